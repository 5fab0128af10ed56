"""What the processes of a training run agree on; alone, a process agrees with itself."""

from __future__ import annotations

import torch
from torch import Tensor, distributed


def world_size() -> int:
    """How many processes train together; 1 without a process group."""
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_world_size()
    return 1


@torch.no_grad()
def mean_across(x: Tensor) -> Tensor:
    """Mean of a tensor over all processes, one ``all_reduce``; without gradient.

    All processes must call it, with the same shape. It waits for no device.

    Args:
        x: any shape, floating; half precision is summed in float32.

    Returns:
        The same shape and dtype, equal in every process. ``x`` is left as it is; alone, its own values come
        back without a copy.
    """
    world = world_size()
    if world == 1:
        return x.detach()
    total = x.detach().to(torch.promote_types(x.dtype, torch.float32), copy=True)
    distributed.all_reduce(total)
    return (total / world).to(x.dtype)

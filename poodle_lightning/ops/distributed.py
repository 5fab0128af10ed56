"""What the processes of a training run agree on; alone, a process agrees with itself."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, distributed
from torch.autograd.function import once_differentiable


def world_size() -> int:
    """How many processes train together; 1 without a process group."""
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_world_size()
    return 1


def rank() -> int:
    """The number of this process, counted from 0; 0 without a process group."""
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank()
    return 0


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


def gather(x: Tensor, dim: int = 0) -> Tensor:
    """The tensors of all processes behind each other along ``dim``, in the order of their ranks.

    Differentiable: what reaches a process' own part is the sum of the gradients that all processes have for
    it, the gradient of the sum of all their losses. ``DistributedDataParallel`` then takes the mean over
    processes, and so gets the gradient of the mean of the losses. All processes must call it with the same
    shape and dtype, and all or none must go backward through it. It waits for no device.

    Args:
        x: any shape of at least one dimension; half precision goes over as it is, its gradient is summed in
            float32.
        dim: along which the processes' tensors are put.

    Returns:
        ``(…, world · n, …)``, the same dtype; alone, ``x`` itself.
    """
    if world_size() == 1:
        return x
    parts: Tensor = _Gather.apply(x)
    dim %= x.ndim
    return parts.movedim(0, dim).flatten(dim, dim + 1)


class _Gather(torch.autograd.Function):
    """``(…)`` to ``(world, …)`` and back; one collective each way, on flat memory, as gloo wants it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        parts = x.new_empty((world_size(), *x.shape))
        distributed.all_gather_into_tensor(parts.view(-1), x.contiguous().view(-1))
        return parts

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        exact = torch.promote_types(gradient.dtype, torch.float32)
        total = gradient.new_empty(gradient.shape[1:], dtype=exact)
        distributed.reduce_scatter_tensor(total.view(-1), gradient.to(exact).contiguous().view(-1))
        return total.to(gradient.dtype)

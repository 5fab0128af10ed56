"""The slowly moving copy of a network (mean teacher, Tarvainen & Valpola, 2017; BYOL's target network)."""

from __future__ import annotations

import copy
from typing import Any, Generic, TypeVar

import torch
from torch import nn

Network = TypeVar("Network", bound=nn.Module)


class EMA(nn.Module, Generic[Network]):
    """A copy whose parameters follow those of the original by an exponential moving average.

    Only parameters follow. Buffers belong to the copy: its BatchNorm layers are in train mode whenever the
    owner is, normalise with the batch and keep running statistics of their own.

    Args:
        module: copied; it stays as it is.

    Attributes:
        module: the copy; none of its parameters requires a gradient.
    """

    module: Network

    def __init__(self, module: Network) -> None:
        super().__init__()
        self.module = copy.deepcopy(module).requires_grad_(False)

    @torch.no_grad()
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the copy returns, without a graph."""
        return self.module(*args, **kwargs)

    @torch.no_grad()
    def update(self, online: nn.Module, momentum: float) -> None:
        """One step ``copy = momentum * copy + (1 - momentum) * online`` over all parameters, in place.

        Args:
            online: a module with the same parameters in the same order.
            momentum: in [0, 1]; 1 leaves the copy where it is.

        Raises:
            ValueError: the two have different numbers of parameters, or the momentum is outside [0, 1].
        """
        if not 0.0 <= momentum <= 1.0:
            raise ValueError(f"EMA momentum must be in [0, 1], not {momentum}")
        pairs = list(zip(self.module.parameters(), online.parameters(), strict=True))
        if pairs:
            mine, theirs = map(list, zip(*pairs, strict=True))
            torch._foreach_lerp_(mine, theirs, 1.0 - momentum)

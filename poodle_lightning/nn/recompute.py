"""Activation checkpointing: what the backward pass needs is computed again instead of being kept."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

_again = 0


def computing_again() -> bool:
    """Whether what runs now is computed for the second time, in a backward pass."""
    return _again > 0


def recomputed(call: Callable[..., Tensor], *inputs: Tensor, of: nn.Module | None = None) -> Tensor:
    """``call(*inputs)``; of what happens inside only the inputs are kept for the backward pass.

    Result, gradients and BatchNorm's running statistics are those of the plain call. Without gradients it is
    the plain call. What is inside must not draw random numbers (no dropout): it would draw others the second
    time.

    Args:
        call: a module, or a function that calls modules.
        inputs: tensors of any shape.
        of: where the modules are that a function calls; by default ``call`` itself.
    """
    if not torch.is_grad_enabled():
        return call(*inputs)
    parts = call if of is None else of

    def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        return nullcontext(), _SecondTime(parts)

    # No generator state is saved: on a GPU that would be a read back per call. A compiler takes the buffers'
    # changes out of what it recomputes, and it knows no contexts of ours.
    extra: dict[str, Any] = {} if torch.compiler.is_compiling() else {"context_fn": contexts}
    result: Tensor = checkpoint(call, *inputs, use_reentrant=False, preserve_rng_state=False, **extra)
    return result


class _SecondTime:
    """BatchNorm layers normalise as before but leave their running statistics and counters alone.

    The statistics stay in place, because autograd counts what it saves and must find the same the second
    time; with momentum 0 they keep their values. Counters count on a copy: SyncBatchNorm insists on one.
    Entered once per backward pass through the same graph, so it keeps nothing between two of them.
    """

    def __init__(self, parts: object) -> None:
        modules = parts.modules() if isinstance(parts, nn.Module) else ()
        self._layers = [part for part in modules if isinstance(part, nn.modules.batchnorm._BatchNorm)]
        self._before: list[tuple[float | None, Tensor | None]] = []

    def __enter__(self) -> None:
        global _again
        _again += 1
        self._before = [(layer.momentum, layer.num_batches_tracked) for layer in self._layers]
        for layer, (_, count) in zip(self._layers, self._before, strict=True):
            layer.momentum, layer.num_batches_tracked = 0.0, None if count is None else count.clone()

    def __exit__(self, *_: object) -> None:
        global _again
        _again -= 1
        for layer, (momentum, count) in zip(self._layers, self._before, strict=True):
            layer.momentum, layer.num_batches_tracked = momentum, count

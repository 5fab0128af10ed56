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


@torch.no_grad()
def exchange(x: Tensor, order: Tensor) -> Tensor:
    """Rows of all processes in a new order, each process with as many as before; without gradient.

    Row i of the new global batch is row ``order[i]`` of the old one, where the processes' rows lie in the
    order of their ranks; ``order.argsort()`` brings them back. One ``all_to_all``: each row goes over once,
    and only where it is wanted (a ``gather`` would send all to all). All processes must call it, with the
    same shape and dtype. It waits for no device: which rows go where is known on the host.

    Args:
        x: ``(n, …)``.
        order: ``(world · n,)`` int64 on the host, a permutation, the same in all processes.

    Returns:
        ``(n, …)``, the same dtype.

    Raises:
        ValueError: ``order`` has another length.
    """
    world, count = world_size(), len(x)
    if order.shape != (world * count,):
        raise ValueError(f"exchange needs an order of {world} x {count} rows, not {tuple(order.shape)}")
    order = order.view(world, count)
    owner, mine = order // max(count, 1), rank()
    sent = order[owner == mine] - mine * count  # those for process 0 first, in its order
    rows = x[sent.to(x.device, non_blocking=True)].contiguous()
    if world == 1:
        return rows
    to_each, from_each = (owner == mine).sum(dim=1), owner[mine].bincount(minlength=world)
    received = torch.empty_like(rows)
    distributed.all_to_all_single(received, rows, from_each.tolist(), to_each.tolist())
    places = owner[mine].argsort(stable=True).argsort()
    return received[places.to(x.device, non_blocking=True)]


def on_first(value: Any) -> list[Any] | None:
    """What every process has, in the order of their ranks, on the first one; None on the others.

    Args:
        value: any object that can be pickled. All processes must call it.
    """
    if world_size() == 1:
        return [value]
    parts: list[Any] | None = [None] * world_size() if rank() == 0 else None
    distributed.gather_object(value, parts)
    return parts

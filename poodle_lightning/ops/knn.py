"""Exact search for the nearest rows, in blocks that fit into a budget of memory.

What is found is a function of the vectors alone: not of the blocks, of how the queries are split, or of the
order in which a matrix product adds. Candidates come from float32 products; they are scored again in float64
and rounded to float32, and equal scores go to the lower place. Where more rows might tie at the border than
there are candidates, the query is compared with all rows in float64.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

BUDGET = 1 << 28
"""Default bytes of working memory."""

# Candidates beyond k: enough that the border is clear unless many rows are as good as equal.
_SLACK = 16
_PLACES = 1 << 32


def nearest(queries: Tensor, memory: Tensor, k: int, budget: int = BUDGET) -> tuple[Tensor, Tensor]:
    """The k rows of a memory with the largest inner product with each query.

    Args:
        queries: ``(Q, D)`` float32; for the cosine, of length 1, as the rows of ``memory``.
        memory: ``(M, D)`` float32, fewer than 2³² rows; may be on another device, and comes in parts.
        k: neighbours per query.
        budget: bytes of working memory beside inputs and result; less means smaller blocks and nothing else.

    Returns:
        products ``(Q, k)`` float32 from large to small, and places in ``memory``, ``(Q, k)`` int64, on the
        queries' device. Equal products come in the order of their places.

    Raises:
        ValueError: the memory has fewer than k rows, or the lengths of the vectors differ.
    """
    if queries.ndim != 2 or memory.ndim != 2 or queries.shape[1] != memory.shape[1]:
        shapes = f"{tuple(queries.shape)} and {tuple(memory.shape)}"
        raise ValueError(f"queries and memory must be (Q, D) and (M, D), not {shapes}")
    if not 1 <= k <= len(memory):
        raise ValueError(f"{k} neighbours wanted of {len(memory)} rows")
    device = queries.device
    if device.type == "mps":  # has no float64
        queries, memory = queries.cpu(), memory.cpu()
    rows, columns = _blocks(len(queries), len(memory), k, budget)
    values = torch.empty(len(queries), k, dtype=torch.float32, device=queries.device)
    places = torch.empty(len(queries), k, dtype=torch.int64, device=queries.device)
    with torch.no_grad(), full_precision(queries.device):
        for start in range(0, len(queries), rows):
            block = slice(start, start + rows)
            found = _nearest(queries[block].float(), memory, k, columns, budget)
            values[block], places[block] = found
    return values.to(device), places.to(device)


def _blocks(queries: int, memory: int, k: int, budget: int) -> tuple[int, int]:
    """Queries and rows of the memory per block: products, and what choosing from them takes (24 bytes)."""
    columns = min(memory, max(4 * (k + _SLACK), 4096))
    rows = max(1, min(queries, 4096, budget // (24 * columns)))
    return rows, min(memory, max(columns, budget // (24 * rows)))


def _nearest(queries: Tensor, memory: Tensor, k: int, columns: int, budget: int) -> tuple[Tensor, Tensor]:
    wanted = min(k + _SLACK, len(memory))
    rough, places, longest = _candidates(queries, memory, wanted, columns)
    if wanted < len(memory):
        # rounding errors of a product add up like a random walk, each half a unit in the last place
        margin = queries.norm(dim=1) * longest * (8 * math.sqrt(queries.shape[1]) * 2.0**-24)
        unclear = (rough[:, k - 1] - rough[:, -1] <= margin).nonzero()[:, 0]
    else:
        unclear = places.new_empty(0)
    keys = torch.empty(len(queries), k, dtype=torch.int64, device=queries.device)
    # blocks that stay in a processor's cache are several times faster
    step = max(1, min(budget, 1 << 24) // (16 * wanted * queries.shape[1]))
    for part in torch.arange(len(queries), device=queries.device).split(step):
        rows = memory[places[part].to(memory.device)].to(queries.device).double()
        exact = (rows * queries[part, None].double()).sum(dim=-1)
        keys[part] = _keys(exact, places[part]).topk(k, dim=1).values
    if len(unclear):
        keys[unclear] = _against_all(queries[unclear], memory, k, columns)
    return _unpack(keys)


def _candidates(queries: Tensor, memory: Tensor, wanted: int, columns: int) -> tuple[Tensor, Tensor, Tensor]:
    """The best by float32 products, ``(q, wanted)``, large to small, and the length of the longest row."""
    values = queries.new_empty(len(queries), 0)
    places = torch.empty(len(queries), 0, dtype=torch.int64, device=queries.device)
    longest = queries.new_zeros(())
    for start in range(0, len(memory), columns):
        rows = memory[start : start + columns].to(queries.device).float()
        longest = torch.maximum(longest, rows.norm(dim=1).max())
        products = queries @ rows.T
        best, at = products.topk(min(wanted, products.shape[1]), dim=1)
        values, places = torch.cat([values, best], dim=1), torch.cat([places, at + start], dim=1)
        values, order = values.topk(min(wanted, values.shape[1]), dim=1)
        places = places.gather(1, order)
    return values, places, longest


def _against_all(queries: Tensor, memory: Tensor, k: int, columns: int) -> Tensor:
    """Keys of the best by float64 products, ``(q, k)``."""
    keys = torch.empty(len(queries), 0, dtype=torch.int64, device=queries.device)
    wide = queries.double()
    for start in range(0, len(memory), columns):
        products = wide @ memory[start : start + columns].to(queries.device).double().T
        places = torch.arange(start, start + products.shape[1], device=queries.device)
        found = _keys(products, places.expand_as(products))
        best = found.topk(min(k, found.shape[1]), dim=1).values
        keys = torch.cat([keys, best], dim=1)
        keys = keys.topk(min(k, keys.shape[1]), dim=1).values
    return keys


def _keys(scores: Tensor, places: Tensor) -> Tensor:
    """One integer per pair: the larger, the better the float32 score, then the lower the place."""
    bits = (scores.float() + 0.0).view(torch.int32).long()  # + 0.0 makes -0 a 0
    # the bits of floats are ordered as sign and magnitude
    ordered = torch.where(bits < 0, -(bits & 0x7FFFFFFF), bits)
    return ordered * _PLACES - places


def _unpack(keys: Tensor) -> tuple[Tensor, Tensor]:
    places = (-keys) % _PLACES
    ordered = (keys + places).div(_PLACES, rounding_mode="floor")
    bits = torch.where(ordered < 0, -ordered - (1 << 31), ordered)
    return bits.int().view(torch.float32), places


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Neither autocast nor TF32: the margin of the candidates is that of float32."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(before)

"""Inner products of interpolated vectors, without the interpolated vectors.

A bilinear look-up u = Σ aᵢ pᵢ reads the four nodes of one cell of a low-resolution map, with four scalar
weights. So the squared length of u is a quadratic form in the inner products of neighbouring nodes, and the
inner product of u with a look-up t = Σ bⱼ zⱼ in another map is Σ aᵢ bⱼ ⟨pᵢ, zⱼ⟩. What is done here once per
node or per pair of nodes costs C operations; what is done per pixel is arithmetic on scalars.

Layout: maps are ``(B, h, w, C)``, channels last, with both sides ≥ 2 (:func:`as_nodes` makes them so);
everything per pixel has the pixels last, ``(4, …)`` for the corners of a cell and ``(4, 4, …)`` for pairs of
corners. Corners are in the order (0, 0), (0, 1), (1, 0), (1, 1) as (row, column).

Gradients are functions of their own: nothing here is meant to be recorded by autograd, except
:func:`as_nodes`.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from poodle_lightning.ops.geometry import Size

# Corner i of a cell lies at (row, column) from its first.
_CORNERS = ((0, 0), (0, 1), (1, 0), (1, 1))
# Second node of a neighbour product, seen from its first: itself, right, below, and the two diagonals.
_STEPS = ((0, 0), (0, 1), (1, 0), (1, 1), (1, -1))


def as_nodes(maps: Tensor) -> Tensor:
    """Maps ``(B, C, h, w)`` as ``(B, h, w, C)`` contiguous; a side of 1 is repeated, so that there are cells.

    Differentiable. Free for a map in ``channels_last`` memory.
    """
    for side in (2, 3):
        if maps.shape[side] == 1:
            maps = torch.cat([maps, maps], dim=side)
    return maps.permute(0, 2, 3, 1).contiguous()


# ---- where points fall
def locate(points: Tensor, size: Size) -> tuple[Tensor, Tensor, Tensor]:
    """The cell of each point, and the point's place in it, clamped at the border.

    The arithmetic is that of ``grid_sample(padding_mode="border", align_corners=False)``, except that the
    last node belongs to the last cell, at fraction 1. A point that is not a number falls on the first node.

    Args:
        points: ``(..., 2)`` as (x, y) in extent coordinates.
        size: height and width of the map as it was given to :func:`as_nodes`; sides of 1 are allowed.

    Returns:
        cell ``(...)`` int64, counted row by row (there are ``(h − 1)·(w − 1)``), and fractions along x and y.
    """
    height, width = size
    x, y = points.unbind(-1)
    column, along_x = _place(x, width)
    row, along_y = _place(y, height)
    return row.long() * max(width - 1, 1) + column.long(), along_x, along_y


def _place(coordinate: Tensor, count: int) -> tuple[Tensor, Tensor]:
    place = ((coordinate + 1) * (count / 2) - 0.5).nan_to_num_(0.0).clamp_(0, count - 1)
    first = place.floor().clamp_(max=max(count - 2, 0))
    return first, place - first


def corner_weights(along_x: Tensor, along_y: Tensor) -> Tensor:
    """Bilinear weights of a cell's corners at points inside it, ``(4, ...)``."""
    rest_x, rest_y = 1 - along_x, 1 - along_y
    return torch.stack([rest_x * rest_y, along_x * rest_y, rest_x * along_y, along_x * along_y])


def corner_nodes(cell: Tensor, width: int) -> Tensor:
    """Flat indices ``(4, ...)`` of the corners of cells in a map of ``width`` nodes."""
    first = cell + cell.div(width - 1, rounding_mode="floor")
    return torch.stack([first + row * width + column for row, column in _CORNERS])


# ---- products of neighbours in one map
def neighbour_products(nodes: Tensor) -> Tensor:
    """Inner products of every node with itself and four neighbours.

    Args:
        nodes: ``(B, h, w, C)``.

    Returns:
        ``(B, 5, h, w)``: with itself, the right, the lower, the lower right and the lower left neighbour; 0
        where there is none.
    """
    batch, height, width, _ = nodes.shape
    products = nodes.new_zeros(batch, len(_STEPS), height, width)
    for kind, step in enumerate(_STEPS):
        here, there = _shifted(step)
        products[:, kind][here] = (nodes[here] * nodes[there]).sum(-1)
    return products


def add_neighbour_gradient(into: Tensor, gradient: Tensor, nodes: Tensor) -> None:
    """Add the gradient of :func:`neighbour_products` to ``into (B, h, w, C)``, in place.

    Args:
        into: what is added to.
        gradient: ``(B, 5, h, w)`` to the products; 0 where there is no neighbour.
        nodes: ``(B, h, w, C)``.
    """
    for kind, step in enumerate(_STEPS):
        here, there = _shifted(step)
        weight = gradient[:, kind][here].unsqueeze(-1)
        into[here].addcmul_(weight, nodes[there])
        into[there].addcmul_(weight, nodes[here])


def _shifted(step: tuple[int, int]) -> tuple[tuple[slice, ...], tuple[slice, ...]]:
    """The part of ``(B, h, w)`` that has a neighbour at ``step``, and those neighbours."""
    down, right = step
    rows = (slice(None, -down or None), slice(down, None))
    columns = (
        slice(max(-right, 0), -right if right > 0 else None),
        slice(max(right, 0), right if right < 0 else None),
    )
    return (slice(None), rows[0], columns[0]), (slice(None), rows[1], columns[1])


def _pairs_of_corners() -> Iterator[tuple[int, int, int, int, int]]:
    """For each pair of corners: their numbers, which neighbour product it is, and where that starts."""
    for i, first in enumerate(_CORNERS):
        for j, second in enumerate(_CORNERS):
            upper, lower = sorted((first, second))
            step = (lower[0] - upper[0], lower[1] - upper[1])
            yield i, j, _STEPS.index(step), upper[0], upper[1]


def cell_products(products: Tensor) -> Tensor:
    """The products of all corners of every cell.

    Args:
        products: ``(B, 5, h, w)`` of :func:`neighbour_products`.

    Returns:
        ``(4, 4, B, cells)``.
    """
    height, width = products.shape[2] - 1, products.shape[3] - 1
    parts = [
        products[:, kind, row : row + height, column : column + width]
        for _, _, kind, row, column in _pairs_of_corners()
    ]
    return torch.stack(parts).unflatten(0, (4, 4)).flatten(3)


def fold_cells(cells: Tensor, size: Size) -> Tensor:
    """The adjoint of :func:`cell_products`: ``(4, 4, B, cells)`` summed into ``(B, 5, h, w)``."""
    height, width = size
    cells = cells.unflatten(3, (height - 1, width - 1))
    products = cells.new_zeros(cells.shape[2], len(_STEPS), height, width)
    for i, j, kind, row, column in _pairs_of_corners():
        products[:, kind, row : row + height - 1, column : column + width - 1].add_(cells[i, j])
    return products


# ---- products of nodes of two maps
def pair_products(x: Tensor, y: Tensor, starts: Tensor, targets: Tensor) -> Tensor:
    """Inner products of some pairs of rows; nothing is gathered.

    Args:
        x: ``(N, C)``.
        y: ``(M, C)``.
        starts: ``(N + 1)`` int64: the pairs of row n are ``starts[n]:starts[n + 1]``.
        targets: ``(K)`` int64, the row of ``y`` in each pair.

    Returns:
        ``(K)``.
    """
    _hear_the_beta_notice()
    pattern = torch.sparse_csr_tensor(
        starts, targets, x.new_zeros(len(targets)), (len(x), len(y)), check_invariants=False
    )
    return torch.sparse.sampled_addmm(pattern, x, y.t(), beta=0.0).values()


@cache
def _hear_the_beta_notice() -> None:
    """PyTorch says once per process that CSR tensors are in beta: users can do nothing with that."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
        torch.sparse_csr_tensor([0, 0], [], [], (1, 1), check_invariants=False)


def weighted_sums(rows: Tensor, weights: Tensor, starts: Tensor, index: Tensor | None = None) -> Tensor:
    """Sums of weighted rows: ``out[n] = Σ_k weights[k] · rows[index[k]]`` over k in starts[n]:starts[n+1].

    A sparse-dense product, taken as an embedding bag: no row is copied, and sums have a fixed order on the
    CPU, so that they repeat bit by bit.

    Args:
        rows: ``(R, C)``.
        weights: ``(K)``.
        starts: ``(N + 1)`` int64, from 0 to K.
        index: ``(K)`` int64; without it, row k is taken with weight k.

    Returns:
        ``(N, C)``.
    """
    index = torch.arange(len(weights), device=rows.device) if index is None else index
    return F.embedding_bag(
        index, rows, starts, mode="sum", per_sample_weights=weights, include_last_offset=True
    )


def starts_of(sorted_index: Tensor, count: int) -> Tensor:
    """Where each of ``count`` values starts in a sorted index, ``(count + 1)`` int64."""
    starts = sorted_index.new_zeros(count + 1)
    torch.cumsum(torch.bincount(sorted_index, minlength=count), 0, out=starts[1:])
    return starts


@contextmanager
def full_float32() -> Iterator[None]:
    """Matrix products on a GPU in IEEE float32, whatever the user has asked for elsewhere.

    Someone who allows TF32 (``torch.set_float32_matmul_precision("high")``) means the network: an inner
    product with ten bits of mantissa would put 1e-3 of error into a loss. The switch is the per-backend one
    that cuBLAS itself reads; the older ``allow_tf32`` refuses to be read once the two disagree. It is only
    touched where TF32 is on, and it is host state, so that no device waits.
    """
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    if before != "tf32":
        yield
        return
    matmul.fp32_precision = "ieee"
    try:
        yield
    finally:
        matmul.fp32_precision = before

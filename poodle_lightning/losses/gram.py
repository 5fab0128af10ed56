"""The dense loss on inner products of nodes: exact, and no tensor has channels times pixels values.

With u = Σ aᵢ pᵢ and t = Σ bⱼ zⱼ the two bilinear look-ups of a pixel,

    ‖û − t̂‖² = 2 − 2 ⟨u, t⟩ / √(⟨u, u⟩ ⟨t, t⟩),   ⟨u, t⟩ = Σᵢⱼ aᵢ bⱼ ⟨pᵢ, zⱼ⟩,

and likewise for ⟨u, u⟩ and ⟨t, t⟩, which need neighbouring nodes of one map only (``ops/dense.py``). A pixel
reads 3 · 16 scalars in place of 2 · 4 vectors. Pixels of the loss grid are many times denser than nodes:
the same pairs of nodes come again and again, and each product is taken once.

Two forms differ in how the products ⟨pᵢ, zⱼ⟩ are found:

* **cells** sorts the pixels by (cell in p, cell in z), one key per pixel, and takes the products of the node
  pairs that occur. Least arithmetic and memory; it asks the data how many there are, for which a GPU would
  have to wait.
* **all pairs** is one matrix product of all nodes with all nodes per image, then look-ups. No sort and
  nothing read back, at N·M·C multiply-adds: the form for a GPU.

Both take the gradient on the way, when every number for it is at hand: what is kept for the backward pass is
one tensor of the map's own size, and the backward pass multiplies it by a scalar per image.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from poodle_lightning.ops.dense import (
    add_neighbour_gradient,
    cell_products,
    corner_nodes,
    corner_weights,
    fold_cells,
    full_float32,
    locate,
    neighbour_products,
    pair_products,
    starts_of,
    weighted_sums,
)
from poodle_lightning.ops.geometry import Size

# Product of two squared lengths below which vectors count as zero.
SHORTEST = 1e-24
# A squared length found by subtraction is trusted down to this many roundings of what was subtracted.
_ROUNDINGS = 8
# Pixels worked at a time in the cells form on a CPU: 16 numbers of each stay in its cache.
_BLOCK = 1 << 14

# A sum per image, and its gradients to p and z where they were asked for.
Worked = tuple[Tensor, Tensor | None, Tensor | None]
# Of p, z, and whether each needs a gradient.
Work = Callable[[Tensor, Tensor, bool, bool], Worked]


def with_gradient(work: Work, p: Tensor, z: Tensor) -> Tensor:
    """The sums of ``work(p, z)``, ``(B,)``, whose gradients it also returns; differentiable once."""
    wanted = torch.is_grad_enabled()
    sums: Tensor = _OnTheWay.apply(p, z, work, (wanted and p.requires_grad, wanted and z.requires_grad))
    return sums


class _OnTheWay(torch.autograd.Function):
    """A function that knows its gradient as soon as it knows its value."""

    @staticmethod
    def forward(ctx: Any, p: Tensor, z: Tensor, work: Work, wanted: tuple[bool, bool]) -> Tensor:
        sums, to_p, to_z = work(p, z, *wanted)
        ctx.save_for_backward(to_p, to_z)
        return sums

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        weight = gradient[:, None, None, None]
        to_p, to_z = (None if saved is None else saved * weight for saved in ctx.saved_tensors)
        return to_p, to_z, None, None


# ---- arithmetic of a pixel
def _distances(
    cross: Tensor, own_p: Tensor, own_z: Tensor, a: Tensor, b: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Distance per pixel, and its derivatives by ⟨u, t⟩, ⟨u, u⟩ and ⟨t, t⟩.

    Args:
        cross: ``(4, 4, ...)`` products of the corners in p with those in z.
        own_p: ``(4, 4, ...)`` products of the corners in p.
        own_z: ``(4, 4, ...)`` products of the corners in z.
        a: ``(4, ...)`` weights of the corners in p.
        b: ``(4, ...)`` weights of the corners in z.
    """
    dot = _form(cross, a, b)
    uu, u_moves = _squared_length(own_p, a)
    tt, t_moves = _squared_length(own_z, b)
    product = uu * tt
    lengths = product.clamp_min(SHORTEST)
    inverse = lengths.rsqrt()
    cosine = dot * inverse
    by_product = cosine / lengths * (product > SHORTEST)
    return 2 - 2 * cosine, -2 * inverse, by_product * tt * u_moves, by_product * uu * t_moves


def _form(matrix: Tensor, left: Tensor, right: Tensor) -> Tensor:
    return ((matrix * right).sum(1) * left).sum(0)


def _squared_length(own: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """⟨u, u⟩, and whether it follows its nodes.

    Between opposite vectors u is short and its square a difference of large numbers. Below the rounding of
    those its digits mean nothing and may be negative: the square is then held, and the cosine stays bounded.
    """
    square = _form(own, weights, weights)
    scale = (own.flatten(0, 1)[::5] * weights).sum(0)
    least = scale * (_ROUNDINGS * torch.finfo(own.dtype).eps)
    return torch.maximum(square, least), square > least


# ---- cells
@dataclass(frozen=True)
class CellPairs:
    """The pixels of one image, sorted by the pair of cells that they read.

    Args:
        cell_p: ``(n)`` cell in p of each pair that occurs.
        cell_z: ``(n)`` cell in z.
        starts: ``(n + 1)`` first pixel of each pair.
        inside: ``(4, P)`` places of the pixels: along x and y in p's cell, along x and y in z's.
        node_starts: ``(N + 1)`` first node pair of each node of p.
        targets: ``(K)`` node of z in each node pair.
        slot: ``(4, 4, n)`` which node pair the corners of each pair of cells are.
    """

    cell_p: Tensor
    cell_z: Tensor
    starts: Tensor
    inside: Tensor
    node_starts: Tensor
    targets: Tensor
    slot: Tensor

    def by_target(self, count: int) -> tuple[Tensor, Tensor, Tensor]:
        """The node pairs in the order of z's ``count`` nodes: starts, nodes of p, and that order."""
        order = self.targets.argsort(stable=True)
        nodes = torch.arange(len(self.node_starts) - 1, device=order.device)
        return (
            starts_of(self.targets[order], count),
            nodes.repeat_interleave(self.node_starts.diff())[order],
            order,
        )


def pair_cells(
    points: tuple[Tensor, Tensor], mask: Tensor, size_p: Size, size_z: Size, per_node: int
) -> CellPairs | None:
    """Sort the pixels of one image by the cells that they read, and find the node pairs that occur.

    Args:
        points: where the pixels fall in p and in z, ``(P, 2)`` each.
        mask: ``(P)`` bool, the pixels that count.
        size_p: height and width of p.
        size_z: height and width of z.
        per_node: more node pairs than this per node of p, or a quarter as many pairs of cells, are too many.

    Returns:
        None where there are too many.
    """
    kept = mask.nonzero().squeeze(1)
    cell_p, *in_p = locate(points[0][kept], size_p)
    cell_z, *in_z = locate(points[1][kept], size_z)
    (rows_p, columns_p), (rows_z, columns_z) = ((max(h, 2), max(w, 2)) for h, w in (size_p, size_z))
    cells_z, nodes_p, nodes_z = (rows_z - 1) * (columns_z - 1), rows_p * columns_p, rows_z * columns_z
    key, order = (cell_p * cells_z + cell_z).sort(stable=True)
    key, counts = torch.unique_consecutive(key, return_counts=True)
    # smooth motion has four node pairs for each pair of cells, torn motion sixteen: seen before they are made
    if 4 * len(key) > per_node * nodes_p:
        return None
    cell_p, cell_z = key // cells_z, key % cells_z
    nodes = corner_nodes(cell_p, columns_p)[:, None] * nodes_z + corner_nodes(cell_z, columns_z)
    pair, slot = torch.unique(nodes, return_inverse=True)
    if len(pair) > per_node * nodes_p:
        return None
    starts = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    inside = torch.stack([*in_p, *in_z]).index_select(1, order)
    return CellPairs(
        cell_p, cell_z, starts, inside, starts_of(pair // nodes_z, nodes_p), pair % nodes_z, slot
    )


def sum_by_cells(pairs: CellPairs, p: Tensor, z: Tensor, to_p: bool, to_z: bool) -> Worked:
    """Sum of the distances of one image's pixels, ``(1,)``, for maps ``(1, h, w, C)``, and its gradients."""
    rows_p, rows_z = p.flatten(0, 2), z.flatten(0, 2)
    products = pair_products(rows_p, rows_z, pairs.node_starts, pairs.targets)
    own_p, own_z = (
        cell_products(neighbour_products(nodes))[:, :, 0, cell]
        for nodes, cell in ((p, pairs.cell_p), (z, pairs.cell_z))
    )
    total, by_cross, by_p, by_z = _sum_blocks(pairs, (products[pairs.slot], own_p, own_z), to_p, to_z)
    # a value that is not finite shows in the loss, as in the other forms, though no pixel may read it
    total = total + 0.0 * (rows_p.sum() + rows_z.sum())
    if not (to_p or to_z):
        return total, None, None
    by_pair = torch.zeros_like(products).index_add_(0, pairs.slot.flatten(), by_cross.t().flatten())
    gradient_p = gradient_z = None
    if to_p:
        gradient_p = weighted_sums(rows_z, by_pair, pairs.node_starts, pairs.targets).view_as(p)
        _add_own_gradient(gradient_p, by_p, pairs.cell_p, p)
    if to_z:
        starts, sources, order = pairs.by_target(len(rows_z))
        gradient_z = weighted_sums(rows_p, by_pair[order], starts, sources).view_as(z)
        _add_own_gradient(gradient_z, by_z, pairs.cell_z, z)
    return total, gradient_p, gradient_z


def _sum_blocks(
    pairs: CellPairs, tables: tuple[Tensor, Tensor, Tensor], to_p: bool, to_z: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The sum of distances, ``(1,)``, and its derivatives by the three tables, ``(n, 16)`` each.

    The tables are the products of :func:`_distances` per pair of cells, ``(4, 4, n)``.
    """
    flat = [table.flatten(0, 1) for table in tables]
    total = flat[0].new_zeros(1)
    by_cross, by_p, by_z = (total.new_zeros(flat[0].shape[1], 16) for _ in flat)
    for some, pixels in _blocks(pairs.starts):
        starts = pairs.starts[some.start : some.stop + 1] - pixels.start
        here = torch.arange(some.start, some.stop, device=starts.device).repeat_interleave(starts.diff())
        x_p, y_p, x_z, y_z = pairs.inside[:, pixels]
        a, b = corner_weights(x_p, y_p), corner_weights(x_z, y_z)
        cross, own_p, own_z = (table.index_select(1, here).unflatten(0, (4, 4)) for table in flat)
        distance, by_dot, by_uu, by_tt = _distances(cross, own_p, own_z, a, b)
        total += distance.sum()
        if to_p or to_z:
            by_cross[some] = _sum_outer(a, b, by_dot, starts)
        if to_p:
            by_p[some] = _sum_outer(a, a, by_uu, starts)
        if to_z:
            by_z[some] = _sum_outer(b, b, by_tt, starts)
    return total, by_cross, by_p, by_z


def _blocks(starts: Tensor) -> Iterator[tuple[slice, slice]]:
    """Whole pairs of cells, some pixels at a time: which pairs, which pixels."""
    pixels = int(starts[-1])
    block = _BLOCK if starts.device.type == "cpu" else max(pixels, 1)
    ends = torch.arange(block, pixels + block, block, device=starts.device)
    cuts = torch.searchsorted(starts, ends).clamp_(max=len(starts) - 1)
    first, first_pixel = 0, 0
    for last, last_pixel in zip(cuts.tolist(), starts[cuts].tolist(), strict=True):
        if last > first:
            yield slice(first, last), slice(first_pixel, last_pixel)
            first, first_pixel = last, last_pixel


def _sum_outer(left: Tensor, right: Tensor, weights: Tensor, starts: Tensor) -> Tensor:
    """Sums of ``weights · left ⊗ right`` over runs of pixels, ``(n, 16)``."""
    outer = (left[:, None] * right).flatten(0, 1)
    return weighted_sums(outer.t().contiguous(), weights, starts)


def _add_own_gradient(into: Tensor, by_own: Tensor, cell: Tensor, nodes: Tensor) -> None:
    """Add the gradient through ⟨u, u⟩ to ``into (B, h, w, C)``.

    Args:
        into: what is added to.
        by_own: ``(n, 16)`` derivatives by the products of the corners of some cells.
        cell: ``(n)`` which cells, counted through the batch.
        nodes: ``(B, h, w, C)``.
    """
    batch, height, width, _ = nodes.shape
    cells = by_own.new_zeros(batch * (height - 1) * (width - 1), 16).index_add_(0, cell, by_own)
    by_neighbour = fold_cells(cells.t().reshape(4, 4, batch, -1), (height, width))
    add_neighbour_gradient(into, by_neighbour, nodes)


# ---- all pairs
@dataclass(frozen=True)
class Places:
    """What every pixel of some images reads, in the flat memory of all of them.

    Args:
        a: ``(4, B, P)`` weights in p.
        b: ``(4, B, P)`` weights in z.
        cell_p: ``(B, P)``.
        cell_z: ``(B, P)``.
        slot: ``(4, 4, B, P)`` into the products of all nodes with all nodes.
        mask: ``(B, P)`` bool, the pixels that count.
    """

    a: Tensor
    b: Tensor
    cell_p: Tensor
    cell_z: Tensor
    slot: Tensor
    mask: Tensor


def place_pixels(points: tuple[Tensor, Tensor], mask: Tensor, size_p: Size, size_z: Size) -> Places:
    """Find what every pixel reads; points in p and in z, ``(B, P, 2)`` each, mask ``(B, P)``."""
    cell_p, *in_p = locate(points[0], size_p)
    cell_z, *in_z = locate(points[1], size_z)
    (rows_p, columns_p), (rows_z, columns_z) = ((max(h, 2), max(w, 2)) for h, w in (size_p, size_z))
    nodes_z = rows_z * columns_z
    image = torch.arange(len(mask), device=mask.device).unsqueeze(1)
    first = (corner_nodes(cell_p, columns_p) + image * (rows_p * columns_p)) * nodes_z
    return Places(
        a=corner_weights(*in_p),
        b=corner_weights(*in_z),
        cell_p=cell_p + image * ((rows_p - 1) * (columns_p - 1)),
        cell_z=cell_z + image * ((rows_z - 1) * (columns_z - 1)),
        slot=first[:, None] + corner_nodes(cell_z, columns_z),
        mask=mask,
    )


def sum_by_all_pairs(places: Places, p: Tensor, z: Tensor, to_p: bool, to_z: bool) -> Worked:
    """Sum of the distances of each image's pixels, ``(B,)``, for maps ``(B, h, w, C)``, and its gradients."""
    a, b, mask = places.a, places.b, places.mask
    rows_p, rows_z = p.flatten(1, 2), z.flatten(1, 2)
    with full_float32():
        products = rows_p @ rows_z.mT
    own_p, own_z = (
        cell_products(neighbour_products(nodes)).flatten(2)[:, :, cell]
        for nodes, cell in ((p, places.cell_p), (z, places.cell_z))
    )
    distance, by_dot, by_uu, by_tt = _distances(products.view(-1)[places.slot], own_p, own_z, a, b)
    total = (distance * mask).sum(1)
    if not (to_p or to_z):
        return total, None, None
    by_pair = products.zero_()  # they have been read: their memory takes their gradient
    by_pair.view(-1).scatter_add_(0, places.slot.view(-1), _outer(a, b, by_dot * mask).view(-1))
    gradient_p = gradient_z = None
    with full_float32():
        if to_p:
            gradient_p = (by_pair @ rows_z).view_as(p)
        if to_z:
            gradient_z = (by_pair.mT @ rows_p).view_as(z)
    if gradient_p is not None:
        by_own = _outer(a, a, by_uu * mask).view(16, -1).t()
        _add_own_gradient(gradient_p, by_own, places.cell_p.view(-1), p)
    if gradient_z is not None:
        by_own = _outer(b, b, by_tt * mask).view(16, -1).t()
        _add_own_gradient(gradient_z, by_own, places.cell_z.view(-1), z)
    return total, gradient_p, gradient_z


def _outer(left: Tensor, right: Tensor, weights: Tensor) -> Tensor:
    return (left * weights)[:, None] * right

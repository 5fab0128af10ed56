"""Regression of unit vectors: BYOL's loss, pooled and dense, and the masked mean of dense losses."""

from __future__ import annotations

from functools import partial
from typing import Literal

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from poodle_lightning.losses.gram import (
    SHORTEST,
    pair_cells,
    place_pixels,
    sum_by_all_pairs,
    sum_by_cells,
    with_gradient,
)
from poodle_lightning.ops.dense import as_nodes
from poodle_lightning.ops.geometry import Affine, Chain, Flow, Size, island, pull, trace_grid

Form = Literal["auto", "cells", "all_pairs", "direct"]

# Above this many values per branch the direct form works in chunks of rows and keeps none of them. Chunks
# that fit a CPU's cache are faster and smaller there; a GPU wants few launches.
CHUNK_VALUES = 1 << 24
CPU_CHUNK_VALUES = 1 << 20
# Up to this many values of an image's pixels the direct form is as fast on a CPU, with a tenth of the
# operations: each of them waits for all threads, which costs where others use the cores too. (Measured: about
# level at 64×64 pixels of 64 channels, 2.5 to 3 times slower than *cells* at twice as many.)
SMALL_VALUES = 1 << 18
# All nodes times all nodes: so many bytes of products at a time, of one image or several, and so many pixels.
# The peak is twice that: their gradient has the same size.
ALL_PAIRS_BYTES = 1 << 30
ALL_PAIRS_PIXELS = 1 << 21
# Smooth motion has 15 node pairs per node. Pure noise at stride 8 comes near 1,024, the most that there can
# be: the pairs then still take a seventh of the direct form's time, for 250 MiB where that has 40 (512×1024).
# Only coarser maps can have more, and for those the vectors are the smaller evil.
PAIRS_PER_NODE = 1024


def cosine_distance(p: Tensor, z: Tensor, dim: int = 1) -> Tensor:
    """``‖p̂ − ẑ‖² = 2 − 2 cos(p, z)`` along ``dim``, in float32 (float64 stays float64), in [0, 4].

    Source: BYOL, Eq. 2 (Grill et al. 2020); PooDLe and FlowE use it densely.
    """
    with island(p.device.type):
        wide = torch.float64 if p.dtype == torch.float64 else torch.float32
        p, z = p.to(wide), z.to(wide)
        # unit vectors are never written down: three sums in place of two normalised copies
        lengths = (p.square().sum(dim) * z.square().sum(dim)).clamp_min(SHORTEST).sqrt()
        return 2.0 - 2.0 * (p * z).sum(dim) / lengths


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean over each image's valid pixels, then over images; an image without any counts 0.

    Args:
        values: ``(B, H, W)``.
        mask: ``(B, H, W)`` bool.

    Returns:
        Scalar; splitting the batch evenly and averaging gives the same.
    """
    return _mean_of_sums((values * mask).flatten(1).sum(1), mask.flatten(1).sum(1))


def warped_distance(
    p: Tensor,
    to_p: Affine | Flow | Chain,
    z: Tensor,
    to_z: Affine | Flow | Chain,
    size: Size,
    visible: Tensor | None = None,
    form: Form = "auto",
) -> Tensor:
    """Dense flow-equivariance loss: two low-resolution maps, each read once on the loss grid.

    ``mean_images [ Σ_x M(x) ‖p̂(to_p(x)) − ẑ(to_z(x))‖² / Σ_x M(x) ]``, M = seen by both maps and visible.
    Sources: FlowE Eq. 3 (Xiong et al. 2021); PooDLe §3 and App. A. There both maps are upsampled to the
    image and then warped; here the look-up is composed, which leaves out one interpolation
    (the difference is measured in ``docs/architecture.md``).

    All forms give the same loss and gradient to rounding, but where neighbouring vectors cancel to nothing:
    there the direction, and with it the gradient, is noise in any form. *direct* writes the vectors of every
    pixel, some rows at a time; *cells* and *all_pairs* never do (``losses/gram.py``). *auto* is *cells* on a
    CPU (*direct* for small images), *all_pairs* on a CUDA device where one image's products fit
    ``ALL_PAIRS_BYTES``, else *direct*; and *direct* where a coordinate map needs a gradient. An image whose
    motion is torn so much that *cells* would take more than ``PAIRS_PER_NODE`` node pairs per node is worked
    in the direct form.

    Args:
        p: ``(B, C, h, w)`` online predictions, any float dtype; compared in float32 (float64 stays float64).
        to_p: from the loss grid to ``p``'s frame.
        z: ``(B, C, h', w')`` target projections.
        to_z: from the loss grid to ``z``'s frame.
        size: height and width of the loss grid.
        visible: optional ``(B, H, W)`` bool on the loss grid, combined by *and*.
        form: how it is computed.

    Returns:
        Scalar.

    Raises:
        ValueError: *cells* or *all_pairs* was asked for, and a coordinate map needs a gradient;
            ``visible`` has another shape.
    """
    if visible is not None and visible.shape != (len(p), *size):
        raise ValueError(f"visible must be {(len(p), *size)}, not {tuple(visible.shape)}")
    # cast once, before anything is cut up: the gradients of the parts then add up in float32
    wide = torch.float64 if torch.float64 in (p.dtype, z.dtype) else torch.float32
    p, z = p.to(wide), z.to(wide)
    moving = torch.is_grad_enabled() and (_needs_gradient(to_p) or _needs_gradient(to_z))
    if form == "auto":
        form = "direct" if moving else _best_form(p, z, size)
    elif form != "direct" and moving:
        raise ValueError(f"form={form!r} gives a coordinate map no gradient: use 'direct' or 'auto'")
    sums = {"cells": _sum_cells, "all_pairs": _sum_all_pairs, "direct": _sum_direct}[form]
    with island(p.device.type):
        return _mean_of_sums(*sums(p, to_p, z, to_z, size, visible))


def _best_form(p: Tensor, z: Tensor, size: Size) -> Literal["cells", "all_pairs", "direct"]:
    if p.device.type == "cpu":
        return "cells" if p.shape[1] * size[0] * size[1] > SMALL_VALUES else "direct"
    products = p[0, 0].numel() * z[0, 0].numel() * p.element_size()
    return "all_pairs" if p.device.type == "cuda" and products <= ALL_PAIRS_BYTES else "direct"


def _needs_gradient(where: Affine | Flow | Chain) -> bool:
    steps = where.steps if isinstance(where, Chain) else (where,)
    return any(
        (step.matrix if isinstance(step, Affine) else step.displacement).requires_grad for step in steps
    )


# ---- each form: sum of distances and count of valid pixels per image, (B,) each
def _sum_cells(
    p: Tensor,
    to_p: Affine | Flow | Chain,
    z: Tensor,
    to_z: Affine | Flow | Chain,
    size: Size,
    visible: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Image by image, so that only one image's pixels are sorted at a time."""
    size_p, size_z = (p.shape[2], p.shape[3]), (z.shape[2], z.shape[3])
    sums, counts = [], []
    for image, (one_p, one_z) in enumerate(zip(p.split(1), z.split(1), strict=True)):
        here = slice(image, image + 1)
        where = (_of_images(to_p, here), _of_images(to_z, here))
        seen = None if visible is None else visible[here]
        points, mask = _trace(where, size, 1, seen, one_p)
        pairs = pair_cells((points[0][0], points[1][0]), mask[0], size_p, size_z, PAIRS_PER_NODE)
        if pairs is None:
            total, count = _sum_direct(one_p, where[0], one_z, where[1], size, seen)
        else:
            total = with_gradient(partial(sum_by_cells, pairs), as_nodes(one_p), as_nodes(one_z))
            count = mask.sum(1)
        sums.append(total)
        counts.append(count)
    return torch.cat(sums), torch.cat(counts)


def _sum_all_pairs(
    p: Tensor,
    to_p: Affine | Flow | Chain,
    z: Tensor,
    to_z: Affine | Flow | Chain,
    size: Size,
    visible: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """As many images at a time as their products and pixels allow: small maps in few launches."""
    size_p, size_z = (p.shape[2], p.shape[3]), (z.shape[2], z.shape[3])
    products = p[0, 0].numel() * z[0, 0].numel() * p.element_size()
    together = max(1, min(ALL_PAIRS_BYTES // products, ALL_PAIRS_PIXELS // (size[0] * size[1])))
    sums, counts = [], []
    for start, some_p, some_z in zip(
        range(0, len(p), together), p.split(together), z.split(together), strict=True
    ):
        here = slice(start, start + together)
        where = (_of_images(to_p, here), _of_images(to_z, here))
        points, mask = _trace(where, size, len(some_p), None if visible is None else visible[here], p)
        places = place_pixels(points, mask, size_p, size_z)
        sums.append(with_gradient(partial(sum_by_all_pairs, places), as_nodes(some_p), as_nodes(some_z)))
        counts.append(mask.sum(1))
    return torch.cat(sums), torch.cat(counts)


def _sum_direct(
    p: Tensor,
    to_p: Affine | Flow | Chain,
    z: Tensor,
    to_z: Affine | Flow | Chain,
    size: Size,
    visible: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """In chunks of rows that are recomputed in the backward pass."""
    height, width = size
    values = CPU_CHUNK_VALUES if p.device.type == "cpu" else CHUNK_VALUES
    rows = max(1, min(height, values // max(1, len(p) * p.shape[1] * width)))
    if rows >= height:
        return _distance_rows(p, to_p, z, to_z, size, visible, slice(0, height))
    total = count = torch.zeros((), device=p.device)
    for start in range(0, height, rows):
        part = slice(start, min(start + rows, height))
        # no random operation inside: saving generator states would only cost a read back from the device
        sums, counts = checkpoint(
            _distance_rows,
            p,
            to_p,
            z,
            to_z,
            size,
            visible,
            part,
            use_reentrant=False,
            preserve_rng_state=False,
        )
        total, count = total + sums, count + counts
    return total, count


def _distance_rows(
    p: Tensor,
    to_p: Affine | Flow | Chain,
    z: Tensor,
    to_z: Affine | Flow | Chain,
    size: Size,
    visible: Tensor | None,
    rows: slice,
) -> tuple[Tensor, Tensor]:
    """For some rows of the grid."""
    read_p, seen_p = pull(p, to_p, size, rows)
    read_z, seen_z = pull(z, to_z, size, rows)
    mask = seen_p & seen_z if visible is None else seen_p & seen_z & visible[:, rows]
    distance = cosine_distance(read_p, read_z)
    return (distance * mask).flatten(1).sum(1), mask.flatten(1).sum(1)


# ---- shared
@torch.no_grad()
def _trace(
    where: tuple[Affine | Flow | Chain, Affine | Flow | Chain],
    size: Size,
    batch: int,
    visible: Tensor | None,
    like: Tensor,
) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """Where the pixels fall in both maps, ``(B, P, 2)`` each, and which of them count, ``(B, P)``."""
    (in_p, seen_p), (in_z, seen_z) = (
        trace_grid(step, size, batch, device=like.device, dtype=like.dtype) for step in where
    )
    mask = seen_p & seen_z if visible is None else seen_p & seen_z & visible
    return (in_p.flatten(1, 2), in_z.flatten(1, 2)), mask.flatten(1)


def _of_images(where: Affine | Flow | Chain, images: slice) -> Affine | Flow | Chain:
    """The maps of some images; a map with one row serves them all."""
    if isinstance(where, Chain):
        return Chain(tuple(step if len(step) == 1 else step[images] for step in where.steps))
    return where if len(where) == 1 else where[images]


def _mean_of_sums(sums: Tensor, counts: Tensor) -> Tensor:
    return (sums / counts.clamp(min=1)).mean()

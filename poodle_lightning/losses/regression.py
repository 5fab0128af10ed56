"""Regression of unit vectors: BYOL's loss, pooled and dense, and the masked mean of dense losses."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from poodle_lightning.ops.geometry import Affine, Chain, Flow, Size, island, pull

# Above this many values per branch the dense loss works in chunks of rows and keeps none of them. Chunks that
# fit a CPU's cache are faster and smaller there (benchmarks/dense_loss.py); a GPU wants few launches.
CHUNK_VALUES = 1 << 24
CPU_CHUNK_VALUES = 1 << 20
# Product of two squared lengths below which vectors count as zero.
_SHORTEST = 1e-24


def cosine_distance(p: Tensor, z: Tensor, dim: int = 1) -> Tensor:
    """``‖p̂ − ẑ‖² = 2 − 2 cos(p, z)`` along ``dim``, in float32 (float64 stays float64), in [0, 4].

    Source: BYOL, Eq. 2 (Grill et al. 2020); PooDLe and FlowE use it densely.
    """
    with island(p.device.type):
        wide = torch.float64 if p.dtype == torch.float64 else torch.float32
        p, z = p.to(wide), z.to(wide)
        # unit vectors are never written down: three sums in place of two normalised copies
        lengths = (p.square().sum(dim) * z.square().sum(dim)).clamp_min(_SHORTEST).sqrt()
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
) -> Tensor:
    """Dense flow-equivariance loss: two low-resolution maps, each read once on the loss grid.

    ``mean_images [ Σ_x M(x) ‖p̂(to_p(x)) − ẑ(to_z(x))‖² / Σ_x M(x) ]``, M = seen by both maps and visible.
    Sources: FlowE Eq. 3 (Xiong et al. 2021); PooDLe §3 and App. A. There both maps are upsampled to the
    image and then warped; here the look-up is composed, which leaves out one interpolation
    (the difference is measured in ``docs/architecture.md``).

    Large grids are worked in chunks of rows that are recomputed in the backward pass, so that no feature
    tensor of the grid's size is kept.

    Args:
        p: ``(B, C, h, w)`` online predictions, any float dtype; compared in float32.
        to_p: from the loss grid to ``p``'s frame.
        z: ``(B, C, h', w')`` target projections.
        to_z: from the loss grid to ``z``'s frame.
        size: height and width of the loss grid.
        visible: optional ``(B, H, W)`` bool on the loss grid, combined by *and*.

    Returns:
        Scalar.
    """
    height, width = size
    values = CPU_CHUNK_VALUES if p.device.type == "cpu" else CHUNK_VALUES
    rows = max(1, min(height, values // max(1, len(p) * p.shape[1] * width)))
    if rows >= height:
        return _mean_of_sums(*_distance_rows(p, to_p, z, to_z, size, visible, slice(0, height)))
    # cast before the chunks: their gradients then add up in float32
    p, z = (x if x.dtype == torch.float64 else x.float() for x in (p, z))
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
    return _mean_of_sums(total, count)


def _distance_rows(
    p: Tensor,
    to_p: Affine | Flow | Chain,
    z: Tensor,
    to_z: Affine | Flow | Chain,
    size: Size,
    visible: Tensor | None,
    rows: slice,
) -> tuple[Tensor, Tensor]:
    """Sum of distances and count of valid pixels per image, ``(B,)`` each, for some rows of the grid."""
    read_p, seen_p = pull(p, to_p, size, rows)
    read_z, seen_z = pull(z, to_z, size, rows)
    mask = seen_p & seen_z if visible is None else seen_p & seen_z & visible[:, rows]
    distance = cosine_distance(read_p, read_z)
    return (distance * mask).flatten(1).sum(1), mask.flatten(1).sum(1)


def _mean_of_sums(sums: Tensor, counts: Tensor) -> Tensor:
    return (sums / counts.clamp(min=1)).mean()

"""PixPro's loss: cells of two views that show the same place agree (Xie et al., CVPR 2021)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize

from poodle_lightning.ops.dense import full_float32
from poodle_lightning.ops.geometry import Affine, Size, island, pixel_grid

# Weights of so many pairs of cells at a time are made numbers of.
BLOCK_PAIRS = 1 << 26


@torch.no_grad()
def positive_pairs(to_clean_a: Affine, to_clean_b: Affine, grid: Size, threshold: float = 0.7) -> Tensor:
    """Which cells of two views lie together: the distance of their centres is below a share of a cell.

    The distance is over the longer of both views' cell diagonals, all measured in the clean image with each
    of its sides counted as one (zdaxie/PixPro ``contrast/models/PixPro.py``, ``regression_loss``): where it
    is twice as wide as high, a pixel to the side counts as half a pixel up.

    Args:
        to_clean_a: from points of the first view to points of the clean image, for B images.
        to_clean_b: the same of the second view; also flipped, rotated or sheared.
        grid: ``(h, w)`` of both views' maps.
        threshold: 0.7 in PixPro.

    Returns:
        ``(B, h·w, h·w)`` bool on the maps' device: cells of a, row by row, and cells of b.
    """
    centres = pixel_grid(grid, to_clean_a.matrix.device, to_clean_a.matrix.dtype)[None]
    a, b = (where(centres).flatten(1, 2) for where in (to_clean_a, to_clean_b))
    sides = to_clean_a.matrix.new_empty(2)
    sides[0], sides[1] = 2.0 / grid[1], 2.0 / grid[0]
    squared = [
        (where.matrix[:, :2, :2] * sides).square().sum(dim=(1, 2)) for where in (to_clean_a, to_clean_b)
    ]
    reach = threshold**2 * torch.maximum(*squared)[:, None, None]
    apart = (a[:, :, None, 0] - b[:, None, :, 0]).square_()
    return apart.add_((a[:, :, None, 1] - b[:, None, :, 1]).square_()) < reach


def consistency(online: Tensor, target: Tensor, positive: Tensor) -> Tensor:
    """``−2 · mean cosine`` of positive pairs: PixPro's loss in one direction; the method adds both.

    The mean is over an image's positive pairs, then over images; an image whose views do not meet counts 0,
    as in the published code. A cell's partners are added up before the product with it, so that no cosine of
    a pair is kept for the backward pass.

    Args:
        online: ``(B, D, h, w)``, after the pixel propagation.
        target: ``(B, D, h, w)`` of the other view, without gradient.
        positive: ``(B, h·w, h·w)`` bool, cells of ``online`` and cells of ``target``; of
            :func:`positive_pairs`, for the other direction its ``mT``.

    Returns:
        Scalar in [−2, 2], float32 (float64 stays float64).
    """
    with island(online.device.type), full_float32():
        exact = torch.promote_types(online.dtype, torch.float32)
        cells = normalize(online.flatten(2).to(exact), dim=1)
        with torch.no_grad():
            partners = _partners(normalize(target.flatten(2).to(exact), dim=1), positive)
            count = positive.flatten(1).sum(dim=1).clamp(min=1)
        return -2.0 * ((cells * partners).flatten(1).sum(dim=1) / count).mean()


def _partners(cells: Tensor, positive: Tensor) -> Tensor:
    """Sums ``(B, D, n)`` of the cells ``(B, D, m)`` that are positive with each of n cells."""
    rows = max(1, BLOCK_PAIRS // max(1, positive[:, 0].numel()))
    blocks = [cells @ block.to(cells.dtype).mT for block in positive.split(rows, dim=1)]
    return torch.cat(blocks, dim=2)

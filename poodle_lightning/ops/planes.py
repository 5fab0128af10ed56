"""YUV 4:2:0 planes of frames: half the bytes of RGB, made into RGB where there is time for it."""

from __future__ import annotations

import torch
from torch import Tensor

from poodle_lightning.ops.geometry import Size, island


def planes_size(shape: tuple[int, ...]) -> Size:
    """Height and width of the pixels behind I420 planes ``(..., H·3/2, W)``.

    Raises:
        ValueError: no even H and W belong to such planes.
    """
    rows, width = shape[-2:]
    if rows % 3 or width % 2 or not rows or not width:
        raise ValueError(f"no even height and width belong to planes of {rows}×{width} bytes")
    return rows // 3 * 2, width


def split_planes(planes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Y ``(..., H, W)``, U and V ``(..., H/2, W/2)``, views of I420 planes ``(..., H·3/2, W)``.

    Raises:
        ValueError: no even H and W belong to such planes.
        RuntimeError: the planes of a frame do not follow each other in memory.
    """
    height, width = planes_size(planes.shape)
    chroma = planes[..., height:, :].view(*planes.shape[:-2], 2, height // 2, width // 2)
    return planes[..., :height, :], chroma[..., 0, :, :], chroma[..., 1, :, :]


def planes_to_rgb(planes: Tensor, matrix: Tensor) -> Tensor:
    """RGB of I420 planes, every pixel with the chroma of its 2x2 block, rounded to whole levels.

    Args:
        planes: ``(B, T, H·3/2, W)`` uint8: H rows of Y, then (H/2)·(W/2) values of U, then of V.
        matrix: ``(B, 3, 4)`` float32, from (Y, U, V, 1) in bytes to RGB in 0…255.

    Returns:
        ``(B, T, 3, H, W)`` float32, whole numbers in 0…255: what an image of bytes would hold.

    Raises:
        ValueError: no even H and W belong to such planes.
    """
    y, u, v = split_planes(planes)
    batch, count, height, width = y.shape
    # products, not a matrix product, which a GPU may take in 10 bits; chroma at its own resolution
    with island(planes.device.type):
        of_y, of_u, of_v, one = matrix.float().reshape(batch, 1, 3, 4, 1, 1).unbind(3)
        chroma = torch.addcmul(one + of_u * u.unsqueeze(2), of_v, v.unsqueeze(2).float())
        blocks = chroma.reshape(batch, count, 3, height // 2, 1, width // 2, 1)
        luma = y.reshape(batch, count, 1, height // 2, 2, width // 2, 2)
        rgb = (luma * of_y[..., None, None]).add_(blocks)
        return rgb.round_().clamp_(0.0, 255.0).reshape(batch, count, 3, height, width)

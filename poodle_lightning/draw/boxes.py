"""Pictures of subcrops: where they were cut, in the same colour on both frames, and what they show."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from poodle_lightning.draw.canvas import colour
from poodle_lightning.ops.geometry import Affine, extent_to_pixels

_CORNERS = ((-1.0, -1.0), (1.0, -1.0), (1.0, 1.0), (-1.0, 1.0))


def corners(boxes: Affine) -> Tensor:
    """Corners of crops in the frame they are cut from, ``(B, 4, 2)`` in extent coordinates."""
    return boxes(boxes.matrix.new_tensor(_CORNERS).expand(len(boxes), 4, 2))


def outline(
    images: Tensor, boxes: Affine, scale: int = 1, thickness: int = 2, only: Tensor | None = None
) -> Tensor:
    """Images with the outlines of their boxes, box k of every image in colour k.

    Args:
        images: ``(B, 3, H, W)`` in [0, 1].
        boxes: B·K rows (row i·K + k), each from a point of the crop to the point of the image shown there.
        scale: the picture is this many times larger than the image.
        thickness: of the line, in pixels of the picture; its middle runs along the box's border.
        only: ``(B·K,)`` bool, the boxes that are drawn; None draws all.

    Returns:
        ``(B, 3, scale·H, scale·W)`` in [0, 1].

    Raises:
        ValueError: the number of boxes is no multiple of the number of images.
    """
    import cv2
    import numpy as np

    if len(boxes) % len(images):
        raise ValueError(f"{len(boxes)} boxes cannot be dealt out over {len(images)} images")
    per_image = len(boxes) // len(images)
    height, width = images.shape[-2] * scale, images.shape[-1] * scale
    points = extent_to_pixels(corners(Affine(boxes.matrix.detach().cpu())), (height, width))
    pixels = (images.detach().float().cpu().clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).numpy()
    drawn = []
    for i, frame in enumerate(pixels):
        canvas = np.ascontiguousarray(frame.repeat(scale, axis=0).repeat(scale, axis=1))
        for k in range(per_image):
            if only is not None and not only[i * per_image + k]:
                continue
            polygon = points[i * per_image + k].round().int().numpy().reshape(-1, 1, 2)
            shade = tuple(round(c * 255) for c in colour(k))
            cv2.polylines(canvas, [polygon], isClosed=True, color=shade, thickness=thickness)
        drawn.append(torch.from_numpy(canvas))
    return torch.stack(drawn).permute(0, 3, 1, 2).float() / 255.0


def frame_crops(crops: Tensor, width: int = 3, numbers: Sequence[int] | None = None) -> Tensor:
    """Crops with a border in their box's colour.

    Args:
        crops: ``(K, 3, h, w)`` in [0, 1].
        width: of the border in pixels, added around the crop.
        numbers: colour numbers; None counts from 0.

    Returns:
        ``(K, 3, h + 2·width, w + 2·width)``.
    """
    count, _, height, breadth = crops.shape
    shades = torch.tensor([colour(k) for k in (range(count) if numbers is None else numbers)])
    framed = shades.reshape(count, 3, 1, 1).repeat(1, 1, height + 2 * width, breadth + 2 * width)
    framed[:, :, width : width + height, width : width + breadth] = crops.detach().float().cpu()
    return framed

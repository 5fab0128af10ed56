"""Pictures of motion: colour wheel, arrows, and what is hidden in the other frame."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from poodle_lightning.draw.canvas import MAGENTA, blend
from poodle_lightning.ops.geometry import pixel_grid


def hsv_to_rgb(hue: Tensor, saturation: Tensor, value: Tensor) -> Tensor:
    """RGB of hue (turns), saturation and value, stacked in a new dimension before the last two."""
    channels = []
    for offset in (5.0, 3.0, 1.0):
        k = (offset + hue * 6.0) % 6.0
        channels.append(value - value * saturation * torch.minimum(k, 4.0 - k).clamp(0.0, 1.0))
    return torch.stack(channels, dim=-3)


def flow_colours(flow: Tensor, longest: float | None = None) -> Tensor:
    """Flow as colours: the hue is the direction, the saturation the length; white stands still.

    Right is red (hue 0), down is hue 1/4, left is cyan (1/2), up is hue 3/4.

    Args:
        flow: ``(B, 2, H, W)`` in pixels.
        longest: length in pixels shown in full colour; None takes the 99th percentile of this flow.

    Returns:
        ``(B, 3, H, W)`` in [0, 1].
    """
    x, y = flow.detach().float().cpu().unbind(1)
    length = torch.hypot(x, y)
    limit = longest_of(flow) if longest is None else longest
    hue = torch.atan2(y, x) / (2.0 * math.pi)
    return hsv_to_rgb(hue % 1.0, (length / max(limit, 1e-6)).clamp(max=1.0), torch.ones_like(length))


def longest_of(flow: Tensor, share: float = 0.99) -> float:
    """The length in pixels that this share of the flow's pixels does not exceed."""
    length = flow.detach().float().cpu().norm(dim=1).flatten()
    return float(length.kthvalue(max(1, math.ceil(share * len(length)))).values)


def wheel(size: int) -> Tensor:
    """The key to ``flow_colours``: a disc ``(4, size, size)`` with alpha, full colour at its border."""
    x, y = pixel_grid((size, size)).unbind(-1)
    radius = torch.hypot(x, y)
    disc = flow_colours(torch.stack([x, y])[None], longest=1.0)[0]
    alpha = ((1.0 - radius) * size / 2.0 + 0.5).clamp(0.0, 1.0)
    return torch.cat([disc, alpha[None]])


def arrows(image: Tensor, flow: Tensor, step: int = 16, scale: int = 4) -> Tensor:
    """A frame with an arrow every few pixels, from a point to where it is in the other frame.

    Args:
        image: ``(3, H, W)`` in [0, 1].
        flow: ``(2, H, W)`` in pixels of the image.
        step: pixels between arrows.
        scale: the picture is this many times larger than the image, so that lines are thin.

    Returns:
        ``(3, scale·H, scale·W)`` in [0, 1].
    """
    import cv2
    import numpy as np

    height, width = image.shape[-2:]
    pixels = (image.detach().float().cpu().clamp(0, 1) * 255).byte().permute(1, 2, 0).contiguous().numpy()
    canvas = cv2.resize(pixels, (width * scale, height * scale), interpolation=cv2.INTER_CUBIC)
    canvas = np.ascontiguousarray(canvas)
    motion = flow.detach().float().cpu()
    for y in range(step // 2, height, step):
        for x in range(step // 2, width, step):
            dx, dy = (float(v) for v in motion[:, y, x])
            if math.hypot(dx, dy) < 0.5:
                continue
            tail = (round((x + 0.5) * scale), round((y + 0.5) * scale))
            head = (round((x + dx + 0.5) * scale), round((y + dy + 0.5) * scale))
            for colour, thickness in (((0, 0, 0), 2), ((255, 255, 255), 1)):
                cv2.arrowedLine(canvas, tail, head, colour, thickness, cv2.LINE_AA, tipLength=0.25)
    return torch.from_numpy(canvas).permute(2, 0, 1).float() / 255.0


def visibility(images: Tensor, visible: Tensor) -> Tensor:
    """Frames with what the other frame does not show laid over in magenta.

    Args:
        images: ``(B, 3, H, W)`` in [0, 1].
        visible: ``(B, H, W)`` bool.
    """
    return blend(images.detach().float().cpu(), MAGENTA, ~visible.cpu())

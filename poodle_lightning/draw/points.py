"""Pictures of points: which ones belong together, and the ways that they took through a video."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import cv2
import numpy as np
import torch
from torch import Tensor

from poodle_lightning.draw.flow import hsv_to_rgb
from poodle_lightning.ops.geometry import Size, extent_to_pixels

_FINE = 4  # bits of a pixel's fraction that OpenCV's drawing takes


def place_colours(places: Tensor) -> Tensor:
    """A colour per place, hue from x and paler to the top: points that belong together share that of one.

    Args:
        places: ``(P, 2)`` in extent coordinates.

    Returns:
        ``(P, 3)`` in [0, 1], on the host; white where a place is lost (NaN).
    """
    known = places.isfinite().all(dim=-1)
    x, y = ((places.detach().cpu().float().nan_to_num() + 1) / 2).clamp(0, 1).unbind(-1)
    shape = (-1, 1, 1)
    colours = hsv_to_rgb(0.85 * x.reshape(shape), (0.45 + 0.55 * y).reshape(shape), torch.ones(len(x), 1, 1))
    return torch.where(known.cpu()[:, None], colours.reshape(len(x), 3), torch.ones(3))


def dots(image: Tensor, places: Tensor, colours: Tensor, radius: float = 3.0) -> Tensor:
    """An image with a dot at each place.

    Args:
        image: ``(3, H, W)`` in [0, 1].
        places: ``(P, 2)`` in extent coordinates; NaN is left out.
        colours: ``(P, 3)`` in [0, 1].
        radius: of the dots, pixels.

    Returns:
        ``(3, H, W)`` in [0, 1], on the host.
    """
    drawn = _canvas(image)
    for (x, y), colour in zip(_fixed(places, drawn.shape[:2]), _tones(colours), strict=True):
        if x is not None:
            cv2.circle(drawn, (x, y), round((radius + 1) * 2**_FINE), (0, 0, 0), -1, cv2.LINE_AA, _FINE)
            cv2.circle(drawn, (x, y), round(radius * 2**_FINE), colour, -1, cv2.LINE_AA, _FINE)
    return _image(drawn)


def trails(image: Tensor, ways: Tensor, colours: Tensor, thickness: int = 1) -> Tensor:
    """An image with the ways that points took.

    Args:
        image: ``(3, H, W)`` in [0, 1].
        ways: ``(P, F, 2)`` in extent coordinates, place by place; where one is NaN, the line is broken.
        colours: ``(P, 3)`` in [0, 1].
        thickness: of the lines, pixels.

    Returns:
        ``(3, H, W)`` in [0, 1], on the host.
    """
    drawn = _canvas(image)
    for way, colour in zip(ways, _tones(colours), strict=True):
        places = _fixed(way, drawn.shape[:2])
        for (x0, y0), (x1, y1) in pairwise(places):
            if x0 is not None and x1 is not None:
                cv2.line(drawn, (x0, y0), (x1, y1), colour, thickness, cv2.LINE_AA, _FINE)
    return _image(drawn)


def _canvas(image: Tensor) -> np.ndarray:
    pixels = (image.detach().float().cpu().clamp(0, 1) * 255).round().to(torch.uint8)
    return np.ascontiguousarray(pixels.permute(1, 2, 0).numpy())


def _image(drawn: np.ndarray) -> Tensor:
    return torch.from_numpy(drawn).permute(2, 0, 1).float() / 255


def _tones(colours: Tensor) -> list[tuple[int, int, int]]:
    return [(r, g, b) for r, g, b in (colours.clamp(0, 1) * 255).round().int().tolist()]


def _fixed(places: Tensor, size: Size | Sequence[int]) -> list[tuple[int, int] | tuple[None, None]]:
    """Places in fixed-point pixels as OpenCV wants them; None where a point is lost."""
    pixels = extent_to_pixels(places.detach().cpu().double(), (size[0], size[1]))
    known = pixels.isfinite().all(dim=-1).tolist()
    fixed = (pixels.nan_to_num() * 2**_FINE).round().long().tolist()
    return [(x, y) if there else (None, None) for (x, y), there in zip(fixed, known, strict=True)]

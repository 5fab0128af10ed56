"""The ground that pictures stand on: tensors to pixels, contact sheets, figures without global state.

Pictures made of image pixels are float tensors ``(3, H, W)`` or ``(B, 3, H, W)`` in [0, 1]; plots are
Matplotlib figures of the object interface (Agg), so that drawing never touches a window system or the state
of ``pyplot``.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's palette for colour-blind readers (2008), black replaced; one colour per subcrop or curve.
PALETTE = (
    (230, 159, 0), (86, 180, 233), (0, 158, 115), (204, 121, 167), (213, 94, 0), (0, 114, 178),
    (240, 228, 66), (153, 153, 153),
)  # fmt: skip
MAGENTA = (1.0, 0.0, 1.0)


@dataclass(frozen=True)
class Theme:
    """Colours of a plot's text, lines and ground (hex)."""

    text: str
    muted: str
    grid: str
    ground: str


LIGHT = Theme(text="#1c2024", muted="#60646c", grid="#e2e4e9", ground="#ffffff")
DARK = Theme(text="#edeef0", muted="#a0a4ab", grid="#33373d", ground="#191b1f")


def colour(number: int) -> tuple[float, float, float]:
    """The colour of a numbered thing, RGB in [0, 1]; repeats after eight."""
    red, green, blue = PALETTE[number % len(PALETTE)]
    return red / 255, green / 255, blue / 255


def enlarge(images: Tensor, factor: int) -> Tensor:
    """Images ``(B, 3, H, W)`` with every pixel repeated ``factor`` times each way."""
    return images.repeat_interleave(factor, dim=-2).repeat_interleave(factor, dim=-1)


def blend(images: Tensor, tint: Sequence[float], where: Tensor, strength: float = 0.6) -> Tensor:
    """Images with a colour laid over some pixels.

    Args:
        images: ``(B, 3, H, W)`` in [0, 1].
        tint: RGB in [0, 1].
        where: ``(B, H, W)`` bool.
        strength: 0 leaves the image, 1 covers it.
    """
    tinted = images.lerp(images.new_tensor(list(tint)).reshape(3, 1, 1).expand_as(images), strength)
    return torch.where(where[:, None], tinted, images)


def sheet(images: Sequence[Tensor], columns: int, gap: int = 4, paper: float | None = None) -> Tensor:
    """A contact sheet, row by row.

    Args:
        images: each ``(3, h, w)`` in [0, 1]; smaller ones are centred in the largest one's cell.
        columns: images per row.
        gap: pixels between cells.
        paper: grey of the gaps in [0, 1]; None leaves them transparent.

    Returns:
        ``(4, H, W)`` with an alpha channel, or ``(3, H, W)`` when there is paper.

    Raises:
        ValueError: no images.
    """
    if not images:
        raise ValueError("a contact sheet needs at least one image")
    height, width = max(i.shape[1] for i in images), max(i.shape[2] for i in images)
    columns = min(columns, len(images))
    rows = -(-len(images) // columns)
    canvas = torch.zeros(4, rows * (height + gap) - gap, columns * (width + gap) - gap)
    for number, image in enumerate(images):
        top = (number // columns) * (height + gap) + (height - image.shape[1]) // 2
        left = (number % columns) * (width + gap) + (width - image.shape[2]) // 2
        cell = canvas[:, top : top + image.shape[1], left : left + image.shape[2]]
        cell[:3], cell[3] = image.float().cpu().clamp(0, 1), 1.0
    if paper is None:
        return canvas
    return canvas[:3] + (1 - canvas[3:]) * paper


def fit(images: Tensor, width: int) -> Tensor:
    """Images enlarged by the largest whole factor that stays within ``width``, or averaged down to it."""
    if images.shape[-1] <= width:
        return enlarge(images, width // images.shape[-1])
    height = max(1, round(images.shape[-2] * width / images.shape[-1]))
    return F.interpolate(images.float(), size=(height, width), mode="area")


def png(image: Tensor) -> bytes:
    """A PNG of ``(3 or 4, H, W)`` in [0, 1]."""
    import cv2

    pixels = (image.detach().float().cpu().clamp(0, 1) * 255).round().to(torch.uint8)
    # OpenCV writes blue first
    swapped = pixels[[2, 1, 0, *range(3, len(pixels))]].permute(1, 2, 0).contiguous().numpy()
    return bytes(cv2.imencode(".png", swapped, [cv2.IMWRITE_PNG_COMPRESSION, 9])[1])


def figure(width: float, height: float, theme: Theme = LIGHT) -> tuple[Figure, Axes]:
    """An empty plot in the theme's colours; width and height in inches."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    made = Figure(figsize=(width, height), layout="constrained", facecolor=theme.ground)
    FigureCanvasAgg(made)
    axes = made.add_subplot(facecolor=theme.ground)
    axes.grid(visible=True, color=theme.grid, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=theme.muted, labelsize=8, length=0)
    for side in axes.spines.values():
        side.set_visible(False)
    return made, axes


def figure_png(drawn: Figure, dpi: int = 144) -> bytes:
    """A PNG of a figure."""
    stream = io.BytesIO()
    drawn.savefig(stream, format="png", dpi=dpi, facecolor=drawn.get_facecolor())
    return stream.getvalue()

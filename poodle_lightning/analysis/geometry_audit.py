"""Geometry audit: the error, in pixels, of everything a config does to coordinates.

Two raw frames are replaced by *coordinate images*: every pixel of frame a holds its own position, and every
pixel of frame b the position in frame a of the point it shows, under a known motion (rotation, zoom and
shift). Both go through the config's own window, affine, flip and flow, and back onto the loss grid, just as
features would. Whatever arrives at a grid point must be the position of that point: the difference is the
error. A linear image is reproduced by bilinear interpolation exactly, so what remains is a mistake in the
maps, or rounding.

Pixels whose four taps reach over a border are left out: ``seen`` is eroded by one pixel at each sampling.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from poodle_lightning.data.windows import Window, WindowRule
from poodle_lightning.ops.geometry import (
    Affine,
    Chain,
    Flow,
    Size,
    WarpOrder,
    island,
    pixel_grid,
    pull,
    warp_into_view,
)
from poodle_lightning.ops.random import fold, key_of, uniform
from poodle_lightning.types import View

TOLERANCE = 0.01


@dataclass(frozen=True)
class Audit:
    """Errors in pixels of the training crop, over all trials.

    Args:
        online: largest error of the un-augmented online view.
        target: largest error of the un-augmented, flow-warped target view.
        mean: mean error of both.
        covered: share of the loss grid that was judged.
        upsampling: largest error of the decoder's ×2 upsampling, in pixels of its output.
    """

    online: float
    target: float
    mean: float
    covered: float
    upsampling: float

    @property
    def passed(self) -> bool:
        """Whether every error is below 0.01 px and something was judged."""
        return max(self.online, self.target, self.upsampling) < TOLERANCE and self.covered > 0


@dataclass(frozen=True)
class Motion:
    """``q = c + s R (p − c) + t`` in raw pixels (edges): where the point p of frame a is in frame b."""

    linear: Tensor
    offset: Tensor

    @classmethod
    def draw(cls, key: Tensor, frame: Size) -> Motion:
        """A turn of up to 3°, a zoom of up to 5 % and a shift of up to 4 % of the frame."""
        angle, zoom, dx, dy = uniform(fold(key, "motion").reshape(1), 4, -1, 1, dtype=torch.float64)[
            0
        ].tolist()
        angle, scale = math.radians(3.0) * angle, 1 + 0.05 * zoom
        turn = [[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]]
        linear = scale * torch.tensor(turn, dtype=torch.float64)
        centre = torch.tensor([frame[1] / 2, frame[0] / 2], dtype=torch.float64)
        shift = 0.04 * torch.tensor([dx * frame[1], dy * frame[0]], dtype=torch.float64)
        return cls(linear, centre - linear @ centre + shift)

    def __call__(self, points: Tensor) -> Tensor:
        """Points ``(..., 2)`` of frame a in frame b."""
        return points @ self.linear.T + self.offset

    def back(self, points: Tensor) -> Tensor:
        """Points ``(..., 2)`` of frame b in frame a."""
        return (points - self.offset) @ torch.linalg.inv(self.linear).T


def audit(
    rule: WindowRule,
    view: Callable[[Tensor, Tensor], View] | None = None,
    frame: Size = (720, 1280),
    trials: int = 8,
    seed: int = 0,
    order: WarpOrder = "paper",
) -> Audit:
    """Put coordinate images through windows, views and flow, and measure what comes back.

    Args:
        rule: how the config draws windows.
        view: how it draws affine and flip; None for none.
        frame: height and width of the raw frames.
        trials: windows, views and motions to draw.
        seed: of all draws.
        order: of warp and affine. The authors' ("code") fails by design.
    """
    online = target = total = judged = cells = 0.0
    with torch.no_grad(), island("cpu"):
        for number in range(trials):
            key = key_of(seed, "geometry audit", number)
            window = rule.draw(frame[1], frame[0], key)
            errors, masks = _trial(window, rule.size, view, Motion.draw(key, frame), key, order)
            worst = [float((e * m).max()) for e, m in zip(errors, masks, strict=True)]
            online, target = max(online, worst[0]), max(target, worst[1])
            total += sum(float((e * m).sum()) for e, m in zip(errors, masks, strict=True))
            judged += sum(float(m.sum()) for m in masks)
            cells += sum(m.numel() for m in masks)
    return Audit(online, target, total / max(judged, 1.0), judged / cells, upsampling_error())


def _trial(
    window: Window,
    size: Size,
    view: Callable[[Tensor, Tensor], View] | None,
    motion: Motion,
    key: Tensor,
    order: WarpOrder,
) -> tuple[list[Tensor], list[Tensor]]:
    """Errors in crop pixels and where they count, for the online and the target side."""
    (fx, fy), (left, top, right, bottom) = window.factor, window.outer
    stored = ((bottom - top) // fy, (right - left) // fx)
    raw_per_stored = torch.tensor([fx, fy], dtype=torch.float64)
    cells = torch.stack(
        torch.meshgrid(*(torch.arange(n).double() + 0.5 for n in stored[::-1]), indexing="xy"), -1
    )
    raw = cells * raw_per_stored + torch.tensor([left, top]).double()  # positions of stored pixels
    middle = torch.tensor([(left + right) / 2, (top + bottom) / 2]).double()  # keeps float32 precise
    there = ((motion(raw) - raw) / raw_per_stored).float().permute(2, 0, 1)[None]

    x0, y0, x1, y1 = window.stored
    box = torch.tensor([[x0 / stored[1], y0 / stored[0], x1 / stored[1], y1 / stored[0]]]) * 2 - 1
    to_stored = Affine.box(box.float())
    flow = Flow.from_pixels(there).through(to_stored, size)

    sides = []
    for label, positions in (("a", raw), ("b", motion.back(raw))):
        image = (positions - middle).float().permute(2, 0, 1)[None]
        clean, _ = pull(image, to_stored, size)
        drawn = View(clean, Affine.identity(1)) if view is None else view(clean, fold(key[None], label))
        sides.append(drawn)

    a, b = sides
    maps: tuple[Affine | Chain, ...] = (a.to_clean.inverse(), warp_into_view(b.to_clean, flow, order))
    inner = torch.tensor([window.inner[0], window.inner[1]]).double()
    side = torch.tensor([window.inner[2] - window.inner[0], window.inner[3] - window.inner[1]]).double()
    expected = inner + (pixel_grid(size, dtype=torch.float64) + 1) / 2 * side - middle
    per_pixel = side / torch.tensor([size[1], size[0]])

    errors, masks = [], []
    for drawn, where in zip(sides, maps, strict=True):
        view_size = (drawn.image.shape[-2], drawn.image.shape[-1])
        inside_clean = _eroded(pull(torch.zeros(1, 1, *size), drawn.to_clean, view_size)[1])
        back, seen = pull(drawn.image, where, size)
        taps, _ = pull(inside_clean[:, None].float(), where, size)
        gap = (back[0].permute(1, 2, 0).double() - expected) / per_pixel
        errors.append(gap.norm(dim=-1))
        masks.append(_eroded(seen)[0] & (taps[0, 0] > 1 - 1e-6))
    return errors, masks


def _eroded(mask: Tensor) -> Tensor:
    """A mask ``(B, H, W)`` without the pixels next to its border; the image's border counts as one."""
    outside = F.pad((~mask).float(), (1, 1, 1, 1), value=1.0)
    return F.max_pool2d(outside[:, None], 3, stride=1)[:, 0] == 0


def upsampling_error(cells: Size = (8, 16)) -> float:
    """Largest error in output pixels, off the border, of upsampling a coordinate map as the decoder does."""
    fine = (cells[0] * 2, cells[1] * 2)
    coarse = pixel_grid(cells).permute(2, 0, 1)[None]
    raised = F.interpolate(coarse, size=fine, mode="bilinear", align_corners=False)[0].permute(1, 2, 0)
    gap = (raised - pixel_grid(fine)) * torch.tensor([fine[1] / 2, fine[0] / 2])
    return float(gap[1:-1, 1:-1].norm(dim=-1).max())

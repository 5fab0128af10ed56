"""Which part of a frame becomes a training crop, and which raw pixels must leave the worker for it.

Pixel coordinates here are *edges*: a frame of W × H covers [0, W] × [0, H] and the centre of its first pixel
is at (0.5, 0.5). A window is drawn with real numbers; resize and crop are one affine map (``Clip.window``),
so nothing is rounded to the pixel grid and nothing is resampled twice.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from statistics import NormalDist

import numpy as np
import torch
from torch import Tensor

from poodle_lightning.data.pixels import Box
from poodle_lightning.ops.geometry import Size
from poodle_lightning.ops.random import fold, uniform
from poodle_lightning.types import UserError

Rect = tuple[float, float, float, float]
# BDD100K crops of the paper: 512 × 1024 out of 1080 × 1920 · U(0.75, 1.25) cover this share of the frame.
PAPER_AREA = (0.162, 0.449)
_TRIES = 10  # of torchvision's RandomResizedCrop


class TooSmall(Exception):
    """The frame, resized as asked, is smaller than the crop."""


@dataclass(frozen=True)
class Window:
    """One crop: the exact window, and the whole pixels that hold it with their margin.

    Args:
        inner: ``(x0, y0, x1, y1)`` of the crop in the frame, pixel edges.
        outer: whole pixels read, ``(x0, y0, x1, y1)``; may reach over the frame's border by the margin.
        factor: stored pixels are means of ``(fx, fy)`` raw pixels; ``(1, 1)`` is raw.
    """

    inner: Rect
    outer: Box
    factor: tuple[int, int] = (1, 1)

    @property
    def stored(self) -> Rect:
        """The crop in the stored pixels: ``(x0, y0, x1, y1)``, edges."""
        (fx, fy), (left, top) = self.factor, self.outer[:2]
        x0, y0, x1, y1 = self.inner
        return (x0 - left) / fx, (y0 - top) / fy, (x1 - left) / fx, (y1 - top) / fy

    def shifted(self, dx: int, dy: int) -> Window:
        """The same window, moved by whole raw pixels."""
        x0, y0, x1, y1 = self.inner
        a, b, c, d = self.outer
        return replace(
            self, inner=(x0 + dx, y0 + dy, x1 + dx, y1 + dy), outer=(a + dx, b + dy, c + dx, d + dy)
        )


@dataclass(frozen=True)
class WindowRule:
    """How windows are drawn: by resizing the frame as a paper does, or by the share of its area.

    Args:
        size: height and width of the training crop, px.
        scale: the frame is thought resized to ``reference · s``, s ~ U(scale), then cropped at random
            (PooDLe: 1080 × 1920 · U(0.75, 1.25) on BDD100K, U(0.535, 0.625) on Walking Tours).
        area: or the window covers this share of the frame, U(area), at the aspect of ``size``; clamped so
            that it always fits. Works for videos of any size; smaller ones are enlarged.
        reference: height and width to which ``scale`` refers; None is each video's own size.
        antialias: store means over ``floor(window / crop)`` raw pixels where a window shrinks, so that the
            bilinear sampling that follows does not alias. The papers' recipes do not.
        aspect: with ``area``: width over height of the window; None is that of ``size``. (PooDLe's study of
            the subcrops' area squeezes square windows to 2:1.)
        area_normal: mean and standard deviation: the share of the frame is normal, truncated to ``area``,
            in place of uniform. (PooDLe's study of the global crop's area, §4.4, Fig. 5; the authors' code
            truncates to [0.05, 0.95].)
        ratio: with ``area``: range of the window's width over height in px, log-uniform. What does not fit
            into the frame is drawn again, ten times at most; after that it is the largest window in the
            middle whose ratio is allowed. That is torchvision's ``RandomResizedCrop`` but for its rounding
            to whole pixels. (DoRA's clips: area [0.2, 1], ratio [3/4, 4/3].)
        whole: the window is the whole frame, whatever its shape.

    Raises:
        UserError: the settings contradict each other, or no crop fits.
    """

    size: Size
    scale: tuple[float, float] | None = None
    area: tuple[float, float] | None = None
    reference: Size | None = (1080, 1920)
    antialias: bool = False
    aspect: float | None = None
    area_normal: tuple[float, float] | None = None
    ratio: tuple[float, float] | None = None
    whole: bool = False

    def __post_init__(self) -> None:
        if min(self.size) < 1:
            raise UserError(f"size {self.size}: give height and width in pixels, at least 1")
        if self.scale is not None and self.area is not None:
            raise UserError("scale and area are two ways to draw a window: give one of them")
        for name, pair in (("scale", self.scale), ("area", self.area), ("ratio", self.ratio)):
            if pair is not None and not 0 < pair[0] <= pair[1]:
                raise UserError(f"{name} {pair}: give two positive numbers, the smaller one first")
        if self.aspect is not None and not self.aspect > 0:
            raise UserError(f"aspect {self.aspect}: width over height of a window is above 0")
        if self.area is not None and self.area[1] > 1:
            raise UserError(f"area {self.area}: a share of the frame is at most 1")
        if self.area_normal is not None and (self.area is None or not self.area_normal[1] > 0):
            raise UserError(
                f"area_normal {self.area_normal}: mean and a standard deviation above 0, truncated to area, "
                "which has to be given"
            )
        if self.ratio is not None and (self.area is None or self.aspect is not None):
            raise UserError(f"ratio {self.ratio}: it goes with area, and aspect would fix what it draws")
        if self.whole and (self.scale, self.area, self.aspect) != (None, None, None):
            raise UserError("whole takes all of the frame: leave out scale, area, aspect and ratio")
        if self.scale is not None and self.reference is not None:
            low = tuple(side * self.scale[0] for side in self.reference)
            if low[0] < self.size[0] or low[1] < self.size[1]:
                raise UserError(
                    f"size {self.size} does not fit into the frame of {low[0]:g} × {low[1]:g} px"
                    f" (reference {self.reference} · scale {self.scale[0]:g}): raise scale or reduce size"
                )

    def draw(self, width: int, height: int, key: Tensor) -> Window:
        """A window in a frame of ``width × height`` px.

        Args:
            width: of the frame.
            height: of the frame.
            key: ``()`` int64; the window is a pure function of it.

        Raises:
            TooSmall: the resized frame is smaller than the crop.
        """
        if self.whole:
            return self._with_margin((0.0, 0.0, float(width), float(height)))
        if self.ratio is not None:
            return self._with_margin(self._of_ratio(width, height, key, self.ratio))
        extent, x, y = uniform(fold(key, "window").reshape(1), 3, dtype=torch.float64)[0].tolist()
        w, h = self._window_size(width, height, extent)
        x0, y0 = x * (width - w), y * (height - h)
        return self._with_margin((x0, y0, x0 + w, y0 + h))

    def shift(self, window: Window, width: int, height: int, jitter: float, key: Tensor) -> tuple[int, int]:
        """How far the second window of a pair without a gap lies from the first, whole raw pixels.

        Uniform within ``± jitter`` of the window's size, as far as the frame allows; a multiple of
        ``window.factor``, so that the stored pixels move by whole pixels too.
        """
        draws = uniform(fold(key, "second window").reshape(1), 2, dtype=torch.float64)[0].tolist()
        moved = []
        for axis, (side, draw) in enumerate(zip((width, height), draws, strict=True)):
            low, high, step = window.inner[axis], window.inner[axis + 2], window.factor[axis]
            reach = jitter * (high - low)
            first = math.ceil(max(-reach, -low) / step)
            last = math.floor(min(reach, side - high) / step)
            moved.append(step * (first + min(int(draw * (last - first + 1)), last - first)))
        return moved[0], moved[1]

    def _window_size(self, width: int, height: int, draw: float) -> tuple[float, float]:
        if self.scale is None:
            aspect = self.size[1] / self.size[0] if self.aspect is None else self.aspect
            h = math.sqrt(self._share(draw) * width * height / aspect)
            w = h * aspect
            fit = min(1.0, width / w, height / h)
            return min(w * fit, width), min(h * fit, height)
        resized_by = self.scale[0] + (self.scale[1] - self.scale[0]) * draw
        rows, columns = (height, width) if self.reference is None else self.reference
        w = self.size[1] * width / (columns * resized_by)
        h = self.size[0] * height / (rows * resized_by)
        if w > width or h > height:
            frame = f"{width}×{height} px times {resized_by:.3g}"
            raise TooSmall(f"{frame} is smaller than the crop of {self.size[1]}×{self.size[0]} px; use area")
        return w, h

    def _of_ratio(self, width: int, height: int, key: Tensor, ratio: tuple[float, float]) -> Rect:
        draws = uniform(fold(key, "window").reshape(1), 2 + 2 * _TRIES, dtype=torch.float64)[0].tolist()
        low, high = math.log(ratio[0]), math.log(ratio[1])
        x, y = draws[:2]
        for share, tilt in zip(draws[2::2], draws[3::2], strict=True):
            area, aspect = self._share(share) * width * height, math.exp(low + (high - low) * tilt)
            w, h = math.sqrt(area * aspect), math.sqrt(area / aspect)
            if w <= width and h <= height:
                break
        else:
            aspect = min(max(width / height, ratio[0]), ratio[1])
            w, h, x, y = min(width, height * aspect), min(height, width / aspect), 0.5, 0.5
        x0, y0 = x * (width - w), y * (height - h)
        return x0, y0, x0 + w, y0 + h

    def _share(self, draw: float) -> float:
        """The share of the frame at a uniform draw, by the inverse of its distribution."""
        low, high = PAPER_AREA if self.area is None else self.area
        if self.area_normal is None:
            return low + (high - low) * draw
        law = NormalDist(*self.area_normal)
        below, above = law.cdf(low), law.cdf(high)
        # a quantile of exactly 0 or 1 does not exist; rounding may also step over the ends
        quantile = min(max(below + (above - below) * draw, 1e-12), 1 - 1e-12)
        return min(max(law.inv_cdf(quantile), low), high)

    def _with_margin(self, inner: Rect) -> Window:
        factors, outer = [], [0, 0, 0, 0]
        for axis, crop in enumerate((self.size[1], self.size[0])):
            low, high = inner[axis], inner[axis + 2]
            factor = max(1, int((high - low) / crop + 1e-9)) if self.antialias else 1
            outer[axis] = math.floor(low) - factor
            outer[axis + 2] = outer[axis] + factor * math.ceil((high - outer[axis]) / factor + 1)
            factors.append(factor)
        return Window(inner, (outer[0], outer[1], outer[2], outer[3]), (factors[0], factors[1]))


def inside_frame(outer: Box, width: int, height: int) -> tuple[Box, tuple[int, int, int, int]]:
    """The part of a box that exists, and how far it reaches over the left, top, right, bottom border."""
    x0, y0, x1, y1 = outer
    box = max(x0, 0), max(y0, 0), min(x1, width), min(y1, height)
    return box, (box[0] - x0, box[1] - y0, x1 - box[2], y1 - box[3])


def extend(pixels: np.ndarray, over: tuple[int, int, int, int]) -> np.ndarray:
    """Repeat border pixels of ``(T, h, w, ...)`` outwards: what clamping at the frame's border would read."""
    if not any(over):
        return pixels
    left, top, right, bottom = over
    return np.pad(pixels, [(0, 0), (top, bottom), (left, right)] + [(0, 0)] * (pixels.ndim - 3), mode="edge")


def reduced(pixels: np.ndarray, factor: tuple[int, int]) -> np.ndarray:
    """Means over blocks of ``(fx, fy)`` pixels of ``(T, h, w, 3)`` uint8, whose sides they divide."""
    if factor == (1, 1):
        return pixels
    import cv2

    size = pixels.shape[2] // factor[0], pixels.shape[1] // factor[1]
    return np.stack([cv2.resize(frame, size, interpolation=cv2.INTER_AREA) for frame in pixels])

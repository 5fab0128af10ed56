"""What a detector is shown of an image, with its boxes and masks; runs in the loader's workers.

A view is a resize, a crop or padding at the right and bottom, and perhaps a mirror image: three numbers per
axis. Boxes are in pixels, from 0 at the outer edge of the first pixel; everything random is drawn from the
item's key.
"""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np
from torch import Tensor

from poodle_lightning.data.label_files import Array
from poodle_lightning.data.label_views import PADDING, limited, resized
from poodle_lightning.ops.geometry import Size
from poodle_lightning.ops.random import bernoulli, fold, randint, uniform
from poodle_lightning.types import UserError

_DETECTRON2 = (640, 672, 704, 736, 768, 800)


@dataclass(frozen=True)
class Placed:
    """Where an image lies in its view.

    Args:
        size: height and width to which the image is brought.
        view: height and width of the view.
        top: rows of the resized image above the view.
        left: columns of the resized image left of the view.
        mirrored: the view is mirrored.
    """

    size: Size
    view: Size
    top: int = 0
    left: int = 0
    mirrored: bool = False

    def image(self, image: Array) -> Array:
        """The view of an image ``(H, W, 3)`` uint8; what lies outside has ImageNet's mean colour."""
        shown = self._cut(resized(image, None, self.size)[0])
        down, right = (want - have for want, have in zip(self.view, shown.shape[:2], strict=True))
        if down or right:
            shown = cv2.copyMakeBorder(
                np.ascontiguousarray(shown), 0, down, 0, right, cv2.BORDER_CONSTANT, value=PADDING
            )
        return shown[:, ::-1] if self.mirrored else shown

    def mask(self, mask: Array) -> Array:
        """The view of a mask ``(H, W)`` uint8; outside it is 0."""
        shown = cv2.resize(mask, (self.size[1], self.size[0]), interpolation=cv2.INTER_NEAREST_EXACT)
        shown = self._cut(shown)
        down, right = (want - have for want, have in zip(self.view, shown.shape, strict=True))
        shown = np.pad(shown, ((0, down), (0, right)))
        return shown[:, ::-1] if self.mirrored else shown

    def boxes(self, boxes: Array, size: Size) -> Array:
        """Boxes ``(k, 4)`` (left, top, right, bottom) of an image of ``size``, cut to the view."""
        height, width = self.view
        scale = np.array([self.size[1] / size[1], self.size[0] / size[0]] * 2)
        moved = boxes * scale - np.array([self.left, self.top] * 2)
        if self.mirrored:
            moved = np.stack([width - moved[:, 2], moved[:, 1], width - moved[:, 0], moved[:, 3]], axis=1)
        return np.clip(moved, 0, np.array([width, height] * 2))

    def _cut(self, shown: Array) -> Array:
        return shown[self.top : self.top + self.view[0], self.left : self.left + self.view[1]]


@dataclass(frozen=True)
class DetectionTrainView:
    """A random view for training; the defaults are detectron2's ``Base-RCNN-FPN``.

    Args:
        short_sides: the short side is one of these.
        long_side: the long side is at most this.
        size: height and width of the view instead: the image is scaled so that it just fits inside, times a
            random factor, then cut or padded to this (VITO: 800, 1024).
        jitter: range of that factor (VITO: 0.8 to 1.25), uniform.
        flip: probability of a mirror image.

    Raises:
        UserError: numbers out of range.
    """

    short_sides: tuple[int, ...] = _DETECTRON2
    long_side: int = 1333
    size: tuple[int, int] | None = None
    jitter: tuple[float, float] = (0.8, 1.25)
    flip: float = 0.5

    def __post_init__(self) -> None:
        if not self.short_sides or min(*self.short_sides, self.long_side, *(self.size or (1,))) < 1:
            raise UserError("detection view: short_sides, long_side and size must be 1 px or more")
        if not 0 < self.jitter[0] <= self.jitter[1] or not 0 <= self.flip <= 1:
            raise UserError("detection view: jitter goes from a smaller to a larger number, flip is a share")

    def place(self, size: Size, key: Tensor) -> Placed:
        """Where an image of ``size`` lies, from the key ``()`` of the item."""
        key = key.reshape(1)
        mirrored = bool(bernoulli(fold(key, "flip"), self.flip)[0, 0])
        if self.size is None:
            short = self.short_sides[int(randint(fold(key, "resize"), len(self.short_sides)))]
            shown = limited(size, int(short), self.long_side)
            return Placed(shown, shown, mirrored=mirrored)
        view = (int(self.size[0]), int(self.size[1]))
        factor = float(uniform(fold(key, "resize"), 1, *map(float, self.jitter)))
        shown = _fitted(size, view, factor)
        places = uniform(fold(key, "crop"), 2)[0].tolist()
        spare = [max(0, have - want) for have, want in zip(shown, view, strict=True)]
        top, left = (min(int(p * (room + 1)), room) for p, room in zip(places, spare, strict=True))
        return Placed(shown, view, top, left, mirrored)


@dataclass(frozen=True)
class DetectionTestView:
    """The whole image for a test; the defaults are detectron2's.

    Args:
        short_side: the short side becomes this, px.
        long_side: the long side is at most this.
        size: height and width instead, in which the image just fits, padded at the right and bottom.

    Raises:
        UserError: numbers out of range.
    """

    short_side: int = 800
    long_side: int = 1333
    size: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        if min(self.short_side, self.long_side, *(self.size or (1,))) < 1:
            raise UserError("detection view: short_side, long_side and size must be 1 px or more")

    def place(self, size: Size) -> Placed:
        """Where an image of ``size`` lies."""
        if self.size is None:
            shown = limited(size, self.short_side, self.long_side)
            return Placed(shown, shown)
        view = (int(self.size[0]), int(self.size[1]))
        return Placed(_fitted(size, view, 1.0), view)


def _fitted(size: Size, view: Size, factor: float) -> Size:
    """A size in its own aspect that just fits into ``view``, times a factor."""
    scale = factor * min(want / have for want, have in zip(view, size, strict=True))
    return max(1, int(size[0] * scale + 0.5)), max(1, int(size[1] * scale + 0.5))

"""What a network is shown of a labelled image, in training and in a test; runs in the loader's workers.

Images are resized with OpenCV's bilinear filter, as MMSegmentation does, masks with its exact nearest
neighbour. (MMSegmentation takes the plain one, which reads up to half a pixel beside the bilinear filter.)
Everything random is drawn from the item's key.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
from torch import Tensor

from poodle_lightning.data.label_files import Array
from poodle_lightning.ops.geometry import Size
from poodle_lightning.ops.random import bernoulli, fold, randint, uniform
from poodle_lightning.types import IGNORE, UserError

# ImageNet's mean colour in bytes: 0 after normalisation, up to rounding (MMSegmentation pads after it).
PADDING = (124, 116, 104)
_TRIES = 10


@dataclass(frozen=True)
class TrainView:
    """A random view for training: resize, crop, flip, colours, and padding where the image is too small.

    At most one of ``short_side``, ``short_sides`` and ``scale`` says how the image is resized, always in its
    own aspect; without any it keeps its size.

    Args:
        crop: height and width of what the network sees, px; None is the whole image (one size for a batch).
        short_side: the short side is drawn uniformly from these two, both included (FlowE on BDD100K and
            hence PooDLe: 512, 2048).
        short_sides: it is one of these (detectron2's ``MIN_SIZE_TRAIN`` with ``choice``).
        scale: long and short side that the image fits into at ratio 1 (MMSegmentation: 2048, 512).
        ratio: the range of the ratio that ``scale`` is multiplied by.
        long_side: the long side is at most this, with ``short_side`` or ``short_sides`` (detectron2: 1333).
        cat_max_ratio: a crop in which one class has this share of the labelled pixels or more is drawn
            again, up to 10 times (MMSegmentation: 0.75); 1 takes the first.
        flip: probability of a mirror image.
        distort: MMSegmentation's ``PhotoMetricDistortion``: brightness ±32, contrast and saturation 0.5 to
            1.5, hue ±18 of 180, each with probability 1/2, contrast before or after the colours.

    Raises:
        UserError: the settings contradict each other.
    """

    crop: tuple[int, int] | None = (512, 1024)
    short_side: tuple[int, int] | None = None
    short_sides: tuple[int, ...] | None = None
    scale: tuple[int, int] | None = None
    ratio: tuple[float, float] = (0.5, 2.0)
    long_side: int | None = None
    cat_max_ratio: float = 1.0
    flip: float = 0.5
    distort: bool = False

    def __post_init__(self) -> None:
        given = [name for name in ("short_side", "short_sides", "scale") if getattr(self, name) is not None]
        if len(given) > 1:
            raise UserError(f"train view: give one of {' and '.join(given)}")
        if self.long_side is not None and given not in (["short_side"], ["short_sides"]):
            raise UserError("train view: long_side limits short_side or short_sides; give one of them")
        long = None if self.long_side is None else (self.long_side,)
        _positive("train view", self.crop, self.short_side, self.short_sides, self.scale, long)
        for name, ends in (("short_side", self.short_side), ("ratio", self.ratio)):
            if ends is not None and not 0 < ends[0] <= ends[1]:
                raise UserError(f"train view: {name} {tuple(ends)} must go from a smaller to a larger number")
        if not 0 < self.cat_max_ratio <= 1 or not 0 <= self.flip <= 1:
            raise UserError("train view: cat_max_ratio and flip are shares, from 0 to 1")

    def __call__(self, image: Array, labels: Array, key: Tensor) -> tuple[Array, Array]:
        """A view of an image.

        Args:
            image: ``(H, W, 3)`` uint8 RGB.
            labels: ``(H, W)`` uint8.
            key: ``()`` of the item.

        Returns:
            image and labels of the crop's size.
        """
        key = key.reshape(1)
        size = self.size((image.shape[0], image.shape[1]), fold(key, "resize"))
        image, labels = resized(image, labels, size)
        if self.crop is not None:
            box = self._box(labels, fold(key, "crop"))
            image, labels = image[box], labels[box]
        if bool(bernoulli(fold(key, "flip"), self.flip)[0, 0]):
            image, labels = image[:, ::-1], labels[:, ::-1]
        if self.distort:
            image = distorted(np.ascontiguousarray(image), fold(key, "distort"))
        return (image, labels) if self.crop is None else padded(image, labels, self.crop)

    def size(self, size: Size, key: Tensor) -> Size:
        """The size to which an image of ``size`` is brought."""
        if self.short_side is not None:
            low, high = self.short_side
            return limited(size, int(low) + int(randint(key, int(high) - int(low) + 1)), self.long_side)
        if self.short_sides is not None:
            chosen = self.short_sides[int(randint(key, len(self.short_sides)))]
            return limited(size, int(chosen), self.long_side)
        if self.scale is not None:
            ratio = float(uniform(key, 1, *map(float, self.ratio)))
            return limited(size, int(min(self.scale) * ratio), int(max(self.scale) * ratio))
        return size

    def _box(self, labels: Array, key: Tensor) -> tuple[slice, slice]:
        """The crop inside an image; smaller where the image is."""
        assert self.crop is not None
        spare = [max(0, have - want) for have, want in zip(labels.shape, self.crop, strict=True)]
        places = uniform(key, 2 * (_TRIES + 1)).reshape(-1, 2)
        for place in places:
            top, left = (
                min(int(p * (room + 1)), room) for p, room in zip(place.tolist(), spare, strict=True)
            )
            box = slice(top, top + self.crop[0]), slice(left, left + self.crop[1])
            if self.cat_max_ratio >= 1 or self._mixed(labels[box]):
                break
        return box

    def _mixed(self, labels: Array) -> bool:
        counts = np.bincount(labels.ravel(), minlength=IGNORE + 1)[:IGNORE]
        return bool(np.count_nonzero(counts) > 1 and counts.max() < self.cat_max_ratio * counts.sum())


@dataclass(frozen=True)
class TestView:
    """The whole image for a test; its labels stay as they are in their file.

    Args:
        short_side: the short side of the image becomes this, px; None keeps its size.
        long_side: the long side is at most this (detectron2: 800 and 1333; MMSegmentation's (2048, 512) is
            ``short_side`` 512 and ``long_side`` 2048).
        size: or height and width of the image, whatever its aspect.

    Raises:
        UserError: the settings contradict each other.
    """

    __test__ = False  # no test of pytest's

    short_side: int | None = None
    long_side: int | None = None
    size: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        if self.size is not None and self.short_side is not None:
            raise UserError("test view: give short_side or size")
        if self.long_side is not None and self.short_side is None:
            raise UserError("test view: long_side limits short_side; give it too")
        sides = [(side,) for side in (self.short_side, self.long_side) if side is not None]
        _positive("test view", self.size, *sides)

    def __call__(self, image: Array) -> Array:
        """The image ``(h, w, 3)`` uint8 as the network sees it."""
        size: Size = (image.shape[0], image.shape[1])
        if self.size is not None:
            size = (int(self.size[0]), int(self.size[1]))
        elif self.short_side is not None:
            size = limited(size, self.short_side, self.long_side)
        return resized(image, None, size)[0]


def _positive(view: str, *sizes: Sequence[int] | None) -> None:
    if any(number < 1 for some in sizes if some is not None for number in some):
        raise UserError(f"{view}: sizes must be 1 px or more")


def limited(size: Size, short: int, long: int | None = None) -> Size:
    """A size in the same aspect: the short side as given, unless the long one would be too long."""
    factor = short / min(size)
    if long is not None:
        factor = min(factor, long / max(size))
    return max(1, int(size[0] * factor + 0.5)), max(1, int(size[1] * factor + 0.5))


def resized(image: Array, labels: Array | None, size: Size, area: bool = False) -> tuple[Array, Array]:
    """Image and labels at another size; labels are never mixed.

    Args:
        image: ``(H, W, 3)`` uint8.
        labels: ``(H, W)`` uint8 of the same size, or None.
        size: height and width, px.
        area: average the pixels where the image shrinks, instead of the bilinear filter.

    Returns:
        the image, and the labels (empty without labels).
    """
    if labels is None:
        labels = np.empty((0, 0), np.uint8)
    if image.shape[:2] == tuple(size):
        return image, labels
    shrinks = image.shape[0] * image.shape[1] > size[0] * size[1]
    how = cv2.INTER_AREA if area and shrinks else cv2.INTER_LINEAR
    made = cv2.resize(image, (size[1], size[0]), interpolation=how)
    if labels.size:
        labels = cv2.resize(labels, (size[1], size[0]), interpolation=cv2.INTER_NEAREST_EXACT)
    return made, labels


def padded(image: Array, labels: Array, size: Size) -> tuple[Array, Array]:
    """Padded at the right and bottom: the image with ``PADDING``, the labels with 255."""
    height, width = (max(0, want - have) for want, have in zip(size, labels.shape, strict=True))
    if not (height or width):
        return image, labels
    image = cv2.copyMakeBorder(
        np.ascontiguousarray(image), 0, height, 0, width, cv2.BORDER_CONSTANT, value=PADDING
    )
    return image, np.pad(labels, ((0, height), (0, width)), constant_values=IGNORE)


def covering(image: Array, labels: Array, size: Size) -> tuple[Array, Array]:
    """Resized so that it just covers ``size``, then its centre; shrinking averages the image's pixels."""
    factor = max(want / have for want, have in zip(size, labels.shape, strict=True))
    whole = tuple(max(want, round(have * factor)) for want, have in zip(size, labels.shape, strict=True))
    image, labels = resized(image, labels, (whole[0], whole[1]), area=True)
    top, left = ((have - want) // 2 for have, want in zip(whole, size, strict=True))
    box = slice(top, top + size[0]), slice(left, left + size[1])
    return image[box], labels[box]


def distorted(image: Array, key: Tensor) -> Array:
    """MMSegmentation's ``PhotoMetricDistortion`` on bytes (``datasets/transforms/transforms.py``).

    Args:
        image: ``(H, W, 3)`` uint8 RGB.
        key: ``(1,)``.
    """
    brighter, contrasted, saturated, turned, first = bernoulli(fold(key, "which"), 0.5, 5)[0].tolist()
    draws: Sequence[float] = uniform(fold(key, "how"), 3)[0].tolist()
    contrast, saturation = 0.5 + draws[1], 0.5 + draws[2]
    if brighter:
        image = _linear(image, 1.0, 64.0 * draws[0] - 32.0)
    if contrasted and first:
        image = _linear(image, contrast, 0.0)
    if saturated:
        hsv = cv2.cvtColor(image, cv2.COLOR_RGB2HSV)
        hsv[..., 1] = _linear(hsv[..., 1], saturation, 0.0)
        image = cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)
    if turned:
        hsv = cv2.cvtColor(image, cv2.COLOR_RGB2HSV)
        # −18 to 17, as NumPy's randint(-18, 18) draws
        hsv[..., 0] = (hsv[..., 0].astype(np.int16) + int(randint(fold(key, "hue"), 36)) - 18) % 180
        image = cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)
    if contrasted and not first:
        image = _linear(image, contrast, 0.0)
    return image


def _linear(image: Array, factor: float, shift: float) -> Array:
    """``factor · image + shift`` in float32, cut to bytes (towards 0, as a cast does)."""
    return np.clip(image.astype(np.float32) * factor + shift, 0, 255).astype(np.uint8)

"""One image and its mask from disk: what the mask's values mean, and what is refused.

Nothing is guessed: a file that does not say what it should is a ``UserError`` that names it. An image is
never dropped, because a score over other images is another score.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from poodle_lightning.types import IGNORE, UserError

Array: TypeAlias = npt.NDArray[Any]
Kind = Literal["ids", "palette", "colours"]
IMAGES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".ppm")
MASKS = (".png", ".bmp", ".tif", ".tiff", ".pgm", ".gif")
_ORIENTATION = 0x0112  # EXIF tag
_LARGEST_ID = 65_535
# What PIL raises for damaged files.
_DAMAGED = (OSError, SyntaxError, ValueError, EOFError, LookupError, struct.error, zlib.error)


@dataclass(frozen=True)
class Codes:
    """What the values in a mask mean.

    Args:
        kind: ``ids``: one channel of numbers. ``palette``: the same, or the indices of a palette image (never
            its colours). ``colours``: RGB, or the colours of a palette image.
        labels: value → label, 255 = ignore. A colour's value is ``r · 65536 + g · 256 + b``. A value that is
            not here is refused.
        meaning: of the values, for messages, e.g. ``"labels 0 to 18, 255 is ignored"``.
    """

    kind: Kind
    labels: Mapping[int, int]
    meaning: str

    @staticmethod
    def plain(classes: int, ignore: Iterable[int] = (IGNORE,), kind: Kind = "ids") -> Codes:
        """Values that are labels already, and those that are ignored."""
        ignored = sorted(ignore)
        said = " and ".join(map(str, ignored))
        meaning = f"labels 0 to {classes - 1}" + (f", {said} ignored" if ignored else ", none ignored")
        return Codes(kind, dict.fromkeys(ignored, IGNORE) | {i: i for i in range(classes)}, meaning)


def colour_value(colour: Iterable[int]) -> int:
    """The value of an RGB colour."""
    red, green, blue = colour
    return (int(red) << 16) | (int(green) << 8) | int(blue)


def read_pair(image: Path, mask: Path, codes: Codes) -> tuple[Array, Array]:
    """An image and its labels.

    The image is turned as its EXIF tag says, as OpenCV and hence MMSegmentation do, unless only the unturned
    one has the mask's size. A mask is never turned.

    Returns:
        ``(H, W, 3)`` uint8 RGB and ``(H, W)`` uint8 labels, 255 = ignore.

    Raises:
        UserError: a file is missing, damaged, of another kind than ``codes`` says, or holds values that mean
            nothing; or the sizes differ.
    """
    labels = read_mask(mask, codes)
    pixels = read_image(image, labels.shape)
    if pixels.shape[:2] != labels.shape:
        (h, w), (mh, mw) = pixels.shape[:2], labels.shape
        raise UserError(f"{mask}: the mask is {mw}×{mh} px, its image {image.name} is {w}×{h} px")
    return pixels, labels


def read_image(path: Path, shape: tuple[int, ...] | None = None) -> Array:
    """An image, ``(H, W, 3)`` uint8 RGB; 16-bit grey keeps its upper 8 bits.

    Args:
        path: of the file.
        shape: height and width of its mask, which decide about an EXIF turn where the two differ.

    Raises:
        UserError: it cannot be read.
    """
    from PIL import ImageOps

    with _opened(path, "image") as image:
        if not _turned_away(image, shape):
            image = ImageOps.exif_transpose(image)
        if image.mode == "I" or image.mode.startswith("I;16"):
            grey = (np.asarray(image).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8)
            return np.repeat(grey[..., None], 3, axis=2)
        return np.asarray(image.convert("RGB"))


def image_size(path: Path, shape: tuple[int, ...] | None = None) -> tuple[int, int]:
    """Height and width as ``read_image`` gives them, from the header alone."""
    with _opened(path, "image") as image:
        turned = image.getexif().get(_ORIENTATION, 1) >= 5 and not _turned_away(image, shape)
        return (image.width, image.height) if turned else (image.height, image.width)


def mask_size(path: Path) -> tuple[int, int]:
    """Height and width of a mask, from the header alone."""
    with _opened(path, "mask") as image:
        return image.height, image.width


def read_mask(path: Path, codes: Codes) -> Array:
    """Labels of a mask file, ``(H, W)`` uint8, 255 = ignore.

    Raises:
        UserError: it cannot be read, is of another kind than ``codes`` says, or holds a value that means
            nothing.
    """
    with _opened(path, "mask") as image:
        values = _values(image, codes.kind, path)
    return _labels(values, codes, path)


# ---- values
def _values(image: Any, kind: Kind, path: Path) -> Array:
    """What the file holds, ``(H, W)`` integers; for colours one number per colour."""
    mode = str(image.mode)
    if kind == "colours":
        if mode == "RGBA" and image.getextrema()[3] != (255, 255):
            raise UserError(f"{path}: the mask has transparent pixels, which are no class: save it opaque")
        if mode not in ("RGB", "RGBA", "P"):
            raise UserError(f"{path}: a mask of kind {mode}, but colours are expected (RGB or palette)")
        rgb = np.asarray(image.convert("RGB")).astype(np.int32)
        return (rgb[..., 0] << 16) | (rgb[..., 1] << 8) | rgb[..., 2]
    if mode == "P" and kind == "ids":
        raise UserError(
            f"{path}: a palette mask, but label ids are expected (one 8-bit channel); if its indices are the"
            " ids, say masks: palette in classes.yaml (source folder) or save it as grey"
        )
    if mode not in ("1", "L", "P", "I", "I;16", "I;16B", "I;16L"):
        what = "an RGB mask" if mode.startswith("RGB") else f"a mask of kind {mode}"
        raise UserError(
            f"{path}: {what}, but label ids are expected (one 8-bit channel); colours need their classes in"
            " classes.yaml (source folder)"
        )
    return np.asarray(image).astype(np.uint8 if mode in ("1", "L", "P") else np.int64)


def _labels(values: Array, codes: Codes, path: Path) -> Array:
    if codes.kind != "colours" and (
        values.dtype == np.uint8 or 0 <= values.min() <= values.max() <= _LARGEST_ID
    ):
        table = np.full(256 if values.dtype == np.uint8 else _LARGEST_ID + 1, -1, np.int16)
        for value, label in codes.labels.items():
            if value < len(table):
                table[value] = label
        labels = table[values]
    else:
        labels = look_up(values, codes.labels)
    if labels.min() < 0:
        raise UserError(_strange(values[labels < 0], codes, path))
    return labels.astype(np.uint8)


def look_up(values: Array, labels: Mapping[int, int]) -> Array:
    """Labels ``(H, W)`` int16 of values of any size; −1 where a value has none."""
    keys = np.array(sorted(labels), np.int64)
    found = np.array([labels[int(key)] for key in keys], np.int16)
    if not len(keys):
        return np.full(values.shape, -1, np.int16)
    place = np.searchsorted(keys, values).clip(max=len(keys) - 1)
    return np.where(keys[place] == values, found[place], np.int16(-1))


def _strange(values: Array, codes: Codes, path: Path) -> str:
    """Which value has no meaning, and how often it occurs."""
    kinds, counts = np.unique(values, return_counts=True)
    worst = int(counts.argmax())
    value, more = int(kinds[worst]), len(kinds) - 1
    if codes.kind == "colours":
        word, said = "colour", f"({value >> 16}, {value >> 8 & 255}, {value & 255})"
    else:
        word, said = "id", str(value)
    others = f" ({more} more such {word}s)" if more else ""
    return f"{path}: {word} {said} in {counts[worst]} pixels is no label{others}; expected {codes.meaning}"


# ---- files
@contextmanager
def _opened(path: Path, what: str) -> Iterator[Any]:
    """A PIL image whose faults are errors that name the file."""
    from PIL import Image

    try:
        with Image.open(path) as image:
            yield image
    except Image.DecompressionBombError as error:
        raise UserError(f"{path}: the {what} is too large: {_said(error)}") from error
    except FileNotFoundError as error:
        raise UserError(f"{path}: the {what} is missing") from error
    except _DAMAGED as error:
        raise UserError(f"{path}: the {what} cannot be read: {_said(error)}") from error


def _said(error: Exception) -> str:
    return " ".join(str(error).split())


def _turned_away(image: Any, shape: tuple[int, ...] | None) -> bool:
    """Whether only the image as stored, without its EXIF turn, has the mask's size."""
    if shape is None or image.getexif().get(_ORIENTATION, 1) < 5:
        return False
    stored = (image.height, image.width)
    return stored == tuple(shape[:2]) and stored[0] != stored[1]

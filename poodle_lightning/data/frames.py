"""Videos kept as folders of images: read by time like a video file, at a rate that the user states."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from poodle_lightning.data.decode import MAX_PIXELS
from poodle_lightning.data.info import DecodeError
from poodle_lightning.data.pixels import Box, one_box_each
from poodle_lightning.data.sources import Entry, Reader
from poodle_lightning.types import Skip, UserError

IMAGES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".ppm")
_ORIENTATION = 0x0112  # EXIF tag; 5 to 8 are quarter turns


class FramesSource:
    """Folders of images, one folder per video.

    Args:
        root: ``<root>/<video>/<image>`` at any depth; a root that holds images itself is one video.
        rate: images per second.

    Raises:
        UserError: the folder is missing, holds no readable image, or the rate is not positive.
    """

    def __init__(self, root: str | Path, rate: float) -> None:
        self.root, self.rate = Path(root), rate
        if not rate > 0:
            raise UserError(f"rate {rate}: give the images per second of the folders, e.g. 10")
        if not self.root.is_dir():
            raise UserError(f"{root}: no such folder; give the folder of the image folders")
        self.entries: list[Entry] = []
        self._images: list[tuple[Path, ...]] = []
        refused = []
        for folder in sorted({self.root, *(path for path in self.root.rglob("*") if path.is_dir())}):
            images = _images_of(folder)
            if not images:
                continue
            try:
                width, height = _size(images[0])
            except DecodeError as error:
                refused.append(Skip(str(images[0]), error.reason, error.detail, 0.0))
                continue
            stop = (len(images) - 1) / rate
            number = len(self.entries)
            self.entries.append(Entry(number, str(folder), 0.0, stop, width, height, 1 / rate))
            self._images.append(images)
        self.refused = tuple(refused)
        if not self.entries:
            found = f"{len(refused)} folders whose first image cannot be read" if refused else "no images"
            raise UserError(f"{root}: {found}; expected <root>/<video>/<image>{{{','.join(IMAGES[:3])},…}}")

    def open(self, entry: Entry) -> Reader:
        """The entry's images."""
        return _ImageReader(self._images[entry.id], self.rate, (entry.width, entry.height))


class _ImageReader:
    """Images by time: the first that is not before the time asked for, as with video files."""

    def __init__(self, images: Sequence[Path], rate: float, size: tuple[int, int]) -> None:
        self._images, self._rate, self._size = images, rate, size

    def read(
        self, times: Sequence[float], box: Box | Sequence[Box] | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """See ``VideoReader.read``."""
        numbers = [int(np.ceil(time * self._rate - 1e-6)) for time in times]
        pixels = []
        for number, part in zip(numbers, one_box_each(box, len(times)), strict=True):
            x0, y0, x1, y1 = part or (0, 0, *self._size)
            pixels.append(self._image(number)[y0:y1, x0:x1])
        return np.stack(pixels), np.array(numbers) / self._rate

    def close(self) -> None:
        """Nothing is held open."""

    def _image(self, number: int) -> np.ndarray:
        time = number / self._rate
        if number >= len(self._images):
            raise DecodeError("past_end", f"{len(self._images)} images end before {time:.3f} s", time)
        try:
            pixels = load_image(self._images[number])
        except DecodeError as error:
            raise DecodeError(error.reason, error.detail, time) from error
        if pixels.shape[1::-1] != self._size:
            raise DecodeError(
                "size_changed", f"{self._images[number].name}: {pixels.shape[1]}×{pixels.shape[0]}", time
            )
        return pixels


def _images_of(folder: Path) -> tuple[Path, ...]:
    files = (
        path for path in folder.iterdir() if path.suffix.lower() in IMAGES and not path.name.startswith(".")
    )
    return tuple(sorted((path for path in files if path.is_file()), key=_natural))


def _natural(path: Path) -> list[tuple[int, int | str]]:
    """2.jpg comes before 10.jpg."""
    return [(0, int(part)) if part.isdigit() else (1, part) for part in re.split(r"(\d+)", path.name)]


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """A PIL image whose faults are ``DecodeError``s and whose size is within the limit."""
    from PIL import Image

    try:
        with Image.open(path) as image:
            if image.width * image.height > MAX_PIXELS:
                raise DecodeError("too_many_pixels", f"{path.name}: {image.width}×{image.height} px")
            yield image
    except (DecodeError, MemoryError):
        raise
    except Image.DecompressionBombError as error:
        raise DecodeError("too_many_pixels", _named(path, error)) from error
    except FileNotFoundError as error:
        raise DecodeError("missing", f"{path.name}: no such file") from error
    except PermissionError as error:
        raise DecodeError("unreadable", f"{path.name}: no permission to read it") from error
    except Exception as error:
        # whatever a damaged file leads to, which no list covers: beside OSError, SyntaxError and ValueError,
        # EXIF alone gives struct.error, AttributeError and TypeError
        raise DecodeError("corrupt", _named(path, error)) from error


def _named(path: Path, error: Exception) -> str:
    return f"{path.name}: {' '.join(str(error).split())}"


def _size(path: Path) -> tuple[int, int]:
    """Width and height as displayed, from the header."""
    with _opened(path) as image:
        turned = image.getexif().get(_ORIENTATION, 1) in (5, 6, 7, 8)
        return (image.height, image.width) if turned else (image.width, image.height)


def load_image(path: Path) -> np.ndarray:
    """``(H, W, 3)`` uint8 RGB, turned as the camera was held; 16-bit grey keeps its upper 8 bits.

    Raises:
        DecodeError: the file is missing, damaged or too large.
    """
    from PIL import ImageOps

    with _opened(path) as image:
        upright = ImageOps.exif_transpose(image)
        if upright.mode == "I" or upright.mode.startswith("I;16"):
            grey = (np.asarray(upright).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8)
            return np.repeat(grey[..., None], 3, axis=2)
        return np.asarray(upright.convert("RGB"))

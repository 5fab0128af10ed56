"""Folders of single images, e.g. ImageNet, as a source of clips of one frame.

A million images are listed, not measured: opening each only to learn its size would take minutes on a local
disk and far longer on a shared one. The size is known when an image is read. The list is one block of bytes
and one number per image, so that processes that are forked share it.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from poodle_lightning.data.frames import IMAGES, load_image
from poodle_lightning.data.index import find_files
from poodle_lightning.data.pixels import Box, one_box_each
from poodle_lightning.data.sources import Entry, LazyEntries, Reader
from poodle_lightning.types import Skip, UserError


class ImageEntries(LazyEntries):
    """One entry per image, without length in time and of a size that is not known yet.

    Args:
        root: the folder.
        names: paths of the images below it, as ``os.fsencode`` gives them.
    """

    def __init__(self, root: str, names: Sequence[bytes]) -> None:
        self._root = root
        self._bytes = b"".join(names)
        self._ends = np.cumsum([0, *map(len, names)], dtype=np.int64)

    def __len__(self) -> int:
        return len(self._ends) - 1

    def entry(self, number: int) -> Entry:
        """See ``LazyEntries``."""
        name = os.fsdecode(self._bytes[self._ends[number] : self._ends[number + 1]])
        return Entry(number, os.path.join(self._root, name), 0.0, 0.0, 0, 0)


class ImagesSource:
    """Every image below a folder, in whatever sub-folders; an image is a video of one moment.

    Links are followed, names that start with a dot are left out, names are sorted. An image that cannot be
    read is skipped when its turn comes, as a video is.

    Args:
        root: the folder, e.g. ImageNet's ``train``.

    Raises:
        UserError: the folder is missing or holds no image.
    """

    refused: tuple[Skip, ...] = ()

    def __init__(self, root: str | Path) -> None:
        folder = os.path.abspath(Path(root).expanduser())
        if not os.path.isdir(folder):
            raise UserError(f"{root}: no such folder; give the folder of the images")
        below = len(os.path.join(folder, ""))
        names = sorted(os.fsencode(path[below:]) for path in find_files(Path(folder), frozenset(IMAGES)))
        if not names:
            raise UserError(
                f"{root}: no image below it; expected <root>/<class>/<image>{{{','.join(IMAGES[:3])},…}}"
            )
        self.entries = ImageEntries(folder, names)

    def open(self, entry: Entry) -> Reader:
        """The image, read.

        Raises:
            DecodeError: it cannot be read.
        """
        return StillReader(load_image(Path(entry.path)))


class StillReader:
    """One image at every time.

    Args:
        pixels: ``(H, W, 3)`` uint8 RGB.
    """

    def __init__(self, pixels: np.ndarray) -> None:
        self._pixels = pixels

    @property
    def size(self) -> tuple[int, int]:
        """Width and height, px; see ``SizedReader``."""
        return self._pixels.shape[1], self._pixels.shape[0]

    def read(
        self, times: Sequence[float], box: Box | Sequence[Box] | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """See ``VideoReader.read``."""
        boxes = [part or (0, 0, *self.size) for part in one_box_each(box, len(times))]
        return np.stack([self._pixels[y0:y1, x0:x1] for x0, y0, x1, y1 in boxes]), np.array(times, float)

    def close(self) -> None:
        """Nothing is held open."""

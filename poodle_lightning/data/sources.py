"""Where clips come from: one interface over folders of videos, known data sets, images and generated streets.

A source lists ``entries`` (a stretch of one video each) and opens them. Layouts on disk:

=================  ==========================================================================================
``folder``         any folder; every video below it, in whatever sub-folders
``bdd100k``        ``<root>/videos/{train,val}/*.mov``, or the folder that holds ``bdd100k/videos/…``
``walking_tours``  ``<root>/<City>*.mp4``, e.g. ``Venice.mp4``, ``Kuala_Lumpur_4k.webm``; 9 cities, a safari
``frames``         ``<root>/<video>/<image>``; images in natural order of their names, ``rate`` per second
``synthetic``      nothing on disk: streets with exact flow and labels, generated on the fly
=================  ==========================================================================================
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np

from poodle_lightning.data.decode import VideoReader
from poodle_lightning.data.index import build_index
from poodle_lightning.data.info import DecodeError, VideoInfo, fingerprint
from poodle_lightning.data.pixels import Box, Piece
from poodle_lightning.types import Skip, UserError

CITIES = (
    "amsterdam", "bangkok", "chiangmai", "istanbul", "kualalumpur",
    "singapore", "stockholm", "venice", "zurich",
)  # fmt: skip
SAFARI = ("wildlife", "safari")
SAME_CITY = {"kualalampur": "kualalumpur"}  # as the data set's paper spells it


@dataclass(frozen=True)
class Entry:
    """A stretch of one video.

    Args:
        id: place in the source's list of videos; stretches of one video share it.
        path: file or folder, or a name for generated videos.
        start: seconds from the video's first frame at which the stretch begins.
        stop: seconds of its last moment.
        width: of the frames, px, after rotation.
        height: of the frames, px, after rotation.
    """

    id: int
    path: str
    start: float
    stop: float
    width: int
    height: int

    @property
    def duration(self) -> float:
        """Seconds between the first and the last moment."""
        return self.stop - self.start


class Reader(Protocol):
    """An opened video."""

    def read(
        self, times: Sequence[float], box: Box | Sequence[Box] | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """``(T, h, w, 3)`` uint8 RGB and ``(T,)`` float64 seconds; see ``VideoReader.read``."""
        ...

    def close(self) -> None:
        """Give files back."""
        ...


@runtime_checkable
class PieceReader(Protocol):
    """A reader that is told at once all that is wanted of its video, and may hand over planes."""

    def pieces(self, times: Sequence[float], boxes: Sequence[Box], planes: bool = False) -> list[Piece]:
        """One box of the frame at every time; see ``VideoReader.pieces``."""
        ...


@runtime_checkable
class ExactReader(Protocol):
    """A reader that knows the truth about its frames (generated videos)."""

    def flow(self, first: float, second: float, box: Box) -> tuple[np.ndarray, np.ndarray]:
        """Motion from one time to another in a box of both frames: ``(2, h, w)`` px, and where it is seen."""
        ...

    def labels(self, time: float, box: Box) -> np.ndarray:
        """Classes ``(h, w)`` uint8."""
        ...


class Source(Protocol):
    """Videos to draw clips from."""

    @property
    def entries(self) -> Sequence[Entry]:
        """One entry per usable video."""
        ...

    @property
    def refused(self) -> tuple[Skip, ...]:
        """What was found but cannot be used."""
        ...

    def open(self, entry: Entry) -> Reader:
        """Open the entry's video.

        Raises:
            DecodeError: it cannot be read any more.
        """
        ...


class FolderSource:
    """Every video below a folder.

    Args:
        root: the folder.
        keep: which videos, by path; None keeps all.
        workers: processes that measure the videos the first time; 0 is this one.

    Raises:
        UserError: the folder is missing or holds no readable video.
    """

    def __init__(
        self, root: str | Path, keep: Callable[[Path], bool] | None = None, workers: int = 0
    ) -> None:
        index = build_index(root, workers=workers)
        wanted = [video for video in index.videos if keep is None or keep(Path(video.path))]
        self.refused = tuple(skip for skip in index.refused if keep is None or keep(Path(skip.path)))
        self.entries = [
            Entry(number, video.path, 0.0, video.duration, video.width, video.height)
            for number, video in enumerate(wanted)
        ]
        self._videos: list[VideoInfo] = wanted

    def open(self, entry: Entry) -> Reader:
        """Open a video; refused when it is no longer the one that was indexed (other content or size)."""
        reader = VideoReader(entry.path)
        if fingerprint(entry.path) != self._videos[entry.id].fingerprint:
            reader.close()
            raise DecodeError("changed", "the file is no longer the one that was indexed: start again")
        return reader


class BDD100KSource(FolderSource):
    """BDD100K's videos, ``videos/{train,val}/*.mov``.

    Args:
        root: the folder that holds ``videos``, or the one that holds ``bdd100k``.
        split: ``train`` (70,000 videos), ``val`` or ``test``.
        workers: see ``FolderSource``.

    Raises:
        UserError: the layout is not there.
    """

    def __init__(self, root: str | Path, split: str = "train", workers: int = 0) -> None:
        tried = [Path(root) / "videos" / split, Path(root) / "bdd100k" / "videos" / split]
        folder = next((path for path in tried if path.is_dir()), None)
        if folder is None:
            raise UserError(
                f"{root}: not laid out as BDD100K, {tried[0]} is missing; put its .mov files there"
            )
        super().__init__(folder, workers=workers)


class WalkingToursSource(FolderSource):
    """Walking Tours (Venkataramanan et al. 2024): long city walks, one file each.

    Args:
        root: folder of ``<City>*.mp4`` (any container); case, blanks, ``_`` and ``-`` do not matter.
        city: ``venice``, another city, ``safari``, or ``all`` ten videos.
        workers: see ``FolderSource``.

    Raises:
        UserError: no such city, or its file is missing.
    """

    def __init__(self, root: str | Path, city: str = "venice", workers: int = 0) -> None:
        wanted = _letters(city)
        wanted = SAME_CITY.get(wanted, wanted)
        known = (*CITIES, "safari")
        if wanted != "all" and wanted not in known:
            raise UserError(f"city {city!r}: choose all or one of {', '.join(known)}")
        accepted = known if wanted == "all" else (wanted,)
        super().__init__(root, keep=lambda path: _tour(path) in accepted, workers=workers)
        if not self.entries:
            name = "<City>" if wanted == "all" else wanted.capitalize()
            raise UserError(
                f"{root}: no readable file {name}*.mp4 of Walking Tours there; expected one file per city"
            )


def _letters(name: str) -> str:
    return re.sub(r"[\W_]+", "", name).lower()


def _tour(path: Path) -> str:
    """Which tour a file is, by the start of its name; empty if none."""
    name = _letters(path.stem)
    if name.startswith(SAFARI):
        return "safari"
    return next((SAME_CITY.get(city, city) for city in (*CITIES, *SAME_CITY) if name.startswith(city)), "")

"""Where clips come from: one interface over folders of videos, known data sets, images and generated streets.

A source lists ``entries`` (a stretch of one video each) and opens them. Layouts on disk:

===================  ========================================================================================
``folder``           any folder; every video below it, in whatever sub-folders
``bdd100k``          ``<root>/videos/{train,val}/*.mov``, or the folder that holds ``bdd100k/videos/…``
``walking_tours``    ``<root>/<City>*.mp4``, e.g. ``Venice.mp4``, ``Kuala_Lumpur_4k.webm``; 9 cities, a
                     safari; the 3 tours of WT-Sem's validation part the same way, e.g. ``Rome.mp4``
``epic_kitchens``    ``P01/videos/P01_01.MP4`` or ``P01/P01_01.MP4`` anywhere below the root
``kinetics400``      ``<root>/{train,val,test}/<class>/*.mp4`` or ``<root>/{train,val,test}/*.mp4``; also
                     below ``<root>/kinetics400`` or ``<root>/k400``
``kinetics700``      the same, also below ``<root>/kinetics700``, ``kinetics700_2020`` or ``k700``
``audioset``         ``<root>/<part>/*.mp4`` at any depth, ``<part>`` named as the lists of segments:
                     ``unbalanced_train_segments``, ``balanced_train_segments``, ``eval_segments``
``youtube8m_shots``  ``<root>/shots.csv`` and videos anywhere below the root, see ``data/shot_lists.py``
``videonet``         a file, the list that ``poodle-lightning curate`` wrote, see ``data/videonet.py``
``film``             one file
``frames``           ``<root>/<video>/<image>``; images in natural order of their names, ``rate`` per second
``images``           every image below a folder, e.g. ImageNet's ``train/<class>/*.JPEG``: clips of one frame
``synthetic``        nothing on disk: streets with exact flow and labels, generated on the fly
===================  ========================================================================================
"""

from __future__ import annotations

import os
import re
import unicodedata
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Protocol, overload, runtime_checkable

import numpy as np

from poodle_lightning.data.decode import VideoReader
from poodle_lightning.data.index import Index, build_index, index_file
from poodle_lightning.data.info import DecodeError, VideoInfo, fingerprint
from poodle_lightning.data.pixels import Box, Piece
from poodle_lightning.types import Skip, UserError

CITIES = (
    "amsterdam", "bangkok", "chiangmai", "istanbul", "kualalumpur",
    "singapore", "stockholm", "venice", "zurich",
)  # fmt: skip
SAFARI = ("wildlife", "safari")
# Tours of other cities whose frames WT-Sem's validation part labels (PooDLe, App. D).
VAL_TOURS = ("rome", "torun", "poznan")
SAME_CITY = {"kualalampur": "kualalumpur"}  # as the data set's paper spells it


@dataclass(frozen=True)
class Entry:
    """A stretch of one video.

    Args:
        id: place in the source's list of videos; stretches of one video share it.
        path: file or folder, or a name for generated videos.
        start: seconds from the video's first frame at which the stretch begins.
        stop: seconds of its last moment.
        width: of the frames, px, after rotation; 0: known when it is opened (a ``SizedReader``).
        height: of the frames, px, after rotation.
        interval: mean seconds from frame to frame; 0 where there is a frame at every moment.
    """

    id: int
    path: str
    start: float
    stop: float
    width: int
    height: int
    interval: float = 0.0

    @property
    def duration(self) -> float:
        """Seconds between the first and the last moment."""
        return self.stop - self.start


class LazyEntries(Sequence[Entry], ABC):
    """A long list of entries, each of which is made when it is asked for."""

    @abstractmethod
    def entry(self, number: int) -> Entry:
        """The entry at a place from 0 on."""

    @overload
    def __getitem__(self, number: int) -> Entry: ...
    @overload
    def __getitem__(self, number: slice) -> list[Entry]: ...
    def __getitem__(self, number: int | slice) -> Entry | list[Entry]:
        numbers = range(len(self))[number]
        return [self.entry(one) for one in numbers] if isinstance(numbers, range) else self.entry(numbers)


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
class SizedReader(Protocol):
    """A reader that knows the size of its frames, for entries that were not measured."""

    @property
    def size(self) -> tuple[int, int]:
        """Width and height, px."""
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
        root: the folder; with ``single`` a file.
        keep: which videos, by path; None keeps all.
        workers: processes that measure the videos the first time; 0 is this one.
        single: the root is the one video.
        index: what was measured already, in place of a search.

    Raises:
        UserError: the folder is missing or holds no readable video.
    """

    def __init__(
        self,
        root: str | Path,
        keep: Callable[[Path], bool] | None = None,
        workers: int = 0,
        *,
        single: bool = False,
        index: Index | None = None,
    ) -> None:
        if index is None:
            index = index_file(root) if single else build_index(root, workers=workers)
        wanted = [video for video in index.videos if keep is None or keep(Path(video.path))]
        self.refused = tuple(skip for skip in index.refused if keep is None or keep(Path(skip.path)))
        self.entries = [
            Entry(
                number,
                video.path,
                0.0,
                video.duration,
                video.width,
                video.height,
                1 / video.fps if video.fps else 0,
            )
            for number, video in enumerate(wanted)
        ]
        self._videos: list[VideoInfo] = wanted

    def video(self, entry: Entry) -> VideoInfo:
        """What was measured of an entry's video."""
        return self._videos[entry.id]

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
        base = Path(root).expanduser()
        tried = [base / "videos" / split, base / "bdd100k" / "videos" / split]
        folder = next((path for path in tried if path.is_dir()), None)
        if folder is None:
            raise UserError(
                f"{root}: not laid out as BDD100K, {tried[0]} is missing; put its .mov files there"
            )
        super().__init__(folder, workers=workers)


class WalkingToursSource(FolderSource):
    """Walking Tours (Venkataramanan et al. 2024): long city walks, one file each.

    Args:
        root: folder of ``<City>*.mp4`` (any container); case, accents, blanks, ``_`` and ``-`` do not matter.
        city: ``venice``, another city, ``safari``, ``all`` ten videos, or ``val``: the tours of Rome, Torun
            and Poznan, of which WT-Sem labels frames for validation.
        workers: see ``FolderSource``.

    Raises:
        UserError: no such city, or its file is missing.
    """

    def __init__(self, root: str | Path, city: str = "venice", workers: int = 0) -> None:
        wanted = _letters(city)
        wanted = SAME_CITY.get(wanted, wanted)
        known = (*CITIES, "safari")
        sets = {"all": known, "val": VAL_TOURS}
        if wanted not in sets and wanted not in known:
            raise UserError(f"city {city!r}: choose all, val or one of {', '.join(known)}")
        accepted = sets.get(wanted, (wanted,))
        super().__init__(root, keep=lambda path: _tour(path) in accepted, workers=workers)
        if not self.entries:
            names = {"all": "<City>", "val": "{Rome,Torun,Poznan}"}.get(wanted, wanted.capitalize())
            raise UserError(
                f"{root}: no readable file {names}*.mp4 of Walking Tours there; expected one file per city"
            )


class EpicKitchensSource(FolderSource):
    """EPIC-KITCHENS-100 (Damen et al. 2022): kitchens as their cooks see them.

    Args:
        root: any folder above ``P01/videos/P01_01.MP4`` or ``P01/P01_01.MP4``.
        workers: see ``FolderSource``.

    Raises:
        UserError: the layout is not there.
    """

    def __init__(self, root: str | Path, workers: int = 0) -> None:
        super().__init__(root, keep=_is_kitchen, workers=workers)
        if not self.entries:
            raise UserError(
                f"{root}: not laid out as EPIC-KITCHENS, no readable file P*/videos/P*_*.MP4 or P*/P*_*.MP4"
            )


class Kinetics400Source(FolderSource):
    """Kinetics-400 (Kay et al. 2017): 10 s of a human action each.

    Args:
        root: the folder of ``train``, ``val`` and ``test``, or the one that holds it as ``kinetics400`` or
            ``k400``. The videos may lie in folders of their classes or in the split's folder itself.
        split: one of them.
        workers: see ``FolderSource``.

    Raises:
        UserError: the layout is not there.
    """

    NAME = "Kinetics-400"
    FOLDERS: tuple[str, ...] = ("kinetics400", "k400")

    def __init__(self, root: str | Path, split: str = "train", workers: int = 0) -> None:
        tried = [Path(root).expanduser() / part / split for part in (".", *self.FOLDERS)]
        folder = next((path for path in tried if path.is_dir()), None)
        if folder is None:
            raise UserError(
                f"{root}: not laid out as {self.NAME}, {tried[0]} is missing; put its .mp4 files there"
            )
        super().__init__(folder, workers=workers)


class Kinetics700Source(Kinetics400Source):
    """Kinetics-700 (Carreira et al. 2019) and its edition of 2020, laid out as Kinetics-400.

    Below ``<root>`` itself, or ``kinetics700``, ``kinetics700_2020`` or ``k700`` in it.
    """

    NAME = "Kinetics-700"
    FOLDERS = ("kinetics700", "kinetics700_2020", "k700")


class FilmSource(FolderSource):
    """One film.

    Args:
        path: of the file.

    Raises:
        UserError: it is missing or cannot be read.
    """

    def __init__(self, path: str | Path) -> None:
        super().__init__(path, single=True)


def inner_path(path: str | Path, root: str | Path) -> PurePath:
    """The path of an indexed video below its root."""
    return PurePath(path).relative_to(os.path.abspath(Path(root).expanduser()))


def _is_kitchen(path: Path) -> bool:
    """Whether a file is ``P01/[videos/]P01_01.MP4``."""
    participant = path.parent.parent.name if path.parent.name.lower() == "videos" else path.parent.name
    return re.fullmatch(r"P\d+", participant) is not None and path.stem.startswith(f"{participant}_")


def _letters(name: str) -> str:
    """Lower-case letters and digits without accents: Toruń is torun."""
    plain = unicodedata.normalize("NFKD", name)
    return re.sub(r"[\W_]+", "", "".join(c for c in plain if not unicodedata.combining(c))).lower()


def _tour(path: Path) -> str:
    """Which tour a file is, by the start of its name; empty if none."""
    name = _letters(path.stem)
    if name.startswith(SAFARI):
        return "safari"
    known = (*CITIES, *SAME_CITY, *VAL_TOURS)
    return next((SAME_CITY.get(city, city) for city in known if name.startswith(city)), "")

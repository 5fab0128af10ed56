"""Shots of videos by a list, as YouTube-8M's are given for PiCo and VITO.

``<root>/shots.csv``, with the videos anywhere below the root:

    video,start,stop
    aB3xY,0,4.2
    train/cD4zW.mp4,4.2,9.5

``video`` is the file's path below the root or its name, either with or without its ending. ``start`` and
``stop`` are seconds from the first frame of the video; at ``stop`` the next shot begins, or the video ends.
Other columns are ignored.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from poodle_lightning.data.info import VideoInfo
from poodle_lightning.data.sources import Entry, FolderSource, inner_path
from poodle_lightning.data.tables import rows_of
from poodle_lightning.types import Skip, UserError

FILE_NAME = "shots.csv"
_COLUMNS = ("video", "start", "stop")
# A list counts frames or seconds in a way of its own: so much of a shot may lie behind the last frame.
_BEHIND = 1.0


@dataclass(frozen=True)
class Listed:
    """A line of a list.

    Args:
        video: as it is named there.
        start: seconds of its first frame.
        stop: seconds of the first frame after it.
        line: of the file, from 1.
    """

    video: str
    start: float
    stop: float
    line: int


class ShotListSource(FolderSource):
    """Shots of videos (YouTube-8M and others) by a list; every shot is an entry.

    Args:
        root: folder of ``shots.csv`` and the videos.
        workers: see ``FolderSource``.

    Raises:
        UserError: there is no list, it has a line that cannot be used, or none of its shots can be read.
    """

    def __init__(self, root: str | Path, workers: int = 0) -> None:
        file = Path(root).expanduser() / FILE_NAME
        listed = read_shots(file)
        wanted = {one.video for one in listed}
        super().__init__(root, lambda path: not wanted.isdisjoint(_names(path, root)), workers)
        places = _places((Path(video.path) for video in self._videos), root, wanted, file)
        self.entries, lost = _entries(listed, places, self._videos)
        unreadable = {name for skip in self.refused for name in _names(Path(skip.path), root)}
        self.refused = (*self.refused, *(skip for skip in lost if skip.path not in unreadable))
        if not self.entries:
            first = self.refused[0]
            raise UserError(
                f"{file}: none of its {len(listed)} shots can be read; the first is of {first.path!r}: "
                f"{first.detail}"
            )


def read_shots(path: str | Path) -> list[Listed]:
    """The lines of a list; see the module for its form.

    Raises:
        UserError: the file is missing, is no such list, is empty, or has a line that cannot be used.
    """
    file = Path(path)
    if not file.exists():
        raise UserError(f"{file}: no such list of shots; source youtube8m_shots needs it beside the videos")
    found = [_listed(file, line, row) for line, row in rows_of(file, _COLUMNS)]
    if not found:
        raise UserError(f"{file}: holds no shot; write one a line: video,start,stop")
    return found


def _listed(file: Path, line: int, row: Mapping[str, Any]) -> Listed:
    video = (row["video"] or "").strip()
    try:
        start, stop = float(row["start"]), float(row["stop"])
    except (TypeError, ValueError):
        start = stop = math.nan
    if not video or not 0 <= start < stop < math.inf:
        text = ",".join(str(row[name] if row[name] is not None else "") for name in _COLUMNS)
        raise UserError(
            f"{file}, line {line}: {text!r} is no shot; write video,start,stop in seconds, stop after start"
        )
    return Listed(video, start, stop, line)


def _names(path: Path, root: str | Path) -> tuple[str, ...]:
    """How a list may name a video, the most exact first."""
    inner = inner_path(path, root)
    return inner.as_posix(), inner.with_suffix("").as_posix(), path.name, path.stem


def _places(paths: Iterable[Path], root: str | Path, wanted: set[str], file: Path) -> dict[str, int]:
    """The place of every wanted video among the paths."""
    found: dict[str, tuple[int, int, Path]] = {}
    for place, path in enumerate(paths):
        for rank, name in enumerate(_names(path, root)):
            before = found.get(name)
            if name not in wanted or (before is not None and (before[0] < rank or before[1] == place)):
                continue
            if before is not None and before[0] == rank:
                raise UserError(f"{file}: {name} may be {before[2]} or {path}: write which, by its path")
            found[name] = (rank, place, path)
    return {name: place for name, (_, place, _) in found.items()}


def _last_before(stop: float, apart: float) -> float:
    """The last frame of a shot: the one at ``stop``, to 1 ms, is the next shot's. Of a constant rate."""
    if not apart:
        return stop
    return max(math.ceil(stop / apart - 1e-3 / apart) - 1, 0) * apart


def _entries(
    listed: Sequence[Listed], places: Mapping[str, int], videos: Sequence[VideoInfo]
) -> tuple[list[Entry], list[Skip]]:
    """The shots that are there; and a skip per missing video and per shot outside of its video."""
    entries: list[Entry] = []
    lost: dict[tuple[str, int], Skip] = {}
    for shot in listed:
        place = places.get(shot.video)
        if place is None:
            lost[shot.video, 0] = Skip(
                shot.video, "missing", f"{FILE_NAME}, line {shot.line}: no such video below the root"
            )
            continue
        video = videos[place]
        apart = 1 / video.fps if video.fps else 0.0
        if shot.start > video.duration or shot.stop > video.duration + apart + _BEHIND:
            detail = (
                f"{FILE_NAME}, line {shot.line}: {shot.start:g} to {shot.stop:g} s is outside of the video of"
                f" {video.duration + apart:.2f} s"
            )
            lost[video.path, shot.line] = Skip(video.path, "outside", detail, shot.start)
            continue
        stop = max(min(_last_before(shot.stop, apart), video.duration), shot.start)
        entries.append(Entry(place, video.path, shot.start, stop, video.width, video.height, apart))
    return entries, list(lost.values())

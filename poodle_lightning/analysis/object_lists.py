"""Objects that a detector found in videos, as a list in a file: how many per frame, and how often each class.

Any detector will do (DoRA, Figure 2, takes Detic's ImageNet-21k classes); what it writes is brought into one
of two forms, one object a line:

=====================  =================================================================================
CSV (``.csv``)         a header with ``time`` and ``class``, perhaps ``video``; other columns are ignored
JSON lines             ``{"time": 12.0, "class": "dog"}``, perhaps with ``"video"``; other keys are ignored
=====================  =================================================================================

``time`` is in seconds from the start of the video; objects of one time are those of one frame. An empty class
(in JSON also ``null``) says that the frame was looked at: without such a line a frame in which nothing was
found is not known, and does not count. ``video`` is the video's file name, with or without its ending. Lists
without it belong to the video of the same name (``venice.csv`` to ``venice.mp4``), or to the only video there
is.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from poodle_lightning.data.tables import rows_of
from poodle_lightning.types import UserError

_ENDINGS = (".csv", ".jsonl", ".json")


@dataclass(frozen=True)
class Found:
    """One line of a list.

    Args:
        time: seconds.
        name: the class; empty where only the frame is named.
        video: name of the video, empty where the list does not say.
    """

    time: float
    name: str
    video: str


@dataclass(frozen=True)
class ObjectCounts:
    """Objects of one video.

    Args:
        times: of the frames that were looked at, seconds, increasing.
        objects: in each of them, of all classes.
        classes: different classes in each of them.
        frames_with: class → frames that show it, the most frequent first.
        total: class → objects of it, in the same order.
    """

    times: tuple[float, ...] = ()
    objects: tuple[int, ...] = ()
    classes: tuple[int, ...] = ()
    frames_with: dict[str, int] = field(default_factory=dict)
    total: dict[str, int] = field(default_factory=dict)


def read_objects(path: str | Path) -> list[Found]:
    """The lines of a list; see the module for its forms.

    Raises:
        UserError: the file is missing, has another ending, lacks a column, or has a time that is no number.
    """
    file = Path(path)
    if file.suffix.lower() not in _ENDINGS:
        raise UserError(f"{file}: objects are read from {', '.join(_ENDINGS)}: choose one of these forms")
    rows = list(rows_of(file, ("time", "class")))
    if not rows:
        raise UserError(f"{file}: holds no line with an object")
    return [_found(file, line, row) for line, row in rows]


def _found(file: Path, line: int, row: dict[str, Any]) -> Found:
    try:
        time = float(row["time"])
    except (TypeError, ValueError):
        time = math.nan
    if not 0 <= time < math.inf:
        raise UserError(f"{file}, line {line}: time {row['time']!r} is no number of seconds")
    name, video = (str(row.get(key) or "").strip() for key in ("class", "video"))
    return Found(time, name, video)


def count_objects(found: Sequence[Found]) -> ObjectCounts:
    """Counts per frame and per class of one video's objects."""
    frames: dict[float, list[str]] = defaultdict(list)
    for one in found:
        names = frames[one.time]
        if one.name:
            names.append(one.name)
    total = Counter(one.name for one in found if one.name)
    within = Counter(name for names in frames.values() for name in set(names))
    order = sorted(within, key=lambda name: (-within[name], -total[name], name))
    times = sorted(frames)
    return ObjectCounts(
        times=tuple(times),
        objects=tuple(len(frames[time]) for time in times),
        classes=tuple(len(set(frames[time])) for time in times),
        frames_with={name: within[name] for name in order},
        total={name: total[name] for name in order},
    )


def objects_of(videos: Sequence[str | Path], lists: Sequence[str | Path]) -> dict[str, ObjectCounts]:
    """Counts of every video that a list speaks of.

    Args:
        videos: paths.
        lists: files; see the module for their form, and for how they are matched with videos.

    Returns:
        The video's path → its counts; videos without a list are left out.

    Raises:
        UserError: a list cannot be read, or speaks of a video that is not there, or of several that share a
            name.
    """
    gathered: dict[str, list[Found]] = defaultdict(list)
    for file in map(Path, lists):
        for one in read_objects(file):
            gathered[_video_of(file, one, videos, alone=len(lists) == 1)].append(one)
    return {path: count_objects(found) for path, found in gathered.items()}


def _video_of(file: Path, one: Found, videos: Sequence[str | Path], alone: bool) -> str:
    if not one.video and alone and len(videos) == 1:
        return str(videos[0])
    wanted = one.video or file.stem
    fitting = [str(video) for video in videos if wanted in (str(video), Path(video).name, Path(video).stem)]
    if len(fitting) == 1:
        return fitting[0]
    if fitting:
        raise UserError(
            f"{file}: {len(fitting)} videos are called {wanted!r}: give the path in the column `video`"
        )
    if one.video:
        raise UserError(f"{file}: speaks of the video {wanted!r}, which is not among the {len(videos)} given")
    raise UserError(
        f"{file}: no video is called {wanted!r}, so it is not known whose objects these are: "
        "add a column `video`, or name the file as the video"
    )

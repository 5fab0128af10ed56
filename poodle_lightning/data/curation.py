"""VideoNet's curation: of a heap of online videos those that show what their titles say (VITO, §3.3).

Parthasarathy et al. 2023: 5,000 clips per ImageNet category whose title holds its name or a synonym; a
ResNet-50 looks at the first 100 frames, and where it never puts the category first the video is discarded, as
is what lasts less than 10 s. 24 % of them, 1,180,042 videos, were left.

What is costly is done once: which classes come first on a video's frames is kept (``data/looks.py``). Whoever
is stopped goes on, several processes share the work, and other titles, classes or lengths cost nothing.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from poodle_lightning.data.decode import VideoReader
from poodle_lightning.data.encode import coding
from poodle_lightning.data.info import DecodeError, VideoInfo
from poodle_lightning.data.looks import Look
from poodle_lightning.data.prepare import in_order
from poodle_lightning.data.tables import rows_of
from poodle_lightning.data.titles import TitleClass, Titles
from poodle_lightning.data.videonet import Curated
from poodle_lightning.types import UserError

COLUMNS = ("id", "title", "path", "duration")
_NEEDED = COLUMNS[:3]
_ENDINGS = (".csv", ".tsv", ".jsonl", ".json")
# A length that rounding puts below the least one counts.
_SLACK = 1e-6


@dataclass(frozen=True)
class Listed:
    """A line of the table.

    Args:
        id: of the video.
        title: of the video.
        path: absolute.
        duration: seconds, if the table knows.
    """

    id: str
    title: str
    path: str
    duration: float | None = None


@dataclass(frozen=True)
class Candidate:
    """A video whose title names classes.

    Args:
        listed: its line.
        classes: places of the classes in their list that it was retrieved for.
    """

    listed: Listed
    classes: tuple[int, ...]


@dataclass(frozen=True)
class Retrieved:
    """What the titles gave.

    Args:
        candidates: in the order of the table.
        matched: per class, titles that name it.
        taken: per class, how many of them were retrieved.
    """

    candidates: tuple[Candidate, ...]
    matched: tuple[int, ...]
    taken: tuple[int, ...]


@dataclass(frozen=True)
class Verdict:
    """What becomes of a candidate.

    Args:
        candidate: which.
        outcome: ``kept``, ``too_short``, ``other_class``, or why it cannot be read (``data/info.py``).
        classes: places of the classes that were confirmed.
        video: what was measured, of what was read.
    """

    candidate: Candidate
    outcome: str
    classes: tuple[int, ...] = ()
    video: VideoInfo | None = None


def read_table(path: str | Path) -> list[Listed]:
    """The lines of a table of videos: ``id``, ``title``, ``path`` and perhaps ``duration`` (seconds).

    CSV or TSV with a header, or JSON lines; other columns are ignored. Paths are absolute or relative to the
    table's folder. A path that comes again is left out.

    Raises:
        UserError: the file is missing or of another form, lacks a column, or has a line that cannot be used.
    """
    file = Path(path)
    if file.suffix.lower() not in _ENDINGS:
        raise UserError(f"--videos {file}: a table ends in {', '.join(_ENDINGS)}: choose one of these forms")
    folder = Path(os.path.abspath(file)).parent
    ids, paths, found = set[str](), set[str](), list[Listed]()
    for number, row in rows_of(file, _NEEDED, "--videos"):
        one = _listed(file, number, row, folder)
        if one.id in ids:
            raise UserError(f"--videos {file}, line {number}: the id {one.id!r} is there twice")
        ids.add(one.id)
        if one.path not in paths:
            paths.add(one.path)
            found.append(one)
    if not found:
        raise UserError(f"--videos {file}: holds no video")
    return found


def _listed(file: Path, number: int, row: Mapping[str, Any], folder: Path) -> Listed:
    identity, title, path = (str(row[key] if row[key] is not None else "").strip() for key in _NEEDED)
    if not identity or not path:
        raise UserError(f"--videos {file}, line {number}: an id and a path are needed")
    given = row.get("duration")
    duration = None
    if given not in (None, ""):
        try:
            duration = float(given)
        except (TypeError, ValueError):
            duration = math.nan
        if not 0 <= duration < math.inf:
            raise UserError(f"--videos {file}, line {number}: duration {given!r} is no number of seconds")
    return Listed(identity, title, os.path.normpath(folder / path), duration)


def retrieve(listed: Sequence[Listed], classes: Sequence[TitleClass], per_class: int) -> Retrieved:
    """The videos whose titles name a class, up to ``per_class`` of each, the first ones of the table."""
    titles = Titles(classes)
    matched, taken = [0] * len(classes), [0] * len(classes)
    candidates = []
    for one in listed:
        hits = titles.find(one.title)
        for place in hits:
            matched[place] += 1
        chosen = tuple(place for place in hits if taken[place] < per_class)
        for place in chosen:
            taken[place] += 1
        if chosen:
            candidates.append(Candidate(one, chosen))
    return Retrieved(tuple(candidates), tuple(matched), tuple(taken))


def first_frames(
    path: str,
    count: int,
    min_seconds: float,
    shrink: Callable[[np.ndarray], Tensor],
    stop: Callable[[], bool],
) -> tuple[VideoInfo, Tensor | None]:
    """The first frames of a video as a classifier is shown them.

    Args:
        path: of the video.
        count: frames, fewer if it has fewer.
        min_seconds: of a shorter video no frame is read.
        shrink: ``(H, W, 3)`` uint8 to ``(3, h, w)`` uint8.
        stop: asked before every frame; True gives up.

    Returns:
        What was measured, and ``(n, 3, h, w)`` uint8, or None of a video that is too short.

    Raises:
        DecodeError: it cannot be read up to there.
        InterruptedError: it was told to give up.
    """
    with VideoReader(path) as reader:
        info = reader.info
        if is_short(info, min_seconds):
            return info, None
        try:
            clock = coding(path).clock
        except (OSError, ValueError) as error:
            raise DecodeError("unreadable", str(error)) from error
        found = []
        for _, pixels in islice(in_order(reader, clock), count):
            if stop():
                raise InterruptedError
            found.append(shrink(pixels))
    if not found:
        raise DecodeError("corrupt", "no frame can be decoded")
    return info, torch.stack(found)


def judge(
    candidate: Candidate, look: Look | None, outputs: Sequence[int], min_seconds: float
) -> Verdict | None:
    """What becomes of a video; None if it is still to be looked at.

    Args:
        candidate: the video.
        look: what was seen in it.
        outputs: of the classifier, per class.
        min_seconds: shorter videos are dropped.
    """
    duration = candidate.listed.duration
    if duration is not None and duration < min_seconds:
        return Verdict(candidate, "too_short")
    if look is None:
        return None
    if look.skip is not None:
        return Verdict(candidate, look.skip.reason)
    if look.video is not None and is_short(look.video, min_seconds):
        return Verdict(candidate, "too_short", (), look.video)
    if look.seen is None:  # it was too short, and no longer is
        return None
    seen = tuple(place for place in candidate.classes if outputs[place] in look.seen)
    return Verdict(candidate, "kept" if seen else "other_class", seen, look.video)


def is_short(video: VideoInfo, min_seconds: float) -> bool:
    """Whether a video lasts less, up to the end of its last frame: what a player shows as its length."""
    length = video.duration + (1 / video.fps if video.fps else 0.0)
    return length < min_seconds - _SLACK


def curated(verdict: Verdict, classes: Sequence[TitleClass]) -> Curated:
    """A kept video as it is listed."""
    assert verdict.video is not None
    listed = verdict.candidate.listed
    return Curated(listed.id, listed.title, verdict.video, tuple(classes[n].key for n in verdict.classes))

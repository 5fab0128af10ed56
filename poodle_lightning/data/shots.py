"""Shots of a film: the stretches between its cuts, found once and remembered beside the index.

Two frames, one after the other, are compared as PySceneDetect's ``ContentDetector`` compares them: the mean
of the absolute differences of hue, saturation and value (0…179, 0…255, 0…255 of OpenCV), against a threshold
of 27. The frames are thumbnails of 256 px width, PySceneDetect's own size too. Two things differ: thumbnails
are means of pixels, which noise and fine motion disturb less than picked ones; and a jump after which the
picture is soon as before is a flash, not a cut, whereas PySceneDetect drops cuts that follow each other too
closely. Slow transitions (fades) are no cuts to either.
"""

from __future__ import annotations

import hashlib
import importlib
import json
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from itertools import groupby, repeat
from math import inf
from multiprocessing import get_context
from pathlib import Path
from time import monotonic
from typing import Any, Literal, cast

import cv2
import numpy as np
from lightning.pytorch.utilities import rank_zero_info

from poodle_lightning.data.decode import VideoReader, probe
from poodle_lightning.data.index import cache_folder, save_whole
from poodle_lightning.data.info import DecodeError, VideoInfo, check_file
from poodle_lightning.data.sources import Reader
from poodle_lightning.data.subsets import lasting
from poodle_lightning.types import Skip, UserError

Shot = tuple[float, float]
"""Times of a shot's first and last frame, seconds from the start of the video."""
Cut = tuple[float, float]
"""Times of the last frame before a cut and of the first one after it."""

_Frame = tuple[float, np.ndarray]
_WIDTH = 256
# The film is looked through in pieces, by several processes if there are. They always end at the same places,
# so that what is found does not depend on how many there are.
_PIECE = 300.0
# What is damaged is passed over in steps of a second; whether there is a cut in it cannot be known.
_OVER_DAMAGE = 1.0
# To the next frame: more than half of the way to it, so that no rounding to the clock leads back.
_ONWARD = 0.75
# Seconds between two lines that say how far a search is.
_REPORT_EVERY = 30.0


@dataclass(frozen=True)
class Detector:
    """When a jump from frame to frame is a cut.

    Args:
        threshold: the smallest content value that is a jump.
        flash: a jump is no cut if within so many seconds the picture is as before it: closer to that than to
            what the jump led to, and by less than the threshold. 0 takes every jump for a cut.
        step: seconds between the frames that are looked at; 0 is every frame. A shot then ends at the last
            frame that was looked at before the cut and the next begins at the first one after it; what lies
            between belongs to none. Motion over the step is more than from frame to frame, so more of it is
            mistaken for a cut.

    Raises:
        UserError: a number is out of range.
    """

    threshold: float = 27.0
    flash: float = 0.25
    step: float = 0.0

    def __post_init__(self) -> None:
        if not (self.threshold > 0 and self.flash >= 0 and self.step >= 0):
            raise UserError(
                f"shots: threshold {self.threshold:g} must be above 0, flash {self.flash:g} and step"
                f" {self.step:g} at least 0"
            )


def shots(
    path: str | Path,
    *,
    detector: Detector | Literal["scenedetect"] | None = None,
    workers: int = 0,
    cache: bool = True,
) -> list[Shot]:
    """The shots of a video, in order; a video without a cut is one.

    Args:
        path: a video file.
        detector: settings of the detector; None is the default; "scenedetect" lets PySceneDetect's
            ``ContentDetector`` decide, with its own defaults, and remembers nothing.
        workers: processes; 0 is this one.
        cache: keep and use what was found in earlier runs, by the content of the file.

    Raises:
        DecodeError: the file cannot be read.
        UserError: PySceneDetect is asked for and not installed.
    """
    if detector == "scenedetect":
        return _by_scenedetect(path)
    (found,) = find_shots([probe(path)], detector or Detector(), workers=workers, cache=cache)
    if isinstance(found, Skip):
        raise DecodeError(found.reason, found.detail, found.time)
    return found


def find_shots(
    videos: Sequence[VideoInfo],
    detector: Detector,
    *,
    workers: int = 0,
    cache: bool = True,
    until: Sequence[float] | None = None,
) -> list[list[Shot] | Skip]:
    """The shots of many videos; a ``Skip`` for each that cannot be read any more.

    What was found of a video is kept as soon as it is complete: a search that is broken off goes on there.

    Args:
        videos: as measured.
        detector: settings.
        workers: processes, which share long films too; 0 is this one.
        cache: keep and use what was found in earlier runs.
        until: seconds up to which each video is looked through, its end at most; None is all of each.
    """
    ends = [min(stop, video.duration) for stop, video in zip(until or repeat(inf), videos, strict=False)]
    stops = zip(videos, ends, strict=True)
    found = [_recall(video, detector, end) if cache else None for video, end in stops]
    pieces = [
        (number, start, min(start + _PIECE, end))
        for number, end in enumerate(ends)
        if found[number] is None
        for start in np.arange(0.0, max(end, 1e-9), _PIECE).tolist()
    ]
    tasks = [(videos[number], start, stop) for number, start, stop in pieces]
    last = {number: place for place, (number, _, _) in enumerate(pieces)}
    results: list[list[Shot] | Skip | None] = [*found]
    cuts: dict[int, list[Cut]] = {number: [] for number in last}
    outcomes = _told(tasks, _work(partial(_look, detector=detector), tasks, workers))
    for place, ((number, _, _), outcome) in enumerate(zip(pieces, outcomes, strict=True)):
        if isinstance(outcome, Skip):
            results[number] = results[number] or outcome
        else:
            cuts[number] += outcome
        if place == last[number] and results[number] is None:
            results[number] = between(cuts[number], ends[number])
            if cache:
                store = _store(videos[number], detector, ends[number])
                save_whole(store, {"settings": asdict(detector), "shots": results[number]})
    return cast(list[list[Shot] | Skip], results)


def between(cuts: Sequence[Cut], duration: float) -> list[Shot]:
    """The shots that cuts leave of a video."""
    starts, stops = [0.0, *(b for _, b in cuts)], [*(a for a, _ in cuts), duration]
    return list(zip(starts, stops, strict=True))


# ---- the detector
def content_value(first: np.ndarray, second: np.ndarray) -> float:
    """How much changes between two thumbnails ``(h, w, 3)`` uint8 HSV: 0 to 230."""
    return float(np.mean(cv2.mean(cv2.absdiff(first, second))[:3]))


def thumbnail(pixels: np.ndarray) -> np.ndarray:
    """``(H, W, 3)`` uint8 RGB as HSV of at most 256 px width, means of the pixels."""
    height, width = pixels.shape[:2]
    if width > _WIDTH:
        size = (_WIDTH, max(1, round(height * _WIDTH / width)))
        pixels = cv2.resize(pixels, size, interpolation=cv2.INTER_AREA)
    return np.asarray(cv2.cvtColor(pixels, cv2.COLOR_RGB2HSV))


def find_cuts(frames: Iterable[tuple[float, np.ndarray | None]], detector: Detector) -> list[Cut]:
    """The cuts between frames that come in order.

    Args:
        frames: time and thumbnail of each; None where the film could not be read, which is taken for a cut.
        detector: settings.
    """
    cuts: list[Cut] = []
    end: float | None = None
    for damaged, run in groupby(frames, key=lambda frame: frame[1] is None):
        if damaged:
            continue
        found, first, last = _cuts_of(cast(Iterator[_Frame], run), detector)
        cuts += found if end is None else [(end, first), *found]
        end = last
    return cuts


def _cuts_of(frames: Iterator[_Frame], detector: Detector) -> tuple[list[Cut], float, float]:
    """The cuts, and the times of the first and the last of the frames."""
    cuts: list[Cut] = []
    first = last = next(frames)
    # frames since a jump: if the picture comes back they were a flash, if not they are looked at again
    waiting: list[_Frame] = []
    again: deque[_Frame] = deque()
    while True:
        now = again.popleft() if again else next(frames, None)
        if now is not None:
            change = content_value(last[1], now[1])
            if change < detector.threshold and _is_back(waiting, now, change):
                last, waiting = now, []
                continue
            waiting.append(now)
            if now[0] - waiting[0][0] < detector.flash:
                continue
        if not waiting:
            return cuts, first[0], last[0]
        cuts.append((last[0], waiting[0][0]))
        last = waiting[0]
        again.extendleft(reversed(waiting[1:]))
        waiting = []


def _is_back(waiting: Sequence[_Frame], now: _Frame, change: float) -> bool:
    """Whether a frame shows again what was there before a jump, rather than what it led to."""
    return not waiting or change < content_value(waiting[0][1], now[1])


def _thumbnails(
    reader: Reader, video: VideoInfo, start: float, stop: float, step: float
) -> Iterator[tuple[float, np.ndarray | None]]:
    """Frames from one time to another, each once."""
    onward = step or _ONWARD * (1 / video.fps if video.fps else 1.0)
    time = start
    while time <= min(stop, video.duration):
        try:
            pixels, (at,) = reader.read([time])
        except DecodeError as error:
            if error.reason != "corrupt":
                raise
            yield time, None
            time += _OVER_DAMAGE
            continue
        yield float(at), thumbnail(pixels[0])
        time = max(float(at), time) + onward


def _look(piece: tuple[VideoInfo, float, float], detector: Detector) -> list[Cut] | Skip:
    """The cuts of a piece of a film: those after which a shot begins in ``(start, stop]``.

    It is looked at from a little before to a little after, so that a flash at its ends is known for one.
    """
    video, start, stop = piece
    around = 2 * detector.flash + 2 * max(detector.step, 1 / video.fps if video.fps else 0.0)
    try:
        with VideoReader(video.path) as reader:
            frames = _thumbnails(reader, video, max(0.0, start - around), stop + around, detector.step)
            return [cut for cut in find_cuts(frames, detector) if start < cut[1] <= stop]
    except DecodeError as error:
        return Skip(video.path, error.reason, error.detail, error.time)
    except OSError as error:
        return Skip(video.path, "unreadable", error.strerror or type(error).__name__)


def _work(
    task: Any, pieces: Sequence[tuple[VideoInfo, float, float]], workers: int
) -> Iterator[list[Cut] | Skip]:
    """What is found in each piece, in order, as soon as it is there."""
    if workers < 1 or len(pieces) < 2:
        yield from map(task, pieces)
        return
    # fresh interpreters, as the index has them: forking a process that holds decoder threads can hang
    with ProcessPoolExecutor(min(workers, len(pieces)), mp_context=get_context("spawn")) as pool:
        yield from pool.map(task, pieces)


def _told(
    pieces: Sequence[tuple[VideoInfo, float, float]], outcomes: Iterator[list[Cut] | Skip]
) -> Iterator[list[Cut] | Skip]:
    """The outcomes, and lines that say how far a long search is."""
    total, done = sum(stop - start for _, start, stop in pieces), 0.0
    if len(pieces) > 1:  # minutes of work
        rank_zero_info(f"Looking for the cuts in {lasting(total)} of video, once for all runs")
    began = told = monotonic()
    for (_, start, stop), outcome in zip(pieces, outcomes, strict=True):
        yield outcome
        done += stop - start
        now = monotonic()
        if now - told >= _REPORT_EVERY and done < total:
            told = now
            left = lasting((now - began) * (total - done) / done)
            rank_zero_info(f"Looked for cuts in {lasting(done)} of {lasting(total)}, about {left} to go")


# ---- what is remembered
def _store(video: VideoInfo, detector: Detector, end: float) -> Path:
    """Where the shots up to a time are kept; those of a whole video where any other part of it finds them."""
    part = [] if end == video.duration else [end]
    settings = json.dumps([video.fingerprint, asdict(detector), *part], sort_keys=True)
    name = hashlib.blake2b(settings.encode(), digest_size=16).hexdigest()
    return cache_folder() / "shots" / f"{name}.json"


def _recall(video: VideoInfo, detector: Detector, end: float) -> list[Shot] | None:
    """Shots up to a time, of an earlier run that looked as far or at all of the video."""
    whole = _load(_store(video, detector, video.duration))
    if whole is None:
        return _load(_store(video, detector, end))
    return [(start, min(stop, end)) for start, stop in whole if start <= end]


def _load(store: Path) -> list[Shot] | None:
    """Shots of an earlier run; None if there are none, or the file is torn."""
    try:
        found = json.loads(store.read_text(encoding="utf-8"))["shots"]
        return [(float(start), float(stop)) for start, stop in found] or None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _by_scenedetect(path: str | Path) -> list[Shot]:
    try:
        library: Any = importlib.import_module("scenedetect")
    except ImportError as error:
        raise UserError(
            "detector scenedetect needs PySceneDetect: pip install 'poodle-lightning[shots]'"
        ) from error
    check_file(str(path))
    scenes = library.detect(str(path), library.ContentDetector(), start_in_scene=True)
    # its scenes end where the next begins, here a shot ends with its last frame
    return [(start.seconds, end.seconds - 1 / float(end.framerate)) for start, end in scenes]

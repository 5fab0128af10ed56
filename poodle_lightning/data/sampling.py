"""When frames are taken: pairs, clips and windows, in seconds of one video.

Every sampler has ``span``, the longest stretch of video it can need, and ``times(duration, key)``, which is a
pure function of the video's duration and the item's random key. ``duration`` is the time of the last frame,
so that a time drawn is always one that can be read.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from poodle_lightning.ops.random import fold, uniform
from poodle_lightning.types import UserError

# Seconds that rounding may take from a stretch that was cut to a clip's length: less than any clock's tick.
SLACK = 1e-6


class TooShort(Exception):
    """The video is shorter than what a sampler needs from it (the skip reason ``too_short``)."""

    def __init__(self, duration: float, span: float) -> None:
        super().__init__(f"{duration:.3f} s of video, {span:.3f} s are needed")


class Sampler(ABC):
    """What the data set needs of a sampler.

    All are of this class, so that a setting on the command line (``data.sampler.frames``) is one of the
    sampler that the configuration names, and not of the first that has such a setting.
    """

    @property
    @abstractmethod
    def span(self) -> float:
        """The longest stretch of video needed, seconds."""

    @abstractmethod
    def times(self, duration: float, key: Tensor) -> list[float]:
        """Times of the frames, seconds in ``[0, duration]``."""


@dataclass(frozen=True)
class PairSampler(Sampler):
    """Two frames a random gap apart.

    Several pairs from one opened video (repeated sampling) are drawn independently, each anywhere in it, as
    PooDLe's are. With ``spread`` they share the decoded stretch instead: they begin at equal steps within so
    many seconds of the first pair's, so that further pairs cost little beyond their pixels. This changes the
    sampling: each pair alone is still drawn from all of the video, with gap and window of its own, but the
    pairs of one video are correlated. A batch shows fewer moments, and its gradient varies as that of a
    smaller batch would; the less the scene changes within ``spread``, the more so.

    Args:
        gap: shortest and longest time between the two frames, seconds. PooDLe on BDD100K: 15 to 30 frames at
            30 frames a second. ``(0, 0)`` is one frame seen twice.
        jitter: for a gap of 0 only: how far the second crop window may lie from the first, as a fraction of
            the crop's size. Unused otherwise: both windows are then the same.
        pairs_per_video: pairs from one opened video.
        spread: seconds over which the pairs of one video begin; None draws each on its own.
    """

    gap: tuple[float, float] = (0.5, 1.0)
    jitter: float = 0.1
    pairs_per_video: int = 1
    spread: float | None = None

    def check(self) -> None:
        """Refuse what makes no sense; see ``ClipSampler.check`` for why not while it is made.

        Raises:
            UserError: the gap is negative or reversed, or there are no pairs.
        """
        low, high = self.gap
        if not 0 <= low <= high < math.inf:
            raise UserError(f"gap must be (shortest, longest) seconds ≥ 0, not {self.gap}")
        if self.pairs_per_video < 1:
            raise UserError(f"pairs_per_video must be at least 1, not {self.pairs_per_video}")
        if self.jitter < 0 or (self.spread or 0.0) < 0:
            raise UserError(f"jitter and spread must be ≥ 0, not {self.jitter} and {self.spread}")

    @property
    def span(self) -> float:
        """The longest gap and the way from the first pair's start to the last's, seconds."""
        return self.gap[1] + self._step * (self.pairs_per_video - 1)

    @property
    def _step(self) -> float:
        return (self.spread or 0.0) / self.pairs_per_video

    def times(self, duration: float, key: Tensor) -> list[float]:
        """``[a₀, b₀, a₁, b₁, …]`` seconds, two per pair.

        Args:
            duration: time of the video's last frame, seconds.
            key: ``()`` or ``(1,)`` int64.

        Raises:
            TooShort: the duration is less than ``span``.
        """
        start = _start(duration, self.span, key)
        low, high = self.gap
        gaps = _draw(key, "gap", self.pairs_per_video)
        starts = [start + number * self._step for number in range(self.pairs_per_video)]
        if self.spread is None:
            room = max(duration - self.span, 0.0)
            starts = [share * room for share in _draw(key, "starts", self.pairs_per_video)]
        found = []
        for first, share in zip(starts, gaps, strict=True):
            found += [first, min(first + low + (high - low) * share, duration)]
        return found


@dataclass(frozen=True)
class ClipSampler(Sampler):
    """``frames`` frames, ``step`` seconds apart, from a random start; see ``check``."""

    frames: int
    step: float

    def check(self) -> None:
        """Refuse what makes no sense.

        Not done while it is made: the command line tries every kind of sampler on a configuration, and takes
        whatever that raises for "not of this kind".

        Raises:
            UserError: no frames, or a step that is not positive.
        """
        if self.frames < 1 or not 0 < self.step < math.inf:
            raise UserError(
                f"data.sampler: a clip needs frames >= 1 and step > 0 s, not {self.frames} and {self.step}"
            )

    @property
    def span(self) -> float:
        """Seconds from the first frame to the last."""
        return self.step * (self.frames - 1)

    def times(self, duration: float, key: Tensor) -> list[float]:
        """Times of the frames, seconds, increasing.

        Raises:
            TooShort: the duration is less than ``span``.
        """
        start = _start(duration, self.span, key)
        return [min(start + self.step * k, duration) for k in range(self.frames)]


@dataclass(frozen=True)
class WindowSampler(Sampler):
    """``frames`` frames within a window of ``seconds`` at a random place; the laws of VITO, Fig. A.2.

    What makes no sense is refused by ``check``.

    Args:
        frames: how many; their times are increasing.
        seconds: length of the window. (VITO: 2.56)
        law: how the frames lie in the window. "uniform": each at a uniform time, independent of the others
            (VITO's marginal sampling; the most frequent distance of two is 0). "chunks": one at a uniform
            time of each of as many equal parts (Xu & Wang, 2021; the figure calls this "Uniform"). "gap": at
            equal distances, from one end of the window to the other (Gordon et al., 2020, have a fixed
            distance; that it is ``seconds / (frames − 1)`` is ours).
    """

    frames: int
    seconds: float
    law: Literal["uniform", "gap", "chunks"] = "uniform"

    def check(self) -> None:
        """Refuse what makes no sense; not done while it is made, see ``ClipSampler.check``.

        Raises:
            UserError: no frames, a window that is negative, or an unknown law.
        """
        if self.frames < 1 or not 0 <= self.seconds < math.inf:
            raise UserError(
                "data.sampler: a window needs frames >= 1 and seconds >= 0,"
                f" not {self.frames} and {self.seconds}"
            )
        if self.law not in ("uniform", "gap", "chunks"):
            raise UserError(f"data.sampler: law must be uniform, gap or chunks, not {self.law!r}")

    @property
    def span(self) -> float:
        """Length of the window, seconds."""
        return self.seconds

    def times(self, duration: float, key: Tensor) -> list[float]:
        """Times of the frames, seconds, increasing.

        Raises:
            TooShort: the duration is less than ``span``.
        """
        start = _start(duration, self.span, key)
        return [min(start + self.seconds * share, duration) for share in self._shares(key)]

    def _shares(self, key: Tensor) -> list[float]:
        """Places of the frames in the window, in [0, 1]."""
        if self.law == "gap":
            return [k / max(self.frames - 1, 1) for k in range(self.frames)]
        drawn = _draw(key, "frames", self.frames)
        if self.law == "chunks":
            return [(k + share) / self.frames for k, share in enumerate(drawn)]
        return sorted(drawn)


class Timed(Protocol):
    """Anything with a duration: a ``VideoInfo`` is one."""

    @property
    def duration(self) -> float:
        """Time of the last frame, seconds."""
        ...


def split_long(videos: Sequence[Timed], seconds: float = 10.0) -> list[tuple[int, float, float]]:
    """Cut long videos into clips, so that an hour of film is sampled as often as an hour of short ones.

    Args:
        videos: with durations.
        seconds: length of a clip.

    Returns:
        ``(video number, start, stop)`` in order. All clips of a video are ``seconds`` long but for the last:
        a rest of at least half that is a clip, a shorter one belongs to the clip before it. A video without
        length (a single frame) is one clip.

    Raises:
        ValueError: the length is not positive.
    """
    if not seconds > 0:
        raise ValueError(f"clips must be longer than 0 s, not {seconds}")
    clips = []
    for number, video in enumerate(videos):
        count = max(1, math.floor(video.duration / seconds + 0.5))
        edges = [k * seconds for k in range(count)] + [video.duration]
        clips += [(number, edges[k], edges[k + 1]) for k in range(count)]
    return clips


def _start(duration: float, span: float, key: Tensor) -> float:
    """A uniform start that leaves room for ``span``."""
    if duration < span - SLACK:
        raise TooShort(duration, span)
    return max(duration - span, 0.0) * _draw(key, "start", 1)[0]


def _draw(key: Tensor, label: str, count: int) -> list[float]:
    """Numbers in [0, 1) in double precision: a float32 second in an hour of film is off by a tick."""
    numbers: list[float] = uniform(fold(key.reshape(1), label), count, dtype=torch.float64)[0].tolist()
    return numbers

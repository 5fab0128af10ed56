"""Which videos train, which are held out, and how long ones are cut.

What is done to a source's entries, in this order: those too short for a clip are left out; ``hours`` draws a
subset; with ``cuts`` to avoid, those without a long enough shot are left out; some are held out; cuts,
``clip_seconds`` or ``start_every`` divide what is left of each side.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from poodle_lightning.data.sampling import SLACK, split_long
from poodle_lightning.data.shots import Detector, Shot, find_shots
from poodle_lightning.data.sources import Entry, FolderSource, LazyEntries, Source
from poodle_lightning.data.starts import StartTimes
from poodle_lightning.data.subsets import of_hours, pick
from poodle_lightning.ops.random import key_of, permutation
from poodle_lightning.types import Skip, UserError

# Seconds between held-out clips of one frame, which never overlap however close they are.
_STILLS_APART = 1.0


@dataclass(frozen=True)
class Parts:
    """What trains, what is held out, and which videos are left out and why."""

    train: Sequence[Entry]
    val: Sequence[Entry]
    left_out: tuple[Skip, ...]


@dataclass(frozen=True)
class Division:
    """How the entries of a source become those of training and validation.

    Args:
        span: seconds that a clip needs.
        seed: of what is drawn.
        val_fraction: see :func:`held_out`.
        clip_seconds: see :func:`segments`.
        start_every: seconds from start to start, see ``StartTimes``. Held-out clips do not overlap each
            other, and single frames are a second apart: neighbouring starts would show nearly the same.
        hours: see ``of_hours``.
        cuts: ``avoid`` takes the shots of each video, as ``data.shots`` finds them, for videos.

    Raises:
        UserError: the settings contradict each other.
    """

    span: float
    seed: int = 0
    val_fraction: float = 0.0
    clip_seconds: float | None = None
    start_every: float | None = None
    hours: float | None = None
    cuts: Literal["keep", "avoid"] = "keep"

    def __post_init__(self) -> None:
        if not 0 <= self.val_fraction < 1:
            raise UserError(
                f"val_fraction {self.val_fraction}: give a share of the videos, from 0 to below 1"
            )
        if self.clip_seconds is not None and self.clip_seconds < self.span:
            raise UserError(f"clip_seconds {self.clip_seconds:g} is less than a clip needs ({self.span:g} s)")
        for name, value in (("start_every", self.start_every), ("hours", self.hours)):
            if value is not None and not 0 < value < float("inf"):
                raise UserError(f"{name} {value:g} must be above 0")
        if self.start_every is not None and self.clip_seconds is not None:
            raise UserError("clip_seconds and start_every are two ways to cut long videos: give one of them")
        if self.cuts not in ("keep", "avoid"):
            raise UserError(f"cuts {self.cuts!r}: choose keep or avoid")

    def of(self, source: Source, name: str, workers: int = 0) -> Parts:
        """Divide.

        Args:
            source: whose entries.
            name: of the source, for messages.
            workers: processes that look for cuts the first time.

        Raises:
            UserError: no entry is long enough, or not even a shot of one.
        """
        usable, left_out = long_enough(source.entries, self.span)
        if not usable:
            raise UserError(
                f"{name}: none of {len(source.entries)} videos lasts the {self.span:g} s that a clip needs: "
                "use a smaller gap or window, closer or fewer frames, or longer videos"
            )
        if self.hours is not None:
            usable = of_hours(usable, self.hours, self.seed, self.span)
        shots: Mapping[str, list[Shot]] = {}
        if self.cuts == "avoid":
            # before any is held out: those left out are not to be the ones
            shots, failed = _shots(source, usable, workers)
            usable, short = self._with_room(usable, shots, name)
            left_out += failed + short
        train, val = held_out(usable, self.val_fraction, self.span, self.seed, apart=self.start_every or 0.0)
        if self.cuts == "avoid":
            train = self._within(train, shots, name, "beginning that trains")
            val = self._within(val, shots, name, "held-out end")
        if self.clip_seconds is not None:
            train, val = (segments(part, self.clip_seconds, self.span) for part in (train, val))
        if self.start_every is not None:
            apart = max(self.start_every, self.span or _STILLS_APART)
            train, val = StartTimes(train, self.start_every, self.span), StartTimes(val, apart, self.span)
        return Parts(train, val, left_out)

    def _with_room(
        self, entries: Sequence[Entry], shots: Mapping[str, list[Shot]], name: str
    ) -> tuple[list[Entry], tuple[Skip, ...]]:
        """Entries with a shot that holds a clip, and the others that have shots as skips."""
        found, short = [], []
        for entry in entries:
            if any(map(self._holds_clip, _shots_of(entry, shots))):
                found.append(entry)
            elif entry.path in shots:
                why = f"no shot lasts the {self.span:g} s that a clip needs"
                short.append(Skip(entry.path, "too_short", why))
        if not found:
            self._within(entries, shots, name)  # raises
        return found, tuple(short)

    def _within(
        self, entries: Sequence[Entry], shots: Mapping[str, list[Shot]], name: str, part: str = ""
    ) -> list[Entry]:
        """The shots of the entries that hold a clip, as entries; ``part``: which of a film, for messages."""
        parts = [shot for entry in entries for shot in _shots_of(entry, shots)]
        found = list(filter(self._holds_clip, parts))
        if entries and not found:
            longest = max((shot.duration for shot in parts), default=0.0)
            of, fraction = (f" of the {part}", " another val_fraction,") if part else ("", "")
            raise UserError(
                f"{name}: none of {len(parts)} shots{of} lasts the {self.span:g} s that a clip needs (the"
                f" longest {longest:.2f} s): use fewer or closer frames,{fraction} or cuts keep"
            )
        return found

    def _holds_clip(self, shot: Entry) -> bool:
        return shot.duration >= self.span - SLACK


def _shots_of(entry: Entry, shots: Mapping[str, list[Shot]]) -> list[Entry]:
    """What of an entry lies in each shot of its video, as entries."""
    return [
        replace(entry, start=max(entry.start, start), stop=min(entry.stop, stop))
        for start, stop in shots.get(entry.path, ())
        if start <= entry.stop and stop >= entry.start
    ]


def _shots(
    source: Source, entries: Sequence[Entry], workers: int
) -> tuple[dict[str, list[Shot]], tuple[Skip, ...]]:
    """The shots of every video by its path, and the videos that cannot be read through."""
    if not isinstance(source, FolderSource):
        raise UserError("cuts avoid is for video files: set --data.cuts keep")
    last: dict[str, Entry] = {}  # of several shots of a list in one video, the one that ends last
    for entry in entries:
        last[entry.path] = max(entry, last.get(entry.path, entry), key=lambda one: one.stop)
    videos, until = [source.video(entry) for entry in last.values()], [e.stop for e in last.values()]
    found = find_shots(videos, Detector(), workers=workers, until=until)
    pairs = list(zip(last.values(), found, strict=True))
    failed = tuple(shots for _, shots in pairs if isinstance(shots, Skip))
    if len(failed) == len(pairs):
        raise UserError(f"{failed[0].path}: its shots cannot be found: {failed[0].detail}")
    return {entry.path: shots for entry, shots in pairs if not isinstance(shots, Skip)}, failed


def long_enough(entries: Sequence[Entry], span: float) -> tuple[Sequence[Entry], tuple[Skip, ...]]:
    """Entries that last ``span`` seconds, and the others as skips with the reason ``too_short``."""
    if span == 0:  # any does; a million images are not looked at one by one
        return entries, ()
    usable = [entry for entry in entries if entry.duration >= span]
    short = [
        Skip(entry.path, "too_short", f"{entry.duration:.3f} s of video, {span:.3f} s are needed")
        for entry in entries
        if entry.duration < span
    ]
    return usable, tuple(short)


def held_out(
    entries: Sequence[Entry], fraction: float, span: float, seed: int, apart: float = 0.0
) -> tuple[Sequence[Entry], Sequence[Entry]]:
    """Training and held-out entries.

    Whole videos are held out, at least one. Of a single video it is the end: ``fraction`` of its length, but
    at least what a clip needs.

    Args:
        entries: whole videos, or shots of them; all shots of a video go together.
        fraction: share of the videos that is held out; 0 holds out none.
        span: seconds that a clip needs.
        seed: chooses the videos.
        apart: seconds between the two parts of a single video, at least; if above 0 at least a frame, so that
            no frame is in both.

    Raises:
        UserError: a single video is too short to be divided.
    """
    if fraction == 0:
        return entries, []
    if len(entries) == 1:
        return _in_time(entries[0], fraction, span, max(apart, entries[0].interval) if apart else 0.0)
    video = _video_numbers(entries)
    videos = int(video.max()) + 1
    count = min(max(1, round(fraction * videos)), videos - 1)
    chosen = np.zeros(videos, bool)
    chosen[permutation(key_of(seed, "held out").reshape(1), videos)[0, :count].numpy()] = True
    return pick(entries, np.flatnonzero(~chosen[video])), pick(entries, np.flatnonzero(chosen[video]))


def _video_numbers(entries: Sequence[Entry]) -> np.ndarray:
    """For each entry the number of its video, 0, 1, …; shots of a single video count as videos."""
    if isinstance(entries, LazyEntries):  # each is a video or an image, and making a million takes time
        return np.arange(len(entries))
    videos, numbers = np.unique([entry.id for entry in entries], return_inverse=True)
    return numbers if len(videos) > 1 else np.arange(len(entries))


def _in_time(entry: Entry, fraction: float, span: float, apart: float) -> tuple[list[Entry], list[Entry]]:
    if entry.duration == 0:
        raise UserError(f"{entry.path}: a single image is not divided: set val_fraction to 0 or add more")
    cut = entry.stop - max(fraction * entry.duration, span)
    if cut - apart <= entry.start or cut - apart - entry.start < span:
        raise UserError(
            f"{entry.path}: the only video lasts {entry.duration:.2f} s, too short to hold out"
            f" {max(fraction * entry.duration, span):.2f} s of it: set val_fraction to 0 or add videos"
        )
    return [replace(entry, stop=cut - apart)], [replace(entry, start=cut)]


def segments(entries: Sequence[Entry], seconds: float, span: float = 0.0) -> list[Entry]:
    """Entries cut into stretches of ``seconds`` (``sampling.split_long``), each long enough for a clip.

    A last stretch shorter than ``span`` reaches back into the one before it.
    """
    cut = []
    for number, start, stop in split_long(entries, seconds):
        entry = entries[number]
        start = max(0.0, min(start, stop - span))
        cut.append(replace(entry, start=entry.start + start, stop=entry.start + stop))
    return cut

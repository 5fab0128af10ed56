"""Frames chosen by the tracks of a video, and the points that join them (PiCo, Sharma et al. 2022, §3.3)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from poodle_lightning.data.headers import Damaged
from poodle_lightning.data.sampling import SLACK, Sampler
from poodle_lightning.data.sources import Entry, Source
from poodle_lightning.data.split import Division, Parts, held_out
from poodle_lightning.data.tracks import Tracked, TrackStore, track_name, video_print
from poodle_lightning.data.windows import Window
from poodle_lightning.ops.geometry import inside
from poodle_lightning.ops.random import fold
from poodle_lightning.ops.tracks import DELTA, Spans, alive, anchor_frames, pairs_of, random_frames
from poodle_lightning.types import UserError

# Track files by which it is judged whether a folder's can be used.
_LOOKED_AT = 50
# Seconds between the training part and the held-out part of a single stretch, at least.
_APART = 1e-3


class Untracked(Exception):
    """A video from whose tracks no clip can be drawn.

    Args:
        reason: ``no_tracks``, ``damaged_tracks``, ``tracks_of_another`` (video, estimator or γ),
            ``tracks_below_delta``, ``no_active_track``, ``too_short``.
        detail: one line for a person.
    """

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason, self.detail = reason, detail


@dataclass(frozen=True)
class TrackedFrames(Sampler):
    """``frames`` frames of a video that has tracks, and pairs of points of the first with each other one.

    What makes no sense is refused by ``check`` and ``check_folder``. Videos without usable tracks are skipped
    and counted. What was tracked is what :class:`Stretches` finds.

    Args:
        folder: of the tracks; ``poodle-lightning trace`` fills it.
        frames: k, the anchor among them; the paper leaves open whether it counts. 2 is ours.
        by: "anchor" takes the frames with most of the furthest ends of the anchor's tracks; "random" any.
        motion: "tracks"; "still" puts the second point where the first is (Static (Video)).
        delta: δ in squared pixels; the paper's is not known.
        gamma: tracks with another γ are skipped; None takes any.
        estimator: fingerprint; tracks of another flow are skipped; None takes any.
        points: rows of ``Clip.points`` of a clip: fewer pairs are filled up, more are drawn from. (256 clips
            of 256: 65,536 pairs; ours, the paper's is not known.)
    """

    folder: str
    frames: int = 2
    by: Literal["anchor", "random"] = "anchor"
    motion: Literal["tracks", "still"] = "tracks"
    delta: float = DELTA
    gamma: float | None = None
    estimator: str | None = None
    points: int = 256

    def check(self) -> None:
        """Refuse what makes no sense; not done while it is made, see ``ClipSampler.check``.

        Raises:
            UserError: fewer than two frames, no points, or an unknown word.
        """
        if self.frames < 2 or self.points < 1:
            raise UserError(
                f"data.sampler: tracks join frames >= 2 by points >= 1, not {self.frames} and {self.points}"
            )
        if self.by not in ("anchor", "random") or self.motion not in ("tracks", "still"):
            raise UserError(
                f"data.sampler: by is anchor or random and motion tracks or still, not {self.by} and "
                f"{self.motion}"
            )

    @property
    def store(self) -> TrackStore:
        """The files."""
        return TrackStore(self.folder, self.estimator, self.gamma)

    @property
    def span(self) -> float:
        """0: how long a video must be, its tracks say."""
        return 0.0

    def times(self, duration: float, key: Tensor) -> list[float]:
        """Not to be had without tracks: see :meth:`draw`.

        Raises:
            TypeError: always.
        """
        raise TypeError("TrackedFrames draws from the tracks of a video: use draw")

    def check_folder(self, source: Source, tracked: Sequence[Entry], root: str | None) -> None:
        """Refuse a folder without tracks of any stretch, and a δ that the tracks do not know.

        The first files that are there stand for all: what is wrong with a single one is found when it is
        drawn from.

        Args:
            source: of the stretches.
            tracked: what was tracked, see :class:`Stretches`.
            root: of the data, for the names.

        Raises:
            UserError: there are no tracks, none that are looked at can be used, or δ is above their limit.
        """
        store, refused = self.store, None
        named = ((entry, track_name(entry, root)) for entry in tracked)
        there = ((entry, name) for entry, name in named if store.path(name).is_file())
        for entry, name in islice(there, _LOOKED_AT):
            try:
                self._spans(store.get(name, video_print(source, entry)), name)
                return
            except (UserError, OSError) as error:
                refused = refused or UserError(str(error))
        raise refused or UserError(
            f"{self.folder} has tracks of none of the {len(tracked)} videos: set data.sampler.folder, or "
            "make them by poodle-lightning trace"
        )

    def draw(
        self, name: str, fingerprint: str, key: Tensor, within: tuple[float, float] | None = None
    ) -> tuple[list[float], Tensor]:
        """Moments and points of a clip.

        Args:
            name: of the stretch that was tracked, see ``data.tracks.track_name``.
            fingerprint: of the video as it is now.
            key: ``()`` int64.
            within: first and last second that may be drawn; None: all that was tracked.

        Returns:
            ``frames`` seconds of the video, the anchor's first, and ``(points, frames, 2)`` float32 in extent
            coordinates of the whole frame; a row has the anchor's place and that in one other frame, NaN
            else. Where fewer frames share tracks with the anchor, the last one stands again, without points.

        Raises:
            Untracked: no clip can be drawn.
        """
        store = self.store
        if not store.path(name).is_file():
            raise Untracked(
                "no_tracks", f"no tracks of {name} in {self.folder}: make them by poodle-lightning trace"
            )
        try:
            tracked = store.get(name, fingerprint)
        except UserError as error:
            damaged = isinstance(error.__context__, Damaged)
            raise Untracked("damaged_tracks" if damaged else "tracks_of_another", str(error)) from error
        try:
            spans = self._spans(tracked, name)
        except UserError as error:
            raise Untracked("tracks_below_delta", str(error)) from error
        first, last = _frames_within(tracked.times, within)
        spans = Spans(spans.frames, spans.first.clip(first, last), spans.last.clip(first, last))
        if last - first + 1 < self.frames:
            raise Untracked("too_short", f"{last - first + 1} frames, {self.frames} are needed")
        if not spans.active.any():
            raise Untracked(
                "no_active_track", f"no track of {name} is active on any frame with delta = {self.delta:g}"
            )
        chosen = self._chosen(fold(key, "tracked frames"), spans, first, last)
        pairs = pairs_of(
            tracked.tracks, spans, chosen, fold(key, "pairs"), self.points, self.motion == "still"
        )
        points = torch.full((self.points, self.frames, 2), torch.nan)
        rows = torch.arange(len(pairs))
        points[rows, 0], points[rows, pairs.other] = pairs.first, pairs.second
        chosen += chosen[-1:] * (self.frames - len(chosen))
        return np.asarray(tracked.times)[chosen].tolist(), points

    def ways(self, name: str, fingerprint: str, time: float) -> Tensor:
        """Where the tracks that are active at a moment are on every frame, for pictures.

        Args:
            name: of the stretch that was tracked.
            fingerprint: of the video as it is now.
            time: seconds of the video, of a frame.

        Returns:
            ``(P, frames, 2)`` float32 in extent coordinates of the whole frame; NaN before and after a track.

        Raises:
            UserError: there are no such tracks, or δ is above their limit.
        """
        tracked = self.store.get(name, fingerprint)
        tracks, spans = tracked.tracks, self._spans(tracked, name)
        rows = np.flatnonzero(spans.on(int(np.abs(np.asarray(tracked.times) - time).argmin())))
        found = np.full((len(rows), tracks.frames, 2), np.nan, np.float32)
        for place, row in enumerate(rows):
            frames = np.arange(spans.first[row], spans.last[row] + 1)
            found[place, frames] = tracks.at(np.full(len(frames), row), frames)
        return torch.from_numpy(found)

    def _spans(self, tracked: Tracked, name: str) -> Spans:
        """From when to when tracks live under δ.

        Raises:
            UserError: δ is above their limit.
        """
        if not self.delta <= tracked.tracks.limit:
            raise UserError(
                f"data.sampler.delta = {self.delta:g} is above the limit {tracked.tracks.limit:g} with which "
                f"{name} was tracked: give less, or track it again by poodle-lightning trace --limit "
                f"{self.delta:g}"
            )
        return alive(tracked.tracks, self.delta)

    def _chosen(self, key: Tensor, spans: Spans, first: int, last: int) -> list[int]:
        """Frames from ``first`` to ``last``, the anchor's first; anchors lie where a track is active."""
        if self.by == "anchor":
            return anchor_frames(key, spans, self.frames)
        part = Spans(last - first + 1, spans.first - first, spans.last - first)
        return [first + frame for frame in random_frames(key, part, self.frames)]


class Stretches:
    """The stretches of a source: what is tracked, and what trains and what is held out. Each is found once.

    What is tracked are all videos, or shots or stretches of them, **before** any is held out. That depends on
    ``hours``, ``cuts``, ``clip_seconds`` and the seed of the data alone, not on what a clip needs or how many
    are held out. So ``poodle-lightning trace`` and training agree on names, whatever their samplers.

    Args:
        division: of the data.
        name: of the source, for messages.
        workers: processes that look for cuts the first time.
        sampler: of the data. If it is ``TrackedFrames``, then what is tracked is divided: of several videos
            some are held out, with all of their stretches; of one video some stretches; of a single stretch
            its end, and both parts draw from the tracks of the whole. Otherwise ``Division`` divides.

    Raises:
        UserError: the division says at which moments clips of tracked frames begin.
    """

    def __init__(self, division: Division, name: str, workers: int, sampler: Sampler) -> None:
        self.division, self.name, self.workers = division, name, workers
        self.tracked = isinstance(sampler, TrackedFrames)
        if self.tracked and division.start_every is not None:
            raise UserError("tracks choose the moments of clips: give data.clip_seconds, not start_every")
        self._whole: Parts | None = None
        self._divided: Parts | None = None

    def whole(self, source: Source) -> Parts:
        """What is tracked, as if all of it trained."""
        if self._whole is None:
            undivided = replace(self.division, span=0.0, val_fraction=0.0, start_every=None)
            self._whole = undivided.of(source, self.name, self.workers)
        return self._whole

    def divided(self, source: Source) -> Parts:
        """What trains and what is held out."""
        if self._divided is None:
            division = self.division
            if self.tracked:
                whole = self.whole(source)
                parts = held_out(whole.train, division.val_fraction, 0.0, division.seed, apart=_APART)
                self._divided = Parts(*parts, whole.left_out)
            else:
                self._divided = division.of(source, self.name, self.workers)
        return self._divided

    def only(self, source: Source) -> Entry | None:
        """What was tracked where that is a single stretch, of which all others are parts; else None."""
        whole = self.whole(source).train if self.tracked else ()
        return whole[0] if len(whole) == 1 else None


def _frames_within(times: np.ndarray, within: tuple[float, float] | None) -> tuple[int, int]:
    """First and last of the frames that may be drawn; the last is before the first where there are none."""
    if within is None:
        return 0, len(times) - 1
    first = int(np.searchsorted(times, within[0] - SLACK))
    return first, int(np.searchsorted(times, within[1] + SLACK, side="right")) - 1


def into_window(points: Tensor, window: Window, width: int, height: int) -> Tensor:
    """Points of the whole frame in the extent of a window; NaN outside of it.

    Args:
        points: ``(..., 2)``.
        window: of the frame.
        width: of the frame, px.
        height: of the frame, px.
    """
    x0, y0, x1, y1 = window.inner
    size, low = points.new_tensor([width, height]), points.new_tensor([x0, y0])
    moved = ((points + 1) / 2 * size - low) / points.new_tensor([x1 - x0, y1 - y0]) * 2 - 1
    return torch.where(inside(moved)[..., None], moved, torch.nan)

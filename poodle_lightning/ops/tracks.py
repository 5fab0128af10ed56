"""Points followed through a video by optical flow, and the frames and pairs that are drawn from them.

PiCo (Sharma et al. 2022, "Pixel-level Correspondence for Self-Supervised Learning from Video", §3.2 and 3.3),
after Sundaram et al. 2010, "Dense point trajectories by GPU-accelerated large displacement optical flow".
A point moves by the flow, ``p' = p + w`` with ``w = F_t→t+1(p)`` and ``ŵ = F_t+1→t(p')``, both bilinear, and
stops where it leaves the frame or where the two do not agree:

    ``|w + ŵ|² ≥ γ (|w|² + |ŵ|²) + δ``    (PiCo eq. 3, the condition to go on negated)

The **consistency** ``d = |w + ŵ|² − γ (|w|² + |ŵ|²)``, squared pixels, is kept for every step: a step holds
where ``d < δ``. So δ may change without following again (:func:`alive`); γ may not.

Two numbers of 16 bits say where a point is, one how consistent its step was: 6 bytes per point and frame. The
consistency is in half precision, as the paper has it. Places are fixed-point numbers of the extent: half
precision would be wrong by up to W/8192 px near the border (0.23 px of 1920), these are by W/131068 (0.015).
Whether a point goes on is decided by the **rounded** consistency, so that following with a small δ and
cutting what was followed with a large one agree to the bit.

Frames are numbers here, 0 … n−1; what moments they stand for is kept beside the tracks (``data.tracks``).
Following runs where the points are; everything that is drawn from tracks runs on the host, in numpy.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from poodle_lightning.ops.geometry import Flow, Size, inside, island
from poodle_lightning.ops.random import fold, permutation, randint, uniform

GAMMA = 0.01  # Sundaram et al. 2010, eq. 5; PiCo's own values of both are not known
DELTA = 0.5  # the same; squared pixels
_UNITS = 32767  # of a place, from the middle of the frame to its border

Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True)
class Tracks:
    """Where P points are on the frames on which they were followed.

    The S places of all tracks stand one after the other. Track i has rows ``offsets[i] … offsets[i+1] − 1``,
    one per frame from ``first[i]`` on, at least one. Host arrays; they may be mapped from a file.

    Args:
        frames: how many frames the video has, n.
        size: height and width of the frame in whose pixels the consistency is measured.
        gamma: γ of the consistency.
        limit: the largest δ that can be asked for: following stopped there.
        first: ``(P,)`` integers, the frame on which a track starts.
        offsets: ``(P + 1,)`` int64.
        places: ``(S, 2)`` int16, ``(x, y)`` in extent coordinates times 32767.
        consistency: ``(S,)`` float16, d of the step that led here, squared pixels; −∞ where a track starts.
    """

    frames: int
    size: Size
    gamma: float
    limit: float
    first: Array
    offsets: Array
    places: Array
    consistency: Array

    def __len__(self) -> int:
        return len(self.first)

    @property
    def lengths(self) -> Array:
        """On how many frames each track was followed, ``(P,)`` int64."""
        return np.diff(self.offsets)

    def at(self, rows: Array, frames: Array | int) -> Array:
        """Where tracks are on frames on which they were followed.

        Args:
            rows: ``(N,)`` numbers of tracks.
            frames: ``(N,)``, or one for all.

        Returns:
            ``(N, 2)`` float32, ``(x, y)`` in extent coordinates.

        Raises:
            IndexError: a track was not followed on its frame.
        """
        after = np.asarray(frames, np.int64) - self.first[rows]
        if ((after < 0) | (after >= self.lengths[rows])).any():
            raise IndexError("a track was asked for on a frame on which it was not followed")
        return np.asarray(self.places[self.offsets[rows] + after], np.float32) / np.float32(_UNITS)


@dataclass(frozen=True)
class Spans:
    """From when to when tracks live under a δ.

    A track without a single step joins no two frames: it is active nowhere.

    Args:
        frames: how many frames the video has, n.
        first: ``(P,)`` int64, first frame.
        last: ``(P,)`` int64, last frame, ``>= first``.
    """

    frames: int
    first: Array
    last: Array

    def on(self, *frames: int) -> Array:
        """Which tracks are active on all of some frames, ``(P,)`` bool."""
        active = self.last > self.first
        for frame in frames:
            active = active & (self.first <= frame) & (frame <= self.last)
        return np.asarray(active)

    @property
    def active(self) -> Array:
        """How many tracks are active on each frame, ``(n,)`` int64."""
        moves = self.last > self.first
        change = np.bincount(self.first[moves], minlength=self.frames + 1)
        change -= np.bincount(self.last[moves] + 1, minlength=self.frames + 1)
        return np.asarray(np.cumsum(change)[: self.frames])


@dataclass(frozen=True)
class PointPairs:
    """Points of two frames that show the same thing. On the host.

    Args:
        first: ``(M, 2)`` float32, ``(x, y)`` in extent coordinates of the anchor.
        second: ``(M, 2)`` float32, the same points in the other frame.
        other: ``(M,)`` int64, which of the drawn frames the other one is, 1 … k−1.
        track: ``(M,)`` int64, number of the track.
    """

    first: Tensor
    second: Tensor
    other: Tensor
    track: Tensor

    def __len__(self) -> int:
        return len(self.track)


def starts(key: Tensor, count: int, frames: int) -> tuple[Tensor, Tensor]:
    """Points to follow, uniform in space and time (PiCo App. A.1).

    The first points of a larger count are those of a smaller one, so a part of the tracks is a fair draw too.

    Args:
        key: ``()`` int64.
        count: how many, P.
        frames: how many frames the video has.

    Returns:
        places ``(P, 2)`` float32 in extent coordinates and frames ``(P,)`` int64, on the host.
    """
    places = uniform(fold(key, "place").reshape(1), 2 * count, -1.0, 1.0)
    return places.reshape(count, 2), randint(fold(key, "frame").reshape(1), frames, count)[0]


@torch.no_grad()
def follow(
    forward: Flow | Iterable[Flow],
    backward: Flow | Iterable[Flow],
    points: Tensor,
    start_frames: Tensor,
    gamma: float = GAMMA,
    *,
    limit: float = float("inf"),
    size: Size | None = None,
) -> Tracks:
    """Follow points until they leave the frame, disagree by ``limit``, or the video ends.

    All points of a frame move at once; only frames are looped over. On the CPU the work per frame is that of
    the points under way, elsewhere that of all of them, and nothing is read back from frame to frame.

    Args:
        forward: n − 1 rows, row t from frame t to t + 1; or one flow of one row after the other, which need
            not exist at the same time.
        backward: row t from frame t + 1 to t.
        points: ``(P, 2)`` float32 or float64 in extent coordinates, inside the frame; any device, the flow's.
        start_frames: ``(P,)`` integers, 0 … n−1.
        gamma: share of the squared lengths that is tolerated.
        limit: largest δ that will be asked for, squared pixels; ∞ follows through occlusions. A consistency
            beyond half precision (65 504) ends a track in any case, and so does flow that is not finite.
        size: frame in whose pixels the consistency is measured; None is that of the first flow.

    Returns:
        Tracks in the order of the points, on the host.

    Raises:
        ValueError: no flow, not as many steps back as forth, a point outside the frame, or a start after the
            last frame.
    """
    if not bool(inside(points).all()):
        raise ValueError("points to follow must start inside the frame")
    compact = _answers_at_once(points.device)
    begin = start_frames.to(points.device)
    now, running = points.clone(), torch.ones(len(points), dtype=torch.bool, device=points.device)
    steps: list[tuple[Tensor | None, Tensor, Tensor, Tensor]] = []
    with island(points.device.type):
        for frame, (there, back) in enumerate(zip(_one_by_one(forward), _one_by_one(backward), strict=True)):
            size = there.size if size is None else size
            on = running & (begin <= frame)
            rows = on.nonzero()[:, 0] if compact else None
            at = slice(None) if rows is None else rows
            place, consistency = _step(there, back, now[at], gamma, size)
            keep = on[at] & inside(place) & (consistency.float() < limit)
            now[at] = torch.where(keep[:, None], place, now[at])
            running[at] &= keep | ~on[at]
            steps.append((rows, keep, _units(place), consistency))
    if size is None:
        raise ValueError("no flow to follow points by: a video needs at least two frames")
    if len(start_frames) and not 0 <= int(start_frames.min()) <= int(start_frames.max()) <= len(steps):
        raise ValueError(f"points must start on frames 0 … {len(steps)}")
    first = start_frames.cpu().numpy().astype(np.int32)
    return Tracks(len(steps) + 1, size, float(gamma), float(limit), first, *_by_track(points, steps))


def _answers_at_once(device: torch.device) -> bool:
    """Whether asking which points are under way does not wait for work that was sent to a device."""
    return device.type == "cpu"


def _one_by_one(flow: Flow | Iterable[Flow]) -> Iterator[Flow]:
    return (flow[t : t + 1] for t in range(len(flow))) if isinstance(flow, Flow) else iter(flow)


def _step(there: Flow, back: Flow, points: Tensor, gamma: float, size: Size) -> tuple[Tensor, Tensor]:
    """Where points ``(N, 2)`` are on the next frame, and the step's consistency ``(N,)`` as half floats."""
    way = there.at(points[None, None])[0, 0]
    place = points + way
    way, again = _in_pixels(way, size), _in_pixels(back.at(place[None, None])[0, 0], size)
    tolerated = gamma * (way.square().sum(-1) + again.square().sum(-1))
    return place, ((way + again).square().sum(-1) - tolerated).half()


def _in_pixels(way: Tensor, size: Size) -> Tensor:
    x, y = way.unbind(-1)
    return torch.stack([x * (size[1] / 2.0), y * (size[0] / 2.0)], dim=-1)


def _units(points: Tensor) -> Tensor:
    return (points * _UNITS).round().nan_to_num(0.0).clamp(-_UNITS, _UNITS).to(torch.int16)


def _by_track(
    points: Tensor, steps: list[tuple[Tensor | None, Tensor, Tensor, Tensor]]
) -> tuple[Array, Array, Array]:
    """Offsets, places and consistencies, track after track, from what was noted frame after frame."""
    every = np.arange(len(points))
    rows, places = [every], [_units(points).cpu().numpy()]
    consistency = [np.full(len(points), -np.inf, np.float16)]
    for at, keep, place, value in steps:
        kept = keep.cpu().numpy()
        rows.append((every if at is None else at.numpy())[kept])
        places.append(place.cpu().numpy()[kept])
        consistency.append(value.cpu().numpy()[kept])
    row = np.concatenate(rows)
    order = np.argsort(row, kind="stable")  # within a track the frames stay in order
    offsets = np.zeros(len(points) + 1, np.int64)
    np.cumsum(np.bincount(row, minlength=len(points)), out=offsets[1:])
    return offsets, np.concatenate(places)[order], np.concatenate(consistency)[order]


def alive(tracks: Tracks, delta: float = DELTA) -> Spans:
    """From when to when tracks live: up to the last step before the first one with ``d ≥ δ``.

    Args:
        tracks: P of them.
        delta: δ, squared pixels.

    Raises:
        ValueError: δ is above the tracks' limit (or no number): there they were not followed.
    """
    if not delta <= tracks.limit:
        raise ValueError(f"these tracks were followed up to δ = {tracks.limit:g}, not {delta:g}")
    begin, end = tracks.offsets[:-1], tracks.offsets[1:]
    broken = np.flatnonzero(~(tracks.consistency.astype(np.float32) < delta))
    # where a track starts, d is −∞: not a step, and never the place where one breaks (unless δ is −∞ too)
    next_broken = np.append(broken, tracks.offsets[-1])[np.searchsorted(broken, begin + 1)]
    first = tracks.first.astype(np.int64)
    return Spans(tracks.frames, first, first + np.minimum(next_broken, end) - begin - 1)


def anchor_frames(key: Tensor, spans: Spans, count: int = 2) -> list[int]:
    """An anchor, and the frames on which most of its tracks have their furthest end (PiCo §3.3).

    The anchor is uniform among the frames with an active track. Every track that is active there votes for
    the one of its ends that is further away (the later one, if both are as far). Of equal votes the frame
    further from the anchor comes first, then the earlier one; the paper says neither.

    Args:
        key: ``()`` int64.
        spans: of the tracks, see :func:`alive`.
        count: how many frames, the anchor among them (the paper's k; whether it counts the anchor, it leaves
            open).

    Returns:
        The anchor first; at least 2 frames, and fewer than ``count`` where fewer have votes.

    Raises:
        ValueError: no track is active on any frame, or ``count`` is below 2.
    """
    if count < 2:
        raise ValueError(f"two frames at least are drawn, not {count}")
    there = np.flatnonzero(spans.active)
    if not len(there):
        raise ValueError("no track is active on any frame")
    anchor = int(there[int(randint(fold(key, "anchor").reshape(1), len(there)))])
    on = spans.on(anchor)
    first, last = spans.first[on], spans.last[on]
    furthest = np.where(anchor - first > last - anchor, first, last)
    votes = np.bincount(furthest, minlength=spans.frames)
    frames = np.arange(spans.frames)
    order = np.lexsort((frames, -np.abs(frames - anchor), -votes))
    chosen = order[votes[order] > 0][: count - 1]
    return [anchor, *chosen.tolist()]


def random_frames(key: Tensor, spans: Spans, count: int = 2) -> list[int]:
    """Different frames, uniform among all: the baseline without anchors (PiCo Fig. 5). May share no track.

    Raises:
        ValueError: the video has fewer frames than are to be drawn.
    """
    if not 2 <= count <= spans.frames:
        raise ValueError(f"{count} frames cannot be drawn of {spans.frames}")
    return [int(frame) for frame in permutation(fold(key, "frames").reshape(1), spans.frames)[0, :count]]


def pairs_of(
    tracks: Tracks, spans: Spans, frames: list[int], key: Tensor, cap: int | None = None, still: bool = False
) -> PointPairs:
    """Pairs of points of the first frame with each of the others, from the tracks active on both.

    Args:
        tracks: P of them.
        spans: the same tracks under a δ.
        frames: k frames, the anchor first.
        key: ``()`` int64, for the choice among too many.
        cap: at most so many pairs, of all frames together; None keeps all.
        still: take for granted that nothing moves: the second point is where the first is. The zero flow of
            Static (Video), on the same frames, with as many pairs at the same points of the anchor.

    Returns:
        Pairs ordered by frame, then by track; none where no track is active on both.
    """
    anchor = frames[0]
    found = [np.flatnonzero(spans.on(anchor, frame)) for frame in frames[1:]]
    track = np.concatenate([np.zeros(0, np.int64), *found])
    other = np.repeat(np.arange(1, len(frames)), [len(rows) for rows in found])
    chosen = subsample(key, len(track), cap).numpy()
    track, other = track[chosen], other[chosen]
    first = tracks.at(track, anchor)
    second = first.copy() if still else tracks.at(track, np.asarray(frames)[other])
    return PointPairs(*(torch.from_numpy(x) for x in (first, second, other, track)))


def subsample(key: Tensor, count: int, cap: int | None) -> Tensor:
    """Which of ``count`` things are kept so that at most ``cap`` are: a uniform subset, in order.

    Args:
        key: ``()`` int64.
        count: how many there are.
        cap: how many are kept; None keeps all.

    Returns:
        ``(min(count, cap),)`` int64 on the host, rising.
    """
    if cap is None or count <= cap:
        return torch.arange(count)
    return permutation(fold(key, "subsample").reshape(1), count)[0, :cap].sort().values

"""From a request to raw pixels: a map-style data set whose every item is a pure function of its request.

A request is ``(epoch, position)``. The order of the epoch says which item stands at that position, the item's
key ``fold(seed, epoch, index)`` says which moment and which window, so neither the number of workers nor a
restart changes anything. An item that cannot be read is replaced, in the worker, by the next position of the
same rank; the failures travel to the main process with the batch.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal, Protocol, runtime_checkable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

from poodle_lightning.data.batches import Group, Item
from poodle_lightning.data.cached_flow import CachedFlow
from poodle_lightning.data.info import DecodeError
from poodle_lightning.data.order import Order, Request
from poodle_lightning.data.pixels import Box, Piece
from poodle_lightning.data.sampling import Sampler, TooShort
from poodle_lightning.data.sources import Entry, ExactReader, PieceReader, Reader, SizedReader, Source
from poodle_lightning.data.starts import StartTimes
from poodle_lightning.data.tracked import TrackedFrames, Untracked, into_window
from poodle_lightning.data.tracks import track_name, video_print
from poodle_lightning.data.windows import TooSmall, Window, WindowRule, extend, inside_frame, reduced
from poodle_lightning.ops.geometry import Size
from poodle_lightning.ops.planes import planes_size
from poodle_lightning.ops.random import fold, key_of
from poodle_lightning.types import Skip

# An open decoder holds some 25 MB. A few long films are drawn from again and again and all stay open; of
# many files each is seen once, and is opened in little time.
_FEW_FILMS, _OPEN_READERS = 12, 4
# When the disk is gone every video fails: say so soon instead of trying all of a large data set.
_MAX_TRIES = 256


@runtime_checkable
class PixelFlow(Protocol):
    """A flow estimator that runs in the workers, e.g. ``poodle_lightning.flow.dis.DIS``."""

    def pixels(self, first: np.ndarray, second: np.ndarray) -> np.ndarray:
        """Flow between two ``(h, w, 3)`` uint8 images: there and back, ``(2, 2, h, w)`` float32 px."""
        ...


class ClipDataset(Dataset[Group]):
    """Clips of a source's entries.

    Args:
        source: opens entries.
        entries: the stretches to draw from.
        order: which entry stands at which position of an epoch, and how many positions a rank jumps.
        sampler: which moments make a clip.
        rule: which part of the frame.
        seed: of all draws.
        repeats: clips per opened video (PooDLe's repeated sampling).
        jitter: how far the second window of a clip without a time gap may lie from the first, as a share of
            the window's size; the exact flow is then that shift. 0 or None keeps one window.
        flow: estimates flow in the worker, on the stored pixels.
        exact: take flow and labels from sources that know them (an estimator's flow comes first).
        pixels: ``yuv`` hands over the planes of a video as they are stored, half the bytes of ``rgb``. A clip
            is RGB all the same where its frames have no such planes or are turned, where it is averaged
            (``antialias``), where its windows differ, and where ``flow`` needs to see it.
        root: of the data: what tracked videos are called follows from it.
        tracked: the stretch that was tracked, of which all entries are parts; None: each entry was.
    """

    def __init__(
        self,
        source: Source,
        entries: Sequence[Entry],
        order: Order,
        sampler: Sampler,
        rule: WindowRule,
        *,
        seed: int = 0,
        repeats: int = 1,
        jitter: float | None = None,
        flow: PixelFlow | None = None,
        exact: bool = True,
        pixels: Literal["rgb", "yuv"] = "rgb",
        root: str | None = None,
        tracked: Entry | None = None,
    ) -> None:
        self.root, self.tracked = root, tracked
        self.source, self.entries, self.order = source, entries, order
        self.sampler, self.rule, self.seed, self.repeats = sampler, rule, seed, repeats
        self.jitter, self.flow, self.exact, self.pixels = jitter, flow, exact, pixels
        films = _films(entries)
        self._readers = _OpenReaders(films if films <= _FEW_FILMS else _OPEN_READERS)

    def __len__(self) -> int:
        """Positions in an epoch, of all ranks together."""
        return self.order.length

    def __getitem__(self, request: Request | int) -> Group:
        """The clips at a position; a bare position is of epoch 0."""
        epoch, position = (0, request) if isinstance(request, int) else request
        skipped: list[Skip] = []
        wanted = self.order.item(epoch, position)
        for attempt in range(min(self.order.length // self.order.stride, _MAX_TRIES)):
            item = self.order.item(epoch, position + attempt * self.order.stride)
            replaced = None if attempt == 0 else wanted
            entry = self.entries[item % len(self.entries)]
            try:
                return Group(self._clips(entry, epoch, item, replaced), tuple(skipped))
            except (DecodeError, Untracked, TooShort, TooSmall, OSError) as error:
                self._readers.drop(entry)
                skipped.append(_skip(entry, error))
        return Group((), tuple(skipped))

    def _clips(self, entry: Entry, epoch: int, item: int, replaced: int | None) -> tuple[Item, ...]:
        """All clips of an opened video. A replacement draws anew, or it would repeat a clip of the epoch."""
        reader = self._readers.get(self.source, entry)
        if not entry.width and isinstance(reader, SizedReader):
            entry = replace(entry, width=reader.size[0], height=reader.size[1])
        indices = range(item * self.repeats, (item + 1) * self.repeats)
        keys = [key_of(self.seed, epoch, index) for index in indices]
        if replaced is not None:
            keys = [fold(key, "replaces", replaced) for key in keys]
        times, points = self._moments(entry, fold(keys[0], "time"))
        count = len(times) // self.repeats
        plans = [
            self._plan(entry, index, key, times[i * count : (i + 1) * count])
            for i, (index, key) in enumerate(zip(indices, keys, strict=True))
        ]
        seen = self.flow is not None and not isinstance(self.flow, CachedFlow)
        _fill(reader, plans, entry, planes=self.pixels == "yuv" and not seen)
        return tuple(self._item(reader, entry, plan, points) for plan in plans)

    def ways(self, index: int, time: float) -> Tensor | None:
        """Tracks through the first frame of a clip, see ``TrackedFrames.ways``; None where there are none.

        Args:
            index: of the clip, ``Clip.index``.
            time: of its first frame, ``Clip.times``.
        """
        if not isinstance(self.sampler, TrackedFrames) or not self.rule.whole:
            return None
        entry = self.entries[index // self.repeats % len(self.entries)]
        name = track_name(self.tracked or entry, self.root)
        return self.sampler.ways(name, video_print(self.source, entry), time)

    def _moments(self, entry: Entry, key: Tensor) -> tuple[list[float], Tensor | None]:
        """Seconds of the video, and the points of the whole frames at these times, if tracks choose them."""
        if isinstance(self.sampler, TrackedFrames):
            name = track_name(self.tracked or entry, self.root)
            within = None if self.tracked is None else (entry.start, entry.stop)
            return self.sampler.draw(name, video_print(self.source, entry), key, within)
        return [entry.start + t for t in self.sampler.times(entry.duration, key)], None

    def _plan(self, entry: Entry, index: int, key: Tensor, times: list[float]) -> _Plan:
        window = self.rule.draw(entry.width, entry.height, key)
        windows = [window] * len(times)
        if self.jitter and _is_still(times):
            windows[1] = window.shifted(*self.rule.shift(window, entry.width, entry.height, self.jitter, key))
        return _Plan(index, key, times, windows)

    def _item(self, reader: Reader, entry: Entry, plan: _Plan, points: Tensor | None) -> Item:
        exact = reader if self.exact and isinstance(reader, ExactReader) else None
        flow: Tensor | None = None
        if _is_still(plan.times):
            flow = _shift_flow(plan)
        elif isinstance(self.flow, CachedFlow):
            flow = _cached_flow(self.flow, reader, plan, entry)
        elif self.flow is not None:
            flow = torch.from_numpy(np.asarray(self.flow.pixels(*plan.frames), np.float32))
        elif exact is not None and len(plan.times) == 2:
            flow = _exact_flow(exact, plan.times, plan.windows[0], entry)
        labels = None if exact is None else _exact_labels(exact, plan, entry)
        yuv = None if plan.matrix is None else torch.from_numpy(plan.matrix)
        frames = plan.frames if yuv is not None else plan.frames.transpose(0, 3, 1, 2)
        window, aspect = plan.windows[0].stored, entry.width / entry.height if self.rule.whole else None
        pixels = torch.from_numpy(frames)
        if points is not None:
            points = into_window(points, plan.windows[0], entry.width, entry.height)
        return Item(pixels, window, plan.actual, plan.index, plan.key, flow, labels, yuv, aspect, points)


class _Plan:
    """One clip that is being read: what was drawn for it, and what was read."""

    def __init__(self, index: int, key: Tensor, times: list[float], windows: list[Window]) -> None:
        self.index, self.key, self.times, self.windows = index, key, times, windows
        self.frames: np.ndarray = np.empty((0, 0, 0), np.uint8)
        self.actual: list[float] = []
        self.matrix: np.ndarray | None = None

    @property
    def size(self) -> Size:
        """Height and width of the stored pixels."""
        rows, width = int(self.frames.shape[1]), int(self.frames.shape[2])
        return (rows, width) if self.matrix is None else planes_size((rows, width))

    @property
    def is_raw(self) -> bool:
        """Whether all frames are one window of unchanged pixels, so that planes can stand for them."""
        return self.windows[0].factor == (1, 1) and len(set(self.windows)) == 1

    def boxes(self, entry: Entry) -> list[Box]:
        """What must be read for every frame."""
        return [inside_frame(window.outer, entry.width, entry.height)[0] for window in self.windows]

    def take(self, pieces: Sequence[Piece], entry: Entry) -> None:
        """Keep what was read: the frames as ``(T, h, w, 3)`` RGB, or as planes ``(T, h·3/2, w)``."""
        self.actual, self.matrix = [piece.time for piece in pieces], pieces[0].matrix
        if self.matrix is None:
            overs = [inside_frame(window.outer, entry.width, entry.height)[1] for window in self.windows]
            read = [extend(piece.pixels[None], over) for piece, over in zip(pieces, overs, strict=True)]
            self.frames = reduced(np.concatenate(read), self.windows[0].factor)
        else:
            self.frames = np.stack([piece.pixels for piece in pieces])
            self.windows = [replace(window, outer=pieces[0].box) for window in self.windows]


def _films(entries: Sequence[Entry]) -> int:
    """Different videos, counted to where it is clear that they are many: there may be a million."""
    found: set[str] = set()
    for entry in entries.stretches if isinstance(entries, StartTimes) else entries:
        found.add(entry.path)
        if len(found) > _FEW_FILMS:
            break
    return len(found)


def _fill(reader: Reader, plans: Sequence[_Plan], entry: Entry, planes: bool) -> None:
    """Read all frames of all clips in one go: each stretch of the video is decoded once."""
    times = [time for plan in plans for time in plan.times]
    boxes = [box for plan in plans for box in plan.boxes(entry)]
    found = _pieces(reader, times, boxes, planes and all(plan.is_raw for plan in plans))
    if not _is_uniform(found):  # rare: a stream whose colours change on the way
        found = _pieces(reader, times, boxes, False)
    for plan in plans:
        plan.take(found[: len(plan.times)], entry)
        found = found[len(plan.times) :]


def _pieces(reader: Reader, times: Sequence[float], boxes: Sequence[Box], planes: bool) -> list[Piece]:
    if isinstance(reader, PieceReader):
        return reader.pieces(times, boxes, planes)
    found = {}
    for i in sorted(range(len(times)), key=times.__getitem__):
        pixels, actual = reader.read([times[i]], boxes[i])
        found[i] = Piece(pixels[0], float(actual[0]), boxes[i])
    return [found[i] for i in range(len(times))]


def _is_uniform(pieces: Sequence[Piece]) -> bool:
    """Whether all are RGB, or all are planes of the same colours."""
    first = pieces[0].matrix
    if first is None:
        return all(piece.matrix is None for piece in pieces)
    return all(piece.matrix is not None and np.array_equal(piece.matrix, first) for piece in pieces)


def _is_still(times: Sequence[float]) -> bool:
    """A pair without a time gap: one frame seen twice."""
    return len(times) == 2 and times[0] == times[1]


def _shift_flow(plan: _Plan) -> Tensor:
    """The motion of one frame seen through two windows: their shift, in stored pixels, everywhere."""
    first, second = plan.windows
    dx, dy = ((a - b) / f for a, b, f in zip(first.outer[:2], second.outer[:2], first.factor, strict=True))
    return torch.tensor([[dx, dy], [-dx, -dy]])[:, :, None, None].repeat(1, 1, *plan.size)


def _exact_flow(reader: ExactReader, times: Sequence[float], window: Window, entry: Entry) -> Tensor:
    """Flow both ways in stored pixels, the mean of each block."""
    box, over = inside_frame(window.outer, entry.width, entry.height)
    both = [reader.flow(a, b, box)[0] for a, b in (times, times[::-1])]
    return _stored_flow(extend(np.concatenate(both), over), window)


def _cached_flow(cache: CachedFlow, reader: Reader, plan: _Plan, entry: Entry) -> Tensor | None:
    """Flow of the whole frames, kept on disk, cut to the window; None leaves it to the method's estimator."""
    window = plan.windows[0]
    box, over = inside_frame(window.outer, entry.width, entry.height)
    whole = cache.estimate_or_load(
        entry.path,
        (plan.times[0], plan.times[1]),
        lambda: reader.read(plan.times)[0],
        box=box,
        size=(entry.height, entry.width),
    )
    return None if whole is None else _stored_flow(extend(whole.reshape(4, *whole.shape[2:]), over), window)


def _stored_flow(flow: np.ndarray, window: Window) -> Tensor:
    """Flow ``(4, h, w)`` in raw pixels as ``(2, 2, …)`` in stored pixels: the mean of each block."""
    raw = torch.from_numpy(np.ascontiguousarray(flow)).float()
    fx, fy = window.factor
    means = F.avg_pool2d(raw, (fy, fx)).unflatten(0, (2, 2))
    return means / torch.tensor([fx, fy]).reshape(1, 2, 1, 1)


def _exact_labels(reader: ExactReader, plan: _Plan, entry: Entry) -> Tensor:
    """Labels of the stored pixels: those in the middle of their blocks."""
    rows = []
    for time, window in zip(plan.times, plan.windows, strict=True):
        box, over = inside_frame(window.outer, entry.width, entry.height)
        (fx, fy), labels = window.factor, extend(reader.labels(time, box)[None], over)[0]
        rows.append(labels[fy // 2 :: fy, fx // 2 :: fx])
    return torch.from_numpy(np.stack(rows))


def _skip(entry: Entry, error: Exception) -> Skip:
    if isinstance(error, DecodeError):
        return Skip(entry.path, error.reason, error.detail, error.time)
    if isinstance(error, Untracked):
        return Skip(entry.path, error.reason, " ".join(error.detail.split()))
    reasons = {TooShort: "too_short", TooSmall: "too_small"}
    reason = next((word for kind, word in reasons.items() if isinstance(error, kind)), "unreadable")
    return Skip(entry.path, reason, " ".join(str(error).split()))


class _OpenReaders:
    """A few readers kept open, per process: a forked worker must not share its parent's file positions."""

    def __init__(self, most: int) -> None:
        self.most = most
        self._kept: OrderedDict[str, Reader] = OrderedDict()
        self._process = os.getpid()

    def get(self, source: Source, entry: Entry) -> Reader:
        if self._process != os.getpid():
            self._kept, self._process = OrderedDict(), os.getpid()
        if entry.path not in self._kept:
            self._kept[entry.path] = source.open(entry)
        self._kept.move_to_end(entry.path)
        while len(self._kept) > self.most:
            self._kept.popitem(last=False)[1].close()
        return self._kept[entry.path]

    def drop(self, entry: Entry) -> None:
        """Close a reader that failed, so that the next try starts afresh."""
        reader = self._kept.pop(entry.path, None)
        if reader is not None:
            reader.close()

    def __reduce__(self) -> tuple[type[_OpenReaders], tuple[int]]:
        return _OpenReaders, (self.most,)

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
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

from poodle_lightning.data.cached_flow import CachedFlow
from poodle_lightning.data.info import DecodeError
from poodle_lightning.data.order import Order, Request
from poodle_lightning.data.sampling import Sampler, TooShort
from poodle_lightning.data.sources import Entry, ExactReader, Reader, Source
from poodle_lightning.data.windows import Rect, TooSmall, Window, WindowRule, extend, inside_frame, reduced
from poodle_lightning.ops.geometry import Affine, Size
from poodle_lightning.ops.random import fold, key_of
from poodle_lightning.types import Clip, Skip

IGNORE = 255
# Opening costs 8 % of a pair; long films are drawn from again and again.
_OPEN_READERS = 4
# When the disk is gone every video fails: say so soon instead of trying all of a large data set.
_MAX_TRIES = 256


@runtime_checkable
class PixelFlow(Protocol):
    """A flow estimator that runs in the workers, e.g. ``poodle_lightning.flow.dis.DIS``."""

    def pixels(self, first: np.ndarray, second: np.ndarray) -> np.ndarray:
        """Flow between two ``(h, w, 3)`` uint8 images: there and back, ``(2, 2, h, w)`` float32 px."""
        ...


@dataclass(frozen=True)
class Item:
    """One clip before it is put in a batch.

    Args:
        frames: ``(T, 3, h, w)`` uint8.
        window: the crop in ``frames``, ``(x0, y0, x1, y1)``, pixel edges.
        times: T seconds from the start of the video.
        index: number of the item.
        key: ``()`` int64.
        flow: optional ``(2, 2, h, w)`` float32, px of ``frames``.
        labels: optional ``(T, h, w)`` uint8.
    """

    frames: Tensor
    window: Rect
    times: Sequence[float]
    index: int
    key: Tensor
    flow: Tensor | None = None
    labels: Tensor | None = None


@dataclass(frozen=True)
class Group:
    """The clips of one opened video, and what was tried before it; without clips when all tries failed."""

    items: tuple[Item, ...]
    skipped: tuple[Skip, ...] = ()


@dataclass(frozen=True)
class Exhausted:
    """What a worker hands over instead of a batch when one request after the other failed."""

    skipped: tuple[Skip, ...]


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
    ) -> None:
        self.source, self.entries, self.order = source, entries, order
        self.sampler, self.rule, self.seed, self.repeats = sampler, rule, seed, repeats
        self.jitter, self.flow, self.exact = jitter, flow, exact
        self._readers = _OpenReaders()

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
            except (DecodeError, TooShort, TooSmall, OSError) as error:
                self._readers.drop(entry)
                skipped.append(_skip(entry, error))
        return Group((), tuple(skipped))

    def _clips(self, entry: Entry, epoch: int, item: int, replaced: int | None) -> tuple[Item, ...]:
        """All clips of an opened video. A replacement draws anew, or it would repeat a clip of the epoch."""
        reader = self._readers.get(self.source, entry)
        indices = range(item * self.repeats, (item + 1) * self.repeats)
        keys = [key_of(self.seed, epoch, index) for index in indices]
        if replaced is not None:
            keys = [fold(key, "replaces", replaced) for key in keys]
        times = [entry.start + t for t in self.sampler.times(entry.duration, fold(keys[0], "time"))]
        count = len(times) // self.repeats
        plans = [
            self._plan(entry, index, key, times[i * count : (i + 1) * count])
            for i, (index, key) in enumerate(zip(indices, keys, strict=True))
        ]
        # all frames of all clips in the order of time: each stretch of the video is decoded once
        for time, i, j in sorted((t, i, j) for i, plan in enumerate(plans) for j, t in enumerate(plan.times)):
            plans[i].take(j, *_read(reader, time, plans[i].windows[j], entry))
        return tuple(self._item(reader, entry, plan) for plan in plans)

    def _plan(self, entry: Entry, index: int, key: Tensor, times: list[float]) -> _Plan:
        window = self.rule.draw(entry.width, entry.height, key)
        windows = [window] * len(times)
        if self.jitter and _is_still(times):
            windows[1] = window.shifted(*self.rule.shift(window, entry.width, entry.height, self.jitter, key))
        return _Plan(index, key, times, windows)

    def _item(self, reader: Reader, entry: Entry, plan: _Plan) -> Item:
        exact = reader if self.exact and isinstance(reader, ExactReader) else None
        flow: Tensor | None = None
        if _is_still(plan.times):
            flow = _shift_flow(plan)
        elif isinstance(self.flow, CachedFlow):
            flow = _cached_flow(self.flow, reader, plan, entry)
        elif self.flow is not None:
            flow = torch.from_numpy(np.asarray(self.flow.pixels(*plan.pixels), np.float32))
        elif exact is not None and len(plan.times) == 2:
            flow = _exact_flow(exact, plan.times, plan.windows[0], entry)
        labels = None if exact is None else _exact_labels(exact, plan, entry)
        frames = torch.from_numpy(np.ascontiguousarray(np.stack(plan.pixels).transpose(0, 3, 1, 2)))
        return Item(frames, plan.windows[0].stored, plan.actual, plan.index, plan.key, flow, labels)


class _Plan:
    """One clip that is being read: what was drawn for it, and the frames so far."""

    def __init__(self, index: int, key: Tensor, times: list[float], windows: list[Window]) -> None:
        self.index, self.key, self.times, self.windows = index, key, times, windows
        self.pixels: list[np.ndarray] = [np.empty(0, np.uint8)] * len(times)
        self.actual = [0.0] * len(times)

    def take(self, number: int, pixels: np.ndarray, time: float) -> None:
        self.pixels[number], self.actual[number] = pixels, time


def collate(groups: Sequence[Group], size: Size) -> Clip | Exhausted:
    """A batch: the clips of all groups one after the other, padded at the right and bottom to the largest.

    Padding repeats the border, so that sampling at a frame's border reads what clamping would.

    Args:
        groups: of one batch.
        size: height and width of the training crop, px.
    """
    skipped = tuple(skip for group in groups for skip in group.skipped)
    if any(not group.items for group in groups):
        return Exhausted(skipped)
    items = [item for group in groups for item in group.items]
    height = max(item.frames.shape[-2] for item in items)
    width = max(item.frames.shape[-1] for item in items)
    whole = torch.tensor([2.0 / width, 2.0 / height] * 2, dtype=torch.float64)
    boxes = torch.tensor([item.window for item in items], dtype=torch.float64) * whole - 1.0
    flow, labels = [item.flow for item in items], [item.labels for item in items]
    return Clip(
        frames=torch.stack([_padded(item.frames, height, width) for item in items]),
        window=Affine(Affine.box(boxes).matrix.float()),
        size=size,
        times=torch.tensor([list(item.times) for item in items], dtype=torch.float64),
        index=torch.tensor([item.index for item in items], dtype=torch.int64),
        key=torch.stack([item.key for item in items]),
        flow=_stacked(flow, (2, 2, height, width), torch.nan, torch.float32),
        present=_present(flow),
        labels=_stacked(labels, (len(items[0].times), height, width), IGNORE, torch.uint8),
        skipped=skipped,
    )


def _stacked(
    rows: Sequence[Tensor | None], shape: tuple[int, ...], missing: float, dtype: torch.dtype
) -> Tensor | None:
    if all(row is None for row in rows):
        return None
    fill = torch.full(shape, missing, dtype=dtype)
    return torch.stack([fill if row is None else _padded(row, *shape[-2:]) for row in rows])


def _present(rows: Sequence[Tensor | None]) -> Tensor | None:
    """Which directions of which clips have flow, ``(B, 2)`` bool: a sum is finite if its terms are."""
    if all(row is None for row in rows):
        return None
    missing = torch.zeros(2, dtype=torch.bool)
    return torch.stack([missing if row is None else row.sum((1, 2, 3)).isfinite() for row in rows])


def _padded(x: Tensor, height: int, width: int) -> Tensor:
    """``(A, B, h, w)`` or ``(A, h, w)`` padded at the right and bottom by repeating the border."""
    right, bottom = width - x.shape[-1], height - x.shape[-2]
    if not (right or bottom):
        return x
    if x.dtype == torch.uint8:  # no replication kernel for bytes
        x = torch.cat([x, x[..., -1:].expand(*x.shape[:-1], right)], dim=-1)
        return torch.cat([x, x[..., -1:, :].expand(*x.shape[:-2], bottom, width)], dim=-2)
    return F.pad(x, (0, right, 0, bottom), mode="replicate")


def _read(reader: Reader, time: float, window: Window, entry: Entry) -> tuple[np.ndarray, float]:
    """Stored pixels ``(h, w, 3)`` of a window, and the frame's own time."""
    box, over = inside_frame(window.outer, entry.width, entry.height)
    pixels, actual = reader.read([time], box)
    return reduced(extend(pixels, over), window.factor)[0], float(actual[0])


def _is_still(times: Sequence[float]) -> bool:
    """A pair without a time gap: one frame seen twice."""
    return len(times) == 2 and times[0] == times[1]


def _shift_flow(plan: _Plan) -> Tensor:
    """The motion of one frame seen through two windows: their shift, in stored pixels, everywhere."""
    first, second = plan.windows
    dx, dy = ((a - b) / f for a, b, f in zip(first.outer[:2], second.outer[:2], first.factor, strict=True))
    return torch.tensor([[dx, dy], [-dx, -dy]])[:, :, None, None].repeat(1, 1, *plan.pixels[0].shape[:2])


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
    reasons = {TooShort: "too_short", TooSmall: "too_small"}
    reason = next((word for kind, word in reasons.items() if isinstance(error, kind)), "unreadable")
    return Skip(entry.path, reason, " ".join(str(error).split()))


class _OpenReaders:
    """A few readers kept open, per process: a forked worker must not share its parent's file positions."""

    def __init__(self) -> None:
        self._kept: OrderedDict[str, Reader] = OrderedDict()
        self._process = os.getpid()

    def get(self, source: Source, entry: Entry) -> Reader:
        if self._process != os.getpid():
            self._kept, self._process = OrderedDict(), os.getpid()
        if entry.path not in self._kept:
            self._kept[entry.path] = source.open(entry)
        self._kept.move_to_end(entry.path)
        while len(self._kept) > _OPEN_READERS:
            self._kept.popitem(last=False)[1].close()
        return self._kept[entry.path]

    def drop(self, entry: Entry) -> None:
        """Close a reader that failed, so that the next try starts afresh."""
        reader = self._kept.pop(entry.path, None)
        if reader is not None:
            reader.close()

    def __reduce__(self) -> tuple[type[_OpenReaders], tuple[()]]:
        return _OpenReaders, ()

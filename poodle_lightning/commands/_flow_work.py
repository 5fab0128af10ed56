"""The work behind ``poodle-lightning flow``: videos in threads, pairs of frames in batches on devices."""

from __future__ import annotations

import threading
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol, Self

from poodle_lightning.types import UserError

if TYPE_CHECKING:
    import numpy as np

    from poodle_lightning.data.cached_flow import FixedPairs, PixelEstimator
    from poodle_lightning.data.flow_cache import FlowCache, Moments
    from poodle_lightning.data.sources import Entry, Source
    from poodle_lightning.flow.raft import RAFT
    from poodle_lightning.ops.geometry import Size

_VOLUME_BYTES = 6e9  # of correlation on a device at a time; 8 pairs of 512x1024
_LARGEST_BATCH = 32


class Closed(Exception):
    """No more flow is computed."""


class Estimators(Protocol):
    """Where pairs of frames become flow; used by many threads."""

    @property
    def ahead(self) -> int:
        """Pairs that a thread should have handed over before it waits for the first."""
        ...

    def submit(self, frames: np.ndarray) -> Future[np.ndarray]:
        """Two frames ``(2, H, W, 3)`` uint8; the flow will be ``(2, 2, H, W)`` float32 px."""
        ...

    def close(self) -> None:
        """Nothing more is handed over; may be called twice."""
        ...


class AtOnce:
    """An estimator that works in the thread that asks, as DIS does.

    Args:
        estimator: may be used by several threads.
    """

    ahead = 1

    def __init__(self, estimator: PixelEstimator) -> None:
        self.estimator = estimator
        self._closed = False

    def submit(self, frames: np.ndarray) -> Future[np.ndarray]:
        """See ``Estimators``.

        Raises:
            Closed: it was.
        """
        if self._closed:
            raise Closed
        done: Future[np.ndarray] = Future()
        done.set_result(self.estimator.pixels(frames[0], frames[1]))
        return done

    def close(self) -> None:
        """What is being computed is finished; threads that ask for more end."""
        self._closed = True


class OnDevices:
    """RAFT on several devices, each with a thread of its own, behind one queue.

    A device that is free takes as many waiting pairs of one size as it has room for, whatever video they are
    of: batches fill up while all devices are busy, and nothing waits while one is idle.

    Args:
        rafts: one per device.
        batch: pairs at a time; 0 takes what fits beside ``_VOLUME_BYTES``.
        threads: how many will hand over pairs.
    """

    def __init__(self, rafts: Sequence[RAFT], batch: int = 0, threads: int = 1) -> None:
        self.batch = batch
        # one batch in work and one waiting on each device
        self.ahead = max(2, -(-2 * (batch or 8) * len(rafts) // threads))
        self._waiting: dict[Size, deque[tuple[np.ndarray, Future[np.ndarray]]]] = {}
        self._changed = threading.Condition()
        self._closed = False
        for raft in rafts:
            threading.Thread(target=self._serve, args=(raft,), daemon=True).start()

    def submit(self, frames: np.ndarray) -> Future[np.ndarray]:
        """See ``Estimators``.

        Raises:
            Closed: it was.
        """
        done: Future[np.ndarray] = Future()
        with self._changed:
            if self._closed:
                raise Closed
            self._waiting.setdefault(frames.shape[1:3], deque()).append((frames, done))
            self._changed.notify()
        return done

    def close(self) -> None:
        """What is waiting is still computed; then the devices are given up."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def pairs_at_once(self, size: Size) -> int:
        """Pairs of frames of a size that one device computes together."""
        if self.batch:
            return self.batch
        places = (size[0] / 8) * (size[1] / 8)
        both_ways = 2 * 4 * places**2 * 4 / 3  # float32, and the coarser levels are a third of it
        return max(1, min(_LARGEST_BATCH, int(_VOLUME_BYTES / both_ways)))

    def _take(self) -> list[tuple[np.ndarray, Future[np.ndarray]]]:
        """Pairs of one size; none when there will be no more."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._closed)
            if not self._waiting:
                return []
            size, queue = next(iter(self._waiting.items()))
            taken = [queue.popleft() for _ in range(min(len(queue), self.pairs_at_once(size)))]
            del self._waiting[size]
            if queue:
                self._waiting[size] = queue  # at the end: other sizes are next
            return taken

    def _serve(self, raft: RAFT) -> None:
        import torch

        while taken := self._take():
            try:
                flows = raft.pixels_of([frames for frames, _ in taken])
            except torch.OutOfMemoryError:
                height, width = taken[0][0].shape[1:3]
                less = f"give --batch {len(taken) // 2}" if len(taken) > 1 else "take smaller videos"
                error: BaseException = UserError(
                    f"{len(taken)} pairs of {height} x {width} frames are too large for the device: {less}"
                )
            except BaseException as other:
                error = other
            else:
                for (_, done), flow in zip(taken, flows, strict=True):
                    done.set_result(flow)
                continue
            for _, done in taken:
                done.set_exception(error)


@dataclass
class Count:
    """Pairs of a stretch, or of all; ``stopped`` if there would have been more.

    ``seconds`` of video are counted by the share of a stretch's pairs that was stored.
    """

    stored: int = 0
    kept: int = 0
    bytes: int = 0
    seconds: float = 0.0
    left_out: Counter[str] = field(default_factory=Counter)
    stopped: bool = False

    def __iadd__(self, other: Count) -> Self:
        self.stored += other.stored
        self.kept += other.kept
        self.bytes += other.bytes
        self.seconds += other.seconds
        self.left_out += other.left_out
        self.stopped |= other.stopped
        return self


@dataclass(frozen=True)
class Work:
    """What is done to each video."""

    source: Source
    sampler: FixedPairs
    estimators: Estimators
    cache: FlowCache

    def video(self, stretches: Sequence[Entry], advance: Callable[[int], object]) -> Count:
        """All stretches of one video, one after the other: they share files.

        Raises:
            UserError: the cache cannot be written, or a device has no room.
        """
        total = Count()
        for entry in stretches:
            total += self._stretch(entry, advance)
            if total.stopped:
                break
            if not self.cache.writable:
                raise UserError(
                    f"{self.cache.folder} cannot be written: make room or choose another --out; what is "
                    "there stays, and the same command goes on from it"
                )
        return total

    def _stretch(self, entry: Entry, advance: Callable[[int], object]) -> Count:
        from poodle_lightning.data.cached_flow import video_of
        from poodle_lightning.data.sampling import TooShort

        count = Count()
        video = video_of(entry.path)
        try:
            pairs = [(entry.start + a, entry.start + b) for a, b in self.sampler.pairs(entry.duration)]
        except TooShort:
            pairs = []
        if video is None or not pairs:
            count.left_out["not_a_file" if video is None else "too_short"] += self.sampler.fixed
            advance(self.sampler.fixed)
            return count
        lacking = self.cache.lacking(video, pairs)
        count.kept = len(pairs) - len(lacking)
        advance(count.kept)
        flows = self._flows(entry, lacking, count, advance)
        count.stored, count.bytes = self.cache.put_all(video, flows)
        count.seconds = entry.duration * count.stored / len(pairs)
        if self.cache.writable and not count.stopped:  # else not all was tried
            count.left_out["not_storable"] += len(lacking) - count.left_out.total() - count.stored
        return count

    def _flows(
        self, entry: Entry, pairs: Sequence[Moments], count: Count, advance: Callable[[int], object]
    ) -> Iterator[tuple[float, float, np.ndarray]]:
        """Flow of the pairs that can be read, some pairs read ahead of the one whose flow is waited for."""
        waiting: deque[tuple[Moments, Future[np.ndarray]]] = deque()
        for moments, done in self._submitted(entry, pairs, count, advance):
            waiting.append((moments, done))
            if len(waiting) >= self.estimators.ahead:
                yield _finished(waiting, advance)
        while waiting:
            yield _finished(waiting, advance)

    def _submitted(
        self, entry: Entry, pairs: Sequence[Moments], count: Count, advance: Callable[[int], object]
    ) -> Iterator[tuple[Moments, Future[np.ndarray]]]:
        """Read and hand over; a damaged place ends one pair, not the video."""
        from poodle_lightning.data.info import DecodeError

        reader = None
        try:
            for moments in pairs:
                try:
                    reader = reader or self.source.open(entry)
                    frames, _ = reader.read(moments)
                except (DecodeError, OSError, UserError) as error:
                    count.left_out[getattr(error, "reason", "unreadable")] += 1
                    if reader is not None:
                        reader.close()
                    reader = None
                    advance(1)
                    continue
                try:
                    done = self.estimators.submit(frames)
                except Closed:  # what was computed is still stored
                    count.stopped = True
                    return
                except UserError:  # all that an estimator has against two frames
                    count.left_out["too_small"] += 1
                    advance(1)
                else:
                    yield moments, done
        finally:
            if reader is not None:
                reader.close()


def _finished(
    waiting: deque[tuple[Moments, Future[np.ndarray]]], advance: Callable[[int], object]
) -> tuple[float, float, np.ndarray]:
    (first, second), done = waiting.popleft()
    flow = done.result()
    advance(1)
    return first, second, flow

"""Videos gone through from their first frame to their last, by the frames' own times.

Training draws moments; tracking needs every frame. A stretch is read twice: once for the moments of its
frames (decoded, but not converted), once in chunks of pixels, so that memory does not grow with its length.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from threading import Event
from typing import TypeVar

import numpy as np

from poodle_lightning.data.decode import VideoReader
from poodle_lightning.data.encode import coding
from poodle_lightning.data.info import DecodeError
from poodle_lightning.data.prepare import in_order
from poodle_lightning.data.shares import split
from poodle_lightning.data.sources import Entry, ExactReader, Reader, Source
from poodle_lightning.data.tracks import track_name, video_print
from poodle_lightning.types import UserError

# Frames per second of what has one at every moment (generated streets).
STREET_RATE = 10.0
_T = TypeVar("_T")
_CHUNK_BYTES = 24e6  # of pixels as they are read, whose flow is 11 times as much; 3 frames of 1080x1920
_LARGEST_CHUNK = 32


class Halted(Exception):
    """The work was called off in the middle of a stretch."""


class Footage:
    """A stretch of video that was not opened yet. No dataclass: Lightning copies those when it moves batches.

    Args:
        source: opens it.
        entry: which stretch.
        name: see ``data.tracks.track_name``.
        workers: threads that whoever works on it may use; 0 is the caller's own.
        halt: once it is set, reading ends by ``Halted``; None: it never is.
    """

    def __init__(
        self, source: Source, entry: Entry, name: str, workers: int = 0, halt: Event | None = None
    ) -> None:
        self.source, self.entry, self.name, self.workers = source, entry, name, workers
        self.halt = halt or Event()

    def fingerprint(self) -> str:
        """See ``data.tracks.video_print``.

        Raises:
            OSError: the video cannot be read.
        """
        return video_print(self.source, self.entry)

    @contextmanager
    def opened(self, every: int = 1) -> Iterator[Stretch]:
        """The stretch, open; closed at the end.

        Args:
            every: take one frame of so many.

        Raises:
            DecodeError: it cannot be opened or is damaged, or has fewer than two frames.
            OSError: the disk refuses.
            Halted: see ``halt``.
        """
        reader = self.source.open(self.entry)
        try:
            times = np.fromiter(self._until_halted(_times(reader, self.entry, every)), np.float64)
            if len(times) < 2:
                raise DecodeError("too_short", f"{len(times)} frames: motion needs two")
            yield Stretch(reader, times, (self.entry.height, self.entry.width), self._until_halted)
        finally:
            reader.close()

    def _until_halted(self, items: Iterable[_T]) -> Iterator[_T]:
        for item in items:
            if self.halt.is_set():
                raise Halted
            yield item


class Stretch:
    """An open stretch.

    Args:
        reader: of its video.
        times: ``(n,)`` float64, seconds of the video at which its frames stand; at least two.
        size: height and width of the frames, px.
        guard: what the places go through at which reading may be called off.
    """

    def __init__(
        self,
        reader: Reader,
        times: np.ndarray,
        size: tuple[int, int],
        guard: Callable[[Iterable[int]], Iterator[int]] = iter,
    ) -> None:
        self.times = times
        self._reader, self._size, self._guard = reader, size, guard

    def chunks(self, short_side: int | None = None) -> Iterator[np.ndarray]:
        """All frames, some at a time; the last one of a chunk is the first one of the next.

        Args:
            short_side: pixels of the shorter side to which larger frames are reduced (means of areas).

        Yields:
            ``(c + 1, H, W, 3)`` uint8 RGB, c pairs of neighbours.

        Raises:
            DecodeError: a frame is damaged.
        """
        height, width = self._size
        step = int(min(max(_CHUNK_BYTES // max(3 * height * width, 1), 1), _LARGEST_CHUNK))
        before = self._read(self.times[:1], short_side)
        for start in self._guard(range(1, len(self.times), step)):
            frames = self._read(self.times[start : start + step], short_side)
            yield np.concatenate([before, frames])
            before = frames[-1:]

    def exact(self) -> Iterator[np.ndarray]:
        """The true flow from frame to frame, ``(2, 2, H, W)`` float32 px, there and back.

        Raises:
            UserError: the video does not know it.
        """
        reader, (height, width) = self._reader, self._size
        if not isinstance(reader, ExactReader):
            raise UserError(
                "only generated videos (source synthetic) know their flow: take an estimator, DIS or RAFT"
            )
        box = (0, 0, width, height)
        for place in self._guard(range(len(self.times) - 1)):
            first, second = self.times[place : place + 2].tolist()
            yield np.stack([reader.flow(first, second, box)[0], reader.flow(second, first, box)[0]])

    def _read(self, times: np.ndarray, short_side: int | None) -> np.ndarray:
        frames, _ = self._reader.read(times.tolist())
        height, width = frames.shape[1:3]
        if short_side is None or min(height, width) <= short_side:
            return frames
        import cv2

        scale = short_side / min(height, width)
        size = (round(width * scale), round(height * scale))
        return np.stack([cv2.resize(frame, size, interpolation=cv2.INTER_AREA) for frame in frames])


class FootageLoader:
    """Stretches one at a time, for ``Trainer.predict``. A ``DataLoader`` would be shared out a second time.

    Where there are none it gives out one None: Lightning calls no hook of a process without a batch, and the
    others would wait for it where all count together.

    Args:
        footage: in the order in which it is given out.
    """

    def __init__(self, footage: Sequence[Footage]) -> None:
        self.footage = footage

    def __iter__(self) -> Iterator[Footage | None]:
        return iter(self.footage or (None,))

    def __len__(self) -> int:
        return max(len(self.footage), 1)


def footage_of(
    source: Source,
    entries: Sequence[Entry],
    root: str | None,
    share: int = 0,
    shares: int = 1,
    *,
    workers: int = 0,
    halt: Event | None = None,
) -> list[Footage]:
    """One share's stretches; all shares last about as long and none has a stretch of another.

    Args:
        source: of the entries.
        entries: all, the same for every share.
        root: of the data, for the names.
        share: from 0 to ``shares − 1``.
        shares: how many there are.
        workers: see ``Footage``.
        halt: see ``Footage``.
    """
    named = {track_name(entry, root): entry for entry in entries}
    chosen = split({name: max(entry.duration, 0.0) for name, entry in named.items()}, shares)[share]
    return [Footage(source, named[name], name, workers, halt) for name in chosen]


def footage_loader(
    source: Source, entries: Sequence[Entry], rank: int, world: int, workers: int, root: str | None
) -> FootageLoader:
    """A rank's share of the stretches, one at a time, for ``Trainer.predict``.

    Nothing is read here: whoever takes a stretch may know that there is nothing to be done.

    Args:
        source: of the entries.
        entries: all, the same on every rank.
        rank: of this process.
        world: number of processes.
        workers: threads that each process may use, see ``Footage``.
        root: of the data, for the names.
    """
    return FootageLoader(footage_of(source, entries, root, rank, world, workers=workers))


def _times(reader: Reader, entry: Entry, every: int) -> Iterator[float]:
    """When the frames of a stretch stand, seconds of the video."""
    if not isinstance(reader, VideoReader):
        apart = entry.interval or 1 / STREET_RATE
        first = np.ceil(entry.start / apart - 1e-6) * apart if entry.interval else entry.start
        count = int(np.floor((entry.stop - first) / apart + 1e-6)) + 1
        yield from (first + apart * np.arange(0, count, every)).tolist()
        return
    try:
        clock = coding(reader.path).clock
    except (OSError, ValueError) as error:
        raise DecodeError("unreadable", str(error)) from error
    ends = entry.stop + float(clock) / 2
    for time, _ in in_order(reader, clock, entry.start, every, small=True):
        if time > ends:
            return
        yield time

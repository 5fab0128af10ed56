"""Video files read by time: a frame is asked for in seconds and found by its own timestamp.

Frame numbers and frame rates never address a frame, so variable rates, streams that do not start at zero and
containers that lie about their length give the right pixels. What comes back is bit-equal to a sequential
decode of the whole file, or a :class:`DecodeError` with a stable reason (the table in ``data/info.py``).
"""

from __future__ import annotations

import math
import os
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fractions import Fraction
from itertools import chain
from pathlib import Path
from typing import Any, Self

import av
import numpy as np

from poodle_lightning.data.info import DecodeError, VideoInfo, check_file, fingerprint, starts_as_video
from poodle_lightning.data.pixels import Box, one_box_each, rgb, rotation_of

__all__ = ["MAX_PIXELS", "Box", "DecodeError", "VideoInfo", "VideoReader", "probe"]

# 8K UHD (7680 × 4320) passes; the 8192 × 8192 frames of a decompression bomb do not.
MAX_PIXELS = 2**25
# Demuxers that hold film. Play lists would open other files; image and subtitle formats are no video.
_FORMATS = "mov,matroska,webm,avi,mpegts,mpeg,flv,ogg,asf,mxf,ivf,nut,gif,dv,wtv,rm"
_COVER_ART = av.stream.Disposition.attached_pic
_TIMEOUT = 30.0
# Where a container has no index, running on this far is preferred to a blind jump.
_BLIND_SECONDS = 10.0
_RETREATS = 6
# Containers that guess most timestamps from those before: after a jump the guesses differ.
_NO_JUMPS = {"mpeg"}


def probe(path: str | Path, *, max_pixels: int = MAX_PIXELS) -> VideoInfo:
    """Measure a video: its packets' timestamps, and the size and rotation of its first frame.

    Raises:
        DecodeError: it cannot be read.
    """
    with VideoReader(path, max_pixels=max_pixels) as reader:
        return reader.info


class VideoReader:
    """Frames of a video by time.

    Where a file has several video streams, the one with the most pixels is read, the first of equals; cover
    art is none. Times are seconds from the start of the stream. The frame at t is the first whose timestamp
    is not before t, with t rounded to the stream's clock: ``read([k / fps])`` is frame k of a constant rate,
    however coarse the clock.

    Args:
        path: a local file.
        max_pixels: the largest width × height that is decoded.
        threads: of the decoder, over slices only (frame threads hang when a reader is dropped early). One
            is right for workers that already fill the cores.

    Raises:
        DecodeError: the file cannot be opened.
    """

    def __init__(self, path: str | Path, *, max_pixels: int = MAX_PIXELS, threads: int = 1) -> None:
        self.path = os.fspath(path)
        self._max_pixels, self._threads = max_pixels, threads
        self._bytes = check_file(self.path)
        self._info: VideoInfo | None = None
        self._container: Any = None
        self._open()
        start = self._stream.start_time
        self._origin = self._first_pts() if start is None else int(start)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Give file and decoder back; the reader cannot be used afterwards."""
        self._reset()
        if self._container is not None:
            self._container.close()
        self._container = None

    @property
    def info(self) -> VideoInfo:
        """What the file holds; measured at the first use.

        Raises:
            DecodeError: the timestamps or the first frame cannot be read.
        """
        if self._info is None:
            with self._guarded():
                self._info = self._measure()
        return self._info

    def read(
        self, times: Sequence[float], box: Box | Sequence[Box] | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Frames at the given times, in the order given.

        Args:
            times: T seconds ≥ 0 from the start of the stream, in any order.
            box: ``(x0, y0, x1, y1)`` in pixels of the rotated frame, one for all or one per time (all of one
                size); None is the whole frame. Only the box is converted to RGB, with the same result.

        Returns:
            ``(T, y1 − y0, x1 − x0, 3)`` uint8 RGB, and ``(T,)`` float64, the frames' own times in seconds.

        Raises:
            DecodeError: a frame is damaged, missing or of another size.
            ValueError: no time, a negative time, a box that is empty or outside, boxes of different sizes.
        """
        if not len(times) or not all(math.isfinite(t) and t >= 0 for t in times):
            raise ValueError(f"times must be finite numbers ≥ 0, and at least one, not {list(times)}")
        boxes = one_box_each(box, len(times))
        pixels: dict[int, np.ndarray] = {}
        actual = np.empty(len(times), np.float64)
        with self._guarded():
            for i in sorted(range(len(times)), key=times.__getitem__):
                frame = self._at(self._origin + round(Fraction(float(times[i])) / self._clock))
                actual[i] = self._seconds(frame.pts)
                pixels[i] = rgb(frame, boxes[i], rotation_of(frame))
        return np.stack([pixels[i] for i in range(len(times))]), actual

    # -- opening

    def _open(self) -> None:
        if self._container is not None:
            self._container.close()
        limits = {
            "protocol_whitelist": "file",
            "format_whitelist": _FORMATS,
            "max_pixels": str(self._max_pixels),  # reaches the probing of the streams, not the decoder
        }
        name = "file:" + os.path.abspath(self.path)
        try:
            self._container = av.open(name, options=limits, timeout=_TIMEOUT, metadata_errors="replace")
        except UnicodeEncodeError as error:
            raise DecodeError("unreadable", f"the file name is not valid text ({error.reason})") from error
        except (av.error.FFmpegError, EOFError) as error:
            raise _opening_error(error, self.path) from error
        self._reset()
        try:
            self._stream = self._pick_stream()
        except DecodeError:
            self.close()
            raise
        context = self._stream.codec_context
        # "explode": damage inside a packet is an error, not a frame patched from its neighbours.
        context.options = {"max_pixels": str(self._max_pixels), "err_detect": "explode"}
        context.thread_type = "SLICE" if self._threads > 1 else "NONE"
        context.thread_count = self._threads
        base = self._stream.time_base  # av's own kind of rational from release 19 on
        self._clock = Fraction(int(base.numerator), int(base.denominator))

    def _pick_stream(self) -> Any:
        videos = [s for s in self._container.streams.video if not s.disposition & _COVER_ART]
        if not videos:
            raise DecodeError("no_video_stream", "the file holds no video stream")
        if any(s.codec_context is None for s in videos):
            raise DecodeError("unsupported", "no decoder for the codec of the video stream")
        stream = max(videos, key=lambda s: s.codec_context.width * s.codec_context.height)
        self._size = (int(stream.codec_context.width), int(stream.codec_context.height))
        if self._size[0] * self._size[1] > self._max_pixels:
            detail = f"{self._size[0]}×{self._size[1]} pixels, more than the limit of {self._max_pixels}"
            raise DecodeError("too_many_pixels", detail)
        return stream

    def _first_pts(self) -> int:
        with self._guarded():
            first = next((p.pts for p in self._container.demux(self._stream) if p.pts is not None), None)
        self._open()
        if first is None:
            self.close()
            raise DecodeError("bad_timestamps", "the stream has no timestamps")
        return int(first)

    def _reset(self) -> None:
        """Forget the position: the next frame is found by a seek."""
        self._packets: Iterator[Any] = iter(())
        self._ready: deque[Any] = deque()
        self._due: dict[int, int] = {}  # timestamp → when it was sent
        self._sent = 0
        self._latest: int | None = None
        self._served: tuple[int, Any] | None = None
        self._damaged = False

    def _seconds(self, pts: int) -> float:
        return float((pts - self._origin) * self._clock)

    # -- finding a frame

    def _at(self, tick: int) -> Any:
        """The first frame with ``pts >= tick``, in the stream's clock."""
        if self._container is None:
            raise ValueError("the reader is closed")
        if self._served is not None and self._served[0] <= tick <= self._served[1].pts:
            return self._served[1]
        if self._worth_seeking(tick):
            self._seek(tick)
        while True:
            while self._ready:
                frame = self._ready.popleft()
                later = self._built_on(frame)
                if self._accept(frame, tick):
                    self._check_later(frame, later, tick)
                    self._served = (tick, frame)
                    return frame
            if not self._decode_next(tick):
                raise DecodeError("past_end", "the video ends before", self._seconds(tick))

    def _worth_seeking(self, tick: int) -> bool:
        """Whether to jump: backwards, or when a key frame lies between here and there."""
        if self._latest is None or tick <= self._latest:
            return True
        if self._container.format.name in _NO_JUMPS:
            return False
        index = self._stream.index_entries
        if len(index) < 2:
            return (tick - self._latest) * self._clock > _BLIND_SECONDS
        # The index holds decoding times, which lag behind by the depth of the B-frames.
        lag = self._origin - index[0].timestamp
        entry = index.search_timestamp(tick - lag, backward=True)
        return bool(entry >= 0 and index[entry].timestamp + lag > self._latest)

    def _seek(self, tick: int) -> None:
        """Go to a key frame that is not after ``tick``, further back each time, in the end to the start."""
        aim: int | None = None if self._container.format.name in _NO_JUMPS else tick
        for attempt in range(_RETREATS + 1):
            self._reset()
            if aim is None:
                self._open()
            else:
                self._container.seek(aim, stream=self._stream, backward=True)
            packets = self._container.demux(self._stream)
            key = next((p for p in packets if p.is_keyframe and p.pts is not None), None)
            if key is not None and (aim is None or key.pts <= tick):
                self._packets = chain((key,), packets)
                return
            if aim is None:
                break
            back = tick - int(2**attempt / self._clock)
            if key is not None and key.dts is not None:
                # An index finds the key frame before this one at once; without one the steps must grow.
                back = key.dts - 1 if attempt == 0 else min(back, key.dts - 1)
            aim = back if back > self._origin and attempt + 1 < _RETREATS else None
        raise DecodeError("corrupt", "no key frame to start from", self._seconds(tick))

    def _decode_next(self, tick: int) -> bool:
        """Send one packet; False at the end of the file."""
        packet = next(self._packets, None)
        if packet is None:
            return False
        if packet.is_corrupt:
            raise DecodeError("truncated", "a packet is incomplete", self._place())
        context = self._stream.codec_context
        wanted = packet.pts is None or packet.pts >= tick
        # Frames that nothing is built on need not be decoded before the one that is asked for.
        context.skip_frame = "DEFAULT" if wanted else "NONREF"
        if packet.pts is not None and wanted and not packet.is_discard:
            self._due[packet.pts] = self._sent
        self._sent += 1
        self._ready.extend(packet.decode())
        return True

    def _accept(self, frame: Any, tick: int) -> bool:
        """Whether this frame, the next in order of time, is the answer."""
        if frame.pts is None or (self._latest is not None and frame.pts <= self._latest):
            raise DecodeError("bad_timestamps", "frames without increasing timestamps", self._place())
        if frame.key_frame:
            self._damaged = False
        self._damaged = self._damaged or frame.is_corrupt
        self._due.pop(frame.pts, None)
        self._latest = frame.pts
        if frame.pts < tick:
            return False
        lost = [pts for pts in self._due if tick <= pts < frame.pts]
        if lost and not frame.interlaced_frame:  # a field may have a packet and a time of its own
            raise DecodeError("corrupt", "a frame could not be decoded", self._seconds(min(lost)))
        if self._damaged:
            raise DecodeError(
                "corrupt", "the frame, or one it is built on, is damaged", self._seconds(frame.pts)
            )
        if (frame.width, frame.height) != self._size:
            detail = f"{frame.width}×{frame.height} instead of {self._size[0]}×{self._size[1]} pixels"
            raise DecodeError("size_changed", detail, self._seconds(frame.pts))
        return True

    def _built_on(self, frame: Any) -> set[int]:
        """Timestamps of later frames that were decoded before this one: it may refer to them."""
        sent = self._due.get(frame.pts, -1)
        return {pts for pts, when in self._due.items() if pts > frame.pts and when < sent}

    def _check_later(self, frame: Any, later: set[int], tick: int) -> None:
        """Read on until those frames are out: only then it is known whether they are damaged."""
        while later - {f.pts for f in self._ready} and self._decode_next(tick):
            pass
        found = [f for f in self._ready if f.pts in later]
        if len(found) < len(later) or any(f.is_corrupt for f in found):
            raise DecodeError("corrupt", "a frame it is built on is damaged", self._seconds(frame.pts))

    def _place(self) -> float | None:
        return None if self._latest is None else self._seconds(self._latest)

    @contextmanager
    def _guarded(self) -> Iterator[None]:
        """Turn FFmpeg's errors into ours; after any error the position is unknown."""
        try:
            yield
        except DecodeError:
            self._reset()
            raise
        except (av.error.FFmpegError, EOFError) as error:
            place = self._place()
            self._reset()
            raise _reading_error(error, place) from error

    # -- measuring

    def _measure(self) -> VideoInfo:
        frame = self._at(self._origin)
        rotation = rotation_of(frame)
        width, height = self._size if rotation % 180 == 0 else self._size[::-1]
        rgb(frame, (0, 0, 1, 1), 0)  # a pixel format that cannot be converted shows here
        first, rate = int(frame.pts), self._stream.average_rate
        count, keys, last = self._timeline()
        span, duration = (last - first) * self._clock, self._seconds(last)
        interval = float((keys[-1] - keys[0]) * self._clock) / (len(keys) - 1) if len(keys) > 1 else duration
        return VideoInfo(
            path=self.path,
            start=float(self._origin * self._clock),
            duration=duration,
            width=width,
            height=height,
            fps=float((count - 1) / span) if span > 0 else float(rate or 0),
            frames=count,
            keyframe_interval=interval,
            rotation=rotation,
            fingerprint=fingerprint(self.path),
        )

    def _timeline(self) -> tuple[int, list[int], int]:
        """Number of frames, timestamps of the key frames, timestamp of the last frame.

        A complete index (MP4, MOV) tells all but the last without reading the file, and whether its end is
        there. Any other container is read through.
        """
        index = list(self._stream.index_entries)
        keys = [entry.timestamp for entry in index if entry.is_keyframe]
        if keys and len(index) == self._stream.frames:
            if max(entry.pos + entry.size for entry in index) > self._bytes:
                raise DecodeError("truncated", "the index points past the end of the file")
            self._reset()
            self._container.seek(keys[-1], stream=self._stream, backward=True)
            last = max((pts for pts, _ in self._stamps()), default=None)
            count = sum(not entry.is_discard for entry in index)
        else:
            self._open()
            stamps = list(self._stamps())
            keys = sorted(pts for pts, is_key in stamps if is_key)
            last = max((pts for pts, _ in stamps), default=None)
            count = len(stamps)
        if last is None:
            raise DecodeError("bad_timestamps", "the stream has no timestamps")
        return count, keys, last

    def _stamps(self) -> Iterator[tuple[int, bool]]:
        """Timestamp of every shown frame from here to the end, and whether it is a key frame."""
        for packet in self._container.demux(self._stream):
            if packet.is_corrupt:
                raise DecodeError("truncated", "a packet is incomplete")
            if packet.pts is not None and not packet.is_discard:
                yield int(packet.pts), bool(packet.is_keyframe)


def _opening_error(error: Exception, path: str) -> DecodeError:
    if isinstance(error, (av.error.TimeoutError, av.error.ExitError)):
        return DecodeError("timeout", f"opening took longer than {_TIMEOUT:.0f} s")
    if isinstance(error, (av.error.PermissionError, av.error.FileNotFoundError)):
        return DecodeError("unreadable", "no permission to open the file")
    if starts_as_video(path):
        return DecodeError("truncated", "a video container that ends early or is damaged")
    return DecodeError("not_a_video", "no known video container")


def _reading_error(error: Exception, time: float | None) -> DecodeError:
    if isinstance(error, (av.error.TimeoutError, av.error.ExitError)):
        return DecodeError("timeout", f"reading took longer than {_TIMEOUT:.0f} s", time)
    lacking = isinstance(error, (av.error.DecoderNotFoundError, av.error.PatchWelcomeError))
    return DecodeError(
        "unsupported" if lacking else "corrupt", getattr(error, "strerror", "") or "no data", time
    )

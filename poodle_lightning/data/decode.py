"""Video files read by time: a frame is asked for in seconds and found by its own timestamp.

Frame numbers and frame rates never address a frame, so variable rates, streams that do not start at zero and
containers that lie about their length give the right pixels. What comes back is bit-equal to a sequential
decode of the whole file, or a :class:`DecodeError` with a stable reason (the table in ``data/info.py``): as
far as the decoder sees damage. Flipped bits may form a valid stream of other pixels, and a frame is handed
over before later packets, which might have shown the damage, are decoded.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fractions import Fraction
from itertools import chain
from pathlib import Path
from typing import Any, Self

import av
import numpy as np

from poodle_lightning.data.decoding import Decoding
from poodle_lightning.data.info import DecodeError, VideoInfo, check_file, fingerprint, starts_as_video
from poodle_lightning.data.pixels import Box, Piece, one_box_each, piece, rgb, rotation_of
from poodle_lightning.data.timeline import KeyFrames, check_times, header_tells_all, timeline

__all__ = ["MAX_PIXELS", "Box", "DecodeError", "VideoInfo", "VideoReader", "probe"]

# 8K UHD (7680 × 4320) passes; the 8192 × 8192 frames of a decompression bomb do not.
MAX_PIXELS = 2**25
# Demuxers that hold film. Play lists would open other files; image and subtitle formats are no video.
_FORMATS = "mov,matroska,webm,avi,mpegts,mpeg,flv,ogg,asf,mxf,ivf,nut,gif,dv,wtv,rm"
_COVER_ART = av.stream.Disposition.attached_pic
_TIMEOUT = 30.0
# Files whose header may make it needless to decode a frame while opening, and the options that leave it out.
_BRIEF = {".mp4", ".m4v", ".mov"}
_NO_PROBING = {"skip_frame": "all", "probesize": "65536"}
# Where a container has no index, running on this far is preferred to a blind jump.
_BLIND_SECONDS = 10.0
_RETREATS = 6
# Containers that guess most timestamps from those before: after a jump the guesses differ.
_NO_JUMPS = {"mpeg"}
# Containers whose timestamps are partly guessed: only the order in which frames come out shows a wrong one.
_GUESSED = _NO_JUMPS | {"avi"}


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
        self._brief = Path(self.path).suffix.lower() in _BRIEF
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
        check_times(times)
        boxes = one_box_each(box, len(times))
        pixels: dict[int, np.ndarray] = {}
        actual = np.empty(len(times), np.float64)
        with self._guarded():
            for i, frame in self._frames(times, keep=True):
                actual[i] = self._seconds(frame.pts)
                pixels[i] = rgb(frame, boxes[i], rotation_of(frame))
        return np.stack([pixels[i] for i in range(len(times))]), actual

    def pieces(self, times: Sequence[float], boxes: Sequence[Box], planes: bool = False) -> list[Piece]:
        """Frames at the given times, for those who next ask for another part of the video.

        The same frames as ``read`` gives. Nothing is decoded beyond the last of them, so that reading on
        from here starts again at a key frame (but for films of few key frames).

        Args:
            times: T seconds ≥ 0 from the start of the stream, in any order.
            boxes: one per time, of any sizes; see ``read``.
            planes: hand over YUV 4:2:0 where the frame is stored so and upright, else RGB; see ``Piece``.

        Raises:
            DecodeError: a frame is damaged, missing or of another size.
            ValueError: no time, a negative time, a box that is empty or outside.
        """
        check_times(times)
        found: dict[int, Piece] = {}
        with self._guarded():
            for i, frame in self._frames(times, keep=False):
                at = self._seconds(frame.pts)
                found[i] = piece(frame, boxes[i], rotation_of(frame), at, planes)
        return [found[i] for i in range(len(times))]

    # -- opening

    def _open(self) -> None:
        """Open the file and pick its stream.

        FFmpeg decodes a frame to learn about a stream, which costs 20 times the rest of opening; here only
        where the header says too little, or turned out to be wrong.
        """
        if self._brief:
            self._open_container(_NO_PROBING)
            with self._guarded():
                self._brief = header_tells_all(self._container, self._videos(), self._max_pixels)
        if not self._brief:
            self._open_container({})
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

    def _open_container(self, probing: dict[str, str]) -> None:
        if self._container is not None:
            self._container.close()
        limits = {
            "protocol_whitelist": "file",
            "format_whitelist": _FORMATS,
            "max_pixels": str(self._max_pixels),  # reaches the probing of the streams, not the decoder
        }
        name = "file:" + os.path.abspath(self.path)
        options = limits | probing
        try:
            self._container = av.open(name, options=options, timeout=_TIMEOUT, metadata_errors="replace")
        except UnicodeEncodeError as error:
            raise DecodeError("unreadable", f"the file name is not valid text ({error.reason})") from error
        except (av.error.FFmpegError, EOFError) as error:
            raise _opening_error(error, self.path) from error
        self._reset()

    def _videos(self) -> list[Any]:
        return [s for s in self._container.streams.video if not s.disposition & _COVER_ART]

    def _pick_stream(self) -> Any:
        videos = self._videos()
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
        self._run: Decoding | None = None
        self._served: tuple[int, Any] | None = None

    def _seconds(self, pts: int) -> float:
        return float((pts - self._origin) * self._clock)

    # -- finding a frame

    def _frames(self, times: Sequence[float], keep: bool) -> Iterator[tuple[int, Any]]:
        """The number of every time and its frame, in order of time."""
        order = sorted(range(len(times)), key=times.__getitem__)
        ticks = [self._origin + round(Fraction(float(times[i])) / self._clock) for i in order]
        keep = keep or KeyFrames(self._stream.index_entries, self._origin).are_few(ticks[-1])
        for number, i in enumerate(order):
            yield i, self._at(ticks[number:], keep)

    def _at(self, ticks: Sequence[int], keep: bool = True) -> Any:
        """The first frame with ``pts >= ticks[0]``, in the stream's clock.

        Args:
            ticks: what is asked for now, and after it, increasing.
            keep: what follows the last tick is wanted too. Else the decoder is emptied as soon as it holds
                the frame, which saves decoding what else it would wait for.
        """
        if self._container is None:
            raise ValueError("the reader is closed")
        tick = ticks[0]
        if self._served is not None and self._served[0] <= tick <= self._served[1].pts:
            return self._served[1]
        run = self._run
        if run is None or run.latest is None or tick <= run.latest or self._key_between(run.latest, tick):
            run = self._seek(tick)
        run.expect(ticks, keep)
        while True:
            while run.ready:
                frame = run.ready.popleft()
                if self._brief and (frame.width, frame.height) != self._size:
                    self._brief = False  # the header is wrong: go by what the frames say
                    self._open()
                    return self._at(ticks, keep)
                if run.emptied and frame.interlaced_frame:
                    break  # perhaps one field of two
                later = run.built_on(frame)
                if run.accept(frame, tick):
                    if later and self._is_enough(run, ticks, keep):
                        run.empty()
                    run.check_later(frame, later)
                    if run.emptied or (not keep and ticks[-1] <= frame.pts):
                        self._reset()  # of what comes next, some was left out
                    self._served = (tick, frame)
                    return frame
            if run.emptied:
                self._reset()
                return self._at(ticks[:1])
            if self._is_enough(run, ticks, keep):
                run.empty()
            elif not run.send():
                raise DecodeError("past_end", "the video ends before", self._seconds(tick))

    def _key_between(self, here: int, tick: int) -> bool:
        """Whether to jump from one to the other: where a key frame lies between them."""
        if self._container.format.name in _NO_JUMPS:
            return False
        keys = KeyFrames(self._stream.index_entries, self._origin)
        return keys.between(here, tick, int(_BLIND_SECONDS / self._clock))

    def _is_enough(self, run: Decoding, ticks: Sequence[int], keep: bool) -> bool:
        """Whether the decoder was sent the frame at ``ticks[0]``, and a jump is next."""
        found = None if run.emptied or (keep and len(ticks) == 1) else run.holds(ticks[0])
        if found is None:
            return False
        after = next((tick for tick in ticks if tick > found), None)
        return not keep if after is None else self._key_between(found, after)

    def _seek(self, tick: int) -> Decoding:
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
                guessed = self._container.format.name in _GUESSED
                context, all_packets = self._stream.codec_context, chain((key,), packets)
                self._run = Decoding(context, all_packets, self._size[::-1], self._seconds, guessed)
                return self._run
            if aim is None:
                break
            back = tick - int(2**attempt / self._clock)
            if key is not None and key.dts is not None:
                # An index finds the key frame before this one at once; without one the steps must grow.
                back = key.dts - 1 if attempt == 0 else min(back, key.dts - 1)
            aim = back if back > self._origin and attempt + 1 < _RETREATS else None
        raise DecodeError("corrupt", "no key frame to start from", self._seconds(tick))

    @contextmanager
    def _guarded(self) -> Iterator[None]:
        """Turn FFmpeg's errors into ours; after any error the position is unknown."""
        try:
            yield
        except (av.error.FFmpegError, EOFError) as error:
            place = None if self._run is None else self._run.place
            self._reset()
            raise _reading_error(error, place) from error
        except BaseException:
            self._reset()
            raise

    # -- measuring

    def _measure(self) -> VideoInfo:
        frame = self._at([self._origin])
        rotation = rotation_of(frame)
        width, height = self._size if rotation % 180 == 0 else self._size[::-1]
        rgb(frame, (0, 0, 1, 1), 0)  # a pixel format that cannot be converted shows here
        first, rate = int(frame.pts), self._stream.average_rate
        count, keys, last = timeline(self._stream, self._bytes, self._packets_from)
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

    def _packets_from(self, key: int | None) -> Iterator[Any]:
        """All packets from the key frame at a timestamp on, or from the start."""
        if key is None:
            self._open()
        else:
            self._reset()
            self._container.seek(key, stream=self._stream, backward=True)
        return iter(self._container.demux(self._stream))


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

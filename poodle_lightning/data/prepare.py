"""Videos re-encoded for training: frames no larger than needed, and short ways from key frame to key frame.

A frame at a random time costs the decoding of everything since the key frame before it, at the stored size.
Both are paid again in every epoch; re-encoding pays once. What is kept: the frames, in the orientation in
which they are shown, and their own times, to the tick. What is not: sound and other streams, and tags.
"""

from __future__ import annotations

import errno
import os
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np

from poodle_lightning.data.decode import VideoReader, probe
from poodle_lightning.data.encode import EncoderError, coding, is_encoder, write_video
from poodle_lightning.data.info import DecodeError, VideoInfo
from poodle_lightning.data.prepared import Made, Settings, WrongSetting

# Frames of each video that are compared with the source, and the least PSNR of their brightness, dB. It tells
# a wrong or broken picture from a coarse one: unlike frames lie near 10 dB, crf 20 near 40.
_COMPARED, _LEAST_PSNR = 5, 20.0
# Frames encoded to estimate size and time.
_SAMPLED = 96
_ENCODERS = "choose libx264, libx265 or libsvtav1"


class Mismatch(Exception):
    """What was written is not what should have been."""


@dataclass(frozen=True)
class Job:
    """One video to be made.

    Args:
        source: path of the video.
        name: the same below the source's folder, with ``/``.
        folder: of the prepared videos.
        made: path of the new video below ``folder``, with ``/``.
        settings: how.
    """

    source: str
    name: str
    folder: str
    made: str
    settings: Settings


@dataclass(frozen=True)
class Outcome:
    """What became of a job: a video, a reason why it was left out, or an end of everything.

    Args:
        job: the job.
        made: the video.
        reason: a stable word: one of ``data/info.py``, ``mismatch`` or ``not_encodable``; empty if made.
        detail: one line for a person.
        fatal: the folder of prepared videos cannot be written.
    """

    job: Job
    made: Made | None = None
    reason: str = ""
    detail: str = ""
    fatal: bool = False


def attempt(job: Job, tick: Callable[[], object] = lambda: None) -> Outcome:
    """Make one video, or say why not; ``tick`` is called for every frame, and ends it by raising."""
    try:
        return Outcome(job, made=remake(job, tick))
    except DecodeError as error:
        where = "" if error.time is None else f" (at {error.time:.2f} s)"
        return Outcome(job, reason=error.reason, detail=error.detail + where)
    except Mismatch as error:
        return Outcome(job, reason="mismatch", detail=str(error))
    except ValueError as error:
        return Outcome(job, reason="not_encodable", detail=str(error))
    except OSError as error:
        return Outcome(job, reason="unwritable", detail=error.strerror or str(error), fatal=True)


def remake(job: Job, tick: Callable[[], object] = lambda: None) -> Made:
    """Re-encode one video and check the result; it appears under its name only after that.

    Args:
        job: what and how.
        tick: called for every frame.

    Raises:
        DecodeError: the source is damaged somewhere.
        Mismatch: what was written differs from the source.
        ValueError: the encoder refuses these frames.
        OSError: the new file cannot be written.
    """
    target = Path(job.folder) / job.made
    settings = job.settings
    with VideoReader(job.source) as reader:
        frames = _Frames(reader, settings, tick)
        target.parent.mkdir(parents=True, exist_ok=True)
        frames.write(target, check=frames.compare)
    info, result = frames.info, frames.result
    return Made(
        source=job.name,
        made=job.made,
        settings=settings.stated,
        source_hash=info.fingerprint,
        made_hash=result.fingerprint,
        frames=result.frames,
        seconds=info.duration,
        bytes=(os.path.getsize(job.source), target.stat().st_size),
        gop=(round(info.gop, 3), round(result.gop, 3)),
        psnr=round(min(frames.psnr, 100.0), 2),  # equal frames have no finite one
    )


def in_order(reader: VideoReader, clock: Fraction, start: float = 0.0, every: int = 1,
             small: bool = False) -> Iterator[tuple[float, np.ndarray]]:  # fmt: skip
    """All frames of a video one after the other, each by its own time, so that nothing is decoded twice.

    Args:
        reader: the video.
        clock: seconds per tick of its timestamps.
        start: seconds at which to begin.
        every: give one frame of so many.
        small: give one pixel of each frame; they are decoded all the same.

    Yields:
        The frame's time in seconds, and ``(H, W, 3)`` uint8 RGB.

    Raises:
        DecodeError: a frame is damaged or missing.
    """
    corner = (0, 0, 1, 1)
    wanted, last, ends = start, start, reader.info.duration - float(clock) / 2
    for number in count():
        taken = number % every == 0
        try:
            pixels, actual = reader.read([wanted], None if taken and not small else corner)
        except DecodeError as error:
            if error.reason != "past_end":
                raise
            # fields with timestamps of their own: the last one has no frame
            if reader.info.frames > 1.5 * number and start == 0.0:
                return
            raise DecodeError("truncated", "the last frames cannot be decoded", last) from error
        last = float(actual[0])
        if taken:
            yield last, pixels[0]
        if last >= ends:
            return
        wanted = last + float(clock)


def estimate(source: str | Path, settings: Settings) -> tuple[float, float]:
    """Bytes and seconds per frame that is kept, from a stretch in the middle of a video.

    Raises:
        DecodeError: it cannot be read there.
        ValueError: the encoder refuses the frames.
    """
    with VideoReader(source) as reader, tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        frames = _Frames(reader, settings, lambda: None, start=reader.info.duration / 2, most=_SAMPLED)
        frames.write(Path(folder) / "sample.mp4")
        made = os.path.getsize(Path(folder) / "sample.mp4")
        return made / len(frames.times), (time.perf_counter() - began) / len(frames.times)


def try_settings(settings: Settings) -> None:
    """Encode a few small frames, with a cut among them, to see whether the encoder obeys.

    Raises:
        WrongSetting: no such encoder, it refuses, or it puts key frames elsewhere than asked.
        OSError: the folder for temporary files cannot be written.
    """
    if not is_encoder(settings.codec):
        advice = f"FFmpeg has no video encoder of this name; {_ENCODERS}"
        raise WrongSetting("codec", settings.codec, advice)
    length = settings.gop + 2
    draw = np.random.default_rng(0).integers(0, 256, (2, 8, 8, 3), dtype=np.uint8)
    scenes = [np.kron(scene, np.ones((8, 8, 1), np.uint8)) for scene in draw]
    images = (np.roll(scenes[2 * k > length], k, 1) for k in range(length))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trial.mp4"
        try:
            write_video(path, images, 30, times=[k / 30 for k in range(length)], **_options(settings))
            found = probe(path)
        except DecodeError as error:
            advice = f"what it writes cannot be read ({error.detail}); {_ENCODERS}"
            raise WrongSetting("codec", settings.codec, advice) from error
        except (ValueError, EncoderError) as error:
            if getattr(error, "errno", None) == errno.ENOSPC:
                raise
            advice = f"here it does not encode film with frames at times of their own into MP4; {_ENCODERS}"
            raise WrongSetting("codec", settings.codec, advice) from error
    if found.frames != length or abs(found.gop - settings.gop) > 0.5:
        advice = f"it does not keep to a key frame every {settings.gop} frames; {_ENCODERS}"
        raise WrongSetting("codec", settings.codec, advice)


# -- in other processes

_frames_done: Any = None
_stop: Any = None


class Stopped(Exception):
    """The main process ends everything."""


def start_worker(frames_done: Any, stop: Any) -> None:
    """Prepare a process: a shared count of frames, and an event upon which it ends its video."""
    global _frames_done, _stop
    import cv2

    _frames_done, _stop = frames_done, stop
    cv2.setNumThreads(0)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the main process says when to stop


def work(job: Job) -> Outcome:
    """``attempt`` in a process that ``start_worker`` has prepared."""
    return attempt(job, _count)


def _count() -> None:
    if _stop.is_set():
        raise Stopped
    with _frames_done.get_lock():
        _frames_done.value += 1


# -- one video


class _Frames:
    """The new frames of a video, made one by one as they are asked for; remembers what the check needs."""

    def __init__(
        self,
        reader: VideoReader,
        settings: Settings,
        tick: Callable[[], object],
        start: float = 0.0,
        most: int | None = None,
    ) -> None:
        try:
            self.info, self.clock = reader.info, coding(reader.path).clock
        except (OSError, ValueError) as error:
            raise DecodeError("unreadable", str(error)) from error
        self.times: list[float] = []
        self.result: VideoInfo = self.info
        self.psnr = float("inf")
        self._reader, self._settings, self._tick = reader, settings, tick
        self._start, self._most = start, most
        expected = -(-self.info.frames // settings.every)
        self._sampled = {round(k) for k in np.linspace(0, expected - 1, _COMPARED)[:-1]}
        self._samples: dict[int, np.ndarray] = {}

    def write(self, path: Path, check: Callable[[Path], object] | None = None) -> None:
        """Encode them; ``times`` is filled just ahead of the encoder."""
        rate = (self.info.fps or 25.0) / self._settings.every
        write_video(
            path,
            self._made(),
            rate,
            times=self.times,
            clock=self.clock,
            check=check,
            **_options(self._settings),
        )

    def compare(self, path: Path) -> None:
        """Look at the new file: number of frames, times, and a few frames.

        Raises:
            Mismatch: it differs.
        """
        try:
            self.result = info = probe(path)
            # another reader than the one that measures, and no first frame before: as in training
            with VideoReader(path) as reader:
                if info.frames != len(self.times):
                    raise Mismatch(f"{info.frames} frames were written of {len(self.times)}")
                if abs(info.duration - self.times[-1]) > float(self.clock) / 2:
                    raise Mismatch(f"it lasts {info.duration:.3f} s in place of {self.times[-1]:.3f} s")
                for number, pixels in self._samples.items():
                    frame, at = reader.read([self.times[number]])
                    if abs(at[0] - self.times[number]) > float(self.clock) / 2:
                        raise Mismatch(f"no frame at {self.times[number]:.3f} s")
                    self.psnr = min(self.psnr, psnr(frame[0], pixels))
        except DecodeError as error:
            raise Mismatch(f"the new file cannot be read: {error}") from error
        if self.psnr < _LEAST_PSNR:
            raise Mismatch(
                f"frames differ from the source (PSNR {self.psnr:.1f} dB): the encoder wrote other pictures, "
                f"or crf {self._settings.crf} is too coarse for this film"
            )

    def _made(self) -> Iterator[np.ndarray]:
        import cv2

        size = self._settings.size(self.info.width, self.info.height)
        first = None
        frames = in_order(self._reader, self.clock, self._start, self._settings.every)
        for number, (when, pixels) in enumerate(frames):
            if number == self._most:
                return
            self._tick()
            if size != (pixels.shape[1], pixels.shape[0]):
                pixels = cv2.resize(pixels, size, interpolation=cv2.INTER_AREA)
            first = when if first is None else first
            self.times.append(when - first)
            # the last one too, whichever it is
            self._samples = {n: p for n, p in self._samples.items() if n in self._sampled} | {number: pixels}
            yield pixels


def psnr(first: np.ndarray, second: np.ndarray) -> float:
    """Peak signal-to-noise ratio of the brightness (BT.601) of two ``(H, W, 3)`` uint8 images, dB."""
    if first.shape != second.shape:
        raise Mismatch(
            f"frames of {first.shape[1]}×{first.shape[0]} px, not {second.shape[1]}×{second.shape[0]}"
        )
    weights = np.array([0.299, 0.587, 0.114], np.float32)
    error = float(np.mean(np.square((first.astype(np.float32) - second) @ weights)))
    return float("inf") if error == 0 else float(10 * np.log10(255**2 / error))


def _options(settings: Settings) -> dict[str, Any]:
    return {"gop": settings.gop, "crf": settings.crf, "codec": settings.codec, "preset": settings.preset}

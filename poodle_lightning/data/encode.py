"""Video files written from RGB frames: whole or not at all."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np

# A clock fine enough for any frame's own time, as MPEG systems use it.
_FREE_CLOCK = Fraction(1, 90_000)
_HAS_CRF = {"libx264", "libx265", "libsvtav1", "libvpx-vp9"}
_HAS_PRESET = {"libx264", "libx265"}
_EVEN_ONLY = {"libx264", "libx265", "libsvtav1"}


def write_video(
    path: str | Path,
    frames: Iterable[np.ndarray],
    fps: float,
    *,
    crf: int = 18,
    gop: int | None = None,
    codec: str = "libx264",
    pix_fmt: str = "yuv420p",
    times: Sequence[float] | None = None,
    rotation: int | None = None,
    b_frames: int | None = None,
    preset: str = "veryfast",
    threads: int = 1,
) -> None:
    """Encode frames into a video file.

    The file appears under its name only when it is complete: it is written beside it first.

    Args:
        path: its suffix decides the container (``.mp4``, ``.mkv``, ``.ts``, ``.mov``, ...).
        frames: ``(H, W, 3)`` uint8 RGB, all of one size.
        fps: frames per second.
        crf: quality of the rate control, lower is better; 0 is lossless for libx264.
        gop: frames from key frame to key frame; None is the encoder's own choice.
        codec: FFmpeg's name of an encoder.
        pix_fmt: stored pixel format. 4:2:0 needs even sides for H.264, H.265 and AV1; ``yuv444p`` takes any.
        times: seconds of every frame, increasing, for a variable rate; None is ``k / fps``.
        rotation: degrees counter-clockwise by which a player turns the stored frames.
        b_frames: most B-frames in a row; None is the encoder's own choice.
        preset: speed of libx264 and libx265.
        threads: of the encoder; 0 is as many as it likes. One is right for writers side by side.

    Raises:
        ValueError: no frames, a wrong shape or type, frames of different sizes, sizes that do not fit
            ``pix_fmt``, fewer times than frames, times that do not increase.
        OSError: the file cannot be written.
    """
    path = Path(path)
    handle, part = tempfile.mkstemp(prefix=f".{path.stem[:40]}.", suffix=path.suffix, dir=path.parent)
    os.close(handle)
    try:
        with av.open("file:" + os.path.abspath(part), "w") as container:
            rate = Fraction(fps).limit_denominator(100_000)
            stream = container.add_stream(codec, rate=rate, options=_options(codec, crf, gop, preset))
            stream.pix_fmt = pix_fmt
            context = stream.codec_context
            context.time_base = 1 / rate if times is None else _FREE_CLOCK
            context.thread_count = threads
            if gop is not None:
                context.gop_size = gop
            if b_frames is not None:
                context.max_b_frames = b_frames
            if rotation is not None:
                stream.set_display_rotation(rotation)
            _encode(container, stream, frames, times)
        os.chmod(part, 0o666 & ~_umask())
        os.replace(part, path)
    except BaseException:
        Path(part).unlink(missing_ok=True)
        raise


def _encode(container: Any, stream: Any, frames: Iterable[np.ndarray], times: Sequence[float] | None) -> None:
    clock = stream.codec_context.time_base
    size: tuple[int, ...] = ()
    previous = -1
    for number, pixels in enumerate(frames):
        if not size:
            size = _check_size(pixels, stream)
            stream.height, stream.width = size[:2]
        if pixels.shape != size or pixels.dtype != np.uint8:
            raise ValueError(f"frame {number} is {pixels.dtype} {pixels.shape}, not uint8 {size}")
        frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
        frame.pts = number if times is None else _tick(times, number, previous)
        frame.time_base = clock
        previous = frame.pts
        container.mux(stream.encode(frame.reformat(format=stream.format.name, threads=1)))
    if not size:
        raise ValueError("there are no frames to write")
    container.mux(stream.encode())


def _tick(times: Sequence[float], number: int, previous: int) -> int:
    if number >= len(times):
        raise ValueError(f"there are more frames than the {len(times)} times")
    tick = round(Fraction(times[number]) / _FREE_CLOCK)
    if tick <= previous:
        raise ValueError(f"times must increase from 0 on: {times[number]} s is not after the frame before")
    return tick


def _check_size(pixels: np.ndarray, stream: Any) -> tuple[int, ...]:
    if pixels.ndim != 3 or pixels.shape[2] != 3 or not pixels.size:
        raise ValueError(f"frames must be (H, W, 3), not {pixels.shape}")
    height, width = pixels.shape[:2]
    form = stream.format
    odd = width % (64 // form.chroma_width(64)) or height % (64 // form.chroma_height(64))
    if odd and stream.codec_context.name in _EVEN_ONLY:
        raise ValueError(
            f"{width}×{height} frames do not fit {form.name}; use pix_fmt='yuv444p' or even sides"
        )
    return pixels.shape


def _options(codec: str, crf: int, gop: int | None, preset: str) -> dict[str, str]:
    options: dict[str, str] = {}
    if codec in _HAS_CRF:
        options["crf"] = str(crf)
    if codec in _HAS_PRESET:
        options["preset"] = preset
    if codec == "libx265":
        options["x265-params"] = "log-level=error"
    if gop is not None and codec == "libx264":
        # exactly every gop frames: no earlier ones at scene cuts
        options |= {"keyint_min": str(gop), "sc_threshold": "0"}
    return options


def _umask() -> int:
    """The process's file mode mask, which can only be read by setting it."""
    mask = os.umask(0)
    os.umask(mask)
    return mask

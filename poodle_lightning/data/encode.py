"""Video files written from RGB frames: whole or not at all; and how a file is coded, from its header."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np

# What FFmpeg raises; some of it is an OSError or a ValueError too.
EncoderError = av.error.FFmpegError
# A clock fine enough for any frame's own time, as MPEG systems use it.
_FREE_CLOCK = Fraction(1, 90_000)
_HAS_CRF = {"libx264", "libx265", "libsvtav1", "libvpx-vp9"}
HAS_PRESET = frozenset({"libx264", "libx265"})
# By the documentation of x264; x265 takes the same names.
PRESETS = (
    "ultrafast", "superfast", "veryfast", "faster", "fast", "medium", "slow", "slower", "veryslow", "placebo"
)  # fmt: skip
_EVEN_ONLY = {"libx264", "libx265", "libsvtav1"}
# Characters that ``tempfile`` puts into a name.
_RANDOM = 8
# The build that comes with PyAV 18 writes past its buffers for frames of 48 columns or less, and the process
# dies, now or later; from 56 on a checking allocator finds nothing.
_X265_WIDTH = 56
# BT.601 and limited range, by the numbers of ITU-T H.273: what FFmpeg converts RGB to unless told otherwise.
# A file that does not say so is shown in other colours by players that take large frames for BT.709.
_BT601, _LIMITED = 6, 1


@dataclass(frozen=True)
class Coding:
    """How the largest video stream of a file is stored.

    Args:
        codec: FFmpeg's name, e.g. ``h264``.
        pix_fmt: e.g. ``yuv420p``; empty if the header does not tell.
        clock: seconds per tick of the stream's timestamps.
    """

    codec: str
    pix_fmt: str
    clock: Fraction


def coding(path: str | Path) -> Coding:
    """What a file's header tells of its coding; no frame is decoded.

    Raises:
        OSError: the file cannot be opened.
        ValueError: it holds no video.
    """
    with av.open("file:" + os.path.abspath(path), metadata_errors="replace") as container:
        cover = av.stream.Disposition.attached_pic
        streams = [s for s in container.streams.video if s.codec_context and not s.disposition & cover]
        if not streams:
            raise ValueError(f"{os.fspath(path)} holds no video stream")
        stream = max(streams, key=lambda s: s.codec_context.width * s.codec_context.height)
        base = stream.time_base
        clock = Fraction(int(base.numerator), int(base.denominator))
        return Coding(stream.codec_context.codec.name, stream.codec_context.pix_fmt or "", clock)


def is_encoder(name: str) -> bool:
    """Whether FFmpeg knows a video encoder of this name."""
    try:
        return bool(av.codec.Codec(name, "w").type == "video")
    except ValueError:
        return False


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
    clock: Fraction | None = None,
    check: Callable[[Path], object] | None = None,
) -> None:
    """Encode frames into a video file.

    The file appears under its name only when it is complete: it is written beside it first. YUV is BT.601
    of limited range, and tagged so. libx264 gives the same bytes for the same frames.

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
        clock: with ``times``: seconds per tick, to which they are rounded; None is 1/90,000.
        check: called with the complete file before it gets its name; if it raises, nothing is left.

    Raises:
        ValueError: no frames, a wrong shape or type, frames of different sizes, sizes that do not fit
            ``pix_fmt``, fewer times than frames, times that do not increase; no such encoder, or it fails.
        OSError: the file cannot be written.
    """
    path = Path(path)
    handle, part = tempfile.mkstemp(prefix=_beginning(path), suffix=path.suffix, dir=path.parent)
    os.close(handle)
    try:
        with av.open("file:" + os.path.abspath(part), "w") as container:
            rate = Fraction(fps).limit_denominator(100_000)
            stream = container.add_stream(codec, rate=rate, options=_options(codec, crf, gop, preset))
            stream.pix_fmt = pix_fmt
            context = stream.codec_context
            context.time_base = 1 / rate if times is None else clock or _FREE_CLOCK
            context.thread_count = threads
            if gop is not None:
                context.gop_size = gop
            if b_frames is not None:
                context.max_b_frames = b_frames
            if rotation is not None:
                stream.set_display_rotation(rotation)
            if pix_fmt.startswith("yuv4"):
                context.colorspace, context.color_range = _BT601, _LIMITED
            _encode(container, stream, frames, times)
        if check is not None:
            check(Path(part))
        os.chmod(part, 0o666 & ~_umask())
        os.replace(part, path)
    except BaseException as error:
        Path(part).unlink(missing_ok=True)
        if isinstance(error, av.error.FFmpegError) and not isinstance(error, (OSError, ValueError)):
            raise ValueError(f"the encoder {codec} failed: {error}") from error
        raise


def leftovers(paths: Iterable[str | Path]) -> list[Path]:
    """Half-written files beside these paths, of calls of ``write_video`` that are killed or still at work."""
    wanted: dict[Path, set[tuple[str, str]]] = {}
    for path in map(Path, paths):
        wanted.setdefault(path.parent, set()).add((_beginning(path), path.suffix))
    found = []
    for folder, kinds in wanted.items():
        for file in folder.iterdir() if folder.is_dir() else ():
            beginning, suffix = file.name[: -len(file.suffix) - _RANDOM], file.suffix
            if (beginning, suffix) in kinds and file.is_file():
                found.append(file)
    return sorted(found)


def _beginning(path: Path) -> str:
    """How the name of an unfinished file begins; ``_RANDOM`` characters and the suffix follow."""
    return f".{path.stem[:40]}."


def _encode(container: Any, stream: Any, frames: Iterable[np.ndarray], times: Sequence[float] | None) -> None:
    base = stream.codec_context.time_base
    clock = Fraction(int(base.numerator), int(base.denominator))
    size: tuple[int, ...] = ()
    previous = -1
    for number, pixels in enumerate(frames):
        if not size:
            size = _check_size(pixels, stream)
            stream.height, stream.width = size[:2]
        if pixels.shape != size or pixels.dtype != np.uint8:
            raise ValueError(f"frame {number} is {pixels.dtype} {pixels.shape}, not uint8 {size}")
        frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
        frame.pts = number if times is None else _tick(times, number, previous, clock)
        frame.time_base = base
        previous = frame.pts
        container.mux(stream.encode(frame.reformat(format=stream.format.name, threads=1)))
    if not size:
        raise ValueError("there are no frames to write")
    container.mux(stream.encode())


def _tick(times: Sequence[float], number: int, previous: int, clock: Fraction) -> int:
    if number >= len(times):
        raise ValueError(f"there are more frames than the {len(times)} times")
    tick = round(Fraction(times[number]) / clock)
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
    if stream.codec_context.name == "libx265" and width < _X265_WIDTH:
        raise ValueError(f"frames {width} px wide: libx265 needs {_X265_WIDTH}; use libx264")
    return pixels.shape


def _options(codec: str, crf: int, gop: int | None, preset: str) -> dict[str, str]:
    options: dict[str, str] = {}
    if codec in _HAS_CRF:
        options["crf"] = str(crf)
    if codec in HAS_PRESET:
        options["preset"] = preset
    if codec == "libx264":
        # else it differs between machines, and in the last bits between runs
        options["x264-params"] = "cpu-independent=1"
    if codec == "libx265":
        options["x265-params"] = "log-level=error"
        if gop is not None:
            options["x265-params"] += f":open-gop=0:scenecut=0:min-keyint={gop}"
    if gop is not None and codec == "libx264":  # and for libx265 above:
        # exactly every gop frames: no earlier ones at scene cuts
        options |= {"keyint_min": str(gop), "sc_threshold": "0"}
    return options


def _umask() -> int:
    """The process's file mode mask, which can only be read by setting it."""
    mask = os.umask(0)
    os.umask(mask)
    return mask

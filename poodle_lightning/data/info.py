"""What is known of a video file without a decoder.

Whether it can be opened at all, its content's hash, the record of its measurements, and the reasons for which
a file is refused:

========================  ===============================================================================
reason                    meaning
========================  ===============================================================================
``missing``               no such file, or a link that points nowhere
``not_a_file``            a folder, a pipe or a device
``unreadable``            no permission, or a name that cannot be passed on
``empty``                 zero bytes
``not_a_video``           no known video container (a text, a web page, an image, a play list)
``truncated``             a video container that ends too early
``no_video_stream``       audio only, or a container without streams
``unsupported``           no decoder for this codec or pixel format
``too_many_pixels``       frames larger than ``max_pixels``; refused before anything is decoded
``bad_timestamps``        frames without usable timestamps
``corrupt``               damaged frames, also those that are built on damaged ones
``size_changed``          a frame of another size than the stream announced, or a box outside of it
``past_end``              no frame at or after the time asked for
``timeout``               the disk did not answer
========================  ===============================================================================
"""

from __future__ import annotations

import hashlib
import os
import stat
from dataclasses import dataclass

_SAMPLE_BYTES = 1 << 16


class DecodeError(Exception):
    """A video, or one moment of it, cannot be read.

    Args:
        reason: a stable word, see the module's table.
        detail: one line for a person.
        time: seconds into the video, if the failure has a place.
    """

    def __init__(self, reason: str, detail: str, time: float | None = None) -> None:
        super().__init__(reason, detail, time)
        self.reason, self.detail, self.time = reason, detail, time

    def __str__(self) -> str:
        where = "" if self.time is None else f" at {self.time:.3f} s"
        return f"{self.reason}{where}: {self.detail}"


@dataclass(frozen=True)
class VideoInfo:
    """What a video holds, measured rather than announced.

    Args:
        path: the file.
        start: the stream's own timestamp of time zero, seconds. All other times count from here.
        duration: time of the last frame, seconds; 0 for a single frame.
        width: pixels, after rotation.
        height: pixels, after rotation.
        fps: mean frames per second.
        frames: number of frames.
        keyframe_interval: mean seconds from key frame to key frame; ``duration`` if there is only one.
        rotation: degrees counter-clockwise that a stored frame is turned for display: 0, 90, 180 or 270.
        fingerprint: hexadecimal hash of the content, the same wherever the file lies.
    """

    path: str
    start: float
    duration: float
    width: int
    height: int
    fps: float
    frames: int
    keyframe_interval: float
    rotation: int
    fingerprint: str

    @property
    def gop(self) -> float:
        """Mean number of frames from key frame to key frame; all frames if there is only one."""
        alone = self.keyframe_interval >= self.duration
        return float(self.frames) if alone else self.keyframe_interval * self.fps


def check_file(path: str) -> int:
    """Size in bytes of a file that can be opened and read.

    A pipe or a device would make the reader wait for ever, so only regular files pass.

    Raises:
        DecodeError: ``missing``, ``not_a_file``, ``unreadable`` or ``empty``.
    """
    try:
        found = os.stat(path)
    except PermissionError as error:
        raise DecodeError("unreadable", "no permission to look into its folder") from error
    except (OSError, ValueError) as error:
        dangling = os.path.islink(path) if "\0" not in path else False
        detail = f"the link points to nothing: {os.readlink(path)}" if dangling else "no such file"
        raise DecodeError("missing", detail) from error
    if not stat.S_ISREG(found.st_mode):
        kind = "a folder" if stat.S_ISDIR(found.st_mode) else "not a regular file"
        raise DecodeError("not_a_file", f"the path is {kind}")
    if not os.access(path, os.R_OK):
        raise DecodeError("unreadable", "no permission to read the file")
    if found.st_size == 0:
        raise DecodeError("empty", "the file has no bytes")
    return found.st_size


def starts_as_video(path: str) -> bool:
    """Whether a file that cannot be opened as a video begins like an MP4, Matroska or AVI file."""
    with open(path, "rb") as file:
        head = file.read(16)
    boxes = (b"ftyp", b"moov", b"mdat", b"free", b"wide", b"skip")
    return head[4:8] in boxes or head.startswith(b"\x1aE\xdf\xa3") or head[8:12] == b"AVI "


def fingerprint(path: str) -> str:
    """Hash of a file's content: 32 hexadecimal digits, from its size and its first, middle and last 64 KiB.

    Three samples identify a film without reading it whole; a copy has the same fingerprint, a re-encoded or
    cut file another.

    Raises:
        OSError: the file cannot be read.
    """
    digest = hashlib.blake2b(digest_size=16)
    with open(path, "rb") as file:
        size = file.seek(0, os.SEEK_END)
        digest.update(str(size).encode())
        for position in (0, max(0, size // 2), max(0, size - _SAMPLE_BYTES)):
            file.seek(position)
            digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()

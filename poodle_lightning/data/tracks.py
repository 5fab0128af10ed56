"""Tracks of points on disk: one compact file per video, mapped into memory.

``<folder>/<2 digits>/<hash of the video's name>.tracks``::

    magic, version, length and CRC-32 of the header        little endian, 20 bytes
    header: JSON with video, estimator, settings, sizes    padded with spaces to a multiple of 8 bytes
    times         float64, one per frame, seconds
    first         int32, one per track: the frame on which it starts
    lengths       int32, one per track: on how many frames it was followed
    places        2 x int16 per track and frame            see ops.tracks.Tracks
    consistency   float16 per track and frame

6 bytes per track and frame, 8 per track and 8 per frame. A file belongs to a video (its name in its source
and its fingerprint), to the estimator of the flow and to γ. Another δ needs no other file.

What is read is mapped, not copied: workers that read one video share its pages. The body has a CRC-32 too; it
is checked when a file is opened, which reads the file once. A file is written beside its place, flushed to
disk and renamed, so a reader sees the old one or the new one.

Unlike a flow cache, tracks are not computed in passing where they are missing: they are what a run trains on.
So everything that does not fit is an error in one line.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import struct
import tempfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from poodle_lightning.ops.tracks import DELTA, Array, Spans, Tracks, alive
from poodle_lightning.types import UserError

VERSION = 1

_MAGIC = b"PLTRAK\r\n"  # the line end shows a transfer as text
_HEAD = struct.Struct("<8sIII")
_LARGEST_HEADER = 1 << 20  # a bound on what a damaged header makes us read
_AGAIN = "track the video again"


class _Damaged(Exception):
    """A file that must not be used."""


@dataclass(frozen=True)
class Tracked:
    """The tracks of a video and the moments of its frames.

    Args:
        tracks: see ``ops.tracks.Tracks``.
        times: ``(n,)`` float64 seconds, one per frame.
    """

    tracks: Tracks
    times: Array


class TrackStore:
    """Tracks by video.

    Args:
        folder: is made when something is first written.
        estimator: the ``fingerprint`` of the flow's estimator; tracks of another one are refused. None takes
            whatever is there, and cannot write.
        gamma: tracks with another γ are refused; None takes any.
    """

    def __init__(self, folder: str | Path, estimator: str | None = None, gamma: float | None = None) -> None:
        self.folder, self.estimator, self.gamma = Path(folder), estimator, gamma

    def path(self, name: str) -> Path:
        """The file of a video.

        Args:
            name: what the video is called in its source; the same wherever the data lie.
        """
        stem = hashlib.blake2b(name.encode(), digest_size=16).hexdigest()
        return self.folder / stem[:2] / f"{stem}.tracks"

    def holds(self, name: str, fingerprint: str) -> bool:
        """Whether a video's tracks are there, whole and usable: nothing to be done again."""
        try:
            self.get(name, fingerprint)
        except UserError:
            return False
        return True

    def get(self, name: str, fingerprint: str) -> Tracked:
        """The tracks of a video, mapped from their file.

        Args:
            name: of the video in its source.
            fingerprint: of the video as it is now, see ``data.info.fingerprint``.

        Raises:
            UserError: there are none, they are damaged, of another video, estimator or γ, or the video was
                changed after it was tracked.
        """
        path = self.path(name)
        try:
            start, header = _header(path)
            self._check(path, header, name, fingerprint)
            return _body(path, start, header)
        except FileNotFoundError:
            raise UserError(f"no tracks of {name} in {self.folder}: track it first") from None
        except _Damaged:
            raise UserError(
                f"the tracks of {name} in {path} are damaged: delete the file and {_AGAIN}"
            ) from None
        except OSError as error:
            raise UserError(f"the tracks of {name} in {path} cannot be read: {error.strerror}") from error

    def _check(self, path: Path, header: dict[str, Any], name: str, fingerprint: str) -> None:
        """Whether a file is about this video, by its fingerprint first: a video may be renamed."""
        if header["fingerprint"] != fingerprint:
            if header["video"] != name:
                raise UserError(
                    f"{path} holds tracks of another video, {header['video']}, not {name}: {_AGAIN}"
                )
            raise UserError(f"{name} was changed after it was tracked ({path}): {_AGAIN}")
        if self.estimator not in (None, header["estimator"]):
            raise UserError(
                f"the tracks of {name} in {self.folder} were made with {header['estimator']}, not "
                f"{self.estimator}: choose that estimator or another folder"
            )
        if self.gamma not in (None, header["gamma"]):
            raise UserError(
                f"the tracks of {name} in {self.folder} were made with gamma = {header['gamma']:g}, not "
                f"{self.gamma:g}: only delta may change without tracking again"
            )

    def put(self, name: str, fingerprint: str, tracks: Tracks, times: Array) -> int:
        """Write the tracks of a video, in place of those that it has.

        Args:
            name: of the video in its source.
            fingerprint: of the video that was tracked.
            tracks: followed with the store's estimator.
            times: ``(n,)`` seconds, rising, one per frame.

        Returns:
            Bytes written.

        Raises:
            UserError: the disk refuses.
            ValueError: the store was opened without an estimator or for another γ, or the times do not fit.
        """
        if self.estimator is None:
            raise ValueError("tracks of any estimator cannot be written: name the estimator")
        if self.gamma not in (None, tracks.gamma):
            raise ValueError(f"a store for gamma = {self.gamma} cannot take tracks with {tracks.gamma}")
        if np.shape(times) != (tracks.frames,):
            raise ValueError(f"{tracks.frames} frames need as many times, not {np.shape(times)}")
        body = b"".join(
            np.ascontiguousarray(array, kind).tobytes()
            for array, kind in (
                (times, "<f8"),
                (tracks.first, "<i4"),
                (tracks.lengths, "<i4"),
                (tracks.places, "<i2"),
                (tracks.consistency, "<f2"),
            )
        )
        content = {
            "video": name,
            "fingerprint": fingerprint,
            "estimator": self.estimator,
            "gamma": tracks.gamma,
            "limit": None if math.isinf(tracks.limit) else tracks.limit,  # JSON has no infinity
            "size": list(tracks.size),
            "frames": tracks.frames,
            "tracks": len(tracks),
            "places": len(tracks.places),
            "crc": zlib.crc32(body),
        }
        text = json.dumps(content, separators=(",", ":")).encode()
        text += b" " * (-(_HEAD.size + len(text)) % 8)
        path, data = self.path(name), _HEAD.pack(_MAGIC, VERSION, len(text), zlib.crc32(text)) + text + body
        try:
            _write(path, data)
        except OSError as error:
            raise UserError(
                f"tracks cannot be written to {path.parent}: {error.strerror or error}"
            ) from error
        return len(data)


def spans_of(tracked: Tracked, name: str, delta: float = DELTA) -> Spans:
    """From when to when a video's tracks live, if any does.

    Args:
        tracked: of the video.
        name: of the video, for the message.
        delta: δ, squared pixels.

    Raises:
        UserError: δ is above what the tracks were followed with, or no track is active on any frame.
    """
    if not delta <= tracked.tracks.limit:
        raise UserError(
            f"delta = {delta:g} is above the limit {tracked.tracks.limit:g} with which {name} was tracked: "
            f"give less, or {_AGAIN} with a higher limit"
        )
    spans = alive(tracked.tracks, delta)
    if not spans.active.any():
        raise UserError(
            f"no track of {name} is active on any frame with delta = {delta:g}: give more, or track more "
            "points"
        )
    return spans


def _header(path: Path) -> tuple[int, dict[str, Any]]:
    """Where the body starts, and what the header says."""
    with path.open("rb") as file:
        head = file.read(_HEAD.size)
        if len(head) < _HEAD.size:
            raise _Damaged
        magic, version, length, crc = _HEAD.unpack(head)
        if magic != _MAGIC or version != VERSION or length > _LARGEST_HEADER:
            raise _Damaged
        text = file.read(length)
    if len(text) < length or zlib.crc32(text) != crc:
        raise _Damaged
    content: dict[str, Any] = json.loads(text)  # its checksum holds: it is what was written
    return _HEAD.size + length, content


def _body(path: Path, start: int, header: dict[str, Any]) -> Tracked:
    """The arrays, mapped; read-only."""
    frames, count, places = header["frames"], header["tracks"], header["places"]
    kinds = [("<f8", frames, 1), ("<i4", count, 1), ("<i4", count, 1), ("<i2", places, 2), ("<f2", places, 1)]
    sizes = [np.dtype(kind).itemsize * rows * width for kind, rows, width in kinds]
    if path.stat().st_size != start + sum(sizes):
        raise _Damaged
    body = np.memmap(path, np.uint8, "r", offset=start, shape=(sum(sizes),))
    if zlib.crc32(body.data) != header["crc"]:
        raise _Damaged
    ends = np.cumsum(sizes)
    parts = [
        body[end - size : end].view(kind).reshape((rows, width) if width > 1 else (rows,))
        for end, size, (kind, rows, width) in zip(ends, sizes, kinds, strict=True)
    ]
    times, first, lengths, where, consistency = parts
    offsets = np.zeros(count + 1, np.int64)
    np.cumsum(lengths, out=offsets[1:])
    size = (header["size"][0], header["size"][1])
    limit = math.inf if header["limit"] is None else header["limit"]
    tracks = Tracks(frames, size, header["gamma"], limit, first, offsets, where, consistency)
    return Tracked(tracks, times)


def _write(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}-", suffix=".part")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)  # mkstemp's files are private; tracks are shared
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise

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

What is read is mapped, not copied: workers that read one video share its pages. The body has a CRC-32 too; a
process checks it when it opens a file for the first time, which reads the file once, and not again until the
file changes. A file is written beside its place, flushed to disk and renamed (``data.headers``), so a reader
sees the old one or the new one.

Times are seconds of the video, also where a stretch of it was tracked. A stretch has a name of its own
(:func:`track_name`), as its points start within it.

Unlike a flow cache, tracks are not computed in passing where they are missing: they are what a run trains on.
So everything that does not fit is an error in one line.
"""

from __future__ import annotations

import hashlib
import math
import os
import zlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from poodle_lightning.data import headers
from poodle_lightning.data.cached_flow import video_of
from poodle_lightning.data.headers import Damaged
from poodle_lightning.data.sources import Entry, FolderSource, Source
from poodle_lightning.data.streets import SyntheticSource
from poodle_lightning.ops.tracks import DELTA, Array, Spans, Tracks, alive
from poodle_lightning.types import UserError

VERSION = 1

_MAGIC = b"PLTRAK\r\n"  # the line end shows a transfer as text
_LARGEST_HEADER = 1 << 20  # a bound on what a damaged header makes us read
_AGAIN = "track it again by poodle-lightning trace"
_intact: set[int] = set()  # hashes of files whose body this process has checked


@dataclass(frozen=True)
class Tracked:
    """The tracks of a video and the moments of its frames.

    Args:
        tracks: see ``ops.tracks.Tracks``.
        times: ``(n,)`` float64 seconds, one per frame.
    """

    tracks: Tracks
    times: Array


def track_name(entry: Entry, root: str | None) -> str:
    """What an entry is called among tracks: the same wherever the data lie.

    Its path below the root, and the stretch in milliseconds: ``train/dancing/x.mp4#0-10010``. An entry does
    not know whether it is all of its video, so the stretch is always named.

    Args:
        entry: of a source.
        root: of the data, a folder or a file; None where there is none (generated videos). A path that does
            not lie below it stays as it is.
    """
    path = Path(entry.path)
    if root is not None:
        folder = Path(os.path.abspath(os.path.expanduser(root)))
        folder = folder.parent if folder.is_file() else folder
        whole = Path(os.path.abspath(path))
        path = whole.relative_to(folder) if whole.is_relative_to(folder) else path
    return f"{path.as_posix()}#{round(entry.start * 1e3)}-{round(entry.stop * 1e3)}"


def video_print(source: Source, entry: Entry) -> str:
    """Fingerprint of an entry's video as it is now: of its content, or of what a generated one is made from.

    A folder of images is known by their names and sizes.

    Raises:
        OSError: it cannot be read.
    """
    if isinstance(source, FolderSource):
        return source.video(entry).fingerprint
    known = video_of(entry.path) if os.path.isfile(entry.path) else None
    if known is not None:
        return known
    if isinstance(source, SyntheticSource):
        about = f"{entry.path} {replace(source.streets, videos=1)}"
    elif os.path.isdir(entry.path):
        with os.scandir(entry.path) as files:
            about = " ".join(sorted(f"{file.name}:{file.stat().st_size}" for file in files))
    else:
        about = entry.path
    return hashlib.blake2b(about.encode(), digest_size=16).hexdigest()


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

    def holds(
        self,
        name: str,
        fingerprint: str,
        points: int = 0,
        limit: float = -math.inf,
        seed: int | None = None,
    ) -> bool:
        """Whether a video's tracks are there: nothing to be done again.

        Reads the header and looks at the file's length, nothing more; damage in the body is noticed by
        :meth:`get`.

        Args:
            name: see :meth:`get`.
            fingerprint: see :meth:`get`.
            points: that must have been followed, at least.
            limit: of δ, up to which they must have been followed.
            seed: of the places where they must start; None takes any.

        Raises:
            UserError: what is there was made with another estimator, γ or seed, and would be lost.
        """
        path = self.path(name)
        try:
            _, header = _header(path)
        except (Damaged, OSError):
            return False
        if header["fingerprint"] != fingerprint:
            return False
        self._check(path, header, name, fingerprint)
        if seed not in (None, header["seed"]):
            raise UserError(
                f"the tracks of {name} in {self.folder} start where seed {header['seed']} put them, not "
                f"{seed}: choose that seed or another folder"
            )
        return bool(header["tracks"] >= points and _limit(header) >= limit)

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
            raise UserError(
                f"no tracks of {name} in {self.folder}: make them by poodle-lightning trace; if there were, "
                "the video has another length now, or is cut otherwise"
            ) from None
        except Damaged:
            raise UserError(f"the tracks of {name} in {path} are damaged: {_AGAIN}") from None
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
                f"{self.estimator}: choose the same settings or another folder"
            )
        if self.gamma not in (None, header["gamma"]):
            raise UserError(
                f"the tracks of {name} in {self.folder} were made with gamma = {header['gamma']:g}, not "
                f"{self.gamma:g}: only delta may change without tracking again, into another folder"
            )

    def put(self, name: str, fingerprint: str, tracks: Tracks, times: Array, seed: int = 0) -> int:
        """Write the tracks of a video, in place of those that it has.

        Args:
            name: of the video in its source.
            fingerprint: of the video that was tracked.
            tracks: followed with the store's estimator.
            times: ``(n,)`` seconds, rising, one per frame.
            seed: of the places where they start.

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
            "seed": seed,
            "limit": None if math.isinf(tracks.limit) else tracks.limit,  # JSON has no infinity
            "size": list(tracks.size),
            "frames": tracks.frames,
            "tracks": len(tracks),
            "places": len(tracks.places),
            "crc": zlib.crc32(body),
        }
        path, header = self.path(name), headers.packed(_MAGIC, VERSION, content, multiple=8)
        try:
            headers.write(path, (header, body))
        except OSError as error:
            raise UserError(
                f"tracks cannot be written to {path.parent}: {error.strerror or error}"
            ) from error
        return len(header) + len(body)


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
            f"give less, or {_AGAIN} --limit {delta:g}"
        )
    spans = alive(tracked.tracks, delta)
    if not spans.active.any():
        raise UserError(
            f"no track of {name} is active on any frame with delta = {delta:g}: give more, or track "
            "more points by poodle-lightning trace --points"
        )
    return spans


def _header(path: Path) -> tuple[int, dict[str, Any]]:
    """Where the body starts, and what the header says."""
    with path.open("rb") as file:
        start, content = headers.read(file, _MAGIC, VERSION, _LARGEST_HEADER)
    if path.stat().st_size != start + sum(_sizes(content)):
        raise Damaged
    return start, content  # its checksum holds: it is what was written


def _kinds(header: dict[str, Any]) -> list[tuple[str, int, int]]:
    """The arrays of the body: type, rows, columns."""
    frames, count, places = header["frames"], header["tracks"], header["places"]
    return [("<f8", frames, 1), ("<i4", count, 1), ("<i4", count, 1), ("<i2", places, 2), ("<f2", places, 1)]


def _sizes(header: dict[str, Any]) -> list[int]:
    return [np.dtype(kind).itemsize * rows * width for kind, rows, width in _kinds(header)]


def _limit(header: dict[str, Any]) -> float:
    return math.inf if header["limit"] is None else header["limit"]


def _body(path: Path, start: int, header: dict[str, Any]) -> Tracked:
    """The arrays, mapped; read-only."""
    kinds, sizes = _kinds(header), _sizes(header)
    body = np.memmap(path, np.uint8, "r", offset=start, shape=(sum(sizes),))
    found = path.stat()
    this = hash((str(path), found.st_ino, found.st_size, found.st_mtime_ns, header["crc"]))
    if this not in _intact:
        if zlib.crc32(body.data) != header["crc"]:
            raise Damaged
        _intact.add(this)
    ends = np.cumsum(sizes)
    parts = [
        body[end - size : end].view(kind).reshape((rows, width) if width > 1 else (rows,))
        for end, size, (kind, rows, width) in zip(ends, sizes, kinds, strict=True)
    ]
    times, first, lengths, where, consistency = parts
    offsets = np.zeros(len(lengths) + 1, np.int64)
    np.cumsum(lengths, out=offsets[1:])
    size, gamma, limit = (header["size"][0], header["size"][1]), header["gamma"], _limit(header)
    tracks = Tracks(header["frames"], size, gamma, limit, first, offsets, where, consistency)
    return Tracked(tracks, times)

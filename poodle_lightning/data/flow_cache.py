"""Optical flow on disk, computed once.

A cache holds the flow of **whole frames**, in pixels of the frame as it is read, so a random crop is cut
from it and augmentation stays random. What it cannot keep is random moments: it helps only if the same pairs
come back. ``data.cached_flow.FixedPairs`` therefore draws from a fixed set of pairs per video. That changes
the paper's sampling (fresh pairs in every epoch), and choosing that sampler is the switch.

One file per video (per minute of a longer one), ``<folder>/<2 digits>/<hash>.flow``::

    magic, version, length and CRC-32 of the header        little endian, 20 bytes
    header: JSON with video, estimator, entries            times in µs, shape, step, place and CRC-32
    one block per pair: flow there and back (4 planes)     int16 in 1/8 px, horizontal differences, zlib

At half resolution (the default) a block stores the mean of every 2x2 pixels; still in whole-frame pixels. The
rounding error is at most 1/16 px; a flow that is affine comes back exactly but for that, inside. A 512x1024
frame of street video takes 180 KB a direction, or 530 KB at full resolution.

A file is written beside its place, flushed to disk and renamed, so a reader sees the old one or the new one.
Of two writers of one video the last wins. Whatever is torn, damaged, of another video, estimator or version
is treated as missing and computed again.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
import tempfile
import warnings
import zlib
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO

import numpy as np

from poodle_lightning.ops.geometry import Size

VERSION = 1
Box = tuple[int, int, int, int]
Moments = tuple[float, float]

_MAGIC = b"PLFLOW\r\n"  # the line end shows a transfer as text
_HEAD = struct.Struct("<8sIII")
_UNIT = 8  # steps per pixel
_REACH = 4095.0  # px; what int16 holds
_LARGEST = 1 << 15  # px a side, and a bound on what a damaged header makes us allocate
_LARGEST_HEADER = 1 << 24
_PART = 60.0  # seconds of video per file: adding a pair rewrites the file, so an hour must not be one


class _Damaged(Exception):
    """A file or block that must not be used."""


@dataclass(frozen=True)
class _Block:
    """Where the flow of a pair is; times in µs, ``step`` frame pixels per stored value."""

    a: int
    b: int
    height: int
    width: int
    step: int
    place: int
    length: int
    crc: int

    def __post_init__(self) -> None:
        if any(type(value) is not int or value < 0 for value in asdict(self).values()):
            raise ValueError("not a natural number")
        if self.step not in (1, 2) or not all(0 < side <= _LARGEST for side in (self.height, self.width)):
            raise ValueError("no such frame")


_Blocks = dict[tuple[int, int], tuple[_Block, bytes]]


class FlowCache:
    """Flow of pairs of frames, by video and moments.

    Args:
        folder: is made when something is first written.
        estimator: the estimator's ``fingerprint``; files of another one are stale. None takes whatever is
            there, and cannot write.
        full_resolution: store every pixel; a stored half is then not good enough and counts as missing.
    """

    def __init__(
        self, folder: str | Path, estimator: str | None = None, full_resolution: bool = False
    ) -> None:
        self.folder, self.estimator = Path(folder), estimator
        self.step = 1 if full_resolution else 2
        self.writable = True
        self._warned: set[str] = set()

    def path(self, video: str, t_a: float = 0.0) -> Path:
        """The file of a pair.

        Args:
            video: the video's fingerprint.
            t_a: the pair's first moment, seconds.
        """
        part = f"{video} {int(t_a // _PART)}"
        name = hashlib.blake2b(part.encode(), digest_size=16).hexdigest()
        return self.folder / name[:2] / f"{name}.flow"

    def get(
        self, video: str, t_a: float, t_b: float, *, box: Box | None = None, size: Size | None = None
    ) -> np.ndarray | None:
        """The flow between two frames.

        Args:
            video: fingerprint.
            t_a: moment that was asked for, seconds; compared in whole microseconds.
            t_b: the other one.
            box: ``(x0, y0, x1, y1)`` in pixels of the frame; None is the whole frame.
            size: height and width of the video's frames, if known; another size is stale.

        Returns:
            ``(2, 2, h, w)`` float32 px, there and back; None if it is missing or must not be used.
        """
        try:
            with self.path(video, t_a).open("rb") as file:
                start, blocks = self._header(file, video)
                block = blocks.get((_micro(t_a), _micro(t_b)))
                if block is None or block.step > self.step:
                    return None
                if size is not None and size != (block.height, block.width):
                    return None
                return _decode(_read_block(file, start, block), block, box)
        except (_Damaged, FileNotFoundError):
            return None
        except OSError as error:
            self._warn("read", f"cannot be read ({error.strerror or error})")
            return None

    def lacking(self, video: str, wanted: Iterable[Moments]) -> list[Moments]:
        """Those of the wanted pairs that are not stored whole (checksums are verified), in order of time."""
        pairs = sorted(set(wanted))
        kept = {
            moments
            for path in {self.path(video, a) for a, _ in pairs}
            for moments in self._intact(path, video)
        }
        return [(a, b) for a, b in pairs if (_micro(a), _micro(b)) not in kept]

    def put(self, video: str, t_a: float, t_b: float, flow: np.ndarray) -> bool:
        """Store one pair; see :meth:`put_all`. Whether it was stored."""
        return self.put_all(video, [(t_a, t_b, flow)])[0] == 1

    def put_all(self, video: str, pairs: Iterable[tuple[float, float, np.ndarray]]) -> tuple[int, int]:
        """Store pairs of a video beside those that it has; one write per file.

        A disk that is full or read-only is no error: the first failure warns and ends writing. Flow that is
        not finite, or beyond ±4095 px, is not stored.

        Args:
            video: fingerprint.
            pairs: moments in seconds and flow ``(2, 2, H, W)`` float32 px, there and back.

        Returns:
            How many were stored, and their bytes.

        Raises:
            ValueError: the cache was opened without an estimator, or the flow has another shape.
        """
        if self.estimator is None:
            raise ValueError("a cache of any estimator cannot be written: name the estimator")
        if not self.writable:
            return 0, 0
        fresh: dict[Path, _Blocks] = {}
        for t_a, t_b, flow in pairs:
            if flow.ndim != 4 or flow.shape[:2] != (2, 2):
                raise ValueError(f"flow must be (2, 2, H, W), there and back, not {flow.shape}")
            if not _storable(flow):
                self._warn("bad", "leaves out flow that is not finite or beyond 4095 px")
                continue
            data = encode(flow, self.step)
            moments = (_micro(t_a), _micro(t_b))
            block = _Block(*moments, flow.shape[2], flow.shape[3], self.step, 0, len(data), zlib.crc32(data))
            fresh.setdefault(self.path(video, t_a), {})[moments] = block, data
        try:
            for path, blocks in fresh.items():
                self._write(path, video, self._intact(path, video) | blocks)
        except OSError as error:
            self.writable = False
            self._warn("write", f"cannot be written ({error.strerror or error}): flow is computed every time")
            return 0, 0
        sizes = [block.length for blocks in fresh.values() for block, _ in blocks.values()]
        return len(sizes), sum(sizes)

    def rounded(self, flow: np.ndarray, box: Box | None = None) -> np.ndarray:
        """Flow as it would come back from here, or a box of it; what cannot be stored comes back as it is."""
        if not _storable(flow):
            x0, y0, x1, y1 = box or (0, 0, flow.shape[3], flow.shape[2])
            return flow[:, :, y0:y1, x0:x1]
        data = encode(flow, self.step)
        return _decode(data, _Block(0, 0, flow.shape[2], flow.shape[3], self.step, 0, len(data), 0), box)

    # ---- the file
    def _header(self, file: IO[bytes], video: str) -> tuple[int, dict[tuple[int, int], _Block]]:
        """Where the blocks start, and the blocks."""
        head = file.read(_HEAD.size)
        if len(head) < _HEAD.size:
            raise _Damaged
        magic, version, length, crc = _HEAD.unpack(head)
        if magic != _MAGIC or version != VERSION or length > _LARGEST_HEADER:
            raise _Damaged
        text = file.read(length)
        if len(text) < length or zlib.crc32(text) != crc:
            raise _Damaged
        try:
            content = json.loads(text)
            if content["video"] != video or self.estimator not in (None, content["estimator"]):
                raise _Damaged
            blocks = [_Block(**entry) for entry in content["entries"]]
        except (ValueError, KeyError, TypeError) as error:
            raise _Damaged from error
        return _HEAD.size + length, {(block.a, block.b): block for block in blocks}

    def _intact(self, path: Path, video: str) -> _Blocks:
        """Blocks of a file whose checksum holds and whose resolution is enough."""
        kept = {}
        try:
            with path.open("rb") as file:
                start, blocks = self._header(file, video)
                for moments, block in blocks.items():
                    try:
                        data = _read_block(file, start, block)
                    except _Damaged:
                        continue
                    if block.step <= self.step:
                        kept[moments] = block, data
        except (_Damaged, FileNotFoundError):
            pass
        except OSError as error:
            self._warn("read", f"cannot be read ({error.strerror or error})")
        return kept

    def _write(self, path: Path, video: str, blocks: _Blocks) -> None:
        place, entries = 0, []
        for block, data in blocks.values():
            entries.append(asdict(block) | {"place": place})
            place += len(data)
        content = {"video": video, "estimator": self.estimator, "entries": entries}
        text = json.dumps(content, separators=(",", ":")).encode()
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}-", suffix=".part")
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(_HEAD.pack(_MAGIC, VERSION, len(text), zlib.crc32(text)) + text)
                file.writelines(data for _, data in blocks.values())
                file.flush()
                os.fsync(file.fileno())
            os.chmod(temporary, 0o644)  # mkstemp's files are private; a cache is shared
            os.replace(temporary, path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise

    def _warn(self, kind: str, what: str) -> None:
        if kind not in self._warned:
            self._warned.add(kind)
            warnings.warn(f"flow cache {self.folder} {what}", RuntimeWarning, stacklevel=3)


def encode(flow: np.ndarray, step: int) -> bytes:
    """Flow ``(2, 2, H, W)`` px as a block; ``step`` 2 stores the mean of every 2x2 pixels."""
    planes: np.ndarray = flow.reshape(4, *flow.shape[2:]).astype(np.float32, copy=False)
    if step == 2:
        odd = [(0, 0), *((0, length % 2) for length in planes.shape[1:])]
        even = np.pad(planes, odd, mode="edge") if any(high for _, high in odd) else planes
        rows = even[:, 0::2] + even[:, 1::2]
        planes = (rows[..., 0::2] + rows[..., 1::2]) / 4
    values = np.rint(planes * _UNIT).astype("<i2")
    values[..., 1:] -= values[..., :-1].copy()  # wraps around, and back when it is summed up
    return zlib.compress(values.tobytes(), level=6)


def _decode(data: bytes, block: _Block, box: Box | None) -> np.ndarray:
    height, width, step = block.height, block.width, block.step
    rows, columns = -(-height // step), -(-width // step)
    expected = 4 * rows * columns * 2
    try:
        raw = zlib.decompressobj().decompress(data, expected)
    except zlib.error as error:
        raise _Damaged from error
    if len(raw) != expected:
        raise _Damaged
    values = np.frombuffer(raw, "<i2").reshape(4, rows, columns)
    x0, y0, x1, y1 = (0, 0, width, height) if box is None else box
    if not (0 <= x0 < x1 <= width and 0 <= y0 < y1 <= height):
        raise _Damaged
    if step == 1:
        planes = np.cumsum(values[:, y0:y1], axis=2, dtype=np.int16)[..., x0:x1]
        return (planes.astype(np.float32) / _UNIT).reshape(2, 2, y1 - y0, x1 - x0)
    # a margin of one stored value, so that a crop equals the same part of the whole
    left, top = max(0, x0 // 2 - 1), max(0, y0 // 2 - 1)
    planes = np.cumsum(values[:, top : (y1 + 1) // 2 + 1], axis=2, dtype=np.int16)
    planes = planes[..., left : (x1 + 1) // 2 + 1]
    fine = _doubled(planes.astype(np.float32) / _UNIT)
    cut = fine[:, y0 - 2 * top : y1 - 2 * top, x0 - 2 * left : x1 - 2 * left]
    return np.ascontiguousarray(cut).reshape(2, 2, y1 - y0, x1 - x0)


def _doubled(planes: np.ndarray) -> np.ndarray:
    """``(4, h, w)`` → ``(4, 2h, 2w)``, bilinear, clamped at the border."""
    import cv2

    size = (2 * planes.shape[2], 2 * planes.shape[1])
    fine = cv2.resize(np.ascontiguousarray(planes.transpose(1, 2, 0)), size, interpolation=cv2.INTER_LINEAR)
    return fine.transpose(2, 0, 1)


def _read_block(file: IO[bytes], start: int, block: _Block) -> bytes:
    file.seek(start + block.place)
    # never ask for more than a block can have: a damaged length must not fill the memory
    data = file.read(min(block.length, 9 * block.height * block.width + 4096))
    if len(data) != block.length or zlib.crc32(data) != block.crc:
        raise _Damaged
    return data


def _storable(flow: np.ndarray) -> bool:
    return bool((np.abs(flow) < _REACH).all())


def _micro(seconds: float) -> int:
    return round(seconds * 1e6)

"""Optical flow on disk, computed once.

A cache holds the flow of **whole frames**, in pixels of the frame as it is read, so a random crop is cut
from it and augmentation stays random. What it cannot keep is random moments: it helps only if the same pairs
come back. ``data.cached_flow.FixedPairs`` therefore draws from a fixed set of pairs per video. That changes
the paper's sampling (fresh pairs in every epoch), and choosing that sampler is the switch.

One file per video (per minute of a longer one), ``<folder>/<2 digits>/<hash>.flow``::

    magic, version, length and CRC-32 of the header        little endian, 20 bytes
    header: JSON with video, estimator, entries            times in µs, shape, step, place and CRC-32
    one block per pair: flow there and back (4 planes)     in one of two forms

``delta`` (``data.flow_delta``) is the default: int16 in 1/8 px, horizontal differences, zlib. What is stored
is rounded by at most 1/16 px, which is the whole error at full resolution. ``jpeg`` (``data.flow_jpeg``) is
PiCo's: smaller, approximate. A block says which it is, one file may hold both, and what is there is read
whatever its form.

At half resolution (the default) one value stands for 2x2 pixels; still in whole-frame pixels. A flow that is
affine comes back exactly but for the rounding, inside; see ``data.flow_planes`` for others. Before the values
were corrected as it says there, they were plain means of 2x2 pixels: such files have the same version, are
still read, and give a blurrier flow. Fill a new folder to have one kind only.

A file is written beside its place, flushed to disk and renamed, so a reader sees the old one or the new one.
Of two writers of one video the last wins. Whatever is torn, damaged, of another video, estimator or version
is treated as missing and computed again.
"""

from __future__ import annotations

import hashlib
import warnings
import zlib
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import IO, Literal

import numpy as np

from poodle_lightning.data import flow_delta, flow_jpeg, headers
from poodle_lightning.data.flow_planes import Part
from poodle_lightning.data.headers import Damaged
from poodle_lightning.data.pixels import Box
from poodle_lightning.ops.geometry import Size
from poodle_lightning.types import UserError

VERSION = 1
Moments = tuple[float, float]
Form = Literal["delta", "jpeg"]

_MAGIC = b"PLFLOW\r\n"  # the line end shows a transfer as text
_FORMS = {"delta": flow_delta.decode, "jpeg": flow_jpeg.decode}
_LARGEST = 1 << 15  # px a side, and a bound on what a damaged header makes us allocate
_LARGEST_HEADER = 1 << 24
_PART = 60.0  # seconds of video per file: adding a pair rewrites the file, so an hour must not be one


@dataclass(frozen=True)
class _Block:
    """Where the flow of a pair is; times in µs, ``step`` frame pixels per stored value.

    A header names the form only where it is not ``delta``, as the first files did not name any.
    """

    a: int
    b: int
    height: int
    width: int
    step: int
    place: int
    length: int
    crc: int
    form: str = "delta"

    def __post_init__(self) -> None:
        if self.form not in _FORMS:
            raise ValueError("no such form")
        if any(type(value) is not int or value < 0 for name, value in asdict(self).items() if name != "form"):
            raise ValueError("not a natural number")
        if self.step not in (1, 2) or not all(0 < side <= _LARGEST for side in (self.height, self.width)):
            raise ValueError("no such frame")

    @property
    def entry(self) -> dict[str, int | str]:
        """As it stands in the header."""
        return {name: value for name, value in asdict(self).items() if (name, value) != ("form", "delta")}


_Blocks = dict[tuple[int, int], tuple[_Block, bytes]]


class FlowCache:
    """Flow of pairs of frames, by video and moments.

    Args:
        folder: is made when something is first written.
        estimator: the estimator's ``fingerprint``; files of another one are stale. None takes whatever is
            there, and cannot write.
        full_resolution: store every pixel; a stored half is then not good enough and counts as missing.
        form: of what is written, ``delta`` or ``jpeg``; what is there is read in either form.
        quality: of ``jpeg``, 1 to 100.

    Raises:
        UserError: no such form or quality.
    """

    def __init__(
        self,
        folder: str | Path,
        estimator: str | None = None,
        full_resolution: bool = False,
        form: Form = "delta",
        quality: int = 95,
    ) -> None:
        if form not in _FORMS:
            raise UserError(f"a flow cache has no form {form!r}: choose one of {', '.join(_FORMS)}")
        if not 1 <= quality <= 100:
            raise UserError(f"JPEG quality goes from 1 to 100, not {quality}")
        self.folder, self.estimator = Path(folder), estimator
        self.form, self.quality = form, quality
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
                return _unpacked(_read_block(file, start, block), block, box)
        except (Damaged, FileNotFoundError):
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
            data = self._packed(flow)
            moments, size = (_micro(t_a), _micro(t_b)), (flow.shape[2], flow.shape[3])
            block = _Block(*moments, *size, self.step, 0, len(data), zlib.crc32(data), self.form)
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
        size = (flow.shape[2], flow.shape[3])
        if not _storable(flow):
            x0, y0, x1, y1 = Part(size, 1, box).inside
            return flow[:, :, y0:y1, x0:x1]
        return _FORMS[self.form](self._packed(flow), size, self.step, box)

    def _packed(self, flow: np.ndarray) -> bytes:
        if self.form == "jpeg":
            return flow_jpeg.encode(flow, self.quality, self.step)
        return flow_delta.encode(flow, self.step)

    # ---- the file
    def _header(self, file: IO[bytes], video: str) -> tuple[int, dict[tuple[int, int], _Block]]:
        """Where the blocks start, and the blocks."""
        start, content = headers.read(file, _MAGIC, VERSION, _LARGEST_HEADER)
        try:
            if content["video"] != video or self.estimator not in (None, content["estimator"]):
                raise Damaged
            blocks = [_Block(**entry) for entry in content["entries"]]
        except (ValueError, KeyError, TypeError) as error:
            raise Damaged from error
        return start, {(block.a, block.b): block for block in blocks}

    def _intact(self, path: Path, video: str) -> _Blocks:
        """Blocks of a file whose checksum holds and whose resolution is enough."""
        kept = {}
        try:
            with path.open("rb") as file:
                start, blocks = self._header(file, video)
                for moments, block in blocks.items():
                    try:
                        data = _read_block(file, start, block)
                    except Damaged:
                        continue
                    if block.step <= self.step:
                        kept[moments] = block, data
        except (Damaged, FileNotFoundError):
            pass
        except OSError as error:
            self._warn("read", f"cannot be read ({error.strerror or error})")
        return kept

    def _write(self, path: Path, video: str, blocks: _Blocks) -> None:
        place, entries = 0, []
        for block, data in blocks.values():
            entries.append(block.entry | {"place": place})
            place += len(data)
        content = {"video": video, "estimator": self.estimator, "entries": entries}
        header = headers.packed(_MAGIC, VERSION, content)
        headers.write(path, chain((header,), (data for _, data in blocks.values())))

    def _warn(self, kind: str, what: str) -> None:
        if kind not in self._warned:
            self._warned.add(kind)
            warnings.warn(f"flow cache {self.folder} {what}", RuntimeWarning, stacklevel=3)


def _unpacked(data: bytes, block: _Block, box: Box | None) -> np.ndarray:
    try:
        return _FORMS[block.form](data, (block.height, block.width), block.step, box)
    except ValueError as error:
        raise Damaged from error


def _read_block(file: IO[bytes], start: int, block: _Block) -> bytes:
    file.seek(start + block.place)
    # never ask for more than a block can have: a damaged length must not fill the memory
    # (a JPEG of a single row has the bytes of 8)
    data = file.read(min(block.length, 9 * (block.height + 7) * (block.width + 7) + 4096))
    if len(data) != block.length or zlib.crc32(data) != block.crc:
        raise Damaged
    return data


def _storable(flow: np.ndarray) -> bool:
    return bool((np.abs(flow) < flow_delta.REACH).all())


def _micro(seconds: float) -> int:
    return round(seconds * 1e6)

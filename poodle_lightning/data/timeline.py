"""What a stream's header and index tell before anything is decoded: its timestamps, and where to start."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from typing import Any

from poodle_lightning.data.info import DecodeError

# Packets that show whether frames are stored out of order: more than H.264 moves one.
_REORDERED_WITHIN = 24
# In a film of fewer stretches between key frames the next request may well lie in the same one.
_FEW = 10


class KeyFrames:
    """Where decoding can start.

    Args:
        index: of the container, as PyAV gives it; perhaps empty.
        origin: timestamp of the first frame.
    """

    def __init__(self, index: Any, origin: int) -> None:
        self._index = index
        # the index holds decoding times, which lag behind by the depth of the B-frames
        self._lag = int(origin - index[0].timestamp) if len(index) else 0

    def between(self, here: int, tick: int, blind: int) -> bool:
        """Whether a jump to ``tick`` gets there sooner than reading on from ``here``.

        Args:
            here: timestamp of the last frame decoded.
            tick: timestamp that is wanted, later.
            blind: where there is no index: how many ticks are worth a jump.
        """
        if len(self._index) < 2:
            return tick - here > blind
        entry = self._index.search_timestamp(tick - self._lag, backward=True)
        return bool(entry >= 0 and self._index[entry].timestamp + self._lag > here)

    def are_few(self, tick: int) -> bool:
        """Whether the key frames around ``tick`` are more than a tenth of the film apart."""
        if len(self._index) < 2:
            return False
        before = self._index.search_timestamp(tick - self._lag, backward=True)
        after = self._index.search_timestamp(tick - self._lag + 1, backward=False)
        stretch = (after if after >= 0 else len(self._index)) - before
        return bool(stretch * _FEW > len(self._index))


def check_times(times: Sequence[float]) -> None:
    """Refuse times that no video has.

    Raises:
        ValueError: there are none, or one is negative or not finite.
    """
    if not len(times) or not all(math.isfinite(t) and t >= 0 for t in times):
        raise ValueError(f"times must be finite numbers ≥ 0, and at least one, not {list(times)}")


def header_tells_all(container: Any, videos: Sequence[Any], max_pixels: int) -> bool:
    """Whether a file's header says how far frames are stored out of order, as decoding some would.

    MP4 and MOV tell it of H.264. A depth of nothing may also mean that nothing is known. Several streams, or
    a size that cannot be, are looked at more closely.

    Args:
        container: as PyAV gives it; it may be read from.
        videos: its video streams.
        max_pixels: the largest size that is decoded.
    """
    context = videos[0].codec_context if len(videos) == 1 else None
    if context is None or context.name != "h264" or not container.format.name.startswith("mov"):
        return False
    if not 0 < context.width * context.height <= max_pixels:
        return False
    if context.reorder_depth > 0:
        return True
    first = islice(container.demux(videos[0]), _REORDERED_WITHIN)
    stamps = [packet.pts for packet in first if packet.size]
    return None not in stamps and stamps == sorted(stamps)


def timeline(
    stream: Any, file_bytes: int, packets: Callable[[int | None], Iterable[Any]]
) -> tuple[int, list[int], int]:
    """Number of frames, timestamps of the key frames, timestamp of the last frame.

    A complete index (MP4, MOV) tells all but the last without reading the file, and whether its end is
    there. Any other container is read through.

    Args:
        stream: the video stream, as PyAV gives it.
        file_bytes: length of the file.
        packets: all packets from the key frame at a timestamp on, or from the start (None).

    Raises:
        DecodeError: the file ends early, or there are no timestamps.
    """
    index = list(stream.index_entries)
    keys = [entry.timestamp for entry in index if entry.is_keyframe]
    if keys and len(index) == stream.frames:
        if max(entry.pos + entry.size for entry in index) > file_bytes:
            raise DecodeError("truncated", "the index points past the end of the file")
        last = max((pts for pts, _ in _stamps(packets(keys[-1]))), default=None)
        count = sum(not entry.is_discard for entry in index)
    else:
        stamps = list(_stamps(packets(None)))
        keys = sorted(pts for pts, is_key in stamps if is_key)
        last = max((pts for pts, _ in stamps), default=None)
        count = len(stamps)
    if last is None:
        raise DecodeError("bad_timestamps", "the stream has no timestamps")
    return count, keys, last


def _stamps(packets: Iterable[Any]) -> Iterator[tuple[int, bool]]:
    """Timestamp of every shown frame, and whether it is a key frame."""
    for packet in packets:
        if packet.is_corrupt:
            raise DecodeError("truncated", "a packet is incomplete")
        if packet.pts is not None and not packet.is_discard:
            yield int(packet.pts), bool(packet.is_keyframe)

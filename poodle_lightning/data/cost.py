"""What a pair of frames costs the loader: expected from how a video is coded, and measured on it.

A frame cannot be decoded without all frames since the key frame before it. With a key frame every g frames
and a pair of frames d frames apart at a random place, the first frame lies k frames behind its key frame, k
uniform on 0 … g − 1, and takes k + 1 decoded frames. The second takes d more while it lies before the next
key frame (k + d < g); past one, reading starts anew there and takes (k + d) mod g + 1. The means are

* first frame: (g + 1) / 2;
* second frame: d − d (d − 1) / (2 g) for d ≤ g, (g + 1) / 2 for d > g.

Readers that leave out frames on which nothing is built do with less; opening the file and taking the pixels
out come on top. So the measured number counts, and the expected one explains it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import torch

from poodle_lightning.data.decode import VideoReader
from poodle_lightning.data.encode import coding
from poodle_lightning.data.info import DecodeError, VideoInfo
from poodle_lightning.data.prepare import in_order
from poodle_lightning.data.sampling import TooShort
from poodle_lightning.data.windows import PAPER_AREA, WindowRule, inside_frame
from poodle_lightning.ops.random import key_of, uniform
from poodle_lightning.types import Skip

# The reason that is no fault of a video.
TOO_SHORT = "too_short"

# Frames decoded in a row to measure the price of one.
_PLAIN_FRAMES = 90
# Only the aspect of this crop matters: the window takes PAPER_AREA of the frame, whatever its size.
_CROP = (512, 1024)


@dataclass(frozen=True)
class Cost:
    """Prices of one video, for one core.

    Args:
        info: the video.
        frames_per_cpu_s: frames decoded one after the other, per second of CPU time.
        frames_per_pair: frames that have to be decoded for a pair, expected.
        pairs_per_cpu_s: measured by reading pairs.
    """

    info: VideoInfo
    frames_per_cpu_s: float
    frames_per_pair: float
    pairs_per_cpu_s: float

    @property
    def expected_pairs_per_cpu_s(self) -> float:
        """What decoding alone would allow."""
        return self.frames_per_cpu_s / self.frames_per_pair


def frames_per_pair(gop: float, fps: float, gap: tuple[float, float] = (0.5, 1.0)) -> float:
    """Frames decoded for a pair, on average.

    Args:
        gop: frames from key frame to key frame, at least 1.
        fps: frames per second.
        gap: seconds between the two frames, uniform between these.

    Raises:
        ValueError: a key frame every less than one frame, or a gap that is negative or reversed.
    """
    if gop < 1 or fps < 0 or not 0 <= gap[0] <= gap[1]:
        raise ValueError(f"gop {gop}, fps {fps}, gap {gap}: need gop ≥ 1, fps ≥ 0, 0 ≤ shortest ≤ longest")
    low, high = gap[0] * fps, gap[1] * fps
    # At a random moment, x frames apart means floor(x) or floor(x) + 1, on average x: the mean is linear
    # between whole numbers of frames, and the trapezium rule on these is exact.
    knots = np.unique([low, *range(math.ceil(low), math.floor(high) + 1), high])
    whole = np.arange(math.floor(low), math.ceil(high) + 2)
    second = np.interp(knots, whole, [_second_frame(gop, int(d)) for d in whole])
    mean = second[0] if len(knots) == 1 else np.trapezoid(second, knots) / (high - low)
    return (gop + 1) / 2 + float(mean)


def cores_for(pairs_per_s: float, pairs_per_cpu_s: float) -> float:
    """Cores that keep up with so many pairs per second.

    Raises:
        ValueError: a number is not positive.
    """
    if not (pairs_per_s > 0 and pairs_per_cpu_s > 0):
        raise ValueError(f"{pairs_per_s} pairs/s by {pairs_per_cpu_s} pairs per CPU-second: both are above 0")
    return pairs_per_s / pairs_per_cpu_s


def together(costs: Sequence[Cost]) -> float:
    """Pairs per CPU-second of videos that are drawn equally often: the CPU times of a pair are averaged.

    Raises:
        ValueError: there are none.
    """
    if not costs:
        raise ValueError("no video was measured")
    return len(costs) / sum(1 / cost.pairs_per_cpu_s for cost in costs)


def spread(count: int, most: int) -> list[int]:
    """Which of ``count`` videos to measure: ``most`` of them, evenly spread."""
    return sorted({round(k) for k in np.linspace(0, count - 1, min(most, count))}) if count else []


def measure_each(
    paths: Sequence[str], gap: tuple[float, float] = (0.5, 1.0), pairs: int = 8
) -> list[Cost | Skip]:
    """``measure`` for each video, or why it cannot be: a reason of ``data/info.py``, or ``too_short``."""
    found: list[Cost | Skip] = []
    for path in paths:
        try:
            found.append(measure(path, gap, pairs))
        except DecodeError as error:
            found.append(Skip(path, error.reason, error.detail, error.time))
        except TooShort as error:
            found.append(Skip(path, TOO_SHORT, str(error)))
        except OSError as error:
            found.append(Skip(path, "unreadable", error.strerror or type(error).__name__))
    return found


def measure(path: str | Path, gap: tuple[float, float] = (0.5, 1.0), pairs: int = 8, seed: int = 0) -> Cost:
    """Read some pairs as training does, with one thread: the crop only, the file opened for each pair.

    CPU time is that of the whole process, so nothing else should run in it. Opening counts, as in a folder
    of many videos; where one long video is kept open, a pair costs about 8 ms less.

    Args:
        path: the video.
        gap: shortest and longest time between the two frames, seconds.
        pairs: how many; they begin in equal parts of the video, at random within each.
        seed: of moments and crops.

    Raises:
        DecodeError: the video cannot be read.
        TooShort: the video is shorter than the longest gap.
        ValueError: no pairs, or a gap that is negative or reversed.
    """
    if pairs < 1:
        raise ValueError(f"pairs {pairs}: at least one")
    with VideoReader(path) as reader:
        info = reader.info
        expected = frames_per_pair(max(1.0, info.gop), info.fps, gap)
        if info.duration < gap[1]:
            raise TooShort(info.duration, gap[1])
        clock = coding(path).clock
        start = max(0.0, info.duration / 2 - _PLAIN_FRAMES / 2 / max(info.fps, 1e-6))
        reader.read([start], (0, 0, 1, 1))  # the way to the first frame does not count
        began = time.process_time()
        decoded = sum(1 for _ in islice(in_order(reader, clock, start, small=True), _PLAIN_FRAMES))
        plain = time.process_time() - began
    rule = WindowRule(_CROP, area=PAPER_AREA)
    draws = uniform(key_of(seed, "cost").reshape(1), 2 * pairs, dtype=torch.float64)[0].reshape(pairs, 2)
    spent = 0.0
    for number, (place, share) in enumerate(draws.tolist()):
        first = (info.duration - gap[1]) * (number + place) / pairs
        window = rule.draw(info.width, info.height, key_of(seed, "cost", number))
        box, _ = inside_frame(window.outer, info.width, info.height)
        began = time.process_time()
        with VideoReader(path) as reader:
            second = min(first + gap[0] + (gap[1] - gap[0]) * share, info.duration)
            reader.pieces([first, second], [box, box])
        spent += time.process_time() - began
    tiny = 1e-6  # a clock may not have moved
    return Cost(info, decoded / max(plain, tiny), expected, pairs / max(spent, tiny))


def _second_frame(gop: float, gap: int) -> float:
    """Mean number of frames decoded for the second frame of a pair, ``gap`` frames after the first."""
    return gap - gap * (gap - 1) / (2 * gop) if gap <= gop else (gop + 1) / 2

"""What a video is like to learn from, as in Figure 2 of DoRA (Venkataramanan et al., ICLR 2024; A.2).

Lightness over time (a), objects per frame (b), how often each class occurs (c), and the number of shots (d).
The paper compares a walking tour, which is one or two shots that slowly grow dark, with films of hundreds.

Lightness is CIE 1976 L* (0 black, 100 white) of the sRGB pixels, averaged over a frame; the paper says only
"the lightness value (L)". Objects come from any detector's list (``analysis/object_lists.py``); shots from
``data/shots.py``.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from poodle_lightning.analysis.object_lists import ObjectCounts
from poodle_lightning.data.decode import VideoReader
from poodle_lightning.data.info import DecodeError
from poodle_lightning.data.shots import shots
from poodle_lightning.types import Skip, UserError

FORMAT = 1
# Pixels along the longer side that are enough for the mean of a frame: every n-th is taken, none is mixed.
_LOOKED_AT = 320
_FREQUENT = 10
# IEC 61966-2-1: bytes of sRGB to linear light.
_LINEAR = np.where(
    np.arange(256) / 255 <= 0.04045,
    np.arange(256) / 255 / 12.92,
    ((np.arange(256) / 255 + 0.055) / 1.055) ** 2.4,
)
# ITU-R BT.709: linear light to the luminance Y, white 1.
_LUMINANCE = np.array([0.2126, 0.7152, 0.0722])


@dataclass(frozen=True)
class VideoStats:
    """One video, or what was found of it.

    Args:
        path: the file.
        duration: seconds.
        times: of the frames whose lightness was taken, seconds, increasing.
        lightness: mean L* of each, 0 … 100.
        shots: times of the first and the last frame of every shot; None where they were not looked for.
        objects: counts of a detector's list, or None.
        faults: moments that could not be read, and are left out.
    """

    path: str
    duration: float
    times: tuple[float, ...]
    lightness: tuple[float, ...]
    shots: tuple[tuple[float, float], ...] | None = None
    objects: ObjectCounts | None = None
    faults: tuple[Skip, ...] = ()

    def summary(self) -> dict[str, float]:
        """The numbers of the table; a key is missing where nothing was looked for.

        ``lightness_change`` is the mean absolute difference from one look to the next (fluctuation),
        ``lightness_range`` the largest mean over a minute less the smallest (drift); ``seconds`` and
        ``median_shot`` are in seconds.
        """
        light = self.lightness
        changes = [abs(b - a) for a, b in pairwise(light)]
        minutes = _by_minute(self.times, light)
        numbers: dict[str, float] = {"seconds": self.duration, "lightness": statistics.fmean(light)}
        numbers["lightness_change"] = statistics.fmean(changes) if changes else 0.0
        numbers["lightness_range"] = max(minutes) - min(minutes)
        if self.shots is not None:
            numbers["shots"] = len(self.shots)
            if self.duration:
                numbers["cuts_per_hour"] = 3600 * (len(self.shots) - 1) / self.duration
            numbers["median_shot"] = statistics.median([stop - start for start, stop in self.shots])
        if self.objects is not None:
            numbers["objects_per_frame"] = statistics.fmean(self.objects.objects)
            numbers["classes_per_frame"] = statistics.fmean(self.objects.classes)
            numbers["classes"] = len(self.objects.frames_with)
        return numbers


def lightness(frames: np.ndarray) -> np.ndarray:
    """Mean CIE 1976 L* of frames.

    Args:
        frames: ``(N, H, W, 3)`` uint8 sRGB.

    Returns:
        ``(N,)`` float64 in 0 … 100, of D65 white.
    """
    y = _LINEAR[frames] @ _LUMINANCE
    # CIE 15: the cube root, and a straight line near black
    f = np.where(y > (6 / 29) ** 3, np.cbrt(y), y / (3 * (6 / 29) ** 2) + 4 / 29)
    mean: np.ndarray = (116 * f - 16).mean(axis=(1, 2))
    return mean


def video_stats(
    path: str | Path,
    step: float = 1.0,
    objects: ObjectCounts | None = None,
    find_shots: bool = True,
    workers: int = 0,
) -> VideoStats:
    """Look at a video.

    Args:
        path: the file.
        step: seconds between the frames whose lightness is taken, from 0 on.
        objects: counts of a detector's list (``object_lists.objects_of``).
        find_shots: look for cuts, which decodes the whole video; what was found is remembered.
        workers: processes that look for cuts; 0 is this one.

    Raises:
        UserError: the step is not above 0.
        DecodeError: the video cannot be opened, or none of its frames be read.
    """
    if not 0 < step < math.inf:
        raise UserError(f"--step {step:g}: the seconds between two looks are above 0")
    with VideoReader(path) as reader:
        info = reader.info
        times, light, faults = [], [], []
        for number in range(int(info.duration / step + 1e-6) + 1):
            try:
                frames, actual = reader.read([min(number * step, info.duration)])
            except DecodeError as error:
                faults.append(Skip(info.path, error.reason, error.detail, error.time))
                continue
            every = max(1, max(info.height, info.width) // _LOOKED_AT)
            times.append(float(actual[0]))
            light.append(float(lightness(frames[:, ::every, ::every])[0]))
    if not light:
        raise DecodeError(faults[0].reason, faults[0].detail, faults[0].time)
    cut = tuple(shots(path, workers=workers)) if find_shots else None
    return VideoStats(info.path, info.duration, tuple(times), tuple(light), cut, objects, tuple(faults))


def _by_minute(times: Sequence[float], values: Sequence[float]) -> list[float]:
    """Means over whole minutes of time, the last one perhaps shorter."""
    minutes: dict[int, list[float]] = {}
    for time, value in zip(times, values, strict=True):
        minutes.setdefault(int(time // 60), []).append(value)
    return [statistics.fmean(some) for some in minutes.values()]


def names_of(paths: Sequence[str]) -> list[str]:
    """What videos are called in tables and pictures: the file's name, the whole path where two share it."""
    names = [Path(path).name for path in paths]
    return [name if names.count(name) == 1 else path for name, path in zip(names, paths, strict=True)]


def markdown(videos: Sequence[VideoStats]) -> str:
    """A table with one row per video, and one of the most frequent classes where there are objects."""
    heads = {
        "seconds": ("s", "{:.1f}"),
        "lightness": ("mean L*", "{:.1f}"),
        "lightness_change": ("change per look", "{:.2f}"),
        "lightness_range": ("range of minutes", "{:.1f}"),
        "shots": ("shots", "{:.0f}"),
        "cuts_per_hour": ("cuts per hour", "{:.0f}"),
        "median_shot": ("median shot, s", "{:.1f}"),
        "objects_per_frame": ("objects per frame", "{:.1f}"),
        "classes_per_frame": ("classes per frame", "{:.1f}"),
        "classes": ("classes", "{:.0f}"),
    }
    numbers = [video.summary() for video in videos]
    kept = {key: head for key, head in heads.items() if any(key in row for row in numbers)}
    lines = [
        "| video | " + " | ".join(head for head, _ in kept.values()) + " |",
        "|---" * (len(kept) + 1) + "|",
    ]
    names = names_of([video.path for video in videos])
    for name, row in zip(names, numbers, strict=True):
        cells = [form.format(row[key]) if key in row else "–" for key, (_, form) in kept.items()]
        lines.append(f"| {_cell(name)} | " + " | ".join(cells) + " |")
    for name, video in zip(names, videos, strict=True):
        if video.objects is not None and video.objects.frames_with:
            lines += ["", *_frequent(name, video.objects)]
    return "\n".join(lines) + "\n"


def _frequent(name: str, objects: ObjectCounts) -> list[str]:
    frames = len(objects.times)
    lines = [
        f"| {_cell(name)}: most frequent classes | of {frames} frames, in % | objects |",
        "|---|---|---|",
    ]
    for found, count in list(objects.frames_with.items())[:_FREQUENT]:
        lines.append(f"| {_cell(found)} | {100 * count / frames:.1f} | {objects.total[found]} |")
    return lines


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def as_plain(videos: Sequence[VideoStats], step: float) -> dict[str, Any]:
    """Everything as plain data for JSON: the summaries, and what they are made of."""
    return {
        "format": FORMAT,
        "step": step,
        "videos": [{"summary": video.summary()} | asdict(video) for video in videos],
    }

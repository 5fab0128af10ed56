"""How well masks follow the objects of a video: region and contour, as DAVIS 2017 measures them.

Perazzi et al., CVPR 2016, and Pont-Tuset et al., arXiv 1704.00675; the numbers are those of
davisvideochallenge/davis2017-evaluation, semi-supervised: objects are the ids 1 … max of the first mask,
every other id (255 too) is background, the first and the last frame do not count, and every object counts as
much as any other, whichever sequence it is in.

Deviation: the public code keeps the frame numbers of the decay in 8 bits, so that a sequence of more than 256
counted frames is cut in wrong places. DAVIS has none.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from typing import Any, TypeAlias

import cv2
import numpy as np
import numpy.typing as npt

Array: TypeAlias = npt.NDArray[Any]

BOUND = 0.008
"""How far contours may lie apart, as a share of the image's diagonal."""


@dataclass(frozen=True)
class Track:
    """What one measure says of one object over the counted frames.

    Args:
        mean: of the frames.
        recall: share of the frames above 0.5.
        decay: mean of the first quarter of the frames minus that of the last.
    """

    mean: float
    recall: float
    decay: float


@dataclass(frozen=True)
class ObjectScore:
    """How well one object was followed.

    Args:
        region: of J, the intersection over union.
        contour: of F.
    """

    region: Track
    contour: Track

    def numbers(self) -> tuple[float, ...]:
        """Mean, recall and decay of region, then of contour."""
        return (*astuple(self.region), *astuple(self.contour))

    @staticmethod
    def of(numbers: Sequence[float]) -> ObjectScore:
        """From what :meth:`numbers` gives."""
        return ObjectScore(Track(*numbers[:3]), Track(*numbers[3:]))


def region(truth: Array, guess: Array) -> Array:
    """J, the intersection over union, 1 where both are empty.

    Args:
        truth: ``(..., H, W)`` bool.
        guess: the same.

    Returns:
        ``(...)`` float64.
    """
    common = (truth & guess).sum(axis=(-2, -1))
    union = (truth | guess).sum(axis=(-2, -1))
    # an empty union becomes 1 over 1
    share: Array = np.where(union == 0, 1, common) / np.where(union == 0, 1, union)
    return share


def edge(mask: Array) -> Array:
    """The contour of a mask ``(H, W)`` bool: pixels unlike the one to the right, below, or both.

    The image goes on beyond its border as it is there: a mask cut off by the border has no contour there.
    """
    padded = np.pad(mask, ((0, 1), (0, 1)), mode="edge")
    found: Array = (mask ^ padded[:-1, 1:]) | (mask ^ padded[1:, :-1]) | (mask ^ padded[1:, 1:])
    return found


def contour(truth: Array, guess: Array, bound: float = BOUND) -> float:
    """F, the harmonic mean of precision and recall of the contour of a mask.

    A contour pixel is right where the other mask's contour is no farther away than ``bound`` diagonals of the
    image, rounded up to whole pixels. Of two masks without contour F is 1, of one it is 0.

    Args:
        truth: ``(H, W)`` bool.
        guess: the same.
        bound: share of the diagonal; 1 or more is a number of pixels.
    """
    edges = [edge(truth), edge(guess)]
    counts = [int(np.count_nonzero(one)) for one in edges]
    if 0 in counts:
        return float(counts[0] == counts[1])
    disk = _disk(
        math.ceil(bound * math.sqrt(truth.shape[0] ** 2 + truth.shape[1] ** 2)) if bound < 1 else int(bound)
    )
    fat = [cv2.dilate(one.view(np.uint8), disk).view(bool) for one in edges]
    recall = np.count_nonzero(edges[0] & fat[1]) / counts[0]
    precision = np.count_nonzero(edges[1] & fat[0]) / counts[1]
    return 0.0 if precision + recall == 0 else 2 * precision * recall / (precision + recall)


def track(values: Array) -> Track:
    """Mean, recall and decay of one object's values in the counted frames, ``(T,)``.

    The frames are cut into four at the rounded places of ``linspace(1, T, 5)``; a frame at a cut belongs to
    both quarters.

    Raises:
        ValueError: there are none.
    """
    if not len(values):
        raise ValueError("no frame is counted: a sequence needs three frames or more")
    # 1e-10, as the public code has it: halves that rounding has moved down go up again
    cuts = np.round(np.linspace(1, len(values), 5) + 1e-10).astype(np.int64) - 1
    quarters = [values[cuts[i] : cuts[i + 1] + 1].mean() for i in (0, 3)]
    return Track(float(values.mean()), float((values > 0.5).mean()), float(quarters[0] - quarters[1]))


def score_sequence(truth: Array, guess: Array, objects: int, bound: float = BOUND) -> list[ObjectScore]:
    """Scores of the objects 1 … ``objects`` of one sequence.

    Args:
        truth: ``(T, H, W)`` ids, all frames.
        guess: the same.
        objects: how many.
        bound: see :func:`contour`.

    Raises:
        ValueError: shapes differ, or there are fewer than three frames.
    """
    if truth.shape != guess.shape or truth.ndim != 3:
        raise ValueError(f"masks must be two equal (T, H, W), not {truth.shape} and {guess.shape}")
    found = []
    for number in range(1, objects + 1):
        here, there = truth[1:-1] == number, guess[1:-1] == number
        contours = np.array([contour(*pair, bound) for pair in zip(here, there, strict=True)])
        found.append(ObjectScore(track(region(here, there)), track(contours)))
    return found


def summary(scores: Sequence[ObjectScore]) -> dict[str, float]:
    """Means over objects: ``j_and_f``, then mean, recall and decay of ``j`` and of ``f``.

    Raises:
        ValueError: there are no objects.
    """
    if not scores:
        raise ValueError("no object was scored")
    names = [f"{measure}_{what}" for measure in ("j", "f") for what in ("mean", "recall", "decay")]
    columns = zip(*(score.numbers() for score in scores), strict=True)
    means = {name: statistics.fmean(column) for name, column in zip(names, columns, strict=True)}
    return {"j_and_f": (means["j_mean"] + means["f_mean"]) / 2, **means}


def _disk(radius: int) -> Array:
    """A digital disk, ``(2 · radius + 1)²`` uint8: pixels whose centres are no farther than the radius."""
    steps = np.arange(-radius, radius + 1)
    disk: Array = (steps[:, None] ** 2 + steps**2 <= radius**2).astype(np.uint8)
    return disk

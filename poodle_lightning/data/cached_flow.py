"""Flow in the workers with a cache behind it, and the sampler that makes a cache worth having."""

from __future__ import annotations

import functools
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
from torch import Tensor

from poodle_lightning.configured import Configured
from poodle_lightning.data.flow_cache import FlowCache, Form, Moments
from poodle_lightning.data.info import fingerprint
from poodle_lightning.data.pixels import Box
from poodle_lightning.data.sampling import PairSampler
from poodle_lightning.ops.geometry import Size
from poodle_lightning.ops.random import key_of, permutation
from poodle_lightning.types import UserError


@runtime_checkable
class PixelEstimator(Protocol):
    """A flow estimator on stored pixels, e.g. ``poodle_lightning.flow.dis.DIS``."""

    @property
    def fingerprint(self) -> str:
        """What the flow depends on besides the images."""
        ...

    def pixels(self, first: np.ndarray, second: np.ndarray) -> np.ndarray:
        """Flow between two ``(H, W, 3)`` uint8 images: there and back, ``(2, 2, H, W)`` float32 px."""
        ...


@dataclass(frozen=True)
class FixedPairs(PairSampler):
    """``fixed`` pairs per stretch of video, drawn once; every clip is one of them.

    This changes the sampling of the papers, which draw fresh pairs in every epoch: it is the price of a flow
    cache. The pairs depend on ``gap``, ``seed`` and the stretch's duration alone, not on what a cache holds.

    Args:
        gap: see ``PairSampler``.
        jitter: see ``PairSampler``.
        pairs_per_video: different pairs taken from one opened video.
        spread: unused; the pairs lie anywhere.
        fixed: how many pairs there are.
        seed: of the set.
    """

    fixed: int = 10
    seed: int = 0

    def check(self) -> None:
        """See ``PairSampler.check``.

        Raises:
            UserError: also where fewer fixed pairs are there than are taken at once.
        """
        super().check()
        if self.fixed < self.pairs_per_video:
            raise UserError(
                f"pairs_per_video {self.pairs_per_video} is more than the {self.fixed} fixed pairs of a video"
            )

    @property
    def span(self) -> float:
        """The longest gap, seconds."""
        return self.gap[1]

    def pairs(self, duration: float) -> list[Moments]:
        """All pairs of a stretch, seconds.

        Raises:
            TooShort: the duration is less than ``span``.
        """
        alone = PairSampler(self.gap, self.jitter)
        # the duration is in the key, or all videos of a data set would be seen at the same moments
        keys = (key_of(self.seed, "fixed pair", _milli(duration), number) for number in range(self.fixed))
        drawn = (alone.times(duration, key) for key in keys)
        return [(first, second) for first, second in drawn]

    def times(self, duration: float, key: Tensor) -> list[float]:
        """``[a₀, b₀, a₁, b₁, …]`` seconds of ``pairs_per_video`` different fixed pairs.

        Raises:
            TooShort: the duration is less than ``span``.
        """
        pairs = self.pairs(duration)
        chosen = permutation(key.reshape(1), self.fixed)[0, : self.pairs_per_video].tolist()
        return [moment for number in chosen for moment in pairs[number]]


class CachedFlow(Configured):
    """Flow of whole frames from a cache, computed and stored where it is missing.

    What is computed goes through the cache's rounding as well, so a clip is the same whether its flow was
    there or not.

    Args:
        folder: of the cache; ``poodle-lightning flow`` fills it.
        estimator: computes what is missing, in the worker. None takes the flow of any estimator from the
            cache and leaves missing rows to the method's own estimator.
        full_resolution: store every pixel instead of one value for every 2x2.
        form: of what is stored: ``delta``, within 1/16 px at full resolution (at half, see
            ``data.flow_planes``), or ``jpeg``, PiCo's way, smaller and approximate. Flow that is there is
            taken in either form: give a folder one form.
        quality: of ``jpeg``, 1 to 100.

    Raises:
        UserError: no such form or quality.
    """

    def __init__(
        self,
        folder: str,
        estimator: PixelEstimator | None = None,
        full_resolution: bool = False,
        form: Form = "delta",
        quality: int = 95,
    ) -> None:
        self.estimator = estimator
        name = None if estimator is None else estimator.fingerprint
        self.cache = FlowCache(folder, name, full_resolution, form, quality)
        if estimator is None and not self.cache.folder.is_dir():
            warnings.warn(
                f"no flow cache at {folder}: fill it by poodle-lightning flow --out {folder}; until then the"
                " method's own estimator does the work",
                RuntimeWarning,
                stacklevel=2,
            )

    def pixels(self, first: np.ndarray, second: np.ndarray) -> np.ndarray:
        """Flow between two images that are not whole frames of a video: not cached.

        Returns:
            ``(2, 2, H, W)`` float32 px; NaN, which is "missing", without an estimator.
        """
        if self.estimator is None:
            return np.full((2, 2, *first.shape[:2]), np.nan, np.float32)
        return self.estimator.pixels(first, second)

    def estimate_or_load(
        self,
        path: str,
        moments: Moments,
        read: Callable[[], np.ndarray],
        *,
        box: Box | None = None,
        size: Size | None = None,
    ) -> np.ndarray | None:
        """Flow between two frames of a video.

        Args:
            path: of the video.
            moments: what is asked of its reader, seconds; not the frames' own times.
            read: gives the two whole frames ``(2, H, W, 3)`` uint8; called only if the flow is missing.
            box: the part wanted, ``(x0, y0, x1, y1)`` in pixels of the frame; None is the whole.
            size: height and width of the frames, if known; a stored flow of another size is not used.

        Returns:
            ``(2, 2, h, w)`` float32 px, there and back; None if it is missing and there is no estimator.
        """
        video = video_of(path)
        found = None if video is None else self.cache.get(video, *moments, box=box, size=size)
        if found is not None or self.estimator is None:
            return found
        frames = read()
        flow = self.estimator.pixels(frames[0], frames[1])
        if video is not None:
            self.cache.put(video, *moments, flow)
        return self.cache.rounded(flow, box)


def video_of(path: str) -> str | None:
    """A file's fingerprint, remembered until it changes; None for what is no file (folders, generated)."""
    try:
        found = os.stat(path)
        return _fingerprint(path, found.st_size, found.st_mtime_ns)
    except OSError:
        return None


@functools.lru_cache(maxsize=1 << 16)
def _fingerprint(path: str, size: int, changed: int) -> str:
    return fingerprint(path)


def _milli(seconds: float) -> int:
    return round(seconds * 1e3)

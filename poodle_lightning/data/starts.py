"""Every start time of a clip as an item of its own: a film of hours gives a list of hundreds of thousands.

The list is made up when it is asked: what is kept is one number per stretch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from poodle_lightning.data.sampling import SLACK
from poodle_lightning.data.sources import Entry, LazyEntries


class StartTimes(LazyEntries):
    """One entry per start time: just long enough for a clip, ``step`` seconds after the one before.

    DoRA's epoch takes every frame of the film once as the first of a clip; its public code (the length of
    ``WTDataloader``) leaves out the last ``T`` steps of the film, here it is the last ``T − 1``, which is
    what a clip needs.

    Args:
        stretches: of videos, each of which lasts ``span``; no clip leaves its stretch.
        step: seconds from start to start. For every frame once, 1/fps rounded down (0.0333333, not 0.0334): a
            time between two frames is that of the later one.
        span: seconds from the first frame of a clip to its last.

    Attributes:
        stretches: as given.

    Raises:
        ValueError: the step is not positive, or a stretch is too short.
    """

    def __init__(self, stretches: Sequence[Entry], step: float, span: float) -> None:
        if not 0 < step < math.inf:
            raise ValueError(f"start times need a step above 0 s, not {step}")
        self.stretches, self.step, self.span = stretches, step, span
        room = np.array([entry.duration for entry in stretches], np.float64) - span
        if (room < -SLACK).any():
            raise ValueError(f"a stretch is shorter than the {span} s of a clip")
        # a start that rounding puts behind the last moment counts
        counts = np.floor((room.clip(0) + SLACK) / step).astype(np.int64) + 1
        self._ends = counts.cumsum()

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def entry(self, number: int) -> Entry:
        """See ``LazyEntries``."""
        place = int(self._ends.searchsorted(number, side="right"))
        stretch = self.stretches[place]
        before = int(self._ends[place - 1]) if place else 0
        start = stretch.start + min((number - before) * self.step, max(stretch.duration - self.span, 0.0))
        return replace(stretch, start=start, stop=start + self.span)

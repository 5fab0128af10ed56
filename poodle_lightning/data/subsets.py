"""Some of a source's entries: by number, without making the others, or as many as last a number of hours."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from poodle_lightning.data.sources import Entry, LazyEntries
from poodle_lightning.ops.random import key_of, permutation
from poodle_lightning.types import UserError


class Picked(LazyEntries):
    """Entries of a long list by their numbers; each is made when it is asked for.

    Args:
        entries: the list.
        numbers: ``(n,)`` int64.
    """

    def __init__(self, entries: Sequence[Entry], numbers: np.ndarray) -> None:
        self._entries, self._numbers = entries, numbers

    def __len__(self) -> int:
        return len(self._numbers)

    def entry(self, number: int) -> Entry:
        """See ``LazyEntries``."""
        return self._entries[int(self._numbers[number])]


def pick(entries: Sequence[Entry], numbers: np.ndarray) -> Sequence[Entry]:
    """Entries by their numbers: of a list a list, of a lazy sequence a lazy one."""
    if isinstance(entries, list):
        return [entries[int(number)] for number in numbers]
    return Picked(entries, numbers)


def lasting(seconds: float) -> str:
    """A length of time in words: hours, below 0.1 h minutes, below a minute seconds."""
    if seconds < 60:
        return f"{seconds:.2g} s"
    return f"{seconds / 3600:.3g} h" if seconds >= 360 else f"{seconds / 60:.2g} min"


def of_hours(entries: Sequence[Entry], hours: float, seed: int, span: float = 0.0) -> list[Entry]:
    """Videos drawn at random until they last ``hours`` in all, in their old order.

    The one with which the sum would be too long is cut at its end, so that subsets of several data sets last
    equally long (DoRA, Table 2a: K-400 and Epic-Kitchens as long as one of the Walking Tours). What is left
    of it must hold a clip; up to ``span`` seconds may be lacking because of that. Of a single film it is the
    beginning.

    Args:
        entries: one per video.
        hours: how long, all together.
        seed: chooses the videos.
        span: seconds that a clip needs.

    Raises:
        UserError: all together they are shorter, or the subset holds no clip.
    """
    wanted = hours * 3600.0
    total = sum(entry.duration for entry in entries)
    if total < wanted:
        which = "the video lasts" if len(entries) == 1 else f"the {len(entries)} videos last"
        raise UserError(f"hours {hours:g}: {which} {lasting(total)} in all; ask for less")
    found: dict[int, Entry] = {}
    for number in permutation(key_of(seed, "hours").reshape(1), len(entries))[0].tolist():
        entry = entries[number]
        if entry.duration >= wanted:
            if wanted >= span:
                found[number] = replace(entry, stop=entry.start + wanted)
            break
        found[number] = entry
        wanted -= entry.duration
    if not found:
        raise UserError(f"hours {hours:g} holds no clip, which needs {span:g} s: ask for more")
    return [found[number] for number in sorted(found)]

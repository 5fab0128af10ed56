"""Which videos train, which are held out, and how long ones are cut."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from poodle_lightning.data.sampling import split_long
from poodle_lightning.data.sources import Entry
from poodle_lightning.ops.random import key_of, permutation
from poodle_lightning.types import Skip, UserError


def long_enough(entries: Sequence[Entry], span: float) -> tuple[list[Entry], tuple[Skip, ...]]:
    """Entries that last ``span`` seconds, and the others as skips with the reason ``too_short``."""
    usable = [entry for entry in entries if entry.duration >= span]
    short = [
        Skip(entry.path, "too_short", f"{entry.duration:.3f} s of video, {span:.3f} s are needed")
        for entry in entries
        if entry.duration < span
    ]
    return usable, tuple(short)


def held_out(
    entries: Sequence[Entry], fraction: float, span: float, seed: int
) -> tuple[list[Entry], list[Entry]]:
    """Training and held-out entries.

    Whole videos are held out, at least one. Of a single video it is the end: ``fraction`` of its length, but
    at least what a clip needs.

    Args:
        entries: one per video.
        fraction: share that is held out; 0 holds out none.
        span: seconds that a clip needs.
        seed: chooses the videos.

    Raises:
        UserError: a single video is too short to be divided.
    """
    if fraction == 0:
        return list(entries), []
    if len(entries) == 1:
        return _in_time(entries[0], fraction, span)
    count = min(max(1, round(fraction * len(entries))), len(entries) - 1)
    chosen = set(permutation(key_of(seed, "held out").reshape(1), len(entries))[0, :count].tolist())
    train = [entry for number, entry in enumerate(entries) if number not in chosen]
    return train, [entry for number, entry in enumerate(entries) if number in chosen]


def _in_time(entry: Entry, fraction: float, span: float) -> tuple[list[Entry], list[Entry]]:
    cut = entry.stop - max(fraction * entry.duration, span)
    if cut <= entry.start or cut - entry.start < span:
        raise UserError(
            f"{entry.path}: the only video lasts {entry.duration:.2f} s, too short to hold out"
            f" {max(fraction * entry.duration, span):.2f} s of it: set val_fraction to 0 or add videos"
        )
    return [replace(entry, stop=cut)], [replace(entry, start=cut)]


def segments(entries: Sequence[Entry], seconds: float, span: float = 0.0) -> list[Entry]:
    """Entries cut into stretches of ``seconds`` (``sampling.split_long``), each long enough for a clip.

    A last stretch shorter than ``span`` reaches back into the one before it.
    """
    cut = []
    for number, start, stop in split_long(entries, seconds):
        entry = entries[number]
        start = max(0.0, min(start, stop - span))
        cut.append(replace(entry, start=entry.start + start, stop=entry.start + stop))
    return cut

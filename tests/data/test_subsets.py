"""Subsets: as many hours as asked for, drawn by the seed; parts of lists that are not made."""

from __future__ import annotations

import numpy as np
import pytest

from poodle_lightning.data.sources import Entry
from poodle_lightning.data.subsets import Picked, lasting, of_hours, pick
from poodle_lightning.types import UserError


def entries(*seconds):
    return [Entry(number, f"v{number}", 0.0, float(s), 64, 48) for number, s in enumerate(seconds)]


def total(part):
    return sum(entry.duration for entry in part)


@pytest.mark.parametrize("seed", range(5))
def test_a_subset_lasts_as_long_as_asked(seed):
    every = entries(*np.random.default_rng(seed).uniform(5, 40, 300))
    part = of_hours(every, 0.5, seed)
    assert total(part) == pytest.approx(1800)
    assert [entry.id for entry in part] == sorted({entry.id for entry in part})
    # all but one are whole
    assert sum(entry != every[entry.id] for entry in part) == 1
    assert of_hours(every, 0.5, seed) == part
    assert {e.id for e in of_hours(every, 0.5, seed + 1)} != {e.id for e in part}


def test_what_is_left_of_the_last_video_holds_a_clip_or_is_left_out():
    for seconds, expected in ((25.0, 25.0), (23.0, 20.0)):
        part = of_hours(entries(*[10] * 20), seconds / 3600, 0, span=4.0)
        assert total(part) == pytest.approx(expected)


def test_of_one_film_it_is_the_beginning():
    (one,) = of_hours(entries(7200), 1.0, 0)
    assert (one.start, one.stop) == (0.0, 3600.0)
    assert of_hours(entries(7200), 2.0, 0) == entries(7200)


def test_too_many_hours_and_too_few():
    with pytest.raises(UserError, match=r"hours 3: the 2 videos last 2 h in all"):
        of_hours(entries(3600, 3600), 3.0, 0)
    with pytest.raises(UserError, match="holds no clip, which needs 7 s"):
        of_hours(entries(3600), 0.001, 0, span=7.0)


def test_parts_of_a_list_are_lists_and_of_others_lazy():
    class Counting(Picked):
        made = 0

        def __getitem__(self, number):
            Counting.made += 1
            return super().__getitem__(number)

    every = entries(*range(10))
    assert pick(every, np.array([7, 2])) == [every[7], every[2]]
    long = Counting(every, np.arange(10))
    part = pick(long, np.array([7, 2, 5]))
    assert (len(part), Counting.made) == (3, 0)
    assert (part[0], part[-1], part[1:]) == (every[7], every[5], [every[2], every[5]])
    assert Counting.made == 4
    with pytest.raises(IndexError):
        part[3]


def test_lengths_are_said_in_hours_minutes_or_seconds():
    assert [lasting(s) for s in (7200.0, 360.0, 359.0, 60.0, 26.4)] == [
        "2 h",
        "0.1 h",
        "6 min",
        "1 min",
        "26 s",
    ]
    with pytest.raises(UserError, match=r"hours 3: the video lasts 1\.5 min in all"):
        of_hours(entries(90), 3.0, 0)

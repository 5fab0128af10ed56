"""Held-out videos and stretches of long ones."""

from __future__ import annotations

import pytest

from poodle_lightning.data.sources import Entry
from poodle_lightning.data.split import held_out, long_enough, segments
from poodle_lightning.types import UserError


def entries(*durations, start=0.0):
    return [Entry(i, f"v{i}", start, start + d, 64, 48) for i, d in enumerate(durations)]


def test_short_videos_are_named():
    usable, short = long_enough(entries(2.0, 0.5, 1.0), 1.0)
    assert [entry.path for entry in usable] == ["v0", "v2"]
    assert [(skip.path, skip.reason) for skip in short] == [("v1", "too_short")]


@pytest.mark.parametrize(
    ("count", "fraction", "expected"), [(100, 0.05, 5), (10, 0.01, 1), (2, 0.9, 1), (9, 0.0, 0)]
)
def test_a_share_of_the_videos_is_held_out(count, fraction, expected):
    every = entries(*[2.0] * count)
    train, val = held_out(every, fraction, 1.0, seed=0)
    assert len(val) == expected
    assert sorted(train + val, key=lambda entry: entry.id) == every
    assert held_out(every, fraction, 1.0, seed=0) == (train, val)


def test_one_video_is_held_out_at_its_end():
    (train,), (val,) = held_out(entries(10.0, start=5.0), 0.2, 1.0, seed=0)
    assert (train.start, train.stop, val.start, val.stop) == (5.0, 13.0, 13.0, 15.0)
    (train,), (val,) = held_out(entries(10.0), 0.01, 1.0, seed=0)
    assert (train.stop, val.start) == (9.0, 9.0)  # at least what a clip needs


@pytest.mark.parametrize(("duration", "span"), [(1.5, 1.0), (0.0, 0.0)])
def test_one_short_video_cannot_be_divided(duration, span):
    with pytest.raises(UserError, match="set val_fraction to 0"):
        held_out(entries(duration), 0.1, span, seed=0)


def test_segments_cover_a_video_and_hold_a_clip_each():
    cut = segments(entries(35.5, 4.0, start=100.0), 10.0, span=6.0)
    spans = [(entry.id, entry.start, entry.stop) for entry in cut]
    assert spans == [
        (0, 100.0, 110.0),
        (0, 110.0, 120.0),
        (0, 120.0, 130.0),
        (0, 129.5, 135.5),
        (1, 100.0, 104.0),
    ]

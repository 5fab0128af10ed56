"""Held-out videos and stretches of long ones."""

from __future__ import annotations

import numpy as np
import pytest

from poodle_lightning.data import split as module
from poodle_lightning.data.sources import Entry
from poodle_lightning.data.split import Division, held_out, long_enough, segments
from poodle_lightning.data.starts import StartTimes
from poodle_lightning.data.subsets import Picked
from poodle_lightning.types import UserError


class Videos:
    """A source of videos of given lengths."""

    refused = ()

    def __init__(self, *durations):
        self.entries = entries(*durations)


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


def test_shots_of_a_video_are_held_out_together():
    shots = [Entry(i % 5, f"v{i % 5}", 4.0 * i, 4.0 * i + 4, 64, 48) for i in range(20)]
    train, val = held_out(shots, 0.4, 1.0, seed=0)
    assert len(val) == 8
    assert not {entry.path for entry in train} & {entry.path for entry in val}
    assert {entry.path for entry in val} == {
        entry.path for entry in held_out(entries(*[2.0] * 5), 0.4, 1.0, 0)[1]
    }


def test_shots_of_a_single_video_are_divided_by_themselves():
    shots = [Entry(0, "v", 4.0 * i, 4.0 * i + 4, 64, 48) for i in range(10)]
    train, val = held_out(shots, 0.2, 1.0, seed=0)
    assert (len(train), len(val)) == (8, 2)


def test_one_video_is_held_out_at_its_end():
    (train,), (val,) = held_out(entries(10.0, start=5.0), 0.2, 1.0, seed=0)
    assert (train.start, train.stop, val.start, val.stop) == (5.0, 13.0, 13.0, 15.0)
    (train,), (val,) = held_out(entries(10.0), 0.01, 1.0, seed=0)
    assert (train.stop, val.start) == (9.0, 9.0)  # at least what a clip needs


@pytest.mark.parametrize(("duration", "span"), [(1.5, 1.0), (0.0, 0.0)])
def test_one_short_video_cannot_be_divided(duration, span):
    with pytest.raises(UserError, match="set val_fraction to 0"):
        held_out(entries(duration), 0.1, span, seed=0)


def test_one_image_cannot_be_divided():
    with pytest.raises(UserError, match="v0: a single image is not divided"):
        held_out(entries(0.0), 0.1, 0.0, seed=0)


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


def test_no_frame_is_in_both_ends_of_a_film():
    film = [Entry(0, "v", 0.0, 10.0, 64, 48, 0.04)]
    (train,), (val,) = held_out(film, 0.2, 1.0, seed=0, apart=0.02)
    assert val.start - train.stop == pytest.approx(0.04)  # a frame
    (train,), (val,) = held_out(film, 0.2, 1.0, seed=0, apart=0.5)
    assert (train.stop, val.start) == (7.5, 8.0)
    with pytest.raises(UserError, match="set val_fraction to 0"):
        held_out(entries(2.2), 0.1, 1.0, seed=0, apart=0.5)


def test_a_long_list_is_divided_without_making_it():
    every = Picked(entries(*[0.0] * 100), np.arange(100))
    usable, short = long_enough(every, 0.0)
    assert usable is every
    assert short == ()
    train, val = held_out(every, 0.1, 0.0, seed=0)
    assert isinstance(train, Picked)
    assert (len(train), len(val)) == (90, 10)
    assert {entry.id for entry in train} | {entry.id for entry in val} == set(range(100))
    listed = held_out(entries(*[0.0] * 100), 0.1, 0.0, seed=0)
    assert ([*train], [*val]) == listed


def test_a_subset_is_drawn_before_some_of_it_is_held_out():
    source = Videos(*[36.0] * 100, 1.0)
    parts = Division(2.0, seed=3, val_fraction=0.1, hours=0.5).of(source, "films")
    assert (len(parts.train), len(parts.val)) == (45, 5)
    assert [skip.path for skip in parts.left_out] == ["v100"]
    assert sum(entry.duration for part in (parts.train, parts.val) for entry in part) == pytest.approx(1800)


def test_start_times_are_made_of_what_is_left():
    parts = Division(2.0, val_fraction=0.5, start_every=0.5).of(Videos(4.0, 4.0), "films")
    assert isinstance(parts.train, StartTimes)
    assert [entry.start for entry in parts.train] == [0.0, 0.5, 1.0, 1.5, 2.0]
    assert [entry.start for entry in parts.val] == [0.0, 2.0]
    assert {e.path for e in parts.train}.isdisjoint(e.path for e in parts.val)


def test_held_out_frames_are_a_second_apart():
    parts = Division(0.0, val_fraction=0.5, start_every=0.1).of(Videos(3.0, 3.0), "films")
    assert len(parts.train) == 31
    assert [entry.start for entry in parts.val] == [0.0, 1.0, 2.0, 3.0]


def with_shots(monkeypatch, **shots):
    monkeypatch.setattr(module, "_shots", lambda source, entries, workers: (shots, ()))


@pytest.mark.parametrize("seed", range(6))
def test_videos_without_a_long_shot_are_left_out_before_some_are_held_out(monkeypatch, seed):
    quick = [(0.0, 0.9), (1.0, 1.9), (2.0, 4.0 - 1e-3)]
    with_shots(monkeypatch, v0=quick, v1=[(0.0, 4.0)], v2=quick, v3=[(0.0, 1.0), (1.0, 4.0)], v4=[(0.0, 4.0)])
    division = Division(2.0, val_fraction=0.4, cuts="avoid", seed=seed)
    parts = division.of(Videos(*[4.0] * 5), "films")
    assert [(skip.path, skip.reason) for skip in parts.left_out] == [
        ("v0", "too_short"),
        ("v2", "too_short"),
    ]
    assert (len(parts.train), len(parts.val)) == (2, 1)
    assert {entry.path for entry in (*parts.train, *parts.val)} == {"v1", "v3", "v4"}


@pytest.mark.parametrize(
    ("shots", "message"),
    [
        ([(0.0, 7.5), (7.6, 9.5), (9.6, 10.0)], "none of 2 shots of the held-out end lasts the 2 s"),
        ([(0.0, 1.5), (1.6, 3.0), (3.1, 4.9), (5.0, 10.0)], None),
        ([*((k * 1.0, k + 0.9) for k in range(8)), (8.0, 10.0)], "shots of the beginning that trains lasts"),
        ([(0.0, 1.5), (1.6, 3.0)], "none of 2 shots lasts the 2 s"),
    ],
)
def test_the_part_of_a_film_that_has_no_long_shot_is_named(monkeypatch, shots, message):
    with_shots(monkeypatch, v0=shots)
    division = Division(2.0, val_fraction=0.2, cuts="avoid")
    if message is None:
        parts = division.of(Videos(10.0), "film")
        assert [[(e.start, e.stop) for e in side] for side in (parts.train, parts.val)] == [
            [(5.0, 8.0)],
            [(8.0, 10.0)],
        ]
    else:
        with pytest.raises(UserError, match=message):
            division.of(Videos(10.0), "film")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"val_fraction": 1.0}, "val_fraction"),
        ({"clip_seconds": 1.0}, "clip_seconds 1 is less than a clip needs"),
        ({"start_every": -1.0}, "start_every -1 must be above 0"),
        ({"hours": 0.0}, "hours 0 must be above 0"),
        ({"start_every": 1.0, "clip_seconds": 5.0}, "give one of them"),
        ({"cuts": "all"}, "cuts 'all': choose keep or avoid"),
    ],
)
def test_settings_are_checked(settings, message):
    with pytest.raises(UserError, match=message):
        Division(2.0, **settings)

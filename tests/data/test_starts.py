"""Start times as items: all of them, none beyond the stretch, made only when asked for."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch

from poodle_lightning.data.clips import ClipDataset
from poodle_lightning.data.order import Order
from poodle_lightning.data.sampling import ClipSampler
from poodle_lightning.data.sources import Entry
from poodle_lightning.data.starts import StartTimes
from poodle_lightning.data.streets import StreetSet
from poodle_lightning.data.video import VideoDataModule
from poodle_lightning.data.windows import WindowRule
from poodle_lightning.types import UserError


def stretch(start, stop, number=0):
    return Entry(number, f"v{number}", start, stop, 64, 48, 0.1)


def test_all_starts_of_all_stretches_in_order():
    starts = StartTimes([stretch(2.0, 3.1), stretch(0.0, 0.3, 1), stretch(5.0, 5.55, 2)], 0.1, 0.3)
    assert [entry.path for entry in starts] == ["v0"] * 9 + ["v1"] + ["v2"] * 3
    expected = [*(2.0 + np.arange(9) / 10), 0.0, *(5.0 + np.arange(3) / 10)]
    np.testing.assert_allclose([entry.start for entry in starts], expected, atol=1e-12)
    np.testing.assert_allclose([entry.duration for entry in starts], 0.3, atol=1e-12)
    assert starts[-1] == starts[12]
    assert starts[8:10] == [starts[8], starts[9]]
    with pytest.raises(IndexError):
        starts[13]
    assert len(StartTimes([], 0.1, 0.3)) == 0


@pytest.mark.parametrize("fps", [24, 25, 30, 60, 30000 / 1001])
@pytest.mark.parametrize("frames", [1, 8])
def test_every_frame_is_a_start_once(fps, frames):
    count = 997
    sampler = ClipSampler(frames, 1.0)
    starts = StartTimes([stretch(0.0, (count - 1) / fps)], 1 / fps, sampler.span)
    # the public code's range(frames − T · step) ends a step earlier
    room = (count - 1) / fps - sampler.span
    assert len(starts) == int(np.floor(room * fps + 1e-6)) + 1
    numbers = np.array([entry.start * fps for entry in starts])
    np.testing.assert_allclose(numbers, np.arange(len(starts)), atol=1e-6)
    assert max(entry.stop for entry in starts) <= (count - 1) / fps + 1e-6


def test_a_step_rounded_down_still_meets_every_frame_of_two_hours():
    starts = StartTimes([stretch(0.0, 7200.0)], 0.0333333, 7.0)
    numbers = np.minimum(np.arange(len(starts)) * 0.0333333, 7193.0) * 30
    frames = np.ceil(numbers - 1e-6).astype(int)  # the first that is not before the time
    assert len(starts) == 7193 * 30 + 1
    np.testing.assert_array_equal(frames, np.arange(7193 * 30 + 1))
    for number in (0, 1, 123_457, len(starts) - 1):
        assert starts[number].start == pytest.approx(numbers[number] / 30, abs=1e-9)


def test_a_clip_begins_at_its_start():
    class Recording:
        refused = ()

        def __init__(self):
            self.asked = []

        def open(self, entry):
            return self

        def read(self, times, box=None):
            self.asked += list(times)
            x0, y0, x1, y1 = box
            return np.zeros((len(times), y1 - y0, x1 - x0, 3), np.uint8), np.array(times)

        def close(self):
            pass

    source, sampler = Recording(), ClipSampler(3, 0.1)
    starts = StartTimes([stretch(100.0, 103.3)], 1 / 30, sampler.span)
    order = Order(len(starts), 1, len(starts), seed=1)
    data = ClipDataset(source, starts, order, sampler, WindowRule((8, 8), area=(0.2, 1.0)), seed=1)
    firsts = []
    for position in range(len(starts)):
        source.asked.clear()
        (item,) = data[(0, position)].items
        np.testing.assert_allclose(np.diff(source.asked), 0.1, atol=1e-9)
        firsts.append(source.asked[0])
        assert item.index == order.item(0, position)
    np.testing.assert_allclose(sorted(firsts), 100 + np.arange(len(starts)) / 30, atol=1e-9)


def test_a_million_starts_are_one_number():
    starts = StartTimes([stretch(0.0, 6600.0, n) for n in range(12)], 1 / 60, 7.0)
    assert len(starts) > 4_000_000
    assert len(pickle.dumps(starts)) < 5_000
    each = len(starts) // 12
    for number in range(0, len(starts), 4001):
        assert starts[number].path == starts.stretches[number // each].path
        assert starts[number].start == pytest.approx(number % each / 60, abs=1e-6)
    data = ClipDataset(None, starts, Order(1, 1, 1), ClipSampler(8, 1.0), WindowRule((8, 8)))
    assert data._readers.most == 12


def test_steps_and_stretches_are_checked():
    for step in (0.0, -1.0, float("inf")):
        with pytest.raises(ValueError, match="step above 0"):
            StartTimes([stretch(0.0, 1.0)], step, 0.3)
    with pytest.raises(ValueError, match="shorter than"):
        StartTimes([stretch(0.0, 0.2)], 0.1, 0.3)


def module(**changes):
    streets = StreetSet(videos=1, seconds=5.0, size=(16, 24), supersample=1)
    settings = {"size": (8, 8), "area": (0.5, 1.0), "batch_size": 2, "num_workers": 0, "val_fraction": 0.3}
    settings |= {"sampler": ClipSampler(3, 0.25), "start_every": 0.1, "synthetic": streets}
    data = VideoDataModule("synthetic", **(settings | changes))
    data.setup("fit")
    return data


def test_the_held_out_end_of_a_film_shares_no_moment_with_training():
    data = module()
    # 5 s: 1.5 s are held out, 0.1 s lie between; training starts 0, 0.1 … 2.9, held-out clips do not overlap
    np.testing.assert_allclose([e.start for e in data.train_entries], np.arange(30) / 10, atol=1e-9)
    np.testing.assert_allclose([e.start for e in data.val_entries], [3.5, 4.0, 4.5], atol=1e-9)
    train, val = (
        torch.cat([clip.times for clip in part]) for part in (data.train_dataloader(), data.val_dataloader())
    )
    assert float(train.max()) <= 3.4 + 1e-9
    assert float(val.min()) >= 3.5 - 1e-9
    np.testing.assert_allclose(train[:, 0].sort().values, np.arange(30) / 10, atol=1e-9)


def test_settings_that_contradict_each_other():
    with pytest.raises(UserError, match="clip_seconds and start_every"):
        module(clip_seconds=1.0)
    with pytest.raises(UserError, match="start_every 0 must be above 0"):
        module(start_every=0.0)

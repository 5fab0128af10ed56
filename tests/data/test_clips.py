"""Items: exact pixels under every window, exact shifts, replacement of what fails, batches."""

from __future__ import annotations

import os
import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch

from poodle_lightning.data.batches import Exhausted, collate
from poodle_lightning.data.clips import ClipDataset
from poodle_lightning.data.info import DecodeError
from poodle_lightning.data.order import Order
from poodle_lightning.data.sampling import ClipSampler, PairSampler
from poodle_lightning.data.sources import Entry
from poodle_lightning.data.streets import StreetSet, SyntheticSource
from poodle_lightning.data.tracked import TrackedFrames
from poodle_lightning.data.tracks import TrackStore, track_name, video_print
from poodle_lightning.data.windows import WindowRule
from poodle_lightning.ops.tracks import Tracks

WIDTH, HEIGHT = 120, 90


class Analytic:
    """Frames that are the same at all times; some videos cannot be opened."""

    refused = ()

    def __init__(self, frame, videos=5, broken=()):
        self.frame, self.broken, self.opened = frame, broken, 0
        height, width = frame.shape[:2]
        self.entries = [Entry(i, f"v{i}", 0.0, 2.0, width, height) for i in range(videos)]

    def open(self, entry):
        if entry.id in self.broken:
            raise DecodeError("corrupt", "made so", 0.5)
        self.opened += 1
        return self

    def read(self, times, box=None):
        x0, y0, x1, y1 = box
        return np.stack([self.frame[y0:y1, x0:x1]] * len(times)), np.array(times)

    def close(self):
        pass


def ramp(slope=1):
    """Channel values are the pixel's own coordinates: x, y, x + y; exact in bytes, linear in between."""
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    return (np.stack([x, y, x + y], axis=-1) * slope).clip(0, 255).astype(np.uint8)


def dataset(source, rule, sampler=None, *, length=None, stride=1, **settings):
    videos = len(source.entries)
    order = Order(videos, 1, length or videos, stride, seed=1)
    return ClipDataset(
        source, source.entries, order, sampler or PairSampler((0.1, 0.3)), rule, seed=1, **settings
    )


def points(window, size):
    """Where the training crop's pixel centres lie in the frame, pixel indices, clamped to the frame."""
    x0, y0, x1, y1 = window.inner
    x = x0 + (np.arange(size[1]) + 0.5) * (x1 - x0) / size[1] - 0.5
    y = y0 + (np.arange(size[0]) + 0.5) * (y1 - y0) / size[0] - 0.5
    return x.clip(0, WIDTH - 1), y.clip(0, HEIGHT - 1)


@pytest.mark.parametrize(
    "rule",
    [
        WindowRule((20, 30), area=(0.05, 1.0)),  # smaller and larger than the crop, at all borders
        WindowRule((60, 90), area=(0.01, 0.1)),  # enlarged
        WindowRule((40, 50), scale=(0.8, 1.2), reference=(60, 80)),
    ],
)
def test_unit_equals_sampling_the_whole_frame(rule):
    data = dataset(Analytic(ramp(), videos=40), rule)
    groups = [data[(0, position)] for position in range(len(data))]
    clip = collate(groups, rule.size)  # all padded to the largest
    unit = clip.unit().double().numpy()
    for row, group in enumerate(groups):
        window = rule.draw(WIDTH, HEIGHT, group.items[0].key)
        x, y = points(window, rule.size)
        grid_y, grid_x = np.meshgrid(y, x, indexing="ij")
        expected = np.stack([grid_x, grid_y, grid_x + grid_y]) / 255.0
        for frame in range(2):
            np.testing.assert_allclose(unit[row, frame], expected, atol=1e-4)


def box_filtered(frame, window, size):
    """The crop by hand in float64: blocks of the border-extended frame averaged, then bilinear."""
    (fx, fy), (left, top, right, bottom) = window.factor, window.outer
    rows, columns = np.arange(top, bottom).clip(0, HEIGHT - 1), np.arange(left, right).clip(0, WIDTH - 1)
    raw = frame[rows][:, columns].astype(np.float64)
    raw = raw.reshape(len(rows) // fy, fy, len(columns) // fx, fx, 3).mean(axis=(1, 3))
    x0, y0, x1, y1 = window.inner
    x = (x0 + (np.arange(size[1]) + 0.5) * (x1 - x0) / size[1] - left) / fx - 0.5
    y = (y0 + (np.arange(size[0]) + 0.5) * (y1 - y0) / size[0] - top) / fy - 0.5
    i, j = np.floor(y).astype(int), np.floor(x).astype(int)
    b, a = (y - i)[:, None, None], (x - j)[None, :, None]
    value = (1 - b) * ((1 - a) * raw[i][:, j] + a * raw[i][:, j + 1])
    return (value + b * ((1 - a) * raw[i + 1][:, j] + a * raw[i + 1][:, j + 1])).transpose(2, 0, 1) / 255.0


@pytest.mark.parametrize("content", ["ramp", "noise"])
def test_antialias_is_a_box_filter(content):
    noise = np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
    frame = ramp(2) if content == "ramp" else noise
    rule = WindowRule((12, 20), area=(0.1, 0.9), antialias=True)
    data = dataset(Analytic(frame, videos=40), rule)
    groups = [data[(0, position)] for position in range(len(data))]
    unit, factors = collate(groups, rule.size).unit().double().numpy(), set()
    for row, group in enumerate(groups):
        window = rule.draw(WIDTH, HEIGHT, group.items[0].key)
        factors.add(window.factor)
        error = np.abs(unit[row, 0] - box_filtered(frame, window, rule.size))
        # a stored mean is rounded to a byte; a ramp's means are whole where no border is repeated
        assert error.max() <= 0.5 / 255 + 1e-4
        if content == "ramp":
            assert error[0, 2:-2, 2:-2].max() <= 1e-4
            assert error[1, 2:-2, 2:-2].max() <= 1e-4
    assert len(factors) >= 3


@pytest.mark.parametrize("antialias", [False, True])
def test_a_gap_of_zero_jitters_the_second_window_by_its_exact_flow(antialias):
    rule = WindowRule((12, 20), area=(0.1, 0.5), antialias=antialias)
    data = dataset(Analytic(ramp(), videos=30), rule, PairSampler((0.0, 0.0)), jitter=0.1)
    clip = collate([data[(0, position)] for position in range(30)], rule.size)
    flow, present = clip.given_flow()
    assert present.all()
    there, back = flow.to_pixels().double().chunk(2)
    unit = clip.unit().double() * 255.0
    moved = 0
    for row in range(30):
        window = rule.draw(WIDTH, HEIGHT, clip.key[row])
        step = [(window.inner[2] - window.inner[0]) / 20, (window.inner[3] - window.inner[1]) / 12]
        assert torch.all(there[row].isfinite())
        torch.testing.assert_close(back[row], -there[row], atol=1e-4, rtol=0)
        for axis in range(2):
            # the ramp counts raw pixels: content of the first crop reappears displaced by the flow
            displaced = unit[row, 1, axis] + there[row, axis] * step[axis]
            torch.testing.assert_close(
                displaced[2:-2, 2:-2], unit[row, 0, axis][2:-2, 2:-2], atol=0.51, rtol=0
            )
        moved += bool(there[row].abs().max() > 0.5)
    assert moved > 20


def test_no_jitter_keeps_one_window_and_stands_still():
    rule = WindowRule((12, 20), area=(0.1, 0.5))
    data = dataset(Analytic(ramp()), rule, PairSampler((0.0, 0.0)), jitter=0.0)
    clip = collate([data[0]], rule.size)
    assert not clip.flow.any()
    assert torch.equal(clip.frames[:, 0], clip.frames[:, 1])


def test_repeated_sampling_opens_a_video_once_and_draws_each_clip_for_itself():
    rule = WindowRule((12, 20), area=(0.1, 0.5))
    source = Analytic(ramp())
    sampler = PairSampler((0.1, 0.3), pairs_per_video=4)
    data = dataset(source, rule, sampler, repeats=4)
    clip = collate([data[(2, 0)]], rule.size)
    assert source.opened == 1
    assert len(clip) == 4
    assert len(set(clip.key.tolist())) == 4
    assert len({tuple(row) for row in clip.times.tolist()}) == 4
    assert len({tuple(m) for m in clip.window.matrix.flatten(1).tolist()}) == 4
    first = int(clip.index[0])
    assert clip.index.tolist() == [first, first + 1, first + 2, first + 3]
    assert first % 4 == 0
    gaps = clip.times[:, 1] - clip.times[:, 0]
    assert torch.all((gaps >= 0.1 - 1e-9) & (gaps <= 0.3 + 1e-9))


def test_clips_of_many_frames():
    rule = WindowRule((12, 20), area=(0.1, 0.5))
    clip = collate([dataset(Analytic(ramp()), rule, ClipSampler(5, 0.25))[i] for i in range(3)], rule.size)
    assert clip.frames.shape[:3] == (3, 5, 3)
    torch.testing.assert_close(clip.times.diff(dim=1), torch.full((3, 4), 0.25, dtype=torch.float64))


def test_a_stretch_of_a_video_is_read_in_its_own_time():
    rule = WindowRule((12, 20), area=(0.1, 0.5))
    source = Analytic(ramp(), videos=8)
    source.entries = [replace(entry, start=100.0, stop=101.0) for entry in source.entries]
    clip = collate([dataset(source, rule)[i] for i in range(8)], rule.size)
    assert clip.times.min() >= 100.0
    assert clip.times.max() <= 101.0


def test_a_failed_item_is_replaced_by_the_next_of_the_same_rank():
    rule = WindowRule((12, 20), area=(0.1, 0.5))
    source = Analytic(ramp(), videos=8)
    clean = dataset(source, rule, stride=2)
    order = [clean.order.item(0, position) for position in range(8)]
    source.broken = (order[1], order[3])
    data = dataset(source, rule, stride=2)
    group = data[(0, 1)]
    assert [skip.path for skip in group.skipped] == [f"v{order[1]}", f"v{order[3]}"]
    assert [(s.reason, s.detail, s.time) for s in group.skipped] == [("corrupt", "made so", 0.5)] * 2
    assert group.items[0].index == order[5]
    # the same video has its own turn later: another clip of it, not the same twice
    assert int(group.items[0].key) != int(data[(0, 5)].items[0].key)
    assert int(data[(0, 5)].items[0].key) == int(clean[(0, 5)].items[0].key)
    # the end of the rank's order is followed by its beginning
    source.broken = (order[7],)
    assert dataset(source, rule, stride=2)[(0, 7)].items[0].index == order[1]


def test_when_every_video_fails_the_batch_says_so():
    rule = WindowRule((12, 20), area=(0.1, 0.5))
    group = dataset(Analytic(ramp(), videos=4, broken=range(4)), rule)[(0, 0)]
    batch = collate([group], rule.size)
    assert isinstance(batch, Exhausted)
    assert len(batch.skipped) == 4


def test_too_small_and_too_short_are_reasons():
    source = Analytic(ramp(), videos=3)
    source.entries[0] = replace(source.entries[0], stop=0.05)
    source.entries[1] = replace(source.entries[1], width=30, height=20)
    data = dataset(source, WindowRule((40, 50), scale=(0.9, 1.1), reference=None))
    groups = [data[(0, position)] for position in range(3)]
    assert {skip.reason for group in groups for skip in group.skipped} == {"too_short", "too_small"}


def test_a_batch_may_hold_clips_with_and_without_flow():
    rule = WindowRule((12, 20), area=(0.1, 0.5))

    class Constant:
        def pixels(self, first, second):
            return np.full((2, 2, *first.shape[:2]), 1.5, np.float32)

    with_flow = dataset(Analytic(ramp()), rule, flow=Constant())[0]
    without = dataset(Analytic(ramp()), rule)[1]
    clip = collate([with_flow, without], rule.size)
    _, present = clip.given_flow()
    assert present.tolist() == [True, False, True, False]
    assert clip.present.tolist() == [[True, True], [False, False]]
    assert torch.all(clip.flow[0] == 1.5)


@pytest.mark.parametrize("antialias", [False, True])
def test_synthetic_streets_bring_their_exact_flow_and_labels(antialias):
    source = SyntheticSource(StreetSet(videos=3, seconds=2.0, size=(60, 120), supersample=1))
    rule = WindowRule((10, 20), area=(0.3, 0.9), antialias=antialias)
    data = dataset(source, rule)
    for position in range(3):
        item = data[(0, position)].items[0]
        window = rule.draw(120, 60, item.key)
        entry = source.entries[item.index]
        street = source.open(entry).street
        there, _ = street.flow(*item.times)
        back, _ = street.flow(*reversed(item.times))
        (fx, fy), (left, top, right, bottom) = window.factor, window.outer
        rows, columns = np.arange(top, bottom).clip(0, 59), np.arange(left, right).clip(0, 119)
        whole = np.stack([there, back]).astype(np.float64)[:, :, rows][..., columns]
        means = whole.reshape(2, 2, len(rows) // fy, fy, len(columns) // fx, fx).mean(axis=(3, 5))
        expected = means / np.array([fx, fy]).reshape(1, 2, 1, 1)
        np.testing.assert_allclose(item.flow.numpy(), expected, atol=1e-3)
        labels = np.stack([street.labels(time) for time in item.times])[:, rows][..., columns]
        np.testing.assert_array_equal(item.labels.numpy(), labels[:, fy // 2 :: fy, fx // 2 :: fx])
    assert dataset(source, rule, exact=False)[0].items[0].flow is None


def test_a_forked_worker_opens_its_own_readers():
    rule = WindowRule((12, 20), area=(0.1, 0.5))
    source = Analytic(ramp(), videos=1)
    data = dataset(source, rule)
    data[0], data[0]
    assert source.opened == 1
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        data[0]
        os.write(write, bytes([source.opened]))
        os._exit(0)
    os.waitpid(child, 0)
    assert os.read(read, 1) == bytes([2])


@pytest.mark.parametrize(("videos", "most"), [(10, 10), (40, 4)])
def test_few_films_stay_open_and_many_do_not(videos, most):
    """The closed ones are those that were not asked for the longest."""

    class Closing(Analytic):
        def __init__(self):
            super().__init__(ramp(), videos=videos)
            self.open_now, self.closed = 0, 0

        def open(self, entry):
            self.open_now += 1
            assert self.open_now <= most + 1
            return super().open(entry)

        def close(self):
            self.open_now -= 1
            self.closed += 1

    source = Closing()
    data = dataset(source, WindowRule((12, 20), area=(0.1, 0.5)))
    for _ in range(2):
        for position in range(videos):
            data[(0, position)]
    assert source.open_now == most
    assert source.opened == (videos if videos == most else 2 * videos)
    again = pickle.loads(pickle.dumps(data._readers))
    assert again.most == most


class Timed(Analytic):
    """Frames whose third channel tells the time in tenths."""

    def read(self, times, box=None):
        pixels, actual = super().read(times, box)
        pixels[..., 2] = np.round(actual * 10)[:, None, None]
        return pixels, actual


def two_tracks(store, name, prints):
    """One point that moves from left to right in 2 s, one that ends after 1 s in a corner."""
    lengths = (21, 11)
    x = np.concatenate([np.linspace(-0.8, 0.8, 21), np.linspace(0.0, 0.9, 11)])
    y = np.concatenate([np.zeros(21), np.linspace(0.0, 0.9, 11)])
    places = np.round(np.stack([x, y], axis=1) * 32767).astype(np.int16)
    still = np.where(np.isin(np.arange(32), (0, 21)), -np.inf, 0.0).astype(np.float16)
    offsets = np.cumsum([0, *lengths])
    tracks = Tracks(21, (HEIGHT, WIDTH), 0.01, 1.0, np.zeros(2, np.int32), offsets, places, still)
    store.put(name, prints, tracks, np.arange(21) / 10)


def test_clips_of_tracked_frames_show_the_frames_of_their_points(tmp_path):
    """Anchors in any order with the other frame; a part of what was tracked is drawn from alone."""
    source = Timed(ramp(), videos=8)
    sampler = TrackedFrames(str(tmp_path), points=3)
    for entry in source.entries[:6]:
        two_tracks(TrackStore(tmp_path, "by hand"), track_name(entry, None), video_print(source, entry))
    whole, later = WindowRule((HEIGHT, WIDTH), whole=True), 0
    data = dataset(source, whole, sampler)
    for position in range(8):
        (item,), times = data[(0, position)].items, []
        for t in range(2):
            assert int(item.frames[t, 2].float().mean()) == round(item.times[t] * 10)
            times.append(item.times[t])
            now = item.times[t]
            for point in item.points[:2, t]:  # the tracks' order; alone, either may come first
                ways = ([-0.8 + 0.8 * now, 0.0], [0.9 * now, 0.9 * now])
                assert point.isnan().all() or any(point.tolist() == pytest.approx(w, abs=1e-3) for w in ways)
            assert item.points[0, t].isfinite().all()
        later += times[1] > times[0]
        assert item.points[2].isnan().all()
    assert 0 < later < 8
    without = [skip.reason for position in range(8) for skip in data[(0, position)].skipped]
    assert set(without) == {"no_tracks"}
    part = [replace(entry, start=0.5, stop=1.2) for entry in source.entries]
    order = Order(8, 1, 8, 1, seed=1)
    cut = ClipDataset(source, part, order, sampler, whole, seed=1, tracked=source.entries[0])
    for position in range(8):
        (item,) = cut[(0, position)].items
        assert all(0.5 - 1e-6 <= time <= 1.2 + 1e-6 for time in item.times)
        assert item.points[0].isfinite().all()

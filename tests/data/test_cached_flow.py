"""Flow through the cache in a worker, and the sampler of fixed pairs."""

import pickle

import numpy as np
import pytest
import torch

from poodle_lightning.configured import build, spec
from poodle_lightning.data.cached_flow import CachedFlow, FixedPairs, PixelEstimator, video_of
from poodle_lightning.data.sampling import TooShort
from poodle_lightning.flow.dis import DIS
from poodle_lightning.ops.random import key_of
from poodle_lightning.types import UserError


class Counted:
    """Flow by the frames' mean; counts its calls."""

    fingerprint = "counted"

    def __init__(self):
        self.calls = 0

    def pixels(self, first, second):
        self.calls += 1
        ys, xs = np.mgrid[: first.shape[0], : first.shape[1]]
        there = np.stack([0.25 * xs + first.mean(), 0.125 * ys - second.mean()])
        return np.stack([there, -there]).astype(np.float32)


class Frames:
    """Two frames that count how often they are read."""

    def __init__(self, value=20):
        self.frames = np.full((2, 16, 24, 3), value, np.uint8)
        self.reads = 0

    def __call__(self):
        self.reads += 1
        return self.frames


@pytest.fixture
def film(tmp_path):
    path = tmp_path / "film.mp4"
    path.write_bytes(b"the content is not looked at")
    return str(path)


def test_estimates_once_then_loads_the_same_bits(tmp_path, film):
    frames, box = Frames(), (3, 2, 20, 15)
    flow = CachedFlow(str(tmp_path / "cache"), Counted())
    first = flow.estimate_or_load(film, (1.0, 1.5), frames, box=box, size=(16, 24))
    assert first.shape == (2, 2, 13, 17)
    again = flow.estimate_or_load(film, (1.0, 1.5), frames, box=box, size=(16, 24))
    np.testing.assert_array_equal(first, again)
    assert (frames.reads, flow.estimator.calls) == (1, 1)
    exact = Counted().pixels(*frames())[..., 2:15, 3:20]
    assert np.abs(first - exact).max() <= 1 / 16 + 1e-4
    flow.estimate_or_load(film, (1.0, 1.6), frames)
    assert flow.estimator.calls == 2


@pytest.mark.parametrize("form", ["delta", "jpeg"])
def test_a_clip_is_the_same_whether_its_flow_was_there_or_not(tmp_path, film, form):
    folder, box = str(tmp_path / "cache"), (3, 2, 20, 15)
    first = CachedFlow(folder, Counted(), form=form, quality=60)
    computed = first.estimate_or_load(film, (1.0, 1.5), Frames(), box=box)
    for later in (first, CachedFlow(folder)):
        np.testing.assert_array_equal(later.estimate_or_load(film, (1.0, 1.5), Frames(), box=box), computed)
    assert first.estimator.calls == 1
    assert (first.cache.form, first.cache.quality) == (form, 60)
    again = build(spec(CachedFlow(folder, DIS(), form=form, quality=60)))
    assert (again.cache.form, again.cache.quality) == (form, 60)


def test_another_film_in_the_same_place_is_computed_anew(tmp_path, film):
    flow = CachedFlow(str(tmp_path / "cache"), Counted())
    flow.estimate_or_load(film, (1.0, 1.5), Frames(20))
    with open(film, "ab") as file:
        file.write(b"!")
    new = flow.estimate_or_load(film, (1.0, 1.5), Frames(90))
    assert flow.estimator.calls == 2
    assert abs(new[0, 0, 0, 0] - 90) < 0.6


def test_a_torn_file_is_computed_anew(tmp_path, film):
    flow = CachedFlow(str(tmp_path / "cache"), Counted())
    expected = flow.estimate_or_load(film, (1.0, 1.5), Frames())
    (stored,) = (tmp_path / "cache").rglob("*.flow")
    for cut in (0, 10, 40, stored.stat().st_size - 1):
        stored.write_bytes(stored.read_bytes()[:cut])
        calls = flow.estimator.calls
        np.testing.assert_array_equal(flow.estimate_or_load(film, (1.0, 1.5), Frames()), expected)
        assert flow.estimator.calls == calls + 1


def test_goes_on_where_the_cache_cannot_be_written(tmp_path, film):
    (tmp_path / "file").write_text("")
    flow = CachedFlow(str(tmp_path / "file" / "cache"), Counted())
    with pytest.warns(RuntimeWarning, match="cannot be"):
        shapes = [flow.estimate_or_load(film, (1.0, 1.5), Frames()).shape for _ in range(2)]
    assert shapes == [(2, 2, 16, 24)] * 2
    assert flow.estimator.calls == 2


def test_without_an_estimator_it_only_loads(tmp_path, film):
    folder = str(tmp_path / "cache")
    with pytest.warns(RuntimeWarning, match="poodle-lightning flow --out"):
        alone = CachedFlow(folder)
    frames = Frames()
    assert alone.estimate_or_load(film, (1.0, 1.5), frames) is None
    assert frames.reads == 0
    assert np.isnan(alone.pixels(*frames.frames)).all()
    expected = CachedFlow(folder, Counted()).estimate_or_load(film, (1.0, 1.5), frames)
    np.testing.assert_array_equal(alone.estimate_or_load(film, (1.0, 1.5), frames), expected)


def test_what_is_no_file_is_estimated_and_not_stored(tmp_path):
    flow = CachedFlow(str(tmp_path / "cache"), Counted())
    for path in (str(tmp_path), "street 17"):
        assert video_of(path) is None
        assert flow.estimate_or_load(path, (1.0, 1.5), Frames()).shape == (2, 2, 16, 24)
    assert not (tmp_path / "cache").exists()


def test_pixels_passes_crops_to_the_estimator(tmp_path):
    rng = np.random.default_rng(0)
    a, b = rng.integers(0, 256, (2, 20, 30, 3), dtype=np.uint8)
    np.testing.assert_array_equal(
        CachedFlow(str(tmp_path), DIS("fast")).pixels(a, b), DIS("fast").pixels(a, b)
    )


def test_is_plain_data_and_travels_to_workers(tmp_path):
    flow = CachedFlow(str(tmp_path), DIS("fast"))
    assert isinstance(DIS(), PixelEstimator)
    for other in (build(spec(flow)), pickle.loads(pickle.dumps(flow))):
        assert other.estimator.preset == "fast"
        assert other.cache.estimator == flow.cache.estimator


# ---- fixed pairs
def draws(sampler, duration, count=300):
    return [tuple(sampler.times(duration, key_of(7, number))) for number in range(count)]


def test_every_draw_is_one_of_the_fixed_pairs_and_all_come():
    sampler = FixedPairs(gap=(0.5, 1.0), fixed=6, seed=3)
    pairs = sampler.pairs(20.0)
    assert len(set(pairs)) == 6
    for a, b in pairs:
        assert 0 <= a < b <= 20
        assert 0.5 <= b - a <= 1.0 + 1e-9
    assert set(draws(sampler, 20.0)) == set(pairs)


def test_pairs_depend_on_seed_gap_and_duration_alone():
    sampler = FixedPairs(gap=(0.5, 1.0), fixed=4)
    assert sampler.pairs(20.0) == FixedPairs(gap=(0.5, 1.0), fixed=4).pairs(20.0)
    assert FixedPairs(gap=(0.5, 1.0), fixed=9).pairs(20.0)[:4] == sampler.pairs(20.0)
    assert FixedPairs(gap=(0.5, 1.0), fixed=4, seed=1).pairs(20.0) != sampler.pairs(20.0)
    relative = {round(a / d, 6) for d in (20.0, 20.1) for a, _ in sampler.pairs(d)}
    assert len(relative) == 8  # not the same moments in every video


def test_several_pairs_at_once_are_different_ones():
    sampler = FixedPairs(gap=(0.2, 0.4), pairs_per_video=3, fixed=5)
    pairs = set(sampler.pairs(8.0))
    for times in draws(sampler, 8.0, 50):
        taken = {times[0:2], times[2:4], times[4:6]}
        assert len(taken) == 3
        assert taken <= pairs


def test_impossible_settings_are_refused():
    with pytest.raises(UserError, match="fixed pairs"):
        FixedPairs(pairs_per_video=4, fixed=3).check()
    with pytest.raises(TooShort):
        FixedPairs(gap=(0.5, 1.0)).times(0.9, torch.tensor(0))
    assert FixedPairs(gap=(0.5, 1.0), pairs_per_video=3).span == 1.0

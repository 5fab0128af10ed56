"""When frames are taken: limits, distribution, dependence on the key alone."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy.stats import kstest

from poodle_lightning.data.sampling import ClipSampler, PairSampler, TooShort, WindowSampler, split_long
from poodle_lightning.data.streets import StreetSet
from poodle_lightning.data.video import VideoDataModule
from poodle_lightning.ops.random import key_of
from poodle_lightning.types import UserError

SAMPLERS = [
    PairSampler(),
    PairSampler(gap=(0.0, 0.0)),
    PairSampler(gap=(0.2, 0.8), pairs_per_video=4),
    ClipSampler(frames=8, step=0.1),
    ClipSampler(frames=1, step=0.1),
    WindowSampler(frames=4, seconds=1.5),
    WindowSampler(frames=3, seconds=1.5, law="gap"),
    WindowSampler(frames=3, seconds=1.5, law="chunks"),
]


def draw(sampler, duration, count=400):
    return np.array([sampler.times(duration, key_of(0, "test", k)) for k in range(count)])


@pytest.mark.parametrize("sampler", SAMPLERS, ids=repr)
@pytest.mark.parametrize("slack", [0.0, 1e-9, 3.0])
def test_times_lie_within_the_video_and_within_the_span(sampler, slack):
    duration = sampler.span + slack
    times = draw(sampler, duration, 100)
    assert times.min() >= 0
    assert times.max() <= duration
    apart = isinstance(sampler, PairSampler) and sampler.spread is None  # pairs drawn on their own
    together = times.reshape(-1, 2) if apart else times
    assert np.ptp(together, axis=1).max() <= sampler.span + 1e-12


def test_pairs_of_a_video_are_independent_unless_spread():
    """Starts of further pairs: uniform over the video and uncorrelated with the first; or at equal steps."""
    starts = draw(PairSampler(gap=(0.5, 1.0), pairs_per_video=3), 41.0)[:, ::2] / 40.0
    for column in range(3):
        assert abs(starts[:, column].mean() - 0.5) < 0.05
        assert abs(starts[:, column].std() - 12**-0.5) < 0.03
    assert np.abs(np.corrcoef(starts.T) - np.eye(3)).max() < 0.15
    close = draw(PairSampler(gap=(0.5, 1.0), pairs_per_video=3, spread=0.6), 41.0)[:, ::2]
    assert np.allclose(np.diff(close, axis=1), 0.2)


@pytest.mark.parametrize("sampler", [s for s in SAMPLERS if s.span > 0], ids=repr)
def test_too_short(sampler):
    with pytest.raises(TooShort, match="needed"):
        sampler.times(sampler.span * 0.99, key_of(0))


@pytest.mark.parametrize("sampler", SAMPLERS, ids=repr)
def test_the_key_decides(sampler):
    key = key_of(3, 1, 4)
    assert sampler.times(10.0, key) == sampler.times(10.0, key.reshape(1))
    assert sampler.times(10.0, key) != sampler.times(10.0, key_of(3, 1, 5))
    torch.manual_seed(0)
    again = sampler.times(10.0, key)
    torch.manual_seed(1)
    assert again == sampler.times(10.0, key)


def test_pairs_are_uniform_in_start_and_gap():
    first, second = draw(PairSampler(gap=(0.5, 1.0)), 21.0, 2000).T
    assert kstest(second - first, "uniform", args=(0.5, 0.5)).pvalue > 1e-3
    assert kstest(first, "uniform", args=(0.0, 20.0)).pvalue > 1e-3
    assert abs(np.corrcoef(first, second - first)[0, 1]) < 0.1


def test_gap_of_zero_is_one_frame_twice():
    first, second = draw(PairSampler(gap=(0.0, 0.0)), 5.0).T
    np.testing.assert_array_equal(first, second)


def test_several_pairs_share_a_stretch():
    sampler = PairSampler(gap=(0.5, 1.0), pairs_per_video=4, spread=0.5)
    times = draw(sampler, 60.0, 50).reshape(50, 4, 2)
    np.testing.assert_allclose(np.diff(times[:, :, 0], axis=1), 0.125, atol=1e-9)
    gaps = times[:, :, 1] - times[:, :, 0]
    assert gaps.min() >= 0.5 - 1e-9
    assert gaps.max() <= 1.0 + 1e-9
    assert gaps.std(axis=1).min() > 0.001
    assert sampler.span == pytest.approx(1.375)


@pytest.mark.parametrize("law", ["uniform", "gap", "chunks"])
def test_a_window_longer_than_every_video_is_refused_in_one_line(law):
    data = VideoDataModule(
        source="synthetic",
        synthetic=StreetSet(videos=3, seconds=2.5),
        sampler=WindowSampler(3, 2.56, law),
    )
    with pytest.raises(
        UserError, match=r"none of 3 videos lasts the 2\.56 s .* smaller gap or window"
    ) as caught:
        data.setup("fit")
    assert "\n" not in str(caught.value)


def test_clip_steps():
    times = draw(ClipSampler(frames=8, step=0.1), 10.0, 50)
    np.testing.assert_allclose(np.diff(times, axis=1), 0.1, atol=1e-9)


def test_window_frames_are_sorted_and_uniform():
    times = draw(WindowSampler(frames=1, seconds=5.0), 5.0, 2000)
    assert kstest(times[:, 0], "uniform", args=(0.0, 5.0)).pvalue > 1e-3
    assert (np.diff(draw(WindowSampler(frames=5, seconds=2.0), 9.0), axis=1) >= 0).all()


def test_an_unknown_law_is_refused():
    with pytest.raises(
        UserError, match=r"^data\.sampler: law must be uniform, gap or chunks, not 'poisson'$"
    ):
        WindowSampler(frames=2, seconds=1.0, law="poisson").check()


def test_windows_laws():
    """VITO, Fig. A.2: chunks are uniform in each part; a gap is fixed; marginal sampling has its median."""
    chunks = draw(WindowSampler(3, 3.0, "chunks"), 3.0, 2000)
    for k in range(3):
        assert kstest(chunks[:, k] - k, "uniform").pvalue > 1e-3
    gaps = draw(WindowSampler(3, 3.0, "gap"), 9.0)
    assert np.allclose(np.diff(gaps, axis=1), 1.5)
    assert kstest(gaps[:, 0] / 6.0, "uniform").pvalue > 1e-3
    pairs = np.diff(draw(WindowSampler(2, 2.56), 9.0, 4000), axis=1)
    assert abs(np.median(pairs) - 2.56 * (1 - 0.5**0.5)) < 0.04  # the paper: 0.76 s
    assert len(draw(WindowSampler(1, 1.0, "gap"), 2.0, 1)[0]) == 1


@pytest.mark.parametrize(
    "sampler",
    [
        PairSampler(gap=(1.0, 0.5)),
        PairSampler(gap=(-0.1, 0.5)),
        PairSampler(gap=(0.5, float("inf"))),
        PairSampler(pairs_per_video=0),
        PairSampler(jitter=-1.0),
    ],
)
def test_senseless_pairs(sampler):
    with pytest.raises(UserError, match="not"):
        sampler.check()


def test_stretches_last():
    with pytest.raises(ValueError, match="not"):
        split_long([], seconds=0.0)


@pytest.mark.parametrize(
    "sampler",
    [
        ClipSampler(frames=0, step=0.1),
        ClipSampler(frames=2, step=0.0),
        ClipSampler(frames=2, step=float("nan")),
        WindowSampler(frames=0, seconds=1.0),
        WindowSampler(frames=2, seconds=-1.0),
    ],
)
def test_senseless_clips_are_refused_in_one_line(sampler):
    with pytest.raises(UserError, match=r"^data\.sampler: a .* needs frames >= 1 and .* not \d"):
        sampler.check()


@pytest.mark.parametrize(
    ("duration", "expected"),
    [
        (0.0, [(0.0, 0.0)]),
        (4.0, [(0.0, 4.0)]),
        (10.0, [(0.0, 10.0)]),
        (14.0, [(0.0, 14.0)]),
        (16.0, [(0.0, 10.0), (10.0, 16.0)]),
        (30.0, [(0.0, 10.0), (10.0, 20.0), (20.0, 30.0)]),
        (34.0, [(0.0, 10.0), (10.0, 20.0), (20.0, 34.0)]),
    ],
)
def test_long_videos_are_cut(duration, expected):
    videos = [SimpleNamespace(duration=1.0), SimpleNamespace(duration=duration)]
    assert split_long(videos) == [(0, 0.0, 1.0)] + [(1, a, b) for a, b in expected]


@pytest.mark.parametrize("duration", [0.0, 3.0])
def test_a_clip_may_be_one_frame(duration):
    sampler = ClipSampler(frames=1, step=1.0)
    assert sampler.span == 0.0
    times = [sampler.times(duration, key_of(0, number)) for number in range(50)]
    assert all(len(one) == 1 and 0 <= one[0] <= duration for one in times)
    assert len({one[0] for one in times}) == (50 if duration else 1)


@pytest.mark.parametrize("sampler", [ClipSampler(8, 1.0), PairSampler((0.1, 0.7)), WindowSampler(3, 0.7)])
def test_a_stretch_as_long_as_a_clip_is_enough_whatever_rounding_took(sampler):
    for number in range(200):
        start = 100 * number / 7
        times = sampler.times((start + sampler.span) - start, key_of(0, number))
        assert min(times) >= 0
        assert max(times) <= sampler.span + 1e-9
    with pytest.raises(TooShort):
        sampler.times(sampler.span - 1e-3, key_of(0))

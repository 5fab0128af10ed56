"""Tracks against a float64 loop and closed forms; what is drawn from them against brute force."""

import itertools
import math

import numpy as np
import pytest
import torch

from poodle_lightning.ops import tracks as module
from poodle_lightning.ops.geometry import Flow, extent_to_pixels, pixels_to_extent
from poodle_lightning.ops.random import key_of
from poodle_lightning.ops.tracks import (
    Spans,
    Tracks,
    alive,
    anchor_frames,
    follow,
    pairs_of,
    random_frames,
    starts,
    subsample,
)

SIZE = (20, 32)


def bilinear(field, x, y):
    """Value of ``field (2, H, W)`` at a point in pixels, clamped at the border."""
    height, width = field.shape[1:]
    x, y = min(max(x, 0.0), width - 1.0), min(max(y, 0.0), height - 1.0)
    x0, y0 = min(int(x), width - 2), min(int(y), height - 2)
    a, b = x - x0, y - y0
    top = (1 - a) * field[:, y0, x0] + a * field[:, y0, x0 + 1]
    low = (1 - a) * field[:, y0 + 1, x0] + a * field[:, y0 + 1, x0 + 1]
    return (1 - b) * top + b * low


def one_track(forward, backward, point, start, gamma, delta):
    """The definition, in pixels: places and the consistencies of the steps that led to them."""
    height, width = forward.shape[2:]
    places, consistency = [np.array(point)], []
    for t in range(start, len(forward)):
        w = bilinear(forward[t], *places[-1])
        x, y = places[-1] + w
        back = bilinear(backward[t], x, y)
        d = ((w + back) ** 2).sum() - gamma * ((w**2).sum() + (back**2).sum())
        if d >= delta or not (-0.5 <= x <= width - 0.5 and -0.5 <= y <= height - 0.5):
            break
        places.append(np.array([x, y]))
        consistency.append(d)
    return np.array(places), np.array(consistency)


def waves(frames, seed, noise=0.4):
    """Smooth flows whose way back is only roughly their inverse."""
    rng = np.random.default_rng(seed)
    ys, xs = np.mgrid[: SIZE[0], : SIZE[1]].astype(float)
    forward = []
    for _ in range(frames - 1):
        a, b, c, d = rng.uniform(0.1, 0.4, 4)
        forward.append(1.5 * np.stack([np.sin(a * xs + b * ys + c), np.cos(b * xs - a * ys + d)]))
    forward = np.stack(forward)
    return forward, -forward + noise * rng.standard_normal(forward.shape)


def flows(*pixels):
    return [Flow.from_pixels(torch.from_numpy(np.ascontiguousarray(x))) for x in pixels]


def in_pixels(tracks, row, size=SIZE):
    frames = tracks.first[row] + np.arange(tracks.lengths[row])
    at = tracks.at(np.full(len(frames), row), frames)
    return extent_to_pixels(torch.from_numpy(at).double(), size).numpy()


@pytest.mark.parametrize("limit", [0.6, math.inf])
def test_following_is_the_definition_point_by_point(limit):
    forward, backward = waves(9, 0)
    points, begin = starts(key_of(1), 60, 9)
    tracks = follow(*flows(forward, backward), points.double(), begin, 0.05, limit=limit)
    ended_early = 0
    for row in range(60):
        x, y = extent_to_pixels(points[row].double(), SIZE).tolist()
        places, d = one_track(forward, backward, (x, y), int(begin[row]), 0.05, limit)
        assert tracks.lengths[row] == len(places)
        np.testing.assert_allclose(in_pixels(tracks, row), places, atol=SIZE[1] / 131068 + 1e-6)
        low, high = tracks.offsets[row : row + 2]
        np.testing.assert_allclose(tracks.consistency[low + 1 : high], d, rtol=2**-11, atol=1e-6)
        assert tracks.consistency[low] == -np.inf
        ended_early += len(places) < 9 - int(begin[row])
    assert ended_early > 4  # the rest reaches the last frame
    assert (tracks.frames, tracks.size, tracks.gamma, tracks.limit, len(tracks)) == (9, SIZE, 0.05, limit, 60)


@pytest.mark.parametrize("delta", [0.02, 0.2, 0.6, 3.0])
def test_another_delta_needs_no_following_again(delta):
    """Bit for bit: whether a step holds is decided by what is stored."""
    both = flows(*(x.astype(np.float32) for x in waves(12, 3)))
    points, begin = starts(key_of(2), 400, 12)
    once = follow(*both, points, begin, 0.01)
    again = follow(*both, points, begin, 0.01, limit=delta)
    spans = alive(once, delta)
    np.testing.assert_array_equal(spans.last - spans.first + 1, again.lengths)
    np.testing.assert_array_equal(alive(again, delta).last, spans.last)
    kept = np.concatenate(
        [np.arange(o, o + n) for o, n in zip(once.offsets[:-1], again.lengths, strict=True)]
    )
    np.testing.assert_array_equal(once.places[kept], again.places)
    assert (spans.last < once.first + once.lengths - 1).any()


def test_delta_above_the_limit_is_refused():
    tracks = follow(*flows(*waves(3, 0)), *starts(key_of(0), 5, 3), limit=0.5)
    alive(tracks, 0.5)
    for delta in (0.51, math.nan):
        with pytest.raises(ValueError, match=r"followed up to δ = 0.5"):
            alive(tracks, delta)


def test_flows_may_come_one_after_the_other():
    forward, backward = flows(*waves(6, 5))
    points, begin = starts(key_of(3), 30, 6)
    whole = follow(forward, backward, points, begin)
    lazy = follow(
        (forward[t : t + 1] for t in range(5)), (backward[t : t + 1] for t in range(5)), points, begin
    )
    np.testing.assert_array_equal(whole.places, lazy.places)
    np.testing.assert_array_equal(whole.consistency, lazy.consistency)


def test_moving_all_points_gives_what_moving_those_under_way_gives(monkeypatch):
    """The form for devices that must not be waited for, run on the CPU."""
    both = flows(*(x.astype(np.float32) for x in waves(8, 6)))
    points, begin = starts(key_of(4), 80, 8)
    compact = follow(*both, points, begin, limit=0.6)
    asked = []
    monkeypatch.setattr(module, "_answers_at_once", lambda device: asked.append(device) is not None)
    dense = follow(*both, points, begin, limit=0.6)
    assert asked
    for name in ("first", "offsets", "places", "consistency"):
        np.testing.assert_array_equal(getattr(dense, name), getattr(compact, name))


def test_constant_flow_moves_points_straight_until_they_leave():
    dx, dy, frames = 1.25, -0.5, 9
    forward = np.broadcast_to(np.array([dx, dy]).reshape(1, 2, 1, 1), (frames - 1, 2, *SIZE))
    points, begin = starts(key_of(5), 200, frames)
    gamma = 0.1
    tracks = follow(*flows(forward, -forward), points.double(), begin, gamma)
    pixels = extent_to_pixels(points.double(), SIZE).numpy()
    for row in range(200):
        steps = np.arange(frames - int(begin[row]))[:, None]
        ideal = pixels[row] + steps * [dx, dy]
        stays = (np.abs(ideal + 0.5 - np.array(SIZE[::-1]) / 2) <= np.array(SIZE[::-1]) / 2).all(1)
        count = len(stays) if stays.all() else int(stays.argmin())
        assert tracks.lengths[row] == count
        np.testing.assert_allclose(in_pixels(tracks, row), ideal[:count], atol=1e-3)
    moved = tracks.consistency[np.isfinite(tracks.consistency)]
    np.testing.assert_allclose(moved, -gamma * 2 * (dx**2 + dy**2), rtol=2**-11)


def test_a_rotation_carries_points_round_their_circle():
    """Affine flow is exact under bilinear interpolation: only rounding is left after half a turn."""
    size, turn, frames = (33, 33), math.pi / 24, 25
    ys, xs = np.mgrid[:33, :33].astype(float) - 16

    def rotation(angle):
        c, s = math.cos(angle), math.sin(angle)
        return np.stack([c * xs - s * ys - xs, s * xs + c * ys - ys])[None].repeat(frames - 1, 0)

    angle, radius = torch.rand(50).double() * 6.28, torch.rand(50).double() * 15.5
    centred = torch.stack([radius * angle.cos(), radius * angle.sin()], -1)
    points = pixels_to_extent(centred + 16, size)
    tracks = follow(*flows(rotation(turn), rotation(-turn)), points, torch.zeros(50, dtype=torch.int64), 0.0)
    assert (tracks.lengths == frames).all()
    end = extent_to_pixels(torch.from_numpy(tracks.at(np.arange(50), frames - 1)).double(), size) - 16
    np.testing.assert_allclose(end, -centred, atol=2e-3)
    assert np.abs(tracks.consistency[np.isfinite(tracks.consistency)]).max() < 1e-6


def test_the_consistency_is_in_pixels_of_the_named_frame():
    """A flow kept at half resolution gives the thresholds of the whole frame."""
    forward, backward = flows(*waves(4, 8))
    points, begin = starts(key_of(6), 40, 4)
    own = follow(forward, backward, points, begin)
    double = follow(forward, backward, points, begin, size=(40, 64))
    np.testing.assert_array_equal(own.places, double.places)
    finite = np.isfinite(own.consistency)
    np.testing.assert_allclose(double.consistency[finite], 4 * own.consistency[finite], rtol=2e-3, atol=1e-6)


def test_flow_that_is_not_finite_or_far_off_ends_a_track():
    still = np.zeros((2, 2, *SIZE), np.float32)
    for bad in (np.nan, np.inf, 1e9):
        back = still.copy()
        back[1] = bad
        tracks = follow(*flows(still, back), torch.zeros(1, 2), torch.zeros(1, dtype=torch.int64))
        assert tracks.lengths.tolist() == [2]
        forth = still.copy()
        forth[0] = bad
        tracks = follow(*flows(forth, still), torch.zeros(1, 2), torch.zeros(1, dtype=torch.int64))
        assert tracks.lengths.tolist() == [1]


def test_what_cannot_be_followed_is_refused():
    forward, backward = flows(*waves(3, 0))
    point, zero = torch.zeros(1, 2), torch.zeros(1, dtype=torch.int64)
    with pytest.raises(ValueError, match="inside the frame"):
        follow(forward, backward, torch.tensor([[0.0, 1.1]]), zero)
    with pytest.raises(ValueError, match=r"frames 0 … 2"):
        follow(forward, backward, point, zero + 3)
    with pytest.raises(ValueError, match="at least two frames"):
        follow([], [], point, zero)
    with pytest.raises(ValueError, match="shorter"):
        follow(forward, backward[:1], point, zero)
    assert len(follow(forward, backward, point[:0], zero[:0])) == 0


def test_starts_are_uniform_in_space_and_time_and_a_function_of_their_key():
    points, frames = starts(key_of(7), 20000, 8)
    cells = np.histogramdd(
        np.column_stack([points.numpy(), frames.numpy()]), [4, 4, 8], [(-1, 1), (-1, 1), (-0.5, 7.5)]
    )[0]
    expected = 20000 / 128
    assert ((cells - expected) ** 2 / expected).sum() < 127 + 4 * math.sqrt(2 * 127)  # chi², 4 sigma
    assert points.dtype == torch.float32
    fewer = starts(key_of(7), 100, 8)
    assert torch.equal(fewer[0], points[:100])
    assert torch.equal(fewer[1], frames[:100])
    assert not torch.equal(starts(key_of(8), 100, 8)[0], fewer[0])


def test_a_track_is_only_where_it_was_followed():
    tracks = follow(*flows(*waves(4, 0)), torch.zeros(1, 2), torch.ones(1, dtype=torch.int64))
    for frame in (0, 1 + int(tracks.lengths[0])):
        with pytest.raises(IndexError):
            tracks.at(np.array([0]), frame)


# ---- what is drawn


def some_spans(seed, count=40, frames=12):
    rng = np.random.default_rng(seed)
    first = rng.integers(0, frames, count)
    return Spans(frames, first, np.minimum(first + rng.integers(0, 6, count), frames - 1))


def anchor_by_hand(first, last, frames, anchor, count):
    """PiCo §3.3, track by track."""
    votes = dict.fromkeys(range(frames), 0)
    for s, e in zip(first.tolist(), last.tolist(), strict=True):
        if s < e and s <= anchor <= e:
            votes[s if anchor - s > e - anchor else e] += 1
    ranked = sorted((f for f in votes if votes[f]), key=lambda f: (-votes[f], -abs(f - anchor), f))
    return [anchor, *ranked[: count - 1]]


@pytest.mark.parametrize("count", [2, 3, 6])
def test_anchor_sampling_is_brute_force(count):
    anchors = set()
    for seed, draw in itertools.product(range(4), range(30)):
        spans = some_spans(seed)
        chosen = anchor_frames(key_of(seed, draw), spans, count)
        assert chosen == anchor_by_hand(spans.first, spans.last, 12, chosen[0], count)
        anchors.add((seed, chosen[0]))
        assert all(spans.on(chosen[0], frame).any() for frame in chosen[1:])
    active = {
        (seed, f)
        for seed in range(4)
        for f in range(12)
        if any(
            s < e and s <= f <= e for s, e in zip(some_spans(seed).first, some_spans(seed).last, strict=True)
        )
    }
    assert anchors <= active
    assert len(anchors) > 0.7 * len(active)


def test_anchors_are_uniform_among_frames_with_an_active_track():
    spans = Spans(10, np.array([2, 2, 7, 0]), np.array([4, 3, 8, 0]))  # the last one never moves
    assert spans.active.tolist() == [0, 0, 2, 2, 1, 0, 0, 1, 1, 0]
    drawn = [anchor_frames(key_of(9, i), spans)[0] for i in range(2000)]
    counts = np.bincount(drawn, minlength=10)
    assert set(np.flatnonzero(counts)) == {2, 3, 4, 7, 8}
    assert np.abs(counts[[2, 3, 4, 7, 8]] - 400).max() < 4 * math.sqrt(2000 * 0.2 * 0.8)


def test_nothing_active_is_refused():
    spans = Spans(5, np.array([1, 4]), np.array([1, 4]))
    with pytest.raises(ValueError, match="no track is active"):
        anchor_frames(key_of(0), spans)
    with pytest.raises(ValueError, match="two frames"):
        anchor_frames(key_of(0), some_spans(0), 1)


def test_random_frames_are_different_and_uniform():
    spans = some_spans(0, frames=6)
    drawn = np.array([random_frames(key_of(1, i), spans) for i in range(3000)])
    assert (drawn[:, 0] != drawn[:, 1]).all()
    counts = np.bincount(drawn[:, 0] * 6 + drawn[:, 1], minlength=36).reshape(6, 6)
    assert np.abs(counts[~np.eye(6, dtype=bool)] - 100).max() < 4.5 * math.sqrt(100)
    with pytest.raises(ValueError, match="7 frames cannot be drawn of 6"):
        random_frames(key_of(0), spans, 7)


def made_tracks():
    both = flows(*(x.astype(np.float32) for x in waves(8, 11, noise=0.2)))
    return follow(*both, *starts(key_of(12), 150, 8), 0.05)


def test_pairs_are_the_tracks_alive_on_both_frames():
    tracks = made_tracks()
    spans = alive(tracks, 0.3)
    frames = anchor_frames(key_of(1), spans, 3)
    pairs = pairs_of(tracks, spans, frames, key_of(2))
    expected = []
    for other, frame in enumerate(frames[1:], 1):
        for row in range(len(tracks)):
            s, e = int(spans.first[row]), int(spans.last[row])
            if s < e and s <= frames[0] <= e and s <= frame <= e:
                low = int(tracks.offsets[row]) - s
                ends = [tracks.places[low + f] / 32767 for f in (frames[0], frame)]
                expected.append((other, row, *ends))
    assert len(pairs) == len(expected) > 10
    assert pairs.other.tolist() == [e[0] for e in expected]
    assert pairs.track.tolist() == [e[1] for e in expected]
    np.testing.assert_allclose(pairs.first, np.array([e[2] for e in expected]), atol=1e-6)
    np.testing.assert_allclose(pairs.second, np.array([e[3] for e in expected]), atol=1e-6)


def test_zero_flow_has_the_same_anchor_points_and_no_motion():
    tracks = made_tracks()
    spans = alive(tracks, 0.3)
    frames = anchor_frames(key_of(1), spans)
    moving = pairs_of(tracks, spans, frames, key_of(2), cap=9)
    still = pairs_of(tracks, spans, frames, key_of(2), cap=9, still=True)
    assert torch.equal(still.first, moving.first)
    assert torch.equal(still.second, still.first)
    assert not torch.equal(moving.second, moving.first)


def test_too_many_pairs_are_a_uniform_subset():
    tracks = made_tracks()
    spans = alive(tracks, 0.3)
    frames = anchor_frames(key_of(1), spans)
    every = pairs_of(tracks, spans, frames, key_of(0)).track.tolist()
    drawn = [pairs_of(tracks, spans, frames, key_of(3, i), cap=5).track.tolist() for i in range(600)]
    assert all(len(set(d)) == 5 and d == sorted(d) and set(d) <= set(every) for d in drawn)
    share = 5 / len(every)
    counts = np.array([sum(row in d for d in drawn) for row in every])
    assert np.abs(counts - 600 * share).max() < 4.5 * math.sqrt(600 * share * (1 - share))
    assert subsample(key_of(0), 4, None).tolist() == subsample(key_of(0), 4, 4).tolist() == [0, 1, 2, 3]


def test_frames_without_a_common_track_give_no_pairs():
    tracks = Tracks(
        frames=4,
        size=SIZE,
        gamma=0.0,
        limit=1.0,
        first=np.array([0, 2], np.int32),
        offsets=np.array([0, 2, 4]),
        places=np.zeros((4, 2), np.int16),
        consistency=np.array([-np.inf, 0, -np.inf, 0], np.float16),
    )
    assert len(pairs_of(tracks, alive(tracks), [0, 3], key_of(0), cap=3)) == 0

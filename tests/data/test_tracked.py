"""Frames and points drawn from tracks: streets by exact flow, from tracing to batches; what is refused."""

import math
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch

from poodle_lightning.data.sampling import PairSampler
from poodle_lightning.data.streets import StreetSet, SyntheticSource
from poodle_lightning.data.synthetic import Street
from poodle_lightning.data.tracked import TrackedFrames, Untracked, into_window
from poodle_lightning.data.tracks import TrackStore, track_name, video_print
from poodle_lightning.data.video import VideoDataModule
from poodle_lightning.data.windows import WindowRule
from poodle_lightning.flow.given import Given
from poodle_lightning.methods.trace import Trace
from poodle_lightning.ops.random import key_of
from poodle_lightning.ops.tracks import Tracks, alive
from poodle_lightning.types import UserError

H, W, VIDEOS = 48, 96, 4
SCALE = torch.tensor([W / 2, H / 2], dtype=torch.float64)
STREETS = StreetSet(VIDEOS, 1.0, (H, W), supersample=1, seed=5)


def module(folder, streets=STREETS, **changes):
    """Whole frames of generated streets, two per clip; no exact flow in the batches."""
    drawn = {key: changes.pop(key) for key in list(changes) if key in TrackedFrames.__dataclass_fields__}
    settings = {
        "source": "synthetic", "synthetic": streets, "size": (H, W), "whole": True, "batch_size": 2,
        "num_workers": 0, "val_fraction": 0.0, "seed": 3, "exact": False,
        "sampler": TrackedFrames(str(folder), **{"points": 40, **drawn}),
    }  # fmt: skip
    return VideoDataModule(**(settings | changes))


def trace(data, folder, **settings):
    """What ``poodle-lightning predict`` and ``trace --config`` do."""
    data.setup("predict")
    tracer = Trace(Given(), str(folder), **{"points": 300, **settings})
    for footage in data.predict_dataloader():
        tracer.video(footage)
    return tracer


def batches(data, stage="fit"):
    data.setup(stage)
    return list(data.train_dataloader())


def video_of(data, clip, row):
    return data.train_entries[int(clip.index[row]) % len(data.train_entries)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("tracks")
    trace(module(place), place)
    return place


@pytest.fixture(scope="module")
def plain(folder):
    """Batches of pairs chosen by anchors."""
    return batches(module(folder))


def errors(data, frame=1):
    """Pixels between the second points and where exact flow takes the first ones, and how far that is.

    Of the pixels around a point the one that fits best: at a border the nearest may be of another surface.
    """
    found = []
    for clip in batches(data):
        for row in range(len(clip)):
            street = Street(int(video_of(data, clip, row).path.split("-")[1]), (H, W))
            flow, seen = street.flow(*clip.times[row][[0, frame]].tolist())
            pairs = clip.points[row][:, [0, frame]]
            for p, q in pairs[pairs.isfinite().all(dim=(1, 2))].double():
                at = ((p + 1) * SCALE - 0.5).numpy()
                way = ((q - p) * SCALE).numpy()
                j, i = np.mgrid[-1:2, -1:2] + np.round(at[::-1]).astype(int)[:, None, None]
                j, i = j.clip(0, H - 1), i.clip(0, W - 1)
                if seen[j, i].all():
                    off = np.linalg.norm(way[:, None, None] - flow[:, j, i], axis=0)
                    found.append((off.min(), np.linalg.norm(flow[:, j[1, 1], i[1, 1]])))
    return np.array(found).T


@pytest.mark.parametrize("changes", [{}, {"by": "random"}, {"frames": 3}])
def test_points_are_where_exact_flow_takes_them(folder, changes):
    """Over up to 1 s. Near a border each of up to 10 steps may be wrong by √δ = 0.7 px unnoticed."""
    data = module(folder, repeats=2, **changes)
    for frame in range(1, data.sampler.frames):
        error, moved = errors(data, frame)
        assert len(error) > 30
        assert moved.max() > 5
        assert np.median(error) < 0.05
        assert np.quantile(error, 0.95) < 0.7
        assert error.max() < 7  # measured 3.6


def test_points_that_stand_still_are_wrong_by_the_motion(folder, plain):
    """Static (Video): the same frames and first points as with tracks, and no motion between them."""
    error, moved = errors(module(folder, motion="still"))
    assert np.median(error) > 0.5 * np.median(moved) > 0.3
    for one, other in zip(plain, batches(module(folder, motion="still")), strict=True):
        assert torch.equal(one.times, other.times)
        torch.testing.assert_close(one.points[:, :, 0], other.points[:, :, 0], equal_nan=True)
        torch.testing.assert_close(other.points[:, :, 0], other.points[:, :, 1], equal_nan=True)


def test_random_frames_are_others_than_anchors_frames(folder, plain):
    anchored = torch.cat([clip.times for clip in plain])
    random = torch.cat([clip.times for clip in batches(module(folder, by="random"))])
    assert not torch.equal(anchored, random)
    assert (random[:, 0] != random[:, 1]).all()


# ---- shapes, keys, workers
def test_rows_fill_up_with_nan_and_too_many_are_drawn_from(folder):
    many, few = module(folder, points=500), module(folder, points=8)
    for all_of, some in zip(batches(many), batches(few), strict=True):
        assert all_of.points.shape == (2, 500, 2, 2)
        assert some.points.shape == (2, 8, 2, 2)
        assert torch.equal(all_of.times, some.times)
        for row in range(2):
            there = all_of.points[row].isfinite().all(dim=(1, 2))
            count = int(there.sum())
            assert 8 < count < 300
            assert there[:count].all()  # pairs first
            assert all_of.points[row, count:].isnan().all()
            assert some.points[row].isfinite().all()
            pool = {tuple(pair.flatten().tolist()) for pair in all_of.points[row, :count]}
            assert {tuple(pair.flatten().tolist()) for pair in some.points[row]} <= pool


def test_what_is_drawn_follows_from_the_key(folder):
    store, sampler = TrackStore(folder), TrackedFrames(str(folder), points=8)
    name = next(track_name(entry, None) for entry in SyntheticSource(STREETS).entries)
    prints = video_print(SyntheticSource(STREETS), SyntheticSource(STREETS).entries[0])
    draws = [sampler.draw(name, prints, key_of(seed)) for seed in (1, 1, 2, 3, 4)]
    assert store.path(name).is_file()
    assert draws[0][0] == draws[1][0]
    assert torch.equal(draws[0][1], draws[1][1])
    assert len({tuple(times) for times, _ in draws}) > 2


def test_the_number_of_workers_changes_nothing(folder, plain):
    for one, other in zip(plain, batches(module(folder, num_workers=2)), strict=True):
        assert torch.equal(one.frames, other.frames)
        torch.testing.assert_close(one.points, other.points, equal_nan=True)


def test_frames_show_what_the_points_name(plain):
    """Colours of the two places of a pair agree, as they do not with another pair's."""
    same, apart = [], []
    for clip in plain:
        images = clip.unit()
        for row in range(len(clip)):
            pairs = clip.points[row][clip.points[row].isfinite().all(dim=(1, 2))]
            first, second = (
                torch.nn.functional.grid_sample(
                    images[row, t, None], pairs[None, None, :, t], padding_mode="border", align_corners=False
                )[0, :, 0]
                for t in (0, 1)
            )
            same.append((first - second).abs().mean(dim=0))
            apart.append((first - second.roll(1, dims=1)).abs().mean(dim=0))
    assert torch.cat(same).median() < 0.3 * torch.cat(apart).median()


# ---- windows
def test_points_in_a_window_by_hand():
    rule = WindowRule((20, 30), area=(0.2, 0.6))
    for seed in range(5):
        window = rule.draw(W, H, key_of(seed))
        x0, y0, x1, y1 = window.inner
        points = torch.rand(50, 2, 2, generator=torch.Generator().manual_seed(seed)) * 2 - 1
        points[3] = math.nan
        found, kept = into_window(points, window, W, H), 0
        for (x, y), (u, v) in zip(points.reshape(-1, 2).tolist(), found.reshape(-1, 2).tolist(), strict=True):
            px, py = (x + 1) / 2 * W, (y + 1) / 2 * H
            if x0 < px < x1 and y0 < py < y1:
                kept += 1
                assert x0 + (u + 1) / 2 * (x1 - x0) == pytest.approx(px, abs=1e-3)
                assert y0 + (v + 1) / 2 * (y1 - y0) == pytest.approx(py, abs=1e-3)
            else:
                assert [math.isnan(u), math.isnan(v)] == [True, True]
        assert 5 < kept < 95


def test_a_batch_of_windows_has_the_points_that_they_show(folder, plain):
    """The same draws as of whole frames, which are squeezed to any size without moving a point."""
    whole = batches(module(folder, size=(24, 60)))
    assert torch.equal(whole[0].aspect, torch.tensor([2.0, 2.0]))
    cut = batches(module(folder, whole=False, area=(0.3, 0.6), size=(24, 48)))
    rule, lost = WindowRule((24, 48), area=(0.3, 0.6)), 0
    for one, other, native in zip(whole, cut, plain, strict=True):
        torch.testing.assert_close(one.points, native.points, equal_nan=True)
        for row in range(2):
            window = rule.draw(W, H, other.key[row])
            wanted = into_window(one.points[row], window, W, H)
            torch.testing.assert_close(other.points[row], wanted, equal_nan=True)
            lost += int((wanted.isnan() & one.points[row].isfinite()).any(dim=2).sum())
    assert lost > 10


# ---- the stretches that are tracked, and those that train
@pytest.mark.parametrize(
    "changes",
    [{"val_fraction": 0.3}, {"clip_seconds": 0.5, "val_fraction": 0.3}, {"hours": 2.1 / 3600}],
    ids=str,
)
def test_whatever_divides_the_data_tracks_have_the_names_that_training_asks_for(tmp_path, changes):
    """Traced by a data module that draws pairs and holds out nothing, trained on with another."""
    other = {"val_fraction": 0.0, "sampler": PairSampler((0.2, 0.4))}
    other |= {} if "clip_seconds" in changes else {"start_every": 0.1}
    trace(module(tmp_path, **{**changes, **other}), tmp_path, points=60)
    data = module(tmp_path, **changes)
    data.setup("fit")
    assert all(not clip.skipped for clip in data.train_dataloader())
    if "val_fraction" in changes:
        clips = list(data.val_dataloader())
        assert all(not clip.skipped for clip in clips)
        held = {entry.path for entry in data.val_entries}
        assert held.isdisjoint(entry.path for entry in data.train_entries)
        assert clips[0].points.isfinite().any()


def test_a_single_video_is_held_out_in_time_and_both_parts_draw_from_its_tracks(tmp_path):
    one = replace(STREETS, videos=1, seconds=2.0)
    trace(module(tmp_path, one), tmp_path)
    data = module(tmp_path, one, val_fraction=0.35, repeats=8)
    data.setup("fit")
    train = torch.cat([clip.times for clip in data.train_dataloader()])
    val = torch.cat([clip.times for clip in data.val_dataloader()])
    assert (train.max() < 1.3, train.min() < 0.4) == (True, True)
    assert val.min() >= 1.3
    assert all(clip.points.isfinite().all(dim=(2, 3)).any() for clip in data.val_dataloader())
    random = module(tmp_path, one, val_fraction=0.35, by="random")
    random.setup("fit")
    assert torch.cat([clip.times for clip in random.val_dataloader()]).min() >= 1.3


def test_stretches_of_a_single_video_are_held_out_whole(tmp_path):
    one = replace(STREETS, videos=1, seconds=2.0)
    trace(module(tmp_path, one, clip_seconds=0.5), tmp_path)
    data = module(tmp_path, one, clip_seconds=0.5, val_fraction=0.25)
    data.setup("fit")
    assert [len(data.train_entries), len(data.val_entries)] == [3, 1]
    assert all(not clip.skipped for clip in (*data.train_dataloader(), *data.val_dataloader()))


def test_predicting_and_then_training_with_one_module(tmp_path):
    data = module(tmp_path, val_fraction=0.3)
    trace(data, tmp_path, points=60)
    assert (len(data.train_entries), len(data.val_entries)) == (4, 0)
    data.setup("fit")
    assert (len(data.train_entries), len(data.val_entries)) == (3, 1)


# ---- bad input
def one_line(data, match):
    with pytest.raises(UserError, match=match) as told:
        data.setup("fit")
    assert "\n" not in str(told.value)


def test_a_folder_without_tracks_names_the_command(tmp_path):
    one_line(module(tmp_path), r"has tracks of none of the 4 videos: .* poodle-lightning trace")


@pytest.mark.parametrize("workers", [0, 2])
def test_delta_above_the_limit_is_told_before_any_worker_starts(folder, workers):
    data = module(folder, delta=9.0, num_workers=workers)
    one_line(data, r"delta = 9 is above the limit 8 .* poodle-lightning trace --limit 9")


def test_tracks_of_another_estimator_or_gamma_are_refused(folder):
    one_line(module(folder, estimator="DIS medium"), "were made with exact, not DIS medium")
    one_line(module(folder, gamma=0.02), r"were made with gamma = 0\.01, not 0\.02")
    module(folder, gamma=0.01, estimator="exact").setup("fit")


def test_tracks_of_a_video_that_was_changed_are_refused(folder):
    other = replace(STREETS, difficulty="hard")
    one_line(module(folder, other), "was changed after it was tracked")


def reasons(data):
    data.setup("fit")
    return {skip.reason for clip in data.train_dataloader() for skip in clip.skipped}


def spoilt(folder, how):
    """Spoil the tracks of the last video."""
    entry = SyntheticSource(STREETS).entries[-1]
    store, name = TrackStore(folder, "exact"), track_name(entry, None)
    how(store, name, video_print(SyntheticSource(STREETS), entry))


def flip(store, name, _):
    path = store.path(name)
    content = bytearray(path.read_bytes())
    content[-5] ^= 255
    path.write_bytes(content)


def cut(store, name, _):
    path = store.path(name)
    path.write_bytes(path.read_bytes()[:-9])


def of_another(store, name, prints):
    tracked = store.get(name, prints)
    store.put(name, "1" * 32, tracked.tracks, tracked.times)


def still(store, name, prints):
    nothing = np.zeros(1, np.int32)
    tracks = Tracks(
        11, (H, W), 0.01, 8.0, nothing, np.arange(2), np.zeros((1, 2), np.int16), -np.ones(1, np.float16)
    )
    store.put(name, prints, tracks, np.arange(11) / 10)


def lower(store, name, prints):
    tracked = store.get(name, prints)
    store.put(name, prints, replace(tracked.tracks, limit=0.1), np.array(tracked.times))


def removed(store, name, _):
    store.path(name).unlink()


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        (flip, "damaged_tracks"),
        (cut, "damaged_tracks"),
        (of_another, "tracks_of_another"),
        (still, "no_active_track"),
        (lower, "tracks_below_delta"),
        (removed, "no_tracks"),
    ],
)
def test_what_is_wrong_with_one_video_is_the_reason_why_it_is_left_out(folder, tmp_path, how, reason):
    shutil.copytree(folder, tmp_path / "tracks")
    spoilt(tmp_path / "tracks", how)
    assert reasons(module(tmp_path / "tracks", repeats=2)) == {reason}


def test_nothing_is_left_out_where_all_is_well(plain):
    assert not [skip for clip in plain for skip in clip.skipped]


def test_more_frames_than_a_video_has_are_too_many(folder):
    source = SyntheticSource(STREETS)
    name, prints = track_name(source.entries[0], None), video_print(source, source.entries[0])
    with pytest.raises(Untracked, match="11 frames, 12 are needed") as told:
        TrackedFrames(str(folder), frames=12).draw(name, prints, key_of(0))
    assert told.value.reason == "too_short"


def test_ways_for_pictures_are_the_tracks_of_a_frame(folder):
    source = SyntheticSource(STREETS)
    name, prints = track_name(source.entries[0], None), video_print(source, source.entries[0])
    tracked = TrackStore(folder).get(name, prints)
    spans = alive(tracked.tracks, 0.5)
    ways = TrackedFrames(str(folder), delta=0.5).ways(name, prints, float(tracked.times[4]))
    rows = np.flatnonzero(spans.on(4))
    assert ways.shape == (len(rows), tracked.tracks.frames, 2)
    for way, row in zip(ways, rows, strict=True):
        known = way.isfinite().all(dim=1).nonzero()[:, 0].tolist()
        assert known == list(range(spans.first[row], spans.last[row] + 1))
        assert np.array_equal(way[4], tracked.tracks.at(np.array([row]), 4)[0])


def test_settings_that_make_no_sense_are_refused(folder):
    with pytest.raises(UserError, match="frames >= 2 by points >= 1, not 1 and 40"):
        module(folder, frames=1)
    with pytest.raises(UserError, match="by is anchor or random and motion tracks or still, not best"):
        module(folder, by="best")
    with pytest.raises(
        UserError, match=r"tracks choose the moments of clips: .*clip_seconds, not start_every"
    ):
        module(folder, start_every=0.5)

"""Tracking videos: against following by hand, exact flow against the truth, resuming, faults, processes."""

import copy
import json
import os
import signal
from itertools import pairwise

import cv2
import lightning as L
import numpy as np
import pytest
import torch
from films import FPS, film, sequential
from lightning.pytorch.utilities.exceptions import SIGTERMException
from side_by_side import two_of, wait_for

from poodle_lightning.configured import build, spec
from poodle_lightning.data.encode import write_video
from poodle_lightning.data.footage import FootageLoader, footage_loader, footage_of
from poodle_lightning.data.sources import FolderSource
from poodle_lightning.data.streets import StreetSet, SyntheticSource
from poodle_lightning.data.synthetic import Street
from poodle_lightning.data.tracks import TrackStore
from poodle_lightning.flow.dis import DIS
from poodle_lightning.flow.given import Given
from poodle_lightning.flow.raft import RAFT
from poodle_lightning.methods.trace import Trace
from poodle_lightning.ops.geometry import extent_to_pixels
from poodle_lightning.ops.random import key_of
from poodle_lightning.ops.tracks import starts
from poodle_lightning.types import UserError

H, W, COUNT = 32, 64, 12


@pytest.fixture(autouse=True)
def own_index(tmp_path, monkeypatch):
    monkeypatch.setenv("POODLE_CACHE", str(tmp_path / "index"))


@pytest.fixture(scope="module")
def films(tmp_path_factory):
    """Two films of a texture that moves 2 px a frame to the left."""
    root = tmp_path_factory.mktemp("films")
    coarse = np.random.default_rng(0).integers(0, 256, (4, 14, 3), dtype=np.uint8)
    wide = cv2.resize(coarse, (14 * 8, H), interpolation=cv2.INTER_CUBIC)
    for name, extra in (("a.mp4", 0), ("b.mp4", 2)):
        frames = (wide[:, 2 * k : 2 * k + W] for k in range(COUNT + extra))
        write_video(root / name, frames, FPS, preset="ultrafast")
    return root


def footage(root, **kwargs):
    source = FolderSource(root)
    return footage_of(source, source.entries, str(root), **kwargs)


def by_hand(frames, estimator, points, first, gamma, limit):
    """Each point alone, in float64: places by frame in pixels, and consistencies."""
    flows = [estimator.pixels(a, b) for a, b in pairwise(frames)]
    height, width = frames[0].shape[:2]

    def at(field, p):
        x, y = np.clip(p[0], 0, width - 1), np.clip(p[1], 0, height - 1)
        i, j = min(int(x), width - 2), min(int(y), height - 2)
        a, b = x - i, y - j
        rows = (1 - b) * field[:, j] + b * field[:, j + 1]
        return (1 - a) * rows[:, i] + a * rows[:, i + 1]

    found = []
    for point, start in zip(points, first, strict=True):
        path, consistency = [point], []
        for there, back in flows[start:]:
            w = at(there.astype(float), path[-1])
            place = path[-1] + w
            again = at(back.astype(float), place)
            d = ((w + again) ** 2).sum() - gamma * ((w**2).sum() + (again**2).sum())
            if not (-0.5 <= place[0] <= width - 0.5 and -0.5 <= place[1] <= height - 0.5 and d < limit):
                break
            path.append(place)
            consistency.append(d)
        found.append((np.array(path), np.array(consistency)))
    return found


def test_tracks_are_those_of_every_point_followed_by_hand(films, tmp_path):
    trace = Trace(DIS("fast"), str(tmp_path), points=60, gamma=0.02, limit=3.0, seed=7)
    one = footage(films)[1]
    count = trace.video(one)
    times, frames, _ = sequential(films / "b.mp4")
    tracked = TrackStore(tmp_path, DIS("fast").fingerprint, 0.02).get(one.name, one.fingerprint())
    np.testing.assert_allclose(tracked.times, times)
    points, first = starts(key_of(7, "tracks", one.name), 60, len(frames))
    points = extent_to_pixels(points.double(), (H, W)).numpy()
    wanted = by_hand(frames, DIS("fast"), points, first.tolist(), 0.02, 3.0)
    tracks, alike = tracked.tracks, 0
    np.testing.assert_array_equal(tracks.first, first)
    for number, (path, consistency) in enumerate(wanted):
        rows = slice(tracks.offsets[number], tracks.offsets[number + 1])
        if tracks.lengths[number] == len(path):  # a border case may fall the other way in float32
            alike += 1
            places = torch.from_numpy(tracks.places[rows] / 32767.0)
            found = extent_to_pixels(places, (H, W)).numpy()
            np.testing.assert_allclose(found, path, atol=0.01)
            np.testing.assert_allclose(tracks.consistency[rows][1:], consistency, atol=0.01)
    assert alike >= 58
    assert (count.videos, count.tracks, count.places) == (1, 60, len(tracks.places))
    assert count.seconds == pytest.approx(times[-1] - times[0])
    assert count.bytes == sum(file.stat().st_size for file in tmp_path.rglob("*.tracks"))


def test_points_move_with_the_texture(films, tmp_path):
    trace = Trace(DIS(), str(tmp_path), points=300)
    tracked = trace.track(footage(films)[0])
    tracks, moves = tracked.tracks, []
    for row in np.flatnonzero(tracks.lengths > 3):
        rows = tracks.at(np.full(2, row), np.array([tracks.first[row], tracks.first[row] + 3]))
        moves.append((rows[1] - rows[0]) * W / 2)
    assert len(moves) > 100
    np.testing.assert_allclose(np.median(moves, 0)[0], -6, atol=0.3)


def test_exact_flow_follows_generated_streets(tmp_path):
    source = SyntheticSource(StreetSet(1, 0.5, (48, 96), seed=2))
    (one,) = footage_of(source, source.entries, None)
    tracked = Trace(Given(), str(tmp_path), points=400).track(one)
    assert tracked.tracks.frames == len(tracked.times) == 6
    street, rows = Street(2, (48, 96)), np.flatnonzero(tracked.tracks.first == 1)
    begin = tracked.tracks.at(rows, 1)
    alive = tracked.tracks.lengths[rows] == 5
    end = tracked.tracks.at(rows[alive], 5)
    pixel = extent_to_pixels(torch.from_numpy(begin[alive]), (48, 96)).numpy()
    field, seen = street.flow(*tracked.times[[1, 5]].tolist())
    node = np.round(pixel).astype(int).clip(0, [95, 47])
    visible = seen[node[:, 1], node[:, 0]]
    truth = pixel + field[:, node[:, 1], node[:, 0]].T
    error = np.linalg.norm(extent_to_pixels(torch.from_numpy(end), (48, 96)).numpy() - truth, axis=1)
    assert visible.sum() > 15
    assert np.median(error[visible]) < 0.2  # the flow is read at the nearest pixel here
    moved = np.linalg.norm(truth - pixel, axis=1)
    assert np.median(moved[visible]) > 1


def test_raft_and_dis_leave_files_of_their_own_and_smaller_frames_too(films, tmp_path):
    torch.manual_seed(0)
    raft = RAFT("small", None, 1)
    trace = Trace(raft, str(tmp_path / "raft"), points=20)
    one = footage(films)[0]
    assert trace.video(one).tracks == 20
    tracked = trace.store.get(one.name, one.fingerprint())
    other = Trace(RAFT("small", None, 1, pairs_at_once=2), str(tmp_path / "other"), points=20)
    other.flow.net.module.load_state_dict(raft.net.module.state_dict())
    again = other.track(one)  # other batches
    np.testing.assert_array_equal(again.tracks.first, tracked.tracks.first)
    small = Trace(DIS(), str(tmp_path / "raft"), points=20, short_side=16)
    assert small.store.estimator.endswith(", frames of 16 px")
    with pytest.raises(
        UserError, match=r"were made with RAFT small.*choose the same settings or another folder"
    ):
        small.video(one)
    assert small.track(one).tracks.size == (16, 32)
    assert Trace(DIS(), "x", every=3).store.estimator == f"{DIS().fingerprint}, one frame of 3"


def test_the_same_tracks_however_many_threads(films, tmp_path):
    found = []
    for workers in (0, 3):
        one = footage(films)[0]
        one.workers = workers
        found.append(Trace(DIS("fast"), str(tmp_path), points=50).track(one).tracks)
    np.testing.assert_array_equal(found[0].places, found[1].places)
    np.testing.assert_array_equal(found[0].consistency, found[1].consistency)


def predict(trace, root, rank=0, world=1, entries=None):
    source = FolderSource(root)
    trainer = L.Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    loader = footage_loader(source, entries or source.entries, rank, world, 0, str(root))
    return trainer.predict(trace, dataloaders=loader)


def test_predict_writes_a_file_per_video_and_goes_on(films, tmp_path, monkeypatch):
    trace = Trace(DIS("fast"), str(tmp_path), points=30)
    sizes = predict(trace, films)
    files = {file.stat().st_size for file in tmp_path.rglob("*.tracks")}
    assert set(sizes) == files
    assert (trace.total.videos, trace.total.kept) == (2, 0)
    with monkeypatch.context() as patch:
        patch.setattr(DIS, "pixels", lambda *_: pytest.fail("computed again"))
        assert predict(Trace(DIS("fast"), str(tmp_path), points=30), films) == [0, 0]
    more = Trace(DIS("fast"), str(tmp_path), points=31)
    predict(more, films)
    assert (more.total.videos, more.total.kept) == (2, 0)


class Terminated(L.Callback):
    """Asks to stop when the second video begins, as a queue does whose time is over."""

    def on_predict_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0):
        if batch_idx == 1:
            os.kill(os.getpid(), signal.SIGTERM)


def test_a_termination_ends_it_within_a_video(films, tmp_path):
    trace, videos = Trace(DIS("fast"), str(tmp_path / "tracks"), points=40), FootageLoader(footage(films))
    quiet = {"logger": False, "enable_progress_bar": False, "default_root_dir": str(tmp_path)}
    trainer = L.Trainer(accelerator="cpu", devices=1, callbacks=[Terminated()], **quiet)
    with pytest.raises(SIGTERMException):
        trainer.predict(trace, videos)
    assert len(list((tmp_path / "tracks").rglob("*.tracks"))) == 1
    assert not list((tmp_path / "tracks").rglob("*.part"))


def test_shares_of_two_processes_are_all_and_equal_to_one(films, tmp_path):
    for rank in (0, 1):
        predict(Trace(DIS("fast"), str(tmp_path / "two"), points=30), films, rank, 2)
    predict(Trace(DIS("fast"), str(tmp_path / "one"), points=30), films)
    one = {file.name: file.read_bytes() for file in (tmp_path / "one").rglob("*.tracks")}
    assert one == {file.name: file.read_bytes() for file in (tmp_path / "two").rglob("*.tracks")}
    assert len(one) == 2


def test_a_process_without_a_video_still_takes_part_in_the_count(films, tmp_path):
    (tmp_path / "films").mkdir()
    (tmp_path / "films" / "a.mp4").write_bytes((films / "a.mp4").read_bytes())
    wait_for(two_of("two_traces.py", tmp_path))
    both = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1)]
    assert sorted(one["videos"] for one in both) == [0, 1]
    assert "1 videos tracked" in both[0]["said"][-1]
    assert len(list((tmp_path / "out").rglob("*.tracks"))) == 1


def test_a_video_that_changed_is_tracked_again(films, tmp_path):
    root = tmp_path / "videos"
    root.mkdir()
    (root / "x.mp4").write_bytes((films / "a.mp4").read_bytes())
    trace = Trace(DIS("fast"), str(tmp_path / "out"), points=10)
    predict(trace, root)
    (root / "x.mp4").write_bytes((films / "b.mp4").read_bytes())
    predict(trace, root)
    assert trace.total.videos == 1


def test_bad_videos_are_left_out_and_written_down(films, tmp_path):
    root = tmp_path / "videos"
    root.mkdir()
    for name in ("a.mp4", "b.mp4"):
        (root / name).write_bytes((films / name).read_bytes())
    write_video(root / "one.mp4", film(1), FPS)
    trace = Trace(DIS("fast"), str(tmp_path / "out"), points=10)
    with pytest.warns(UserWarning, match="videos left out: 1 too_short"):
        predict(trace, root)
    assert trace.total.videos == 2
    line = json.loads((tmp_path / "out" / "skipped.jsonl").read_text())
    assert (line["video"], line["reason"]) == ("one.mp4#0-0", "too_short")


def test_it_is_an_error_when_most_fail(tmp_path):
    root = tmp_path / "videos"
    root.mkdir()
    for name in ("one.mp4", "two.mp4"):
        write_video(root / name, film(1), FPS)
    write_video(root / "tiny.mp4", [np.zeros((8, 10, 3), np.uint8)] * 3, FPS)
    with (
        pytest.warns(UserWarning, match="left out"),
        pytest.raises(UserError, match=r"3 of 3 videos could not be tracked \(2 too_short, 1 too_small\)"),
    ):
        predict(Trace(DIS("fast"), str(tmp_path / "out")), root)


def test_a_video_that_is_gone_is_left_out(films, tmp_path):
    root = tmp_path / "videos"
    root.mkdir()
    (root / "x.mp4").write_bytes((films / "a.mp4").read_bytes())
    (one,) = footage(root)
    (root / "x.mp4").unlink()
    assert Trace(DIS("fast"), str(tmp_path / "out")).video(one).skipped == {"missing": 1}


def test_films_have_no_exact_flow(films, tmp_path):
    with pytest.raises(UserError, match="only generated videos"):
        Trace(Given(), str(tmp_path)).video(footage(films)[0])


def test_a_disk_that_refuses_ends_it(films, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        Trace(DIS("fast"), str(tmp_path / "file"), points=2).video(footage(films)[0])


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ({"points": 0}, "points 0"),
        ({"every": 0}, "every 0"),
        ({"gamma": -0.1}, "gamma -0.1"),
        ({"gamma": float("nan")}, "gamma nan"),
        ({"limit": -1.0}, "limit -1 must be above 0"),
        ({"limit": float("nan")}, "limit nan"),
        ({"short_side": 8}, "short_side 8"),
    ],
)
def test_settings_out_of_range(setting, said):
    with pytest.raises(UserError, match=said):
        Trace(DIS(), "x", **setting)


def test_exact_flow_is_not_of_reduced_frames():
    with pytest.raises(UserError, match="leave out short_side"):
        Trace(Given(), "x", short_side=64)


def test_it_is_rebuilt_from_plain_data():
    made = build(spec(Trace(DIS("fast"), "tracks", limit=2.0)))
    assert (made.flow.preset, made.limit, made.trains) == ("fast", 2.0, False)
    assert copy.deepcopy(made).folder == made.folder

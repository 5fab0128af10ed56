"""``poodle-lightning flow``: what it stores is the estimator's flow of the fixed pairs; it resumes."""

import re
import threading
import time
import types

import cv2
import numpy as np
import pytest
import torch
from flow_runs import numbers, parse, run
from torchvision.models.optical_flow import raft_small

from poodle_lightning.commands import flow as command
from poodle_lightning.commands._estimators import devices_of
from poodle_lightning.commands._flow_work import Closed, OnDevices
from poodle_lightning.data import flow_delta
from poodle_lightning.data.cached_flow import FixedPairs, video_of
from poodle_lightning.data.decode import VideoReader, probe
from poodle_lightning.data.encode import write_video
from poodle_lightning.data.flow_cache import FlowCache
from poodle_lightning.data.sampling import PairSampler
from poodle_lightning.data.shares import Share
from poodle_lightning.data.sources import Entry, FolderSource
from poodle_lightning.data.split import segments
from poodle_lightning.flow.dis import DIS
from poodle_lightning.flow.raft import RAFT
from poodle_lightning.types import UserError

FPS, FRAMES, HEIGHT, WIDTH = 10, 21, 48, 64


@pytest.fixture(autouse=True)
def own_index(tmp_path, monkeypatch):
    for launcher in ("RANK WORLD_SIZE LOCAL_RANK", "SLURM_PROCID SLURM_STEP_NUM_TASKS SLURM_LOCALID"):
        for name in launcher.split():
            monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("POODLE_CACHE", str(tmp_path / "index"))


@pytest.fixture(scope="module")
def films(tmp_path_factory):
    """Two films of a texture that moves 2 px a frame."""
    root = tmp_path_factory.mktemp("films")
    coarse = np.random.default_rng(0).integers(0, 256, (4, 10, 3), dtype=np.uint8)
    wide = cv2.resize(coarse, (10 * 12, HEIGHT), interpolation=cv2.INTER_CUBIC)  # smooth
    for name, extra in (("a.mp4", 0), ("b.mp4", 3)):
        frames = (wide[:, 2 * k : 2 * k + WIDTH] for k in range(FRAMES + extra))
        write_video(root / name, frames, FPS, preset="ultrafast")
    return root


def test_stores_the_estimators_flow_of_the_fixed_pairs_both_ways(films, tmp_path, capsys):
    assert run(films, tmp_path / "out") == 0
    out = capsys.readouterr().out
    assert numbers(out) == (6, 0)
    found = re.search(
        r"[\d.]+ pairs/s, [\d.]+ s of video/s, [\d.]+ MB, \d+ KB a pair, ([\d.]+) MB per h", out
    )
    cache = FlowCache(tmp_path / "out", DIS("fast").fingerprint)
    sampler = FixedPairs(gap=(0.2, 0.4), fixed=3)
    size = seconds = 0.0
    for path in (films / "a.mp4", films / "b.mp4"):
        seconds += probe(path).duration
        for pair in sampler.pairs(probe(path).duration):
            with VideoReader(path) as reader:
                frames, _ = reader.read(pair)
            size += len(flow_delta.encode(DIS("fast").pixels(*frames), 2))
            stored = cache.get(video_of(str(path)), *pair, size=(HEIGHT, WIDTH))
            np.testing.assert_array_equal(stored, cache.rounded(DIS("fast").pixels(*frames)))
            assert np.median(stored[0, 0]) < -2  # at least 2 frames, each 2 px to the left
            assert np.median(stored[1, 0]) > 2
    assert float(found[1]) == pytest.approx(size / 1e6 / (seconds / 3600), abs=0.051)


def test_goes_on_where_it_was(films, tmp_path, capsys, monkeypatch):
    out = tmp_path / "out"
    run(films, out)
    files = sorted(out.rglob("*.flow"))
    contents = [file.read_bytes() for file in files]
    capsys.readouterr()

    with monkeypatch.context() as patch:
        patch.setattr(DIS, "pixels", lambda *_: pytest.fail("computed again"))
        assert run(films, out) == 0
    assert numbers(capsys.readouterr().out) == (0, 6)

    files[0].write_bytes(contents[0][:-10])  # the last pair of a file is torn
    run(films, out)
    assert numbers(capsys.readouterr().out) == (1, 5)
    cache = FlowCache(out, DIS("fast").fingerprint)
    for path in (films / "a.mp4", films / "b.mp4"):
        pairs = FixedPairs(gap=(0.2, 0.4), fixed=3).pairs(probe(path).duration)
        assert cache.lacking(video_of(str(path)), pairs) == []

    run(films, out, "--pairs-per-video", 5)  # more of them: the first 3 stay
    assert numbers(capsys.readouterr().out) == (4, 6)
    run(films, out, "--preset", "medium")  # another estimator: nothing can stay
    assert numbers(capsys.readouterr().out) == (6, 0)


def test_reports_bytes_as_they_are_on_disk(films, tmp_path, capsys):
    run(films, tmp_path / "out")
    said = float(re.search(r"([\d.]+) MB", capsys.readouterr().out)[1]) * 1e6
    there = sum(file.stat().st_size for file in (tmp_path / "out").rglob("*.flow"))
    assert abs(there - said) < 0.06e6 + 2 * 1000  # 0.1 MB steps, and two headers


def test_raft_from_a_file(films, tmp_path, capsys):
    torch.manual_seed(0)
    torch.save(raft_small(weights=None).state_dict(), tmp_path / "small.pth")
    words = ["--estimator", "raft", "--size", "small", "--iterations", 1]
    out = tmp_path / "out"
    assert run(films, out, *words, "--weights", tmp_path / "small.pth", "--pairs-per-video", 1) == 0
    assert numbers(capsys.readouterr().out) == (2, 0)
    with pytest.raises(UserError, match=r"nowhere\.pth"):
        run(films, out, *words, "--weights", "nowhere.pth")


# ---- several devices
@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "small.pth"
    torch.save(raft_small(weights=None).state_dict(), path)
    return path


@pytest.fixture
def batches(monkeypatch, devices):
    """Which network computed how many pairs at once; the first batches wait until two more pairs do."""
    seen, pixels_of, submit = [], RAFT.pixels_of, OnDevices.submit
    handed_over, enough = [], threading.Event()

    def counted(self, frames):
        future = submit(self, frames)
        handed_over.append(future)
        if len(handed_over) >= devices + 2:
            enough.set()
        return future

    def watched(self, pairs):
        assert enough.wait(60)
        seen.append((id(self), len(pairs)))
        return pixels_of(self, pairs)

    monkeypatch.setattr(OnDevices, "submit", counted)
    monkeypatch.setattr(RAFT, "pixels_of", watched)
    return seen


def raft_words(weights):
    return ["--estimator", "raft", "--size", "small", "--iterations", 1, "--weights", weights]


@pytest.mark.parametrize("devices", [1, 2])
def test_raft_in_batches_on_several_devices_stores_what_one_pair_at_a_time_gives(
    films, tmp_path, capsys, weights, batches, devices
):
    out, words = tmp_path / "out", raft_words(weights)
    assert run(films, out, *words, "--devices", devices, "--batch", 2, "--workers", 2) == 0
    assert numbers(capsys.readouterr().out) == (6, 0)
    assert sum(count for _, count in batches) == 6
    assert max(count for _, count in batches) <= 2
    assert len(batches) < 6
    assert len({network for network, _ in batches}) <= devices
    raft = RAFT("small", str(weights), 1)
    cache = FlowCache(out, raft.fingerprint)
    for path in (films / "a.mp4", films / "b.mp4"):
        for pair in FixedPairs(gap=(0.2, 0.4), fixed=3).pairs(probe(path).duration):
            with VideoReader(path) as reader:
                frames, _ = reader.read(pair)
            stored = cache.get(video_of(str(path)), *pair)
            # one rounding apart at most, as batches add up in another order
            assert np.abs(stored - cache.rounded(raft.pixels(*frames))).max() <= 1 / 4


class Slow:
    """Gives back the frames' first value; its first batch waits until all networks have one."""

    def __init__(self, barrier):
        self.barrier, self.sizes = barrier, []

    def pixels_of(self, pairs):
        if not self.sizes:
            self.barrier.wait(60)
        self.sizes.append([pair.shape[1:3] for pair in pairs])
        return np.stack([np.full((2, 2, *pair.shape[1:3]), pair.flat[0], np.float32) for pair in pairs])


def test_all_devices_work_at_once_and_a_batch_has_one_size():
    barrier = threading.Barrier(2)
    rafts = [Slow(barrier), Slow(barrier)]
    pool = OnDevices(rafts, batch=3)
    shapes = [(8, 8)] * 6 + [(8, 16)] * 6
    futures = [pool.submit(np.full((2, *shape, 3), number, np.uint8)) for number, shape in enumerate(shapes)]
    flows = [future.result(60) for future in futures]
    pool.close()
    assert [flow.shape[2:] for flow in flows] == shapes
    assert [flow.flat[0] for flow in flows] == list(range(12))
    batches = [batch for raft in rafts for batch in raft.sizes]
    assert all(len(set(batch)) == 1 and len(batch) <= 3 for batch in batches)
    assert all(raft.sizes for raft in rafts)
    with pytest.raises(Closed):
        pool.submit(np.zeros((2, 8, 8, 3), np.uint8))


def test_every_device_has_a_network_of_its_own(films, tmp_path, monkeypatch, weights):
    given = []
    monkeypatch.setattr(
        command, "OnDevices", lambda rafts, *rest: given.extend(rafts) or OnDevices(rafts, *rest)
    )
    run(films, tmp_path / "out", *raft_words(weights), "--devices", 2)
    places = [{value.data_ptr() for value in raft.net.module.parameters()} for raft in given]
    assert len(places) == 2
    assert not places[0] & places[1]


def test_closing_ends_the_threads_that_wait():
    before = set(threading.enumerate())
    pool = OnDevices([Slow(None), Slow(None)])
    started = set(threading.enumerate()) - before
    time.sleep(0.1)  # they wait now
    pool.close()
    for thread in started:
        thread.join(60)
    assert len(started) == 2
    assert not any(thread.is_alive() for thread in started)


def test_the_batch_fits_the_frames():
    pool = OnDevices([])
    assert [pool.pairs_at_once(size) for size in ((512, 1024), (256, 512), (1080, 1920))] == [8, 32, 1]
    assert OnDevices([], batch=5).pairs_at_once((1080, 1920)) == 5
    # each thread has so much handed over that every device has a batch in work and one waiting
    for devices, threads in ((1, 1), (8, 16), (2, 64)):
        pool = OnDevices([Slow(None)] * devices, threads=threads)
        assert pool.ahead * threads >= 2 * 8 * devices
        pool.close()


def test_a_full_device_names_the_remedy(films, tmp_path, monkeypatch, weights):
    def full(self, pairs):
        raise torch.OutOfMemoryError("none left")

    monkeypatch.setattr(RAFT, "pixels_of", full)
    with pytest.raises(UserError, match=r"too large for the device: (give --batch|take smaller)"):
        run(films, tmp_path / "out", *raft_words(weights))


def test_devices_have_names(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    by_rank, alone = Share(7, 8, "RANK and WORLD_SIZE"), Share()
    assert devices_of("cuda", 3, alone) == ["cuda:0", "cuda:1", "cuda:2"]
    assert devices_of("cpu", 2, alone) == ["cpu", "cpu"]
    monkeypatch.setenv("LOCAL_RANK", "6")
    assert devices_of("cuda", 1, alone) == ["cuda"]
    assert devices_of("cuda", 1, by_rank) == ["cuda:2"]
    assert devices_of("cuda:1", 1, by_rank) == ["cuda:1"]
    with pytest.raises(UserError, match="give its kind"):
        devices_of("cuda:1", 2, alone)


# ---- several processes
def test_shares_compute_each_video_once_and_together_all(films, tmp_path, capsys):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run(films, whole)
    capsys.readouterr()
    for number in (1, 2, 3):
        assert run(films, parts, "--shard", f"{number}/3") == 0
        said = capsys.readouterr()
        assert numbers(said.out) == ((3, 0) if number < 3 else (0, 0))  # two videos, the third has nothing
        assert f"share {number} of 3" in said.out
        assert f"share {number} of 3 (by --shard): {1 if number < 3 else 0} of 2 videos" in said.err
    contents = [
        {file.relative_to(folder): file.read_bytes() for file in folder.rglob("*.flow")}
        for folder in (whole, parts)
    ]
    assert contents[0] == contents[1]


def test_a_launcher_tells_the_share_and_the_flag_overrules_it(films, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("SLURM_PROCID", "1")
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "2")
    run(films, tmp_path / "out")
    assert (
        "share 2 of 2 (by SLURM_PROCID and SLURM_STEP_NUM_TASKS; --shard 1/1 does all)"
        in capsys.readouterr().err
    )
    run(films, tmp_path / "out", "--shard", "1/1")
    said = capsys.readouterr()
    assert numbers(said.out) == (3, 3)
    assert "share" not in said.err + said.out
    with pytest.raises(UserError, match="i/n"):
        run(films, tmp_path / "out", "--shard", "3/2")


def test_all_stretches_of_a_video_are_in_one_share():
    entries = [Entry(n % 3, f"{n % 3}.mp4", float(n), n + 1.0, 8, 8) for n in range(12)]
    chosen = [command._share(Share(number, 2, "--shard"), entries, 5) for number in (1, 2)]
    assert sorted(path for videos in chosen for path in videos) == ["0.mp4", "1.mp4", "2.mp4"]
    for videos in chosen:
        for path, stretches in videos.items():
            assert stretches == [entry for entry in entries if entry.path == path]


def test_jpeg_is_a_form_of_the_same_cache(films, tmp_path, capsys):
    out = tmp_path / "out"
    run(films, out, "--form", "jpeg", "--quality", 80)
    run(films, out)  # it is there, in whatever form
    assert numbers(capsys.readouterr().out.splitlines()[-1]) == (0, 6)
    path = str(films / "a.mp4")
    pair = FixedPairs(gap=(0.2, 0.4), fixed=3).pairs(probe(path).duration)[0]
    with VideoReader(path) as reader:
        frames, _ = reader.read(pair)
    jpeg = FlowCache(out, DIS("fast").fingerprint, form="jpeg", quality=80)
    expected = jpeg.rounded(DIS("fast").pixels(*frames))
    np.testing.assert_array_equal(FlowCache(out).get(video_of(path), *pair), expected)
    with pytest.raises(UserError, match="quality"):
        run(films, out, "--form", "jpeg", "--quality", 0)


# ---- from a configuration
def data_of(films, sampler):
    """As much of a data module as the command uses."""
    source = FolderSource(films)

    def setup(stage):
        assert stage == "fit"
        data.train_entries = segments(source.entries[:1], 1.0, sampler.span)
        data.val_entries = source.entries[1:]

    data = types.SimpleNamespace(sampler=sampler, source=source, setup=setup)
    return data


def test_takes_videos_and_pairs_from_a_configuration(films, tmp_path, capsys):
    sampler = FixedPairs(gap=(0.2, 0.3), fixed=2, seed=9)
    data, asked = data_of(films, sampler), []

    def build(configs, overrides):
        asked.append((configs, overrides))
        return object(), data

    args = parse("--config", "some.yaml", "--out", tmp_path / "out", "--preset", "fast")
    assert command.run(args, build) == 0
    assert asked == [(["some.yaml"], [])]
    assert numbers(capsys.readouterr().out) == (6, 0)  # two stretches of the first film, and the second
    cache = FlowCache(tmp_path / "out", DIS("fast").fingerprint)
    for entry in (*data.train_entries, *data.val_entries):
        pairs = [(entry.start + a, entry.start + b) for a, b in sampler.pairs(entry.duration)]
        assert cache.lacking(video_of(entry.path), pairs) == []


def test_a_configuration_with_fresh_pairs_is_refused(films, tmp_path):
    data = data_of(films, PairSampler(gap=(0.2, 0.3)))
    with pytest.raises(UserError, match="FixedPairs"):
        command.run(parse("--config", "a.yaml", "--out", tmp_path / "out"), lambda *_: (object(), data))

"""``poodle-lightning flow``: what it stores is the estimator's flow of the fixed pairs; it resumes."""

import argparse
import re
import types

import cv2
import numpy as np
import pytest
import torch
from torchvision.models.optical_flow import raft_small

from poodle_lightning.commands import flow as command
from poodle_lightning.data.cached_flow import FixedPairs, video_of
from poodle_lightning.data.decode import VideoReader, probe
from poodle_lightning.data.encode import write_video
from poodle_lightning.data.flow_cache import FlowCache
from poodle_lightning.data.sampling import PairSampler
from poodle_lightning.data.sources import FolderSource
from poodle_lightning.data.split import segments
from poodle_lightning.flow.dis import DIS
from poodle_lightning.types import UserError

FPS, FRAMES, HEIGHT, WIDTH = 10, 21, 48, 64


@pytest.fixture(autouse=True)
def own_index(tmp_path, monkeypatch):
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


def parse(*words):
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return parser.parse_args([str(word) for word in words])


def no_build(configs, overrides):
    raise AssertionError("not asked for")


def run(films, out, *words, build=no_build):
    args = ("--root", films, "--out", out, "--preset", "fast", "--gap", 0.2, 0.4, "--pairs-per-video", 3)
    return command.run(parse(*args, *words), build)


def numbers(text):
    """Pairs computed, pairs that were there."""
    found = re.search(r"(\d+) pairs computed .* (\d+) were there", text)
    return int(found[1]), int(found[2])


def test_stores_the_estimators_flow_of_the_fixed_pairs_both_ways(films, tmp_path, capsys):
    assert run(films, tmp_path / "out") == 0
    out = capsys.readouterr().out
    assert numbers(out) == (6, 0)
    assert re.search(r"[\d.]+ pairs/s, [\d.]+ MB, \d+ KB a pair", out)
    cache = FlowCache(tmp_path / "out", DIS("fast").fingerprint)
    sampler = FixedPairs(gap=(0.2, 0.4), fixed=3)
    for path in (films / "a.mp4", films / "b.mp4"):
        for pair in sampler.pairs(probe(path).duration):
            with VideoReader(path) as reader:
                frames, _ = reader.read(pair)
            stored = cache.get(video_of(str(path)), *pair, size=(HEIGHT, WIDTH))
            np.testing.assert_array_equal(stored, cache.rounded(DIS("fast").pixels(*frames)))
            assert np.median(stored[0, 0]) < -2  # at least 2 frames, each 2 px to the left
            assert np.median(stored[1, 0]) > 2


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


def test_damaged_and_short_videos_are_counted_and_the_rest_is_done(films, tmp_path, capsys):
    root = tmp_path / "mixed"
    root.mkdir()
    (root / "whole.mp4").write_bytes((films / "a.mp4").read_bytes())
    write_video(root / "short.mp4", [np.zeros((HEIGHT, WIDTH, 3), np.uint8)] * 2, FPS)
    write_video(root / "tiny.mp4", [np.zeros((8, 10, 3), np.uint8)] * FRAMES, FPS)
    (root / "text.mp4").write_text("no film")
    assert run(root, tmp_path / "out") == 0
    said = capsys.readouterr()
    assert numbers(said.out) == (3, 0)
    assert "3 too_short" in said.err
    assert "3 too_small" in said.err


def test_a_file_that_breaks_while_reading_leaves_its_pair_out(films, tmp_path, capsys, monkeypatch):
    from poodle_lightning.data.info import DecodeError

    read, broken = (
        VideoReader.read,
        FixedPairs(gap=(0.2, 0.4), fixed=3).pairs(probe(films / "a.mp4").duration)[0],
    )

    def failing(self, times, box=None):
        if tuple(times) == broken:
            raise DecodeError("corrupt", "made so")
        return read(self, times, box)

    monkeypatch.setattr(VideoReader, "read", failing)
    assert run(films, tmp_path / "out") == 0
    said = capsys.readouterr()
    assert numbers(said.out) == (5, 0)
    assert "1 corrupt" in said.err


def test_nothing_usable_is_an_error(films, tmp_path):
    with pytest.raises(UserError, match=r"no pair of frames could be used .*6 too_short"):
        run(films, tmp_path / "out", "--gap", 30)


def test_a_cache_that_cannot_be_written_ends_it(films, tmp_path):
    (tmp_path / "file").write_text("")
    with (
        pytest.warns(RuntimeWarning, match="cannot be"),
        pytest.raises(UserError, match="cannot be written: make room"),
    ):
        run(films, tmp_path / "file" / "out", "--workers", 1)


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


def test_wrong_flags_are_refused(films, tmp_path):
    for words in (["--out", tmp_path], ["--root", films, "--config", "a.yaml", "--out", tmp_path]):
        with pytest.raises(UserError, match="either --root"):
            command.run(parse(*words), no_build)
    with pytest.raises(UserError, match="gap"):
        run(films, tmp_path, "--gap", 0.5, 0.2)
    with pytest.raises(UserError, match="preset"):
        run(films, tmp_path, "--preset", "slow")

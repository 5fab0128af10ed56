"""``poodle-lightning trace``: files as the module itself makes them, shares, going on, one-line errors."""

import argparse
import re
import threading
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
from torchvision.models.optical_flow import raft_small

from poodle_lightning.cli import main
from poodle_lightning.commands import trace as command
from poodle_lightning.data.encode import write_video
from poodle_lightning.data.footage import Halted, footage_of
from poodle_lightning.data.sources import FolderSource
from poodle_lightning.data.streets import StreetSet
from poodle_lightning.data.tracks import TrackStore
from poodle_lightning.data.video import VideoDataModule
from poodle_lightning.flow.dis import DIS
from poodle_lightning.methods.trace import Trace
from poodle_lightning.types import UserError

FPS, HEIGHT, WIDTH = 10, 32, 64


@pytest.fixture(autouse=True)
def own_index(tmp_path, monkeypatch):
    for launcher in ("RANK WORLD_SIZE LOCAL_RANK", "SLURM_PROCID SLURM_STEP_NUM_TASKS SLURM_LOCALID"):
        for name in launcher.split():
            monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("POODLE_CACHE", str(tmp_path / "index"))


@pytest.fixture(scope="module")
def films(tmp_path_factory):
    """Three films of a texture that moves 2 px a frame."""
    root = tmp_path_factory.mktemp("films")
    (root / "class").mkdir()
    coarse = np.random.default_rng(0).integers(0, 256, (4, 14, 3), dtype=np.uint8)
    wide = cv2.resize(coarse, (14 * 8, HEIGHT), interpolation=cv2.INTER_CUBIC)
    for name, count in (("a.mp4", 11), ("b.mp4", 13), ("class/c.mp4", 12)):
        frames = (wide[:, 2 * k : 2 * k + WIDTH] for k in range(count))
        write_video(root / name, frames, FPS, preset="ultrafast")
    return root


def no_build(configs, overrides):
    raise AssertionError("not asked for")


def parse(*words):
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return parser.parse_args([str(word) for word in words])


def run(films, out, *words, build=no_build):
    root = () if films is None else ("--root", films)
    words = (*root, "--out", out, "--preset", "fast", "--points", 40, *words)
    return command.run(parse(*words), build)


def numbers(text):
    """Videos tracked, videos that were there, tracks."""
    found = re.search(r"(\d+) videos tracked in .* s, (\d+) were there(?:; (\d+) tracks)?", text)
    return int(found[1]), int(found[2]), int(found[3] or 0)


def contents(folder):
    return {file.name: file.read_bytes() for file in folder.rglob("*.tracks")}


def test_files_are_those_of_the_module_and_the_line_adds_up(films, tmp_path, capsys):
    assert run(films, tmp_path / "verb", "--workers", 3, "--seed", 5) == 0
    said = capsys.readouterr().out
    assert numbers(said) == (3, 0, 120)
    trace, source = Trace(DIS("fast"), str(tmp_path / "own"), points=40, seed=5), FolderSource(films)
    places = seconds = 0.0
    for one in footage_of(source, source.entries, str(films)):
        count = trace.video(one)
        places, seconds = places + count.places, seconds + count.seconds
    assert contents(tmp_path / "verb") == contents(tmp_path / "own")
    assert seconds == pytest.approx(3.3)
    rate, speed, size = (
        float(re.search(pattern, said)[1])
        for pattern in (
            r"(\d+) points\*frames/s",
            r"([\d.]+) s of video/s",
            r"([\d.]+) MB per hour",
        )
    )
    there = sum(map(len, contents(tmp_path / "verb").values()))
    assert size == pytest.approx(there / 1e6 / (seconds / 3600), abs=0.06)
    assert rate / speed == pytest.approx(places / seconds, rel=0.05)


def test_goes_on_where_it_was(films, tmp_path, capsys, monkeypatch):
    run(films, tmp_path)
    capsys.readouterr()
    torn = sorted(tmp_path.rglob("*.tracks"))[1]
    whole = contents(tmp_path)
    torn.write_bytes(whole[torn.name][:-7])
    run(films, tmp_path)
    assert numbers(capsys.readouterr().out) == (1, 2, 40)
    assert contents(tmp_path) == whole
    monkeypatch.setattr(DIS, "pixels", lambda *_: pytest.fail("computed again"))
    run(films, tmp_path, "--limit", 2)
    assert numbers(capsys.readouterr().out) == (0, 3, 0)


def test_shares_make_what_one_process_makes(films, tmp_path, capsys, monkeypatch):
    run(films, tmp_path / "all")
    run(films, tmp_path / "parts", "--shard", "1/2")
    assert re.search(r"share 1 of 2 \(by --shard\): \d of 3 videos", capsys.readouterr().err)
    assert len(contents(tmp_path / "parts")) in (1, 2)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    run(films, tmp_path / "parts")
    assert contents(tmp_path / "parts") == contents(tmp_path / "all")


def test_long_videos_are_cut_into_stretches(films, tmp_path, capsys):
    run(films, tmp_path, "--clip-seconds", 0.5)
    assert numbers(capsys.readouterr().out)[0] == 6
    store = TrackStore(tmp_path)
    part = store.get("class/c.mp4#500-1100", FolderSource(films)._videos[2].fingerprint)
    np.testing.assert_allclose(part.times, np.arange(5, 12) / FPS)


def test_one_film(films, tmp_path, capsys):
    run(films / "a.mp4", tmp_path)
    assert numbers(capsys.readouterr().out) == (1, 0, 40)
    store = TrackStore(tmp_path)
    assert store.path("a.mp4#0-1000").is_file()


def test_raft_from_a_file_on_two_devices(films, tmp_path, capsys):
    torch.manual_seed(0)
    torch.save(raft_small(weights=None).state_dict(), tmp_path / "small.pth")
    words = ["--estimator", "raft", "--size", "small", "--iterations", 1, "--weights", tmp_path / "small.pth"]
    run(films, tmp_path / "one", *words, "--batch", 2)
    run(films, tmp_path / "two", *words, "--batch", 2, "--devices", 2, "--workers", 2)
    assert numbers(capsys.readouterr().out) == (3, 0, 120)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


# ---- configurations
def of(data):
    return lambda *_: (None, data)


def test_a_configurations_videos_held_out_ones_too(films, tmp_path, capsys):
    args = parse("--config", "x", "--out", tmp_path / "config", "--preset", "fast", "--points", 40)
    data = VideoDataModule("folder", str(films), gap=(0.2, 0.3), seed=3, val_fraction=0.34, num_workers=0)
    assert command.run(args, of(data)) == 0
    assert len(data.train_entries) == 3  # none is held out of what is tracked
    assert numbers(capsys.readouterr().out) == (3, 0, 120)
    run(films, tmp_path / "flags", "--seed", 3)
    assert contents(tmp_path / "config") == contents(tmp_path / "flags")


def test_exact_flow_of_generated_streets(tmp_path, capsys):
    data = VideoDataModule("synthetic", synthetic=StreetSet(2, 0.4, (32, 64)), gap=(0.1, 0.2))
    words = ["--config", "x", "--out", tmp_path / "out", "--points", 30]
    assert command.run(parse(*words, "--exact"), of(data)) == 0
    assert numbers(capsys.readouterr().out) == (2, 0, 60)
    with pytest.raises(UserError, match=r"street-\d#0-400 in .* were made with exact, not DIS"):
        command.run(parse(*words), of(data))


def test_a_configuration_without_videos(tmp_path):
    args = parse("--config", "x", "--out", tmp_path)
    with pytest.raises(UserError, match="has no videos to follow points through"):
        command.run(args, of(SimpleNamespace()))


# ---- faults
@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--limit", "-1"], "--limit -1: give the largest delta, above 0, or inf"),
        (["--limit", "nan"], "--limit nan"),
        (["--gamma", "-0.5"], "--gamma -0.5"),
        (["--gamma", "inf"], "--gamma inf"),
        (["--points", "0"], "--points must be at least 1"),
        (["--every", "0"], "--every must be at least 1"),
        (["--short-side", "4"], "--short-side 4: give at least 16 px"),
        (["--clip-seconds", "0"], "--clip-seconds 0: give a length above 0"),
        (["--shard", "3/2"], "--shard 3/2"),
        (["--device", "cuda"], "are for RAFT"),
        (["--config", "x.yaml"], "either --root DIR or --config FILE"),
        (["--exact"], "only generated videos"),
    ],
)
def test_one_line_says_what_to_mend(films, tmp_path, words, said):
    with pytest.raises(UserError) as caught:
        run(films, tmp_path / "out", *words)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_no_root(tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        run(tmp_path / "nowhere", tmp_path / "out")
    with pytest.raises(UserError, match="either --root"):
        run(None, tmp_path / "out")


def test_tracks_made_otherwise_are_not_written_over(films, tmp_path):
    run(films, tmp_path)
    before = contents(tmp_path)
    for words in (["--preset", "medium"], ["--short-side", 16], ["--gamma", 0.1], ["--every", 2]):
        with pytest.raises(UserError, match="were made with"):
            run(films, tmp_path, *words)
    assert contents(tmp_path) == before


def test_bad_videos_are_left_out_and_all_bad_is_an_error(films, tmp_path, capsys):
    root = tmp_path / "mixed"
    root.mkdir()
    write_video(root / "one.mp4", [np.zeros((HEIGHT, WIDTH, 3), np.uint8)], FPS)
    with pytest.raises(UserError, match="1 of 1 videos could not be tracked"):
        run(root, tmp_path / "out")
    capsys.readouterr()
    for name in ("a.mp4", "b.mp4"):
        (root / name).write_bytes((films / name).read_bytes())
    (root / "torn.mp4").write_bytes((films / "a.mp4").read_bytes()[:200])
    assert run(root, tmp_path / "out") == 0
    said = capsys.readouterr()
    assert numbers(said.out) == (2, 0, 80)
    assert "videos left out: 1 too_short; see" in said.err
    assert "files left out: 1 truncated; see" in said.err
    assert "torn.mp4" in (tmp_path / "out" / "skipped.jsonl").read_text()
    assert run(root, tmp_path / "out", "--shard", "2/2") == 0
    assert "files left out" not in capsys.readouterr().err  # the first share says it


def test_an_interruption_ends_running_videos_and_leaves_no_part(films, tmp_path):
    source, halt = FolderSource(films), threading.Event()
    videos = footage_of(source, source.entries, str(films), halt=halt)
    ended, busy = [], threading.Event()

    class Waiting:
        def video(self, footage):
            if footage is videos[0]:
                assert busy.wait(60)
                raise KeyboardInterrupt
            busy.set()
            halt.wait(60)
            try:
                Trace(DIS("fast"), str(tmp_path), points=5).video(footage)
            except Halted:
                ended.append(footage)
                raise

    with pytest.raises(KeyboardInterrupt):
        command.track_all([Waiting()] * 2, videos, halt)
    assert ended == videos[1:2]
    assert not list(tmp_path.rglob("*.tracks"))


def test_an_unknown_option_is_not_passed_over(films, tmp_path, capfd):
    """What goes to a configuration means nothing for a folder."""
    for verb in ("trace", "flow"):
        words = [verb, "--root", str(films), "--out", str(tmp_path / verb), "--gama", "0.1"]
        assert main(words) == 2
        assert f"{verb}: --gama is no option of --root" in capfd.readouterr().err
        assert not (tmp_path / verb).exists()


def test_the_command_line_knows_the_verb(films, tmp_path, capsys):
    words = ["trace", "--root", str(films), "--out", str(tmp_path / "out"), "--points", "5"]
    assert main([*words, "--preset", "fast"]) == 0
    assert numbers(capsys.readouterr().out) == (3, 0, 15)
    assert main([*words, "--limit", "0"]) == 2
    assert "--limit 0: give the largest delta" in capsys.readouterr().err

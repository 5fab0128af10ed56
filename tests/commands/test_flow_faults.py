"""``poodle-lightning flow`` where something is wrong: videos, the disk, flags, an interruption."""

import threading
import warnings

import numpy as np
import pytest
from flow_runs import no_build, numbers, parse, run

from poodle_lightning.cli import main
from poodle_lightning.commands import flow as command
from poodle_lightning.commands._flow_work import AtOnce, Work
from poodle_lightning.data.cached_flow import CachedFlow, FixedPairs, video_of
from poodle_lightning.data.decode import VideoReader, probe
from poodle_lightning.data.encode import write_video
from poodle_lightning.data.flow_cache import FlowCache
from poodle_lightning.data.info import DecodeError
from poodle_lightning.data.shares import Share
from poodle_lightning.data.sources import FolderSource
from poodle_lightning.flow.dis import DIS
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
    """Two films of noise."""
    root = tmp_path_factory.mktemp("films")
    for seed, name in enumerate(("a.mp4", "b.mp4")):
        frames = np.random.default_rng(seed).integers(0, 256, (FRAMES + seed, HEIGHT, WIDTH, 3), np.uint8)
        write_video(root / name, frames, FPS, preset="ultrafast")
    return root


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
    assert "files left out: 1 not_a_video; the first is" in said.err


def test_a_file_that_breaks_while_reading_leaves_its_pair_out(films, tmp_path, capsys, monkeypatch):
    read = VideoReader.read
    broken = FixedPairs(gap=(0.2, 0.4), fixed=3).pairs(probe(films / "a.mp4").duration)[0]

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


def test_flow_that_cannot_be_stored_is_counted_as_left_out(films, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(DIS, "pixels", lambda self, a, b: np.full((2, 2, *a.shape[:2]), np.nan, np.float32))
    with (
        pytest.warns(RuntimeWarning, match="not finite"),
        pytest.raises(UserError, match=r"no pair of frames could be used \(6 not_storable\)"),
    ):
        run(films, tmp_path / "out", "--workers", 1)


def test_a_video_that_cannot_be_opened_is_not_called_small(films, tmp_path, capsys, monkeypatch):
    opened = FolderSource.open

    def failing(self, entry):
        if entry.path.endswith("a.mp4"):
            raise UserError("made so")
        return opened(self, entry)

    monkeypatch.setattr(FolderSource, "open", failing)
    assert run(films, tmp_path / "out") == 0
    assert "pairs left out: 3 unreadable" in capsys.readouterr().err


class Interrupted:
    """A source whose first film is open when the second one is interrupted, as by Ctrl-C."""

    def __init__(self, source, busy):
        self.source, self.busy = source, busy

    def open(self, entry):
        if entry.path.endswith("b.mp4"):
            assert self.busy.wait(60)
            raise KeyboardInterrupt
        return self.source.open(entry)


class Patient:
    """Flow that takes until there is no more to do."""

    def __init__(self):
        self.busy, self.closed, self.calls = threading.Event(), threading.Event(), 0

    def pixels(self, first, second):
        self.calls += 1
        self.busy.set()
        assert self.closed.wait(60)
        return np.zeros((2, 2, *first.shape[:2]), np.float32)


def test_an_interruption_ends_running_videos_after_the_pair_in_work(films, tmp_path, monkeypatch):
    patient, close = Patient(), AtOnce.close
    monkeypatch.setattr(AtOnce, "close", lambda self: (close(self), patient.closed.set()))
    source = FolderSource(films)
    videos = {entry.path: [entry] * 3 for entry in source.entries}
    sampler, cache = FixedPairs(gap=(0.2, 0.4), fixed=3), FlowCache(tmp_path / "out", "patient")
    work = Work(Interrupted(source, patient.busy), sampler, AtOnce(patient), cache)
    with pytest.raises(KeyboardInterrupt):
        command._compute(work, videos, 2, Share())
    assert patient.calls == 1
    (first, _) = source.entries
    pairs = sorted(sampler.pairs(first.duration))
    assert cache.lacking(video_of(first.path), pairs) == pairs[1:]  # what was computed is stored


def test_the_advice_to_run_this_command_is_not_given_by_it(tmp_path):
    def build(configs, overrides):
        CachedFlow(str(tmp_path / "missing"))
        warnings.warn("something else", RuntimeWarning, stacklevel=1)
        return object(), object()

    with pytest.warns(RuntimeWarning) as caught, pytest.raises(UserError, match="FixedPairs"):
        command.run(parse("--config", "a.yaml", "--out", tmp_path / "out"), build)
    assert [str(one.message) for one in caught] == ["something else"]


def test_wrong_flags_are_refused(films, tmp_path):
    for words in (["--out", tmp_path], ["--root", films, "--config", "a.yaml", "--out", tmp_path]):
        with pytest.raises(UserError, match="either --root"):
            command.run(parse(*words), no_build)
    with pytest.raises(UserError, match="gap"):
        run(films, tmp_path, "--gap", 0.5, 0.2)
    with pytest.raises(UserError, match="preset"):
        run(films, tmp_path, "--preset", "slow")
    with pytest.raises(UserError, match="--root nowhere: no such folder"):
        run("nowhere", tmp_path)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--workers", -1], "--workers must be at least 0, not -1"),
        (["--pairs-per-video", 0], "--pairs-per-video must be at least 1, not 0"),
        (["--estimator", "raft", "--iterations", 0], "--iterations must be at least 1, not 0"),
        (["--devices", 0], "--devices must be at least 1, not 0"),
        (["--batch", -1], "--batch must be at least 0, not -1"),
        (["--gap", 0.2, 0.3, 0.4], "--gap takes the shortest and the longest"),
        (["--devices", 2], "are for RAFT"),
        (["--device", "cuda"], "are for RAFT"),
        (["--batch", 4], "are for RAFT"),
        (["--form", "jpeg", "--quality", 101], "--quality goes from 1 to 100, not 101"),
    ],
)
def test_numbers_out_of_range_are_refused_before_anything_is_loaded(
    films, tmp_path, monkeypatch, words, said
):
    monkeypatch.setattr(command, "_what", lambda *_: pytest.fail("videos were looked for"))
    monkeypatch.setattr(command, "_estimators", lambda *_: pytest.fail("an estimator was loaded"))
    with pytest.raises(UserError, match=said) as caught:
        run(films, tmp_path, *words)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("rank", ["abc", "1.5"])
def test_a_rank_that_is_no_number_is_one_line(films, tmp_path, capsys, monkeypatch, rank):
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["flow", "--root", str(films), "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err.strip()
    assert f"RANK={rank} of WORLD_SIZE=2 is no share" in said
    assert "\n" not in said

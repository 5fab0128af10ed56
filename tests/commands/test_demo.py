"""The demo in its smallest size: what it makes, prints and leaves."""

import os

import numpy as np
import pytest
import torch

from poodle_lightning import from_pretrained
from poodle_lightning.cli import main
from poodle_lightning.commands._pretraining import threads_each
from poodle_lightning.data.encode import write_video


@pytest.mark.timeout(280)
def test_generated_streets_end_in_numbers_and_a_report(tmp_path, capsys):
    out = tmp_path / "demo"
    assert main(["demo", "--out", str(out), "--steps", "2", "--count", "4", "--labelled", "4"]) == 0
    said = capsys.readouterr().out
    for row in ("PooDLe", "FlowE", "random, same architecture", "position alone", "led in this run"):
        assert row in said
    assert len(list((out / "videos").glob("*.mp4"))) == 4
    run = next((out / "runs" / "demo_poodle").iterdir())
    page = (run / "report" / "index.html").read_text()
    assert "Linear readout" in page
    assert "Subcrop pairs" in page
    encoder = from_pretrained(run / "checkpoints" / "last.ckpt")
    assert encoder(torch.rand(1, 3, 64, 128)).maps["sdm"].shape == (1, 192, 16, 32)


@pytest.mark.timeout(280)
def test_own_videos_are_trained_on_without_a_readout(tmp_path, capsys):
    folder = tmp_path / "mine"
    folder.mkdir()
    noise = np.random.default_rng(0).integers(0, 255, (30, 50, 3), dtype=np.uint8).repeat(4, 0).repeat(4, 1)
    frames = [noise[2 * i : 2 * i + 80, 3 * i : 3 * i + 120] for i in range(16)]
    for number in range(2):
        write_video(folder / f"{number}.mp4", frames, fps=10.0)
    out = tmp_path / "demo"
    assert main(["demo", "--out", str(out), "--videos", str(folder), "--steps", "2"]) == 0
    said = capsys.readouterr().out
    assert "mIoU" not in said
    assert "report" in said
    run = next((out / "runs" / "demo_poodle").iterdir())
    assert "Linear readout" not in (run / "report" / "index.html").read_text()


def test_missing_videos_are_one_line(tmp_path, capsys):
    assert main(["demo", "--out", str(tmp_path / "demo"), "--videos", str(tmp_path / "none")]) == 2
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "jobs", "expected"),
    [(None, 2, 4), (None, 16, 1), ("1", 2, 1), ("3", 1, 3), ("99", 1, 8), ("0", 2, 4), ("many", 2, 4)],
)
def test_threads_are_the_cores_over_the_runs_unless_the_user_said_less(monkeypatch, given, jobs, expected):
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if given is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", given)
    assert threads_each(jobs) == expected

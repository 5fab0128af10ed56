"""Runs that are cut short, from end to end: what they leave, and that they go on as if they had not been."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import lightning.pytorch  # noqa: F401  # its log handlers keep the stderr of the moment of import
import pytest
import torch
from toy_run import make_configs, rows, run, runs_of, weights

HERE = Path(__file__).parent


@pytest.fixture
def folder(tmp_path, monkeypatch):
    make_configs(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


# ---- accidents
def test_a_loss_that_is_not_finite_stops_before_the_weights_move(folder, capsys):
    assert run("fit", "--model.fail_at", "8", "--model.how", "nan") == 2
    (found,) = runs_of()
    said = capsys.readouterr().err
    assert "step 8: the loss is not finite" in said
    assert "Traceback" not in said
    replay = torch.load(found / "replay_step8_rank0.pt", weights_only=True)
    expected = torch.stack(
        [torch.cos(torch.arange(4.0) * (i + 1)) for i in range(8, 12)]
    )  # batch 2 of epoch 1
    assert replay["step"] == 8
    assert torch.equal(replay["batch"], expected)
    left = torch.load(found / "checkpoints/interrupted.ckpt", weights_only=True)
    assert left["global_step"] == 8
    assert all(value.isfinite().all() for value in left["state_dict"].values())


@pytest.mark.parametrize(("how", "code"), [("SIGTERM", 143), ("SIGINT", 130), ("SIGUSR1", 138), ("raise", 1)])
def test_a_run_that_is_cut_short_goes_on_as_if_it_had_not_been(folder, how, code):
    assert run("fit", "--name", "whole") == 0
    # step 6 is the first of the second epoch; the signal's step is finished, the exception's is not
    at = "5" if code > 1 else "6"
    assert run("fit", "--model.fail_at", at, "--model.how", how) == code
    (found,) = runs_of()
    assert (found / "checkpoints/interrupted.ckpt").is_file()
    assert run("fit", "--ckpt_path", "last", "--model.fail_at", "-1") == 0
    expected = weights(runs_of("whole")[0] / "checkpoints/last.ckpt")
    resumed = weights(found / "checkpoints/last.ckpt")
    assert all(torch.equal(expected[key], resumed[key]) for key in expected)
    losses = [[row["train/loss"] for row in rows(folder)] for folder in (found, runs_of("whole")[0])]
    assert losses[0] == losses[1]


def test_under_accumulation_a_run_stops_between_optimiser_steps(folder):
    """The signal comes in the fifth of six batches, between the halves of the epoch's last step."""
    words = ["--trainer.accumulate_grad_batches", "2"]
    assert run("fit", "--name", "whole", *words) == 0
    assert run("fit", "--model.fail_at", "2", "--model.how", "SIGTERM", *words) == 143
    (found,) = runs_of()
    assert run("fit", "--ckpt_path", "last", "--model.fail_at", "-1", *words) == 0
    expected = weights(runs_of("whole")[0] / "checkpoints/last.ckpt")
    resumed = weights(found / "checkpoints/last.ckpt")
    assert all(torch.equal(expected[key], resumed[key]) for key in expected)


def test_the_signals_are_given_back(folder):
    import signal

    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)]
    assert run("fit", "--model.fail_at", "3", "--model.how", "SIGTERM") == 143
    assert run("fit") == 0
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)] == before


def two_processes(*words):
    fixed = ["fit", "--config", "cfg/experiment/toy.yaml", "--allow", "stand_in", "--trainer.strategy", "ddp"]
    fixed += ["--trainer.devices", "2", "--model.fail_at", "2"]
    environment = {**os.environ, "PYTHONPATH": str(HERE)}
    return subprocess.run(
        [sys.executable, "-m", "poodle_lightning", *fixed, *words],
        capture_output=True, text=True, timeout=120, env=environment, check=False,
    )  # fmt: skip


def test_two_processes_stop_together(folder):
    done = two_processes("--model.how", "nan_on_rank_1")
    assert done.returncode == 2, done.stderr
    assert "not finite" in done.stderr
    (found,) = runs_of()
    assert (found / "replay_step2_rank1.pt").is_file()
    assert torch.load(found / "checkpoints/interrupted.ckpt", weights_only=True)["global_step"] == 2


def test_an_error_of_the_first_process_ends_the_other_without_a_word(folder):
    """The other waits for gradients that do not come: it cannot hear a signal, and has nothing to say."""
    done = two_processes("--model.how", "raise_on_rank_0")
    assert done.returncode == 2, done.stderr
    assert "error: an accident" in done.stderr
    assert "Traceback" not in done.stderr
    (found,) = runs_of()
    assert torch.load(found / "checkpoints/interrupted.ckpt", weights_only=True)["global_step"] == 2

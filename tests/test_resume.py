"""Every method, left in the middle of an epoch and gone on with: the next losses are equal to the bit."""

import csv
from pathlib import Path

import pytest

from poodle_lightning.cli import main

TINY = [
    "--data.source=synthetic",
    "--data.synthetic={videos: 9, seconds: 2.0, size: [48, 96], supersample: 1}",
    *("--data.size=[32, 64]", "--data.gap=[0.2, 0.4]", "--data.area=[0.5, 0.8]", "--data.batch_size=2"),
    *("--model.encoder.init_args.width=8", "--model.hidden=16", "--model.out=8"),
    *("--trainer.accelerator=cpu", "--trainer.log_every_n_steps=1", "--trainer.limit_val_batches=0"),
    *("--checkpoint.every_n_steps=1", "--checkpoint.keep=-1"),
]
OWN = {
    "poodle": [
        "--model.decoder.init_args={channels: [8, 16, 32, 64], dims: 32}",
        *("--model.subcrops.size=[16, 16]", "--model.flow=Given"),
    ],
    "flowe": ["--model.flow=Given"],
    "byol": ["--model.crop.init_args.size=[32, 32]"],
}


def fit(name: str, run: str, steps: int, *words: str) -> Path:
    fixed = [
        f"--model=method/{name}_tiny.yaml",
        *TINY,
        *OWN[name],
        f"--name={run}",
        f"--trainer.max_steps={steps}",
    ]
    assert main(["fit", *fixed, *words]) == 0
    return max(Path("runs", run).iterdir())


def losses(folder: Path) -> dict[int, str]:
    with (folder / "metrics.csv").open() as file:
        return {int(row["step"]): row["train/loss"] for row in csv.DictReader(file) if row["train/loss"]}


@pytest.mark.parametrize(
    ("name", "workers"), [("poodle", 0), ("poodle", 1), ("poodle", 2), ("flowe", 0), ("byol", 0)]
)
def test_next_losses_are_bit_equal(name, workers, tmp_path, monkeypatch):
    """Four batches per epoch; the run is left amid the first epoch, where it ends, and amid the second."""
    monkeypatch.chdir(tmp_path)
    words = [f"--data.num_workers={workers}"]
    whole = fit(name, "whole", 7, *words)
    expected = losses(whole)
    assert sorted(expected) == list(range(7))
    for step in (2, 4, 5):
        (checkpoint,) = (whole / "checkpoints").glob(f"*step*{step}.ckpt")
        resumed = losses(fit(name, f"from_{step}", 7, *words, f"--ckpt_path={checkpoint}"))
        assert {k: v for k, v in resumed.items() if k >= step} == {
            k: v for k, v in expected.items() if k >= step
        }


@pytest.mark.parametrize("steps", [4, 6])
def test_a_longer_run_goes_on_where_the_limit_of_steps_ended_one(steps, tmp_path, monkeypatch):
    """Four batches per epoch: at the end of one, and inside the second."""
    monkeypatch.chdir(tmp_path)
    expected = losses(fit("byol", "whole", 9))
    fit("byol", "short", steps)
    assert losses(fit("byol", "short", 9, "--ckpt_path=last")) == expected

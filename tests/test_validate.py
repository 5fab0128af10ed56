"""``validate`` of a checkpoint finds the loss that training found at its end."""

import csv
from pathlib import Path

import pytest

from poodle_lightning.cli import main

WORDS = [
    "--model=method/dino_tiny.yaml",
    "--name=run",
    "--data.source=synthetic",
    "--data.synthetic={videos: 8, seconds: 2.0, size: [48, 96], supersample: 1}",
    *("--data.size=[32, 64]", "--data.gap=[0.2, 0.4]", "--data.area=[0.5, 0.8]", "--data.batch_size=2"),
    *("--model.teacher_temperature=[0.01, 0.1]", "--model.teacher_warmup_epochs=3"),
    *("--data.num_workers=0", "--data.val_fraction=0.25", "--trainer.accelerator=cpu"),
]


def losses(file: Path) -> list[float]:
    with file.open() as rows:
        return [float(row["val/loss"]) for row in csv.DictReader(rows) if row["val/loss"]]


def test_the_temperature_is_that_of_the_checkpoints_epoch(tmp_path, monkeypatch):
    """The teacher starts sharper than it ends."""
    monkeypatch.chdir(tmp_path)
    assert main(["fit", *WORDS, "--trainer.max_epochs=3"]) == 0
    (run,) = Path("runs/run").iterdir()
    assert main(["validate", *WORDS, "--ckpt_path=last"]) == 0
    found = losses(run / "validate" / "metrics.csv")
    assert found == pytest.approx(losses(run / "metrics.csv")[-1:], rel=1e-6)

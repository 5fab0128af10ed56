"""``evaluate`` from end to end: one command trains a head, scores it, and writes what it found."""

from __future__ import annotations

import json
from pathlib import Path

import cv2
import lightning.pytorch  # noqa: F401  # its log handlers keep the stderr of the moment of import
import numpy as np
import pytest
import torch
from tiny_models import tiny_encoder

from poodle_lightning import cli, save_pretrained

LINEAR = """
# A linear readout, for tests
model:
  class_path: poodle_lightning.evaluation.segmentation.Segmentation
  init_args: {output_stride: 8}
data:
  class_path: poodle_lightning.data.labelled.LabelledDataModule
  init_args: {source: synthetic, batch_size: 2, num_workers: 0, synthetic: {train: 4, val: 3, size: [32, 64]}}
trainer: {accelerator: cpu, devices: 1, max_steps: 3, log_every_n_steps: 1, enable_progress_bar: false}
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("linear.yaml").write_text(LINEAR.lstrip())
    Path("retrieval.yaml").write_text(
        LINEAR.lstrip()
        .replace("segmentation.Segmentation", "retrieval.DenseRetrieval")
        .replace("{output_stride: 8}", "{recipe: {k: 3}}")
    )
    torch.manual_seed(0)
    save_pretrained(tiny_encoder(), "encoder")
    return tmp_path


def evaluate(*words, config="linear.yaml", encoder="encoder"):
    given = [] if encoder is None else ["--encoder", encoder]
    return cli.main(["evaluate", "--config", config, *given, *words])


def runs_of(name):
    return sorted(Path("runs", name).iterdir())


def test_one_command_trains_scores_and_writes(folder, capsys):
    assert evaluate() == 0
    (run,) = runs_of("linear-encoder")
    found = json.loads((run / "result.json").read_text())
    assert found["encoder"] == "encoder"
    assert (found["seed"], found["step"], found["headline"]) == (0, 3, "miou")
    assert found["counts"]["images"] == 3
    assert found["value"] == found["scores"]["miou"]
    assert "| encoder |" in (run / "result.md").read_text()
    assert 0 < len(list((run / "pictures").glob("*.png"))) <= 3
    assert "keys matched" in capsys.readouterr().err
    # the head's checkpoint gives the same scores again
    assert (
        cli.main(["validate", "--config", "linear.yaml", "--encoder", "encoder"]) == 2
    )  # a word of evaluate
    words = ["--model.encoder=encoder", "--ckpt_path", str(run)]
    assert cli.main(["validate", "--config", "linear.yaml", *words]) == 0
    again = json.loads((runs_of("linear")[0] / "result.json").read_text())
    assert again["scores"] == found["scores"]
    assert again["details"]["loss"] == pytest.approx(found["details"]["loss"], rel=1e-6)
    assert cli.main(["report", "--run", str(run)]) == 0
    assert "Evaluation" in (run / "report" / "index.html").read_text()


def test_more_devices_than_held_out_images_are_refused_before_training(folder, capsys):
    words = ("--trainer.devices", "4", "--trainer.strategy", "ddp")
    assert evaluate(*words) == 2
    assert "3 images of the split val for 4 devices: use at most 3 devices" in capsys.readouterr().err
    assert runs_of("linear-encoder") == []


def test_runs_differ_in_their_seed_and_are_averaged(folder, capsys):
    assert evaluate("--runs", "2", "--seed_everything", "5") == 0
    (first,), (second,) = (runs_of(f"linear-encoder_seed{seed}") for seed in (5, 6))
    found = [json.loads((run / "result.json").read_text()) for run in (first, second)]
    assert [one["seed"] for one in found] == [5, 6]
    assert found[0]["details"]["loss"] != found[1]["details"]["loss"]
    summary = json.loads((second / "runs.json").read_text())
    mean = sum(one["scores"]["pixel_accuracy"] for one in found) / 2
    assert summary["mean"]["pixel_accuracy"] == pytest.approx(mean)
    assert "miou of 2 runs" in capsys.readouterr().out
    # called again with "last", every seed goes on from its own run
    assert evaluate("--runs", "2", "--seed_everything", "5", "--ckpt_path", "last") == 0
    assert json.loads((second / "runs.json").read_text()) == summary
    again = [json.loads((run / "result.json").read_text())["details"]["loss"] for run in (first, second)]
    assert again == [one["details"]["loss"] for one in found]


def test_a_run_of_another_encoder_is_not_gone_on_with(folder, capsys):
    torch.manual_seed(1)
    save_pretrained(tiny_encoder(), "other")
    assert evaluate("--name", "same") == 0
    (run,) = runs_of("same")
    before = (run / "result.json").read_text()
    assert evaluate("--name", "same", "--ckpt_path", "last", encoder="other") == 2
    assert "that run measured the encoder encoder, not other" in capsys.readouterr().err
    assert (run / "result.json").read_text() == before
    assert evaluate("--name", "same", "--ckpt_path", "last", encoder="./encoder") == 0


def test_what_trains_nothing_is_scored_at_once(folder):
    assert evaluate(config="retrieval.yaml") == 0
    (run,) = runs_of("retrieval-encoder")
    found = json.loads((run / "result.json").read_text())
    assert found["step"] == 0
    assert 0 <= found["scores"]["miou"] <= 1
    assert not (run / "checkpoints").exists()


def test_going_on_gives_the_same_result_as_one_go(folder):
    assert evaluate("--trainer.max_steps", "2", "--model.recipe.horizon_steps", "3", "--name", "parts") == 0
    assert evaluate("--ckpt_path", "last", "--model.recipe.horizon_steps", "3", "--name", "parts") == 0
    assert evaluate("--model.recipe.horizon_steps", "3", "--name", "whole") == 0
    (parts,), (whole,) = runs_of("parts"), runs_of("whole")
    found = [json.loads((run / "result.json").read_text()) for run in (parts, whole)]
    assert found[0]["scores"] == found[1]["scores"]
    assert found[0]["details"]["loss"] == found[1]["details"]["loss"]


def folder_of_labels(count):
    root = Path("labels")
    for number in range(count):
        for part in ("images", "masks"):
            (root / part).mkdir(parents=True, exist_ok=True)
            cv2.imwrite(str(root / part / f"{number}.png"), np.full((8, 8), number % 2, np.uint8))
    (root / "classes.yaml").write_text("names: [road, sky]\n")
    return root


@pytest.mark.parametrize(
    ("words", "encoder", "message"),
    [
        (["--encodr", "x"], "encoder", "no such option: --encodr: did you mean --encoder?"),
        (["--runs", "0"], "encoder", "--runs 0: give a number of runs"),
        (["--runs"], "encoder", "--runs needs a value"),
        ([], None, "no encoder"),
        ([], "nowhere", "nowhere"),
        (["--model.output_stride", "7"], "encoder", "output_stride"),
        (["--model.classes", "4"], "encoder", "19 classes"),
        (["--data.rooot", "x"], "encoder", "did you mean root"),
    ],
)
def test_mistakes_are_one_line(folder, capsys, words, encoder, message):
    assert evaluate(*words, encoder=encoder) == 2
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert len(said) == 1
    assert message in said[0]


def test_bad_labels_are_refused_before_anything_is_trained(folder, capsys):
    for split in ("train", "val"):
        for part in ("images", "masks"):
            Path("set", part, split).mkdir(parents=True)
        for number in range(2):
            pixels = np.full((32, 64, 3), 40 * number, np.uint8)
            cv2.imwrite(f"set/images/{split}/{number}.png", pixels)
            cv2.imwrite(f"set/masks/{split}/{number}.png", pixels[..., 0] % 2 + number)
    Path("set/classes.yaml").write_text("names: [road, sky]\n")
    words = ["--data.source", "folder", "--data.root", "set", "--data.train.crop", "[32, 64]"]
    assert evaluate(*words) == 0
    mask = np.zeros((32, 64), np.uint8)
    mask[:2, :3] = 7
    cv2.imwrite("set/masks/val/1.png", mask)
    capsys.readouterr()
    assert evaluate(*words) == 2
    said = capsys.readouterr().err
    assert "set/masks/val/1.png" in said
    assert "7" in said
    assert "6 " in said  # how many pixels
    assert len(list(Path("runs/linear-encoder").glob("*/metrics.csv"))) == 1


def test_labelled_data_have_their_own_defaults_not_those_of_videos(folder):
    """A class that takes the place of another in a parser's default inherits the settings of that name."""
    import inspect

    from poodle_lightning import LabelledDataModule

    _, data = cli.build(["evaluation/quick_linear.yaml"], ["--data.root", str(folder_of_labels(5))])
    own = inspect.signature(LabelledDataModule).parameters
    assert data.source.val_fraction == own["val_fraction"].default
    text = Path("linear.yaml").read_text().replace("batch_size: 2, ", "")
    Path("plain.yaml").write_text(text)
    _, data = cli.build(["plain.yaml"])
    assert data.batch_size == own["batch_size"].default


def test_without_a_protocol_or_with_one_for_pretraining_it_says_which_to_give(folder, capsys):
    assert cli.main(["evaluate", "--encoder", "encoder"]) == 2
    assert "evaluate needs a protocol: --config evaluation/NAME.yaml" in capsys.readouterr().err
    words = ["--config", "experiment/quickstart.yaml", "--encoder", "torchvision:resnet18:untrained"]
    assert cli.main(["evaluate", *words, "--data.source", "synthetic"]) == 2
    assert "is for an evaluation: give --config evaluation/NAME.yaml" in capsys.readouterr().err


def test_clustering_needs_no_training_images(folder):
    for part in ("images", "masks"):
        Path("only", part, "val").mkdir(parents=True)
    for number in range(3):
        pixels = np.random.default_rng(number).integers(0, 255, (32, 64, 3), np.uint8)
        cv2.imwrite(f"only/images/val/{number}.png", pixels)
        cv2.imwrite(f"only/masks/val/{number}.png", pixels[..., 0] % 2)
    Path("only/classes.yaml").write_text("names: [road, sky]\n")
    text = Path("retrieval.yaml").read_text().replace("retrieval.DenseRetrieval", "clustering.Clustering")
    recipe = "{recipe: {clusters: 2, components: 4, iterations: 3, restarts: 1, seeds: 1}}"
    Path("clustering.yaml").write_text(text.replace("{recipe: {k: 3}}", recipe))
    words = ["--data.source", "folder", "--data.root", "only"]
    assert evaluate(*words, config="clustering.yaml") == 0
    assert evaluate(*words) == 2  # a head does


def test_a_pretraining_config_is_no_evaluation(folder, capsys):
    words = ["--config", "experiment/quickstart.yaml", "--data.source", "synthetic"]
    assert cli.main(["evaluate", *words]) == 2
    assert "is no evaluation" in capsys.readouterr().err


def test_help_lists_the_protocols(capsys):
    assert cli.main(["evaluate", "--help"]) == 0
    said = capsys.readouterr().out
    assert "--encoder" in said
    assert "evaluation/" in said

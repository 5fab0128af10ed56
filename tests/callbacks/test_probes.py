"""Probes leave training bit-equal, say what the readouts say, and agree on every process."""

import csv
import logging
import math
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import lightning as L
import numpy as np
import probed
import pytest
import torch
from lightning.pytorch.demos.boring_classes import BoringModel
from PIL import Image
from probed import method, run, small, streets
from tiny_models import tiny_encoder, tiny_vit

from poodle_lightning import cli
from poodle_lightning.callbacks.probes import Probes, on_first
from poodle_lightning.data.labelled import LabelledDataModule
from poodle_lightning.evaluation.linear_readout import linear_readout
from poodle_lightning.evaluation.memory import RetrievalRecipe
from poodle_lightning.evaluation.retrieval import dense_retrieval
from poodle_lightning.methods.base import Method
from poodle_lightning.nn.online import Online
from poodle_lightning.types import UserError

HERE = Path(__file__).parents[1]
MEASURES = ("knn_miou", "linear_miou")


def rows(folder, key):
    with (folder / "metrics.csv").open(newline="") as file:
        return {int(row["step"]): float(row[key]) for row in csv.DictReader(file) if row.get(key)}


def test_training_is_bit_equal_with_and_without(tmp_path):
    watched, trainer = run(tmp_path / "a", small(every_n_steps=1))
    drawn = torch.rand(3), np.random.rand(3)  # noqa: NPY002
    alone, other = run(tmp_path / "b")
    assert torch.equal(drawn[0], torch.rand(3))
    assert np.array_equal(drawn[1], np.random.rand(3))  # noqa: NPY002
    for name, value in watched.state_dict().items():
        assert torch.equal(value, alone.state_dict()[name]), name
    for one, two in zip(watched.parameters(), alone.parameters(), strict=True):
        assert (one.grad is None) == (two.grad is None)
        assert one.grad is None or torch.equal(one.grad, two.grad)
    modes = [part.training for part in watched.modules()]
    assert modes == [part.training for part in alone.modules()]
    assert any(modes)
    assert "probe/labels/knn_miou" in trainer.callback_metrics
    assert "probe/labels/knn_miou" not in other.callback_metrics


def test_the_numbers_are_those_of_the_readouts_in_the_row_of_their_step(tmp_path):
    probes = small(every_n_steps=2)
    found, trainer = run(tmp_path, probes, steps=3)
    labels, encoder = streets(), found.backbone()
    train, test = labels.sample("train", 3, (32, 64)), labels.sample("val", 2, (32, 64))
    read = {
        "knn": dense_retrieval(encoder, train, test, labels.classes, probes.retrieval),
        "linear": linear_readout(encoder, train, test, labels.classes, probes.readout),
    }
    for kind, readout in read.items():
        scores = readout.confusion.summary(labels.classes.numbered())
        for name in ("miou", "miou_small", "miou_large", "miou_rare", "miou_common"):
            logged = float(trainer.callback_metrics[f"probe/labels/{kind}_{name}"])
            assert logged == pytest.approx(scores[name], rel=1e-5, nan_ok=True)
        curve = rows(tmp_path, f"probe/labels/{kind}_miou")
        # after step 2, and after the last one; rows are numbered from 0 as Lightning's are
        assert list(curve) == [1, 2]
        best = rows(tmp_path, f"probe/labels/best_{kind}_miou")
        assert best[1] == curve[1]
        assert best[2] == max(curve.values())
        assert probes.best[f"{kind}_miou"] == pytest.approx(best[2], rel=1e-6)
    assert list(rows(tmp_path, "perf/probe_s")) == [1, 2]


def test_a_step_of_several_batches_is_probed_once(tmp_path):
    run(tmp_path, small(kinds=["linear"], every_n_steps=1), steps=2, accumulate=2)
    assert list(rows(tmp_path, "probe/labels/linear_miou")) == [0, 1]
    assert not rows(tmp_path, "probe/labels/linear_miou_small").keys() - {0, 1}
    assert "probe/labels/knn_miou" not in (tmp_path / "metrics.csv").read_text()


def test_a_run_that_ends_early_is_probed_at_its_end(tmp_path):
    class Stop(L.Callback):
        def on_train_batch_end(self, trainer, module, *_):
            trainer.should_stop = trainer.global_step == 2

    run(tmp_path, small(kinds=["linear"], every_n_steps=10), Stop(), steps=6)
    assert list(rows(tmp_path, "probe/labels/linear_miou")) == [1]


def test_the_target_and_a_named_layer_can_be_read(tmp_path):
    online = small(name="online", kinds=["linear"], layer="layer2")
    target = small(name="target", kinds=["linear"], layer="layer2", network="target")
    found, trainer = run(tmp_path, online, target, steps=2)
    labels = streets()
    train, test = labels.sample("train", 3, (32, 64)), labels.sample("val", 2, (32, 64))
    for probes, encoder in ((online, found.backbone()), (target, found.target.module.backbone())):
        read = linear_readout(encoder, train, test, labels.classes, probes.readout, "layer2")
        logged = float(trainer.callback_metrics[f"probe/{probes.name}/linear_miou"])
        assert logged == pytest.approx(read.confusion.miou(), rel=1e-6)
    assert online.state_key != target.state_key


def test_the_best_survives_a_restart():
    first, second = small(), small()
    first.best = {"knn_miou": 0.5}
    second.load_state_dict(first.state_dict())
    assert second.best == {"knn_miou": 0.5}


@pytest.mark.parametrize(
    ("encoder", "size"),
    [(tiny_encoder, (28, 44)), (tiny_vit, (24, 40))],  # a transformer's patches have 8 pixels
)
def test_the_images_are_as_large_as_the_training_crops(encoder, size):
    probes = Probes(streets(), kinds=["linear"])
    trainer = SimpleNamespace(
        is_global_zero=True,
        strategy=SimpleNamespace(broadcast=lambda said: said),
        datamodule=SimpleNamespace(size=(28, 44)),
        callbacks=[probes],
    )
    module = method()
    module.online = Online(encoder())
    probes.setup(trainer, module, "fit")
    (images, labels), (others, _) = probes._sample
    assert (images.shape, labels.shape) == ((4, 3, *size), (4, *size))  # all that there are
    assert len(others) == 3
    probes._try(module.backbone())


@pytest.mark.parametrize(("seconds", "said"), [(5.0, []), (15.0, ["every_n_steps"])])
def test_a_dear_probe_is_told_once(seconds, said, caplog):
    probes = small()
    probes._began = time.perf_counter() - 1000.0
    trainer = SimpleNamespace(is_global_zero=True)
    with caplog.at_level(logging.WARNING):
        for _ in range(10):
            probes._weigh(trainer, seconds)
    assert len(caplog.records) == len(said)
    assert all(word in caplog.text for word in said)


class NoTarget(Method):
    def __init__(self):
        super().__init__()
        self.online = method().online


def folder(root, value=0):
    for split in ("train", "val"):
        for kind, pixels in (("images", np.zeros((8, 8, 3))), ("masks", np.full((8, 8), value))):
            place = root / kind / split
            place.mkdir(parents=True)
            for name in ("a", "b"):
                Image.fromarray(pixels.astype(np.uint8)).save(place / f"{name}.png")
    (root / "classes.yaml").write_text("names: [road, car]\n")
    return LabelledDataModule("folder", str(root))


@pytest.mark.parametrize(
    ("make", "say"),
    [
        (lambda tmp: (small(labels=folder(tmp, 255)), method()), "no pixel"),
        (lambda tmp: (small(layer="layer9"), method()), "no layer 'layer9'.*Probes.layer"),
        (lambda tmp: (small(network="target"), NoTarget()), "no target network"),
        (lambda tmp: (small(retrieval=RetrievalRecipe(k=7)), method()), "6 labelled patches .1×2.* 7 neigh"),
        (lambda tmp: (small(), BoringModel()), "method"),
    ],
)
def test_what_does_not_fit_ends_the_run_before_its_first_step(make, say, tmp_path):
    probes, module = make(tmp_path / "labels")
    with pytest.raises(UserError, match=say) as error:
        run(tmp_path / "run", probes, module=module)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run" / "metrics.csv").exists()


def test_a_folder_that_has_gone_ends_the_run_before_its_first_step(tmp_path):
    labels = folder(tmp_path / "labels")
    for path in (tmp_path / "labels" / "masks" / "val").iterdir():
        path.unlink()
    with pytest.raises(UserError):
        run(tmp_path / "run", small(labels=labels))
    assert not (tmp_path / "run" / "metrics.csv").exists()


def test_the_shipped_patch_takes_ones_own_labels(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    configs = ["--config", "experiment/quickstart.yaml", "--config", "patch/probes.yaml"]
    own = ["--trainer.callbacks.labels.source=folder", "--trainer.callbacks.labels.root=nowhere"]
    assert cli.main(["fit", *configs, "--data.root", str(tmp_path), *own]) == 2
    [line] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert "nowhere" in line
    assert not Path("runs").exists()


def test_two_of_one_name_and_nonsense_are_refused(tmp_path):
    probes, trainer = small(), SimpleNamespace(callbacks=[small()])
    with pytest.raises(UserError, match="different names"):
        probes.setup(trainer, method(), "fit")
    for wrong in ({"every_n_steps": 0}, {"train_images": 0}, {"kinds": []}):
        with pytest.raises(UserError, match="1 or more"):
            small(**wrong)


def test_an_error_of_the_first_process_ends_all():
    said = []

    def trainer(first):
        return SimpleNamespace(is_global_zero=first, strategy=SimpleNamespace(broadcast=exchange))

    def exchange(word):
        said.append(word)
        return said[0]

    def wrong():
        raise ValueError("labels are gone")

    with pytest.raises(ValueError, match="labels are gone"):
        on_first(trainer(True), wrong)
    with pytest.raises(UserError, match="labels are gone"):
        on_first(trainer(False), wrong)
    said.clear()
    assert on_first(trainer(True), lambda: {"a": 1.0}) == {"a": 1.0}
    assert on_first(trainer(False), wrong) == {"a": 1.0}


def test_two_processes_find_what_one_finds(tmp_path):
    probed.main(1, str(tmp_path / "1.pt"))
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE), "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, str(HERE / "probed.py"), "2", str(tmp_path / "2.pt")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    one = torch.load(tmp_path / "1.pt", weights_only=True)
    ranks = [torch.load(tmp_path / f"2.pt.{rank}", weights_only=True) for rank in (0, 1)]
    assert set(ranks[0]) >= {f"probe/labels/{name}" for name in MEASURES}
    assert ranks[0] == ranks[1]
    assert one.keys() == ranks[0].keys()
    for name, value in one.items():
        assert math.isnan(value) == math.isnan(ranks[0][name])
        # the weights differ in their last digits, since gradients are summed in another order
        assert math.isnan(value) or abs(value - ranks[0][name]) < 0.02, name

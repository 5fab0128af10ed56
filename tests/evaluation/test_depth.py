"""Depth: the measures and the loss by plain loops, what trains, the command on NYUv2's own layout."""

import json
import math
from pathlib import Path

import lightning as L
import numpy as np
import pytest
import torch
from depth_trees import folder, module, nyu
from tiny_models import tiny_encoder
from torchmetrics.functional import mean_squared_error

from poodle_lightning import cli, save_pretrained
from poodle_lightning.cli import build
from poodle_lightning.evaluation.depth import DepthReadout, pixel_loss
from poodle_lightning.evaluation.depth_metrics import DepthErrors, eigen_box
from poodle_lightning.nn.encoder import DecodedEncoder
from poodle_lightning.nn.fpn import SemanticFPN
from poodle_lightning.nn.head_optim import HeadRecipe
from poodle_lightning.nn.seg_heads import LinearHead
from poodle_lightning.types import UserError

OFF = {
    "accelerator": "cpu", "devices": 1, "logger": False, "enable_progress_bar": False,
    "enable_model_summary": False, "enable_checkpointing": False, "use_distributed_sampler": False,
}  # fmt: skip
QUICK = HeadRecipe(lr=0.05, horizon_steps=20, min_lr=0.0)


def naive(depth, truth):
    rows = [[] for _ in range(9)]
    images = []
    for p_image, t_image in zip(depth.tolist(), truth.tolist(), strict=True):
        squares = []
        for p_row, t_row in zip(p_image, t_image, strict=True):
            for p, t in zip(p_row, t_row, strict=True):
                if t <= 0:
                    continue
                p = max(p, 1e-3)
                squares.append((p - t) ** 2)
                ratio = max(p / t, t / p)
                values = [(p - t) ** 2, 0, abs(p - t) / t, (p - t) ** 2 / t, (math.log(p) - math.log(t)) ** 2]
                values += [abs(math.log10(p) - math.log10(t)), *(ratio < 1.25**k for k in (1, 2, 3))]
                for row, value in zip(rows, values, strict=True):
                    row.append(value)
        images.append(math.sqrt(sum(squares) / len(squares)))
    means = [sum(row) / len(row) for row in rows]
    means[0], means[4] = math.sqrt(means[0]), math.sqrt(means[4])
    means[1] = sum(images) / len(images)
    return means


def drawn():
    torch.manual_seed(0)
    truth = torch.rand(3, 6, 8) * 4 + 0.5
    truth[0, :2] = 0
    return truth * (1 + 0.4 * torch.randn(3, 6, 8)), truth


def test_measures_by_a_loop():
    depth, truth = drawn()
    depth[1, 1, 1] = -2.0  # a linear output may be negative
    errors = DepthErrors()
    for one, two in zip(depth, truth, strict=True):
        errors.update(one[None], two[None])
    assert (errors.images, errors.pixels) == (3, 3 * 48 - 16)
    names = ["rmse", "rmse_image", "abs_rel", "sq_rel", "rmse_log", "log10", "delta1", "delta2", "delta3"]
    found = errors.summary()
    assert list(found) == names
    np.testing.assert_allclose(list(found.values()), naive(depth, truth), rtol=1e-6)


def test_rmse_is_that_of_torchmetrics():
    depth, truth = drawn()
    depth, valid = depth.clamp(min=0.1), truth > 0
    errors = DepthErrors()
    errors.update(depth, truth)
    theirs = mean_squared_error(depth[valid], truth[valid], squared=False)
    assert errors.summary()["rmse"] == pytest.approx(float(theirs), rel=1e-5)


def test_the_crop_of_eigen_et_al():
    assert eigen_box(480, 640) == (slice(45, 471), slice(41, 601))
    truth = torch.ones(1, 480, 640)
    depth = torch.full_like(truth, 9.0)
    depth[:, 45:471, 41:601] = 2.0
    errors = DepthErrors("eigen")
    errors.update(depth, truth)
    assert errors.summary()["rmse"] == pytest.approx(1.0)
    assert errors.pixels == 426 * 560


@pytest.mark.parametrize(("kind", "one"), [
    ("l1", lambda d: abs(d)),
    ("l2", lambda d: d * d),
    ("huber", lambda d: d * d / 2 if abs(d) <= 1 else abs(d) - 0.5),
])  # fmt: skip
def test_the_loss_is_over_measured_pixels(kind, one, tmp_path):
    depth, truth = drawn()
    expected = torch.tensor([one(d) for d in (depth - truth).flatten().tolist()]).reshape(depth.shape)
    torch.testing.assert_close(pixel_loss(depth, truth, kind), expected)
    model = DepthReadout(tiny_encoder(), loss=kind, output_stride=4)
    data = module(folder(tmp_path), source="folder")
    L.Trainer(**OFF).validate(model, datamodule=data, verbose=False)
    (batch, *_) = data.val_dataloader()
    model.log = lambda *args, **kwargs: None
    model.eval()
    found = model.training_step(batch, 0)
    guess = model(batch.unit())[0, 0].detach()
    values = [
        one(float(guess[y, x] - batch.depth[0, y, x]))
        for y, x in np.ndindex(*guess.shape)
        if batch.depth[0, y, x] > 0
    ]
    assert float(found.detach()) == pytest.approx(sum(values) / len(values), rel=1e-5)
    assert len(values) == 12 * 16 - 3


def test_a_constant_is_learned_and_a_frozen_encoder_stays(tmp_path):
    model = DepthReadout(with_semantic_map(), LinearHead(max_stride=4), recipe=QUICK)
    before = {name: value.clone() for name, value in model.encoder.state_dict().items()}
    data = module(folder(tmp_path), source="folder", batch_size=4)
    trainer = L.Trainer(max_steps=20, limit_val_batches=0, **OFF)
    start = L.Trainer(**OFF)
    start.validate(model, datamodule=data, verbose=False)
    first = model.scores().scores["rmse"]
    trainer.fit(model, datamodule=data)
    assert model.head.layer == "semantic"
    assert model.head.conv_seg.weight.shape == (1, 128, 1, 1)
    assert all(value.equal(before[name]) for name, value in model.encoder.state_dict().items())
    trainer.limit_val_batches = 1.0
    L.Trainer(**OFF).validate(model, datamodule=data, verbose=False)
    assert model.scores().scores["rmse"] < first - 0.5


def test_other_data_are_refused(tmp_path):
    class Nothing(L.LightningDataModule):
        pass

    with pytest.raises(UserError, match="give data: DepthDataModule"):
        L.Trainer(max_steps=1, **OFF).fit(DepthReadout(tiny_encoder()), datamodule=Nothing())


def with_semantic_map():
    encoder = tiny_encoder()
    return DecodedEncoder(encoder, SemanticFPN(encoder.channels))


@pytest.mark.parametrize(("encoder", "last"), [(tiny_encoder, "layer4"), (with_semantic_map, "semantic")])
def test_evaluate_reads_nyu(encoder, last, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    nyu(tmp_path / "nyu")
    save_pretrained(encoder(), "encoder")
    words = [
        "--data.root=nyu", "--data.size=[12,16]", "--data.num_workers=0", "--data.batch_size=2",
        "--model.recipe.warmup_steps=1", "--model.recipe.milestones=[3]", "--trainer.max_steps=4",
        "--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false",
    ]  # fmt: skip
    config = "evaluation/pico_nyu_depth.yaml"
    assert cli.main(["evaluate", "--config", config, "--encoder", "encoder", *words]) == 0
    (result,) = Path("runs").rglob("result.json")
    found = json.loads(result.read_text())
    assert (found["headline"], found["counts"]["images"], found["step"]) == ("rmse", 2, 4)
    assert list(found["details"]["strides"].items())[-1] == (last, 4)  # dilated, or decoded
    assert found["value"] == found["scores"]["rmse"] > 0
    (checkpoint, *_) = Path("runs").rglob("*.ckpt")
    again = DepthReadout.load_from_checkpoint(checkpoint)
    assert again.loss == "l1"
    assert again.encoder.strides[last] == 4


def test_the_config(tmp_path):
    words = [f"--data.root={nyu(tmp_path)}", "--model.encoder=torchvision:resnet50:untrained"]
    with torch.device("meta"):
        model, data = build(["evaluation/pico_nyu_depth.yaml"], words)
    assert (model.loss, model.head.max_stride, model.frozen, data.flip) == ("l1", 4, True, 0.5)
    assert model.head.conv_seg.weight.shape == (1, 2048, 1, 1)

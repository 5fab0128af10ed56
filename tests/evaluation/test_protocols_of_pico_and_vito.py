"""PiCo's and VITO's configurations: the papers' numbers of detection, and `evaluate` on small trees."""

import json
from pathlib import Path

import label_trees
import pytest
import torch
import yaml
from detection_trees import detection_tree
from tiny_models import tiny_encoder

from poodle_lightning import cli, save_pretrained
from poodle_lightning.cli import build

CONFIGS = Path(__file__).parents[2] / "configs" / "evaluation"
VITO = {"vito_coco_fcos": (117_266, 100), "vito_lvis_fcos": (99_388, 300)}


def made(name):
    words = ["--model.encoder=torchvision:resnet50:untrained", "--data.root=coco"]
    with torch.device("meta"):
        model, data = build([f"evaluation/{name}.yaml"], words)
    return model, data, yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())["trainer"]


def test_pico_table_2_is_detectron2s_1x_with_a_frozen_pyramid():
    """PiCo, appendix A.2.2; facebookresearch/detectron2 configs/Base-RCNN-FPN.yaml."""
    model, data, trainer = made("pico_coco_maskrcnn")
    recipe = model.recipe
    assert (model.kind, model.frozen, model.frozen_pyramid) == ("maskrcnn", True, True)
    assert model.init_args["decoder"] == "keep"
    assert (recipe.optimizer, recipe.lr, recipe.momentum, recipe.weight_decay) == ("sgd", 0.02, 0.9, 1e-4)
    assert (recipe.decay, recipe.milestones, recipe.gamma) == ("step", (60_000, 80_000), 0.1)
    assert (recipe.warmup_steps, recipe.warmup_ratio) == (1000, 1e-3)
    assert (trainer["max_steps"], data.batch_size * trainer["devices"]) == (90_000, 16)
    assert tuple(data.train_view.short_sides) == (640, 672, 704, 736, 768, 800)
    train, test = data.train_view, data.test_view
    assert (train.long_side, test.short_side, test.long_side) == (1333, 800, 1333)
    assert (data.masks, data.source_name, model.detections, model.threshold) == (True, "coco", 100, 0.05)


@pytest.mark.parametrize("name", VITO)
def test_vito_table_1_trains_30_epochs_of_128(name):
    """VITO, appendix A.1 and A.2."""
    model, data, trainer = made(name)
    recipe, (images, detections) = model.recipe, VITO[name]
    steps = 30 * images / 128
    assert data.batch_size * trainer["devices"] == 128
    assert abs(trainer["max_steps"] - steps) <= 1
    assert (recipe.optimizer, recipe.lr, recipe.weight_decay, recipe.gamma) == ("adamw", 1e-3, 1e-4, 0.1)
    assert abs(recipe.warmup_steps - steps / 30 / 4) <= 1
    assert recipe.milestones == pytest.approx((steps * 2 / 3, steps * 8 / 9), abs=1)
    assert (tuple(data.train_view.size), tuple(data.train_view.jitter)) == ((800, 1024), (0.8, 1.25))
    assert tuple(data.test_view.size) == (800, 1024)
    assert (model.kind, model.frozen, model.detections) == ("fcos", False, detections)
    assert data.federated == (name == "vito_lvis_fcos")
    assert not data.masks


TREES = {
    "pico_coco_linear": label_trees.coco,
    "pico_voc_linear": label_trees.voc,
    "pico_cityscapes_linear": label_trees.cityscapes,
    "vito_voc_fcn": label_trees.voc,
    "vito_ade20k_fcn": label_trees.ade20k,
}


@pytest.mark.parametrize("name", TREES)
def test_evaluate_segmentation_on_a_small_tree(name, tmp_path, monkeypatch):
    TREES[name](tmp_path / "data")
    resize = "--data.train.short_sides=[16]" if name.startswith("pico") else "--data.train.scale=[32,16]"
    # two steps, the second behind a milestone where there are some
    steps = ["--model.recipe.warmup_steps=0", "--model.recipe.milestones=[1]"]
    words = [resize, "--data.train.crop=[16,16]", *(steps if name.startswith("pico") else [])]
    found = evaluated(name, tmp_path, monkeypatch, words)
    assert (found["headline"], found["step"]) == ("miou", 2)
    assert found["counts"]["images"] == (2 if "ade20k" in name else 1)
    assert 0 <= found["value"] <= 1
    assert "fwiou" in found["scores"]


@pytest.mark.parametrize("name", VITO)
def test_evaluate_fcos_on_a_small_tree(name, tmp_path, monkeypatch):
    detection_tree(tmp_path / "data", lvis="lvis" in name)
    words = ["--data.train.size=[64,80]", "--data.test.size=[64,80]", "--trainer.devices=1"]
    words += ["--model.recipe.warmup_steps=1", "--model.recipe.milestones=[1]"]
    found = evaluated(name, tmp_path, monkeypatch, words)
    assert (found["headline"], found["step"], found["counts"]["images"]) == ("box_ap", 2, 3)
    assert ("box_ap_rare" in found["scores"]) == ("lvis" in name)
    assert set(found["per_class"]["box_ap"]) == {"red", "green"}


def evaluated(name, tmp_path, monkeypatch, words):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    save_pretrained(tiny_encoder(), "encoder")
    told = ["--data.root=data", "--data.num_workers=0", "--data.batch_size=2", "--trainer.max_steps=2"]
    told += ["--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false", *words]
    config = f"evaluation/{name}.yaml"
    assert cli.main(["evaluate", "--config", config, "--encoder", "encoder", *told]) == 0
    (result,) = Path("runs").rglob("result.json")
    return json.loads(result.read_text())

"""Every readout's YAML file parses, builds, fits its encoder, and has the papers' numbers."""

import functools
import re
from pathlib import Path

import lightning as L
import pytest
import torch
import yaml
from few_labels import FewLabels
from tiny_models import tiny_encoder, tiny_sdm
from two_readouts import OFF

from poodle_lightning.cli import build
from poodle_lightning.data.labelled import LabelledDataModule
from poodle_lightning.evaluation.inference import Sliding, WholeImage
from poodle_lightning.evaluation.segmentation import Segmentation
from poodle_lightning.nn.encoder import DecodedEncoder
from poodle_lightning.nn.seg_heads import FCN, LinearHead, ViTLinear
from poodle_lightning.nn.upernet import UPerNet
from poodle_lightning.nn.vit import ViT

FOLDER = Path(__file__).parents[1] / "configs" / "evaluation"
HEADER = ("command", "hardware", "hours", "expected", "obtained")
OURS = ["quick_linear", "synthetic_linear"]
PAPERS = {
    "poodle_1": [
        f"{data}_{head}{kind}"
        for data in ("bdd100k", "cityscapes")
        for head in ("linear", "upernet")
        for kind in ("", "_vit")
    ],
    "poodle_2": [
        f"{data}_{head}{kind}"
        for data in ("ade20k", "wt_sem")
        for head in ("linear", "upernet")
        for kind in ("", "_vit")
    ],
    "pico": ["pico_coco_linear", "pico_voc_linear", "pico_cityscapes_linear"],
    "vito": ["vito_voc_fcn", "vito_ade20k_fcn"],
    "dora": ["dora_ade20k_upernet"],
}
OF_PAPERS = [name for names in PAPERS.values() for name in names]


def of_segmentation(path):
    return "segmentation.Segmentation" in path.read_text()


NAMES = sorted(path.stem for path in FOLDER.glob("*.yaml") if of_segmentation(path))


def text(name):
    return (FOLDER / f"{name}.yaml").read_text()


def plain(name):
    return yaml.safe_load(text(name))


@functools.cache
def made(name):
    """Model and data of a config with the encoder of its row, untrained, on the meta device."""
    encoder = "timm:vit_small_patch16_224:untrained" if vit(name) else "torchvision:resnet50:untrained"
    words = [f"--model.encoder={encoder}", *([] if name == "synthetic_linear" else ["--data.root=labels"])]
    if plain(name)["data"].endswith("labelled_folder.yaml"):
        words.append("--data.source=bdd100k")  # a folder would have to be there
    if name == "synthetic_linear":  # draws a street
        return build([f"evaluation/{name}.yaml"], [*words, "--model.encoder=torchvision:resnet18:untrained"])
    with torch.device("meta"):
        model, data = build([f"evaluation/{name}.yaml"], words)
        model.take_classes(data.classes)
    return model, data


def vit(name):
    return name.endswith("_vit") or name.startswith("dora")


def test_every_row_of_the_papers_tables_has_a_file():
    assert sorted([*OF_PAPERS, *OURS]) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_they_have_a_header(name):
    head = [line for line in text(name).splitlines() if line.startswith("#")]
    for key in HEADER:
        assert any(re.match(rf"# {key}\s+\S", line) for line in head), f"{name}.yaml says no {key!r}"
    assert f"--config evaluation/{name}.yaml" in "\n".join(head)


@pytest.mark.parametrize("name", NAMES)
def test_they_build_and_fit_their_encoder(name):
    model, data = made(name)
    assert isinstance(model, Segmentation)
    assert isinstance(data, LabelledDataModule)
    assert plain(name)["model"]["init_args"]["encoder"] is None  # the command line gives it
    trainer = plain(name)["trainer"]
    schedule = model.recipe.schedule(trainer["max_steps"])
    assert schedule.horizon == trainer["max_steps"]
    assert trainer["num_sanity_val_steps"] == 0
    assert all(milestone < schedule.horizon for milestone in model.recipe.milestones)
    assert schedule.lr(schedule.horizon) <= model.recipe.lr / 100 or model.recipe.decay == "step"
    if name not in OURS:
        assert trainer["precision"] == "32-true"


# ---- the papers' numbers, as read in them
@pytest.mark.parametrize("name", PAPERS["poodle_1"])
def test_poodle_table_1(name):
    """FlowE, sections 4.3 and 4.6; PooDLe, section 4.1 and appendix A."""
    model, data = made(name)
    city = name.startswith("cityscapes")
    assert plain(name)["trainer"]["max_steps"] == (40_000 if city else 60_000)
    assert data.batch_size == (8 if city else 16)
    assert tuple(data.train_view.short_side) == (512, 2048)
    assert model.frozen
    recipe = model.recipe
    if vit(name):
        assert recipe.optimizer == "adamw"
        assert data.train_view.crop[0] == data.train_view.crop[1]
        assert isinstance(model.inference, Sliding)
        return
    assert (recipe.optimizer, recipe.lr, recipe.decay) == ("sgd", 0.01 if city else 0.02, "poly")
    assert tuple(data.train_view.crop) == (512, 1024)
    assert isinstance(model.inference, WholeImage)
    if "linear" in name:
        assert isinstance(model.head, LinearHead)
        assert (model.head.max_stride, model.head.kernel) == (8, 1)
        assert model.init_args["decoder"] == "keep"
        assert model.init_args["output_stride"] == 8
    else:
        assert isinstance(model.head, UPerNet)
        assert model.init_args["decoder"] == "drop"
        assert model.init_args["output_stride"] is None


@pytest.mark.parametrize("name", PAPERS["poodle_2"])
def test_poodle_table_2(name):
    """Linear: the settings of BDD100K. UPerNet: iBOT's finetuning, batch 4 on WT-Sem."""
    model, data = made(name)
    recipe, view = model.recipe, data.train_view
    if "linear" in name:
        twin, twin_data = made(name.replace("ade20k", "bdd100k").replace("wt_sem", "bdd100k"))
        assert recipe == twin.recipe
        assert view == twin_data.train_view
        assert data.batch_size == twin_data.batch_size
        assert plain(name)["trainer"] == plain("bdd100k_linear")["trainer"]
        return
    assert not model.frozen
    assert plain(name)["trainer"]["max_steps"] == 160_000
    assert data.batch_size == (4 if name.startswith("wt_sem") else 16)
    assert (recipe.optimizer, recipe.lr, recipe.weight_decay) == ("adamw", 3e-5, 0.05)
    assert (recipe.power, recipe.min_lr, recipe.warmup_steps, recipe.warmup_ratio) == (1.0, 0.0, 1500, 1e-6)
    assert recipe.layer_decay == (0.9 if vit(name) else 1.0)
    assert (tuple(view.scale), tuple(view.ratio), view.cat_max_ratio) == ((2048, 512), (0.5, 2.0), 0.75)
    assert (tuple(view.crop), view.distort) == ((512, 512), True)
    assert (model.inference.crop, model.inference.stride) == ((512, 512), (341, 341))
    assert model.auxiliary_weight == 0.4
    assert (model.auxiliary.channels, model.auxiliary.count) == (256, 1)
    assert model.head.channels == (384 if vit(name) else 512)


def test_dora_table_3a():
    """DoRA, appendix: rate 6e-5, weight decay 1e-2, 1,500 steps of warm-up, 160,000 steps, batch 4."""
    model, data = made("dora_ade20k_upernet")
    recipe = model.recipe
    assert (recipe.optimizer, recipe.lr, recipe.weight_decay) == ("adamw", 6e-5, 1e-2)
    assert (recipe.warmup_steps, data.batch_size) == (1500, 4)
    assert plain("dora_ade20k_upernet")["trainer"]["max_steps"] == 160_000
    assert not model.frozen
    assert data.source_name == "ade20k"


@pytest.mark.parametrize("name", PAPERS["pico"])
def test_pico(name):
    """Frozen features of stride 4, one 1x1 convolution; COCO by detectron2's Base-RCNN-FPN."""
    model, data = made(name)
    recipe = model.recipe
    assert model.frozen
    assert (model.head.max_stride, model.head.kernel, model.init_args["output_stride"]) == (4, 1, 4)
    assert (recipe.decay, recipe.weight_decay, recipe.momentum) == ("step", 1e-4, 0.9)
    steps = plain(name)["trainer"]["max_steps"]
    if name == "pico_coco_linear":
        assert (steps, recipe.milestones, recipe.lr, data.batch_size) == (90_000, (60_000, 80_000), 0.02, 16)
        assert (min(data.train_view.short_sides), max(data.train_view.short_sides)) == (640, 800)
        assert (data.test_view.short_side, data.test_view.long_side) == (800, 1333)
        assert len(data.classes) == 54
    else:
        assert steps < 90_000


def test_pico_changes_what_it_says_it_changes():
    (voc, voc_data), (city, city_data) = made("pico_voc_linear"), made("pico_cityscapes_linear")
    assert max(voc_data.train_view.short_sides) < 800
    assert (
        yaml.safe_load((FOLDER / plain("pico_voc_linear")["data"]).read_text())["init_args"]["voc_train"]
        == "train_aug"
    )
    assert city.recipe.lr < voc.recipe.lr == 0.02
    assert city_data.batch_size > 16
    assert city_data.train_view.long_side > 1333


@pytest.mark.parametrize(("name", "epochs", "images"), [("voc", 45, 10_582), ("ade20k", 60, 20_210)])
def test_vito(name, epochs, images):
    """VITO, appendix A.2: FCN as in MoCo, SGD, batch 16, weight decay 0.005, rate 0.04, mean of 5 runs."""
    name = f"vito_{name}_fcn"
    model, data = made(name)
    recipe = model.recipe
    assert (recipe.optimizer, recipe.lr, recipe.weight_decay, data.batch_size) == ("sgd", 0.04, 0.005, 16)
    assert abs(plain(name)["trainer"]["max_steps"] * 16 - epochs * images) <= 8
    assert isinstance(model.head, FCN)
    assert (model.head.channels, model.head.count, model.head.dilation) == (256, 2, 6)
    assert not model.frozen
    assert "--runs 5" in text(name)


# ---- every kind of encoder under every head
def tiny_vit():
    return ViT(patch=8, dim=16, depth=4, heads=2, image_size=(16, 16))


def with_sdm():
    encoder = tiny_encoder()
    return DecodedEncoder(encoder, tiny_sdm(encoder))


def even_upernet():
    return UPerNet([0, 1, 2, 3], channels=8, vit_pyramid=True)


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize(
    ("encoder", "head", "kwargs"),
    [
        (tiny_encoder, lambda: LinearHead(max_stride=8), {"output_stride": 8}),
        (tiny_encoder, lambda: LinearHead(max_stride=4), {"output_stride": 4}),
        (with_sdm, lambda: LinearHead(max_stride=8), {}),
        (tiny_encoder, lambda: FCN(channels=8), {"output_stride": 16}),
        (with_sdm, lambda: UPerNet(channels=8), {"decoder": "drop", "auxiliary": FCN("layer3", 8, 1, 1)}),
        (tiny_vit, lambda: ViTLinear([1, 3]), {"inference": Sliding((16, 16), (11, 11))}),
        (tiny_vit, even_upernet, {"auxiliary": FCN(2, 8, 1, 1)}),
    ],
)
def test_one_step(encoder, head, kwargs, frozen):
    torch.manual_seed(0)
    model = Segmentation(encoder(), head(), frozen=frozen, **kwargs)
    trainer = L.Trainer(max_steps=1, limit_val_batches=1, **OFF)
    trainer.fit(model, datamodule=FewLabels())
    assert trainer.global_step == 1
    assert torch.isfinite(trainer.callback_metrics["train/loss"])
    trainer.validate(model, datamodule=FewLabels(), verbose=False)
    assert 0 <= model.scores().scores["miou"] <= 1

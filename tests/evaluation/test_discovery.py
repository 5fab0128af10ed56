"""Object discovery against loops over pixels, SciPy and torchvision, and from end to end."""

import json
import math
import re
from pathlib import Path

import lightning as L
import numpy as np
import pytest
import torch
import yaml
from object_trees import SCENES, Thing, voc_objects
from PIL import Image
from scipy import ndimage
from torchvision.ops import box_iou

from poodle_lightning import cli, save_pretrained
from poodle_lightning.data.image_classes import ImageClassDataModule
from poodle_lightning.data.objects import ObjectDataModule
from poodle_lightning.evaluation.discovery import (
    DiscoveryRecipe,
    Found,
    ObjectDiscovery,
    best_of,
    find_objects,
    jaccard,
)
from poodle_lightning.nn.resnet import ResNet
from poodle_lightning.nn.vit import ViT
from poodle_lightning.types import Features, UserError

CONFIGS = Path(__file__).parents[2] / "configs"
PATCH = 8


class Bright(ViT):
    """Head i attends to a patch by the brightness in channel i, as the network is given it."""

    def __init__(self):
        super().__init__(patch=PATCH, dim=12, depth=1, heads=3, image_size=(32, 32))

    def look(self, images, heads=None, rows=None):
        self.asked = (tuple(images.shape), rows)
        cells = torch.nn.functional.avg_pool2d(images, PATCH)
        patches = (cells - cells.amin(dim=(2, 3), keepdim=True)) ** 2 + 1e-6
        flat = torch.cat([torch.ones(len(images), 3, 1), patches.flatten(2)], dim=2)
        attention = (flat / flat.sum(-1, keepdim=True))[:, :, None]
        return Features({"block0": cells}, {"block0": PATCH}, cells.mean((2, 3)), attention)


def trainer(**kwargs):
    return L.Trainer(
        accelerator="cpu", devices=1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, use_distributed_sampler=False, **kwargs,
    )  # fmt: skip


def validated(root, recipe=None, encoder=None, folder=None, **kwargs):
    module = ObjectDiscovery(encoder or Bright(), recipe=recipe)
    data = ObjectDataModule(str(root), num_workers=0, **kwargs)
    trainer(default_root_dir=folder).validate(module, datamodule=data, verbose=False)
    return module


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return voc_objects(tmp_path_factory.mktemp("voc"))


# ---- the whole protocol once more, slowly
def slow_attention(pixels, pad):
    """What ``Bright`` says of one image, in float64 loops: ``(3, h, w)``."""
    height, width = pixels.shape[:2]
    mean = np.array([0.485, 0.456, 0.406])
    rows, columns = (-(-side // PATCH) if pad else side // PATCH for side in (height, width))
    canvas = np.tile(mean, (rows * PATCH, columns * PATCH, 1))
    inside = pixels[: rows * PATCH, : columns * PATCH] / 255.0
    canvas[: inside.shape[0], : inside.shape[1]] = inside
    found = np.zeros((3, rows, columns))
    for y in range(rows):
        for x in range(columns):
            found[:, y, x] = canvas[y * PATCH : (y + 1) * PATCH, x * PATCH : (x + 1) * PATCH].mean((0, 1))
    return (found - found.min((1, 2), keepdims=True)) ** 2 + 1e-6


def slow_mask(attention, mass):
    order = sorted(range(attention.size), key=lambda place: (attention.flat[place], place))
    gone, mask = 0.0, np.ones(attention.size, bool)
    for place in order:
        gone += attention.flat[place] / attention.sum()
        if gone > 1 - mass:
            break
        mask[place] = False
    return mask.reshape(attention.shape)


def slow_box(mask, lost):
    labels, count = ndimage.label(mask)
    if lost:
        sizes = [np.sum(labels == c) for c in range(count)]
        chosen = np.argmax(sizes[1:]) + 1 if len(sizes) > 1 else 0
    else:
        chosen = 1 + np.argmax([np.sum(labels == c) for c in range(1, count + 1)])
    rows, columns = np.where(labels == chosen)
    return [side * PATCH for side in (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)]


def slow_jaccard(masks, truth, counted):
    best = 0.0
    for mask in masks:
        both = either = 0
        for y, x in np.ndindex(truth.shape):
            if counted[y, x]:
                both += bool(mask[y, x] and truth[y, x])
                either += bool(mask[y, x] or truth[y, x])
        best = max(best, both / either)
    return best


def slow_scores(root, recipe, size=None):
    hits, whole, alone, within = [], [], [], []
    for name in SCENES:
        pixels = np.asarray(Image.open(root / f"JPEGImages/{name}.jpg"))
        objects = np.asarray(Image.open(root / f"SegmentationObject/{name}.png"))
        (height, width), things = SCENES[name]
        if size is not None:
            pixels = np.asarray(Image.fromarray(pixels).resize(size[::-1], Image.Resampling.BILINEAR))
        attention = slow_attention(pixels, recipe.fit == "pad")
        maps = {"mean": attention.mean(0, keepdims=True), "best": attention}.get(recipe.head)
        maps = attention[recipe.head : recipe.head + 1] if maps is None else maps
        grids = [slow_mask(one, recipe.mass) for one in maps]
        scale = width / pixels.shape[1], height / pixels.shape[0]
        boxes = np.array([slow_box(grid, recipe.compat == "lost") for grid in grids]) * [*scale, *scale]
        if recipe.compat is None:
            boxes = np.minimum(boxes, [width, height, width, height])
        truth = torch.tensor([[t.left, t.top, t.right, t.bottom] for t in things]).double()
        hits.append(bool((box_iou(torch.from_numpy(boxes), truth) >= recipe.overlap).any()))
        masks = np.zeros((len(grids), height, width), bool)
        for y, x in np.ndindex(height, width):
            row = math.floor((y + 0.5) * pixels.shape[0] / height / PATCH)
            column = math.floor((x + 0.5) * pixels.shape[1] / width / PATCH)
            if row < grids[0].shape[0] and column < grids[0].shape[1]:
                masks[:, y, x] = [grid[row, column] for grid in grids]
        counted = (objects != 255) if recipe.void == "left_out" else np.ones_like(objects, bool)
        whole.append(slow_jaccard(masks, (objects > 0) & (objects != 255), counted))
        each = [slow_jaccard(masks, objects == i, counted) for i in range(1, len(things) + 1)]
        alone += each
        within.append(np.mean(each))
    return {
        "corloc": np.mean(hits),
        "jaccard": np.mean(whole),
        "jaccard_object": np.mean(alone),
        "jaccard_object_image": np.mean(within),
    }


@pytest.mark.parametrize(
    ("recipe", "size"),
    [
        ({}, None),
        ({"mass": 0.95, "head": 1}, None),
        ({"mass": 0.6, "head": "best", "void": "background"}, None),
        ({"fit": "crop", "mass": 0.9}, None),
        ({"compat": "lost", "mass": 0.9}, None),
        ({"compat": "lost", "mass": 0.95, "overlap": 0.2}, None),
        ({}, (48, 48)),
        ({"fit": "crop", "overlap": 0.25}, (45, 50)),
    ],
)
def test_scores_against_loops(root, recipe, size):
    recipe = DiscoveryRecipe(**recipe)
    found = validated(root, recipe, size=size).scores()
    assert found.scores == pytest.approx({k: float(v) for k, v in slow_scores(root, recipe, size).items()})
    assert found.headline == "corloc"
    assert found.counts == {"images": 4, "images_with_boxes": 4, "boxes": 6, "drawn_objects": 6}


def test_an_object_of_whole_patches_is_found_exactly(tmp_path):
    voc_objects(tmp_path, {"a": ((40, 64), [Thing(8, 16, 24, 40)])})
    scores = validated(tmp_path, DiscoveryRecipe(mass=0.99)).scores().scores
    assert scores == {"corloc": 1.0, "jaccard": 1.0, "jaccard_object": 1.0, "jaccard_object_image": 1.0}


def test_two_equal_objects_are_half_found_each(tmp_path):
    """The mask covers both: all of the union, and each object is half of it."""
    voc_objects(tmp_path, {"a": ((32, 64), [Thing(8, 0, 24, 16), Thing(8, 40, 24, 56)])})
    scores = validated(tmp_path, DiscoveryRecipe(mass=0.99)).scores().scores
    assert scores == {"corloc": 1.0, "jaccard": 1.0, "jaccard_object": 0.5, "jaccard_object_image": 0.5}


def test_a_box_is_cut_at_the_images_border(tmp_path):
    """51×37 px, filled up to 56×40: the object's patches reach beyond the image, its box does not."""
    attention = torch.full((1, 7, 5), 1e-6)
    attention[0, 3:, 2:] = 1.0
    (box,) = find_objects(attention, PATCH, (51, 37), (51, 37), DiscoveryRecipe()).boxes.tolist()
    assert box == [16, 24, 37, 51]
    lost = find_objects(attention, PATCH, (51, 37), (51, 37), DiscoveryRecipe(compat="lost"))
    assert lost.boxes.tolist() == [[0, 0, 40, 56]]  # of one piece its code takes the ground, uncut
    voc_objects(tmp_path, {"a": ((51, 37), [Thing(24, 16, 51, 37)])})
    # all four sides agree
    assert validated(tmp_path, DiscoveryRecipe(mass=0.96, overlap=1.0)).scores().scores["corloc"] == 1.0


def test_half_an_overlap_counts(tmp_path):
    """One piece of two objects side by side: its box is twice each of theirs."""
    voc_objects(tmp_path, {"a": ((40, 64), [Thing(8, 16, 24, 32), Thing(8, 32, 24, 48)])})
    assert validated(tmp_path, DiscoveryRecipe(mass=0.99)).scores().scores["corloc"] == 1.0
    above = DiscoveryRecipe(mass=0.99, overlap=0.501)
    assert validated(tmp_path, above).scores().scores["corloc"] == 0.0


def test_batches_change_nothing(root):
    one = validated(root, batch_size=1)
    many = validated(root, batch_size=4)
    assert one.scores() == many.scores()
    # the three images of one size together, only [CLS]'s attention asked for
    assert many.encoder.asked in [((3, 3, 40, 64), 1), ((1, 3, 56, 40), 1)]


def test_detection_has_boxes_alone(root):
    found = validated(root, task="detection", split="trainval", hard="drop").scores()
    assert list(found.scores) == ["corloc"]
    # of four images one has only cut-off objects: it is not judged
    assert found.counts == {"images": 4, "images_with_boxes": 3, "boxes": 4, "drawn_objects": 0}


def test_a_real_vit_is_read_as_its_attention_says(root):
    torch.manual_seed(0)
    vit = ViT(patch=8, dim=24, depth=2, heads=3, image_size=(32, 32)).eval()
    module = ObjectDiscovery(vit)
    images = torch.randint(0, 256, (2, 3, 41, 30), dtype=torch.uint8)
    found = module.attention(images)
    mean = torch.tensor([0.485, 0.456, 0.406]).reshape(3, 1, 1)
    filled = mean.expand(2, 3, 48, 32).clone()
    filled[..., :41, :30] = images / 255.0
    whole = vit.look(filled).attention[:, :, 0, 1:].reshape(2, 3, 6, 4)
    assert torch.allclose(found, whole, atol=1e-6)
    cropped = ObjectDiscovery(vit, recipe=DiscoveryRecipe(fit="crop")).attention(images)
    whole = vit.look(images[..., :40, :24] / 255.0).attention[:, :, 0, 1:].reshape(2, 3, 5, 3)
    assert torch.allclose(cropped, whole, atol=1e-6)
    assert 0 <= validated(root, encoder=vit).scores().scores["jaccard"] <= 1


def test_jaccard_of_an_object_without_counted_pixels_is_none():
    nothing = torch.zeros(1, 2, 2, dtype=torch.bool)
    assert math.isnan(jaccard(nothing, nothing[0], ~nothing[0]))


def test_pictures_are_of_images_spread_over_the_split(root, tmp_path):
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures/discovery_99999_old.png").write_bytes(b"")
    validated(root, DiscoveryRecipe(pictures=2), folder=tmp_path)
    files = sorted(path.name for path in (tmp_path / "pictures").iterdir())
    assert files == ["discovery_00000_2007-000033.png", "discovery_00002_2008-000001.png"]
    with Image.open(tmp_path / "pictures" / files[0]) as picture:
        pixels = np.asarray(picture).astype(int)
    cell = pixels[:200, :320]  # 5 times as large: the true box's border in green, the found one's in magenta
    assert (np.abs(cell - [0, 217, 51]).sum(-1) < 6).any()
    found = np.abs(cell - [255, 0, 255]).sum(-1) < 6
    assert found.any()
    # the lines are not enlarged: two pixels, on the left side of the box
    left = np.flatnonzero(found.any(axis=0))[0]
    middle = (np.flatnonzero(found[:, left])[0] + np.flatnonzero(found[:, left])[-1]) // 2
    assert found[middle, left : left + 8].sum() == 2


def test_lines_stay_whole_where_an_image_is_made_smaller(tmp_path):
    voc_objects(tmp_path / "voc", {"a": ((400, 1200), [Thing(80, 160, 240, 400)])})
    validated(tmp_path / "voc", DiscoveryRecipe(pictures=1), folder=tmp_path)
    (path,) = (tmp_path / "pictures").iterdir()
    with Image.open(path) as picture:
        cell = np.asarray(picture).astype(int)[:120, :360]
    found = np.abs(cell - [255, 0, 255]).sum(-1) < 6
    rows, columns = np.flatnonzero(found.any(axis=1)), np.flatnonzero(found.any(axis=0))
    assert found[rows[0], columns[0] : columns[-1] + 1].all()


def test_of_several_heads_the_picture_shows_those_that_scored():
    masks = torch.zeros(3, 10, 12, dtype=torch.bool)
    masks[0, :2, :2], masks[1, 2:8, 3:9], masks[2, 2:8, 2:6] = True, True, True
    boxes = torch.tensor([[0, 0, 2, 2], [3, 2, 12, 10], [2, 2, 6, 8]]).double()
    objects = torch.zeros(10, 12, dtype=torch.uint8)
    objects[2:8, 3:9] = 1
    found, truth = Found(masks, boxes), torch.tensor([[2.0, 2.0, 6.0, 9.0]]).double()
    assert best_of(found, truth, objects) == (1, 2)
    assert best_of(found, truth, None) == (2, 2)
    assert best_of(found, torch.empty(0, 4), objects) == (1, 0)


def test_a_picture_of_the_best_head_has_its_attention(tmp_path):
    """The object is bright in the third channel alone: of that head are box, heat and mask."""
    voc_objects(tmp_path / "voc", {"a": ((40, 64), [Thing(8, 16, 24, 40)])})
    pixels = np.full((40, 64, 3), 20, np.uint8)
    pixels[8:24, 16:40, 2] = 220
    pixels[32:40, 56:64, :2] = 220  # what the other heads see
    Image.fromarray(pixels).save(tmp_path / "voc/JPEGImages/a.jpg", quality=100, subsampling=0)
    validated(tmp_path / "voc", DiscoveryRecipe(pictures=1, head="best", mass=0.9), folder=tmp_path)
    (path,) = (tmp_path / "pictures").iterdir()
    with Image.open(path) as picture:
        drawn = np.asarray(picture).astype(int)
    boxed, heat, mask = drawn[:200, :320], drawn[:200, 324:], drawn[204:, :320]
    inside, elsewhere = (slice(60, 100), slice(100, 180)), (slice(165, 195), slice(285, 315))
    magenta = np.abs(boxed - [255, 0, 255]).sum(-1) < 6
    assert magenta[40:120, 80:200].any()
    assert not magenta[elsewhere].any()
    assert heat[inside].sum() / 3200 > heat[elsewhere].sum() / 900 + 100
    assert (mask[inside][..., 0] > 100).all()
    assert (mask[inside][..., 1] < 100).all()


# ---- what cannot be
def test_encoders_without_attention_of_cls():
    with pytest.raises(UserError, match=r"which ResNet does not have: give a ViT with a class token"):
        ObjectDiscovery(ResNet(10, width=8))
    with pytest.raises(UserError, match="class token"):
        ObjectDiscovery(ViT(patch=8, dim=12, depth=1, heads=3, image_size=(16, 16), class_token=False))


def test_images_without_a_box_have_no_corloc(tmp_path):
    voc_objects(tmp_path, {"a": ((40, 64), [Thing(8, 16, 24, 40, truncated=1)])})
    with pytest.raises(UserError, match=r"no image has a box to be found: .*data\.split.*data\.hard keep"):
        validated(tmp_path, task="detection", split="trainval", hard="drop")


def test_data_without_objects(tmp_path):
    for split in ("train", "val"):
        (tmp_path / split / "cat").mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(tmp_path / split / "cat/a.png")
    with pytest.raises(UserError, match="give data: ObjectDataModule"):
        trainer().validate(
            ObjectDiscovery(Bright()), datamodule=ImageClassDataModule(str(tmp_path), num_workers=0)
        )


def test_a_head_that_is_not_there_and_attention_that_is_not_finite(root):
    with pytest.raises(UserError, match=r"2007_000033: recipe.head 3: the last block has heads 0 to 2"):
        validated(root, DiscoveryRecipe(head=3))
    with pytest.raises(UserError, match="not finite"):
        find_objects(torch.full((1, 2, 2), torch.nan), 8, (16, 16), (16, 16), DiscoveryRecipe())
    with pytest.raises(UserError, match="smaller than a patch"):
        validated(root, DiscoveryRecipe(fit="crop"), size=(7, 20))
    with pytest.raises(UserError, match="no result yet"):
        ObjectDiscovery(Bright()).scores()


@pytest.mark.parametrize("wrong", [{"mass": 0.0}, {"mass": 1.1}, {"head": -1}, {"overlap": 0.0}])
def test_recipes_out_of_range(wrong):
    with pytest.raises(UserError, match="DiscoveryRecipe"):
        DiscoveryRecipe(**wrong)


# ---- the shipped protocol
def test_the_config_says_what_the_paper_says():
    text = (CONFIGS / "evaluation/discovery_voc.yaml").read_text()
    for key in ("command", "hardware", "hours", "expected", "obtained"):
        assert re.search(rf"^# {key}\s+\S", text, re.MULTILINE)
    given = yaml.safe_load(text)
    assert given["model"]["init_args"]["encoder"] is None
    module, data = cli.build(["evaluation/discovery_voc.yaml"], ["--data.root=voc"])
    assert isinstance(module, ObjectDiscovery)
    assert (module.recipe.mass, module.recipe.head, module.recipe.compat) == (0.8, "mean", None)
    assert isinstance(data, ObjectDataModule)
    assert (data.source.year, data.source.task, data.source.split) == (2012, "segmentation", "val")
    lost = ["--data.year=2007", "--data.task=detection", "--data.split=trainval"]
    lost += ["--model.recipe.head=4", "--model.recipe.mass=0.6", "--model.recipe.compat=lost"]
    module, data = cli.build(["evaluation/discovery_voc.yaml"], ["--data.root=voc", "--data.size=480", *lost])
    assert (module.recipe.head, module.recipe.compat, data.size) == (4, "lost", 480)
    assert cli.build(["evaluation/discovery_voc.yaml"], ["--data.root=v", "--data.size=[480, 480]"])[
        1
    ].size == (
        480,
        480,
    )


def test_one_command_scores_and_writes(root, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    save_pretrained(ViT(patch=8, dim=24, depth=2, heads=3, image_size=(32, 32)), "encoder")
    words = ["evaluate", "--config", "evaluation/discovery_voc.yaml", "--data.root", str(root)]
    words += ["--data.num_workers", "0", "--model.recipe.pictures", "1", "--trainer.accelerator", "cpu"]
    words += ["--trainer.enable_progress_bar", "false"]
    assert cli.main([*words, "--encoder", "encoder"]) == 0
    (run,) = Path("runs/discovery_voc-encoder").iterdir()
    found = json.loads((run / "result.json").read_text())
    assert (found["headline"], found["counts"]["images"]) == ("corloc", 4)
    assert set(found["scores"]) == {"corloc", "jaccard", "jaccard_object", "jaccard_object_image"}
    assert found["value"] == found["scores"]["corloc"]
    assert found["details"]["recipe"]
    assert [path.name for path in (run / "pictures").iterdir()] == ["discovery_00000_2007-000033.png"]
    assert cli.main(["report", "--run", str(run)]) == 0
    capsys.readouterr()
    assert cli.main([*words, "--encoder", "torchvision:resnet18:untrained"]) == 2
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert len(said) == 1
    assert "give a ViT with a class token" in said[0]

"""Label propagation as a whole: loops in float64, easy videos, the command line, shipped protocols."""

import json
import math
from dataclasses import replace
from pathlib import Path

import lightning as L
import numpy as np
import pytest
import torch
import yaml
from davis_trees import Colours, davis, ids
from PIL import Image
from tiny_models import tiny_encoder
from torchvision.models import resnet18

from poodle_lightning import cli, save_pretrained
from poodle_lightning.data.davis import DavisDataModule, FrameView
from poodle_lightning.evaluation.propagation import (
    LabelPropagation,
    PropagationRecipe,
    hard_mask,
    nearest_mask,
    one_hot,
    undilated,
)
from poodle_lightning.evaluation.video_metrics import score_sequence
from poodle_lightning.hub import dilate
from poodle_lightning.nn.resnet import ResNet
from poodle_lightning.nn.vit import ViT
from poodle_lightning.types import UserError

VFS = PropagationRecipe(
    last=2,
    repeat_first=True,
    topk=4,
    temperature=0.07,
    radius=3,
    window="circle",
    ties="drop",
    upsample="original",
    floor=1e-12,
)
DINO = PropagationRecipe(last=2, radius=2, deviation=(0.228, 0.224, 0.225))
OFF = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "accelerator": "cpu"}
CONFIGS = Path(__file__).parents[2] / "configs"


def tiny_vit():
    return ViT(patch=8, dim=24, depth=2, heads=3, image_size=(32, 32))


@pytest.fixture
def root(tmp_path):
    return davis(tmp_path / "DAVIS")


def data_of(root, **kwargs):
    return DavisDataModule(str(root), **{"view": FrameView(short_side=None), "num_workers": 0, **kwargs})


def validated(model, data):
    L.Trainer(**OFF).validate(model, datamodule=data, verbose=False)
    return model


# ---- the whole procedure, step by step in float64
def looped(recipe, maps, mask, objects, shown):
    """Masks of a sequence from its maps ``(T, D, h, w)``."""
    maps = maps.double() / maps.double().norm(dim=1, keepdim=True)
    total, _, height, width = maps.shape
    cells = [(y, x) for y in range(height) for x in range(width)]
    small = looped_nearest(mask, (height, width))
    labels = [{cell: np.eye(objects + 1)[small[cell]] for cell in cells}]
    masks = [mask]
    for time in range(1, total):
        before = range(max(0 if recipe.repeat_first else 1, time - recipe.last), time)
        found = {}
        for y, x in cells:
            near = []
            for frame in (0, *before):
                for v, u in cells:
                    if recipe.window == "square":
                        inside = abs(v - y) <= recipe.radius and abs(u - x) <= recipe.radius
                    else:
                        inside = math.hypot(v - y, u - x) < recipe.radius
                    if inside:
                        near.append((float(maps[time, :, y, x] @ maps[frame, :, v, u]), frame, (v, u)))
            near.sort(key=lambda one: -one[0])
            best = near[: recipe.topk]
            weights = np.exp(np.array([product for product, *_ in best]) / recipe.temperature)
            given = np.stack([labels[frame][cell] for _, frame, cell in best])
            found[y, x] = (weights[:, None] * given).sum(axis=0) / weights.sum()
        labels.append(found)
        soft = np.array([[found[y, x] for x in range(width)] for y in range(height)])
        large = looped_bilinear(soft, shown if recipe.upsample == "frame" else mask.shape)
        for label in range(objects + 1):
            span = large[..., label].max() - large[..., label].min()
            if span > 0:
                large[..., label] = (large[..., label] - large[..., label].min()) / span
        masks.append(looped_nearest(large.argmax(axis=-1), mask.shape))
    return np.stack(masks)


def looped_nearest(mask, size):
    rows, columns = (
        [int((i + 0.5) * old / new) for i in range(new)] for old, new in zip(mask.shape, size, strict=True)
    )
    return mask[np.ix_(rows, columns)]


def looped_bilinear(values, size):
    for axis, new in enumerate(size):
        old = values.shape[axis]
        at = np.clip((np.arange(new) + 0.5) * old / new - 0.5, 0, old - 1)
        low = np.floor(at).astype(int)
        part = (at - low).reshape([-1 if i == axis else 1 for i in range(3)])
        high = np.minimum(low + 1, old - 1)
        values = values.take(low, axis=axis) * (1 - part) + values.take(high, axis=axis) * part
    return values


@pytest.mark.parametrize(
    ("recipe", "encoder", "layer", "view"),
    [
        (DINO, tiny_vit, None, FrameView(32, 8)),
        (DINO, tiny_vit, None, FrameView(16, 8)),
        (VFS, lambda: tiny_encoder(output_stride=8), "layer3", FrameView(32, 1)),
        (replace(VFS, upsample="frame"), lambda: tiny_encoder(output_stride=8), None, FrameView(24, 1)),
    ],
)
def test_is_the_loop(root, recipe, encoder, layer, view):
    torch.manual_seed(0)
    model = LabelPropagation(encoder(), recipe=recipe, layer=layer).eval()
    video = data_of(root, view=view).read(0)
    images = video.frames.float() / 255
    with torch.no_grad():
        found = model.predict_masks(video)
        std = (
            model.encoder.std if recipe.deviation is None else torch.tensor([[[0.228]], [[0.224]], [[0.225]]])
        )
        features = model.encoder.features((images - model.encoder.mean) / std)
    maps = features.last if layer is None else features.maps[layer]
    wanted = looped(recipe, maps, video.masks[0].numpy(), video.objects, video.frames.shape[2:])
    assert found.dtype == torch.uint8
    assert np.array_equal(found.numpy(), wanted)
    assert len(np.unique(wanted)) == 3


def test_images_are_divided_by_the_given_deviation(root):
    deviation = (0.1, 0.4, 0.9)
    video = data_of(root).read(0)
    found = list(
        LabelPropagation(Colours(), recipe=replace(DINO, deviation=deviation))._features(video.frames)
    )
    assert len(found) == 5
    for frame, features in zip(video.frames.double().numpy() / 255, found, strict=True):
        cells = frame.reshape(3, 8, 4, 12, 4).mean(axis=(2, 4)).transpose(1, 2, 0)
        cells = (cells - [0.485, 0.456, 0.406]) / deviation
        wanted = cells / np.linalg.norm(cells, axis=-1, keepdims=True)
        assert np.abs(features.numpy() - wanted).max() < 1e-4


def test_the_first_mask_goes_to_the_cells_at_once(root):
    """24×32 is shown of 32×48: by way of that size other pixels would be at the cells' centres."""
    torch.manual_seed(0)
    model = LabelPropagation(tiny_vit(), recipe=replace(DINO, deviation=None)).eval()
    video = data_of(root, view=FrameView(24, 8)).read(0)
    noise = torch.randint(0, 3, video.masks.shape, dtype=torch.uint8)
    video = replace(video, masks=noise)
    mask = noise[0].numpy()
    through = looped_nearest(looped_nearest(mask, (24, 32)), (3, 4))
    assert not np.array_equal(through, looped_nearest(mask, (3, 4)))
    with torch.no_grad():
        found = model.predict_masks(video)
        maps = model.encoder(video.frames.float() / 255).last
    wanted = looped(model.recipe, maps, mask, 2, (24, 32))
    # of so few cells labels are equal on whole lines, where rounding decides
    assert (found.numpy() != wanted).mean() < 0.02
    # of another first mask at the cells, others would be found
    stood = np.kron(through, np.ones((11, 12), int))[:32]
    assert np.array_equal(looped_nearest(stood, (3, 4)), through)
    assert (looped(model.recipe, maps, stood, 2, (24, 32))[1:] != wanted[1:]).mean() > 0.1


# ---- pictures
def test_pictures_are_of_sequences_spread_over_the_list(tmp_path):
    root = davis(tmp_path / "DAVIS", [("dog", 8, 2), ("cat", 4, 1), ("swan", 4, 1), ("a/b", 4, 1)])
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures/propagation_00009_old.png").write_bytes(b"")
    recipe = PropagationRecipe(last=2, topk=3, radius=3, pictures=2)
    model = LabelPropagation(Colours(), recipe=recipe)
    L.Trainer(**OFF, default_root_dir=tmp_path).validate(model, datamodule=data_of(root), verbose=False)
    files = sorted(path.name for path in (tmp_path / "pictures").iterdir())
    assert files == ["propagation_00000_dog.png", "propagation_00002_swan.png"]
    with Image.open(tmp_path / "pictures" / files[0]) as picture:
        pixels = np.asarray(picture)
    # six of eight frames, each 240×160: shown, true, found
    assert pixels.shape == (3 * 160 + 8, 6 * 240 + 20, 3)
    for column, time in enumerate([0, 1, 3, 4, 6, 7]):
        left, mask = 244 * column, ids(time)
        true, found = (pixels[top : top + 160, left : left + 240].astype(int) for top in (164, 328))
        for number, colour in ((1, [128, 0, 0]), (2, [0, 128, 0])):
            there = np.kron(mask == number, np.ones((5, 5), bool))
            border = there & ~(
                np.roll(there, 1, 0) & np.roll(there, -1, 0) & np.roll(there, 1, 1) & np.roll(there, -1, 1)
            )
            inside = border[1:-1, 1:-1].nonzero()
            assert (np.abs(true[1:-1, 1:-1][inside] - colour).sum(-1) <= 2).all()
    assert np.array_equal(true.shape, found.shape)
    # the first mask was given
    assert np.array_equal(pixels[164:324, :240], pixels[328:488, :240])
    assert not np.array_equal(pixels[164:324, -240:], pixels[:160, -240:])


# ---- easy videos
def test_colours_are_followed(root):
    recipe = PropagationRecipe(last=2, topk=3, temperature=0.05, radius=3)
    model = LabelPropagation(Colours(), recipe=recipe)
    assert not model.trains
    found = validated(model, data_of(root)).scores()
    assert found.scores["j_and_f"] > 0.9
    assert found.scores["j_recall"] == 1
    assert found.counts == {"sequences": 2, "objects": 3, "frames": 9}
    assert list(found.per_class["j"]) == ["dog_1", "dog_2", "swan_1"]
    assert found.details["sequences"]["swan"]["j_mean"] == found.per_class["j"]["swan_1"]
    # a mask that stays where it was is far worse, and so is a window that the object leaves
    still = np.stack([ids(0)] * 5)
    truth = np.stack([ids(time) for time in range(5)])
    assert score_sequence(truth, still, 2)[0].region.mean < 0.5
    again = validated(LabelPropagation(Colours(), recipe=replace(recipe, last=0, radius=1)), data_of(root))
    assert again.scores().per_class["j"]["dog_1"] < found.per_class["j"]["dog_1"]


def test_neither_forward_passes_nor_tiles_change_anything(root):
    torch.manual_seed(0)
    encoder = tiny_vit()
    one, other = (
        validated(LabelPropagation(encoder, recipe=replace(DINO, **changed)), data_of(root)).scores()
        for changed in ({"batch": 1, "budget": 1}, {"batch": 8})
    )
    assert one.scores == pytest.approx(other.scores, abs=1e-12)


def test_the_scores_are_those_of_the_masks_that_are_saved(root, tmp_path):
    torch.manual_seed(0)
    model = LabelPropagation(tiny_encoder(output_stride=8), recipe=VFS, save=str(tmp_path / "out"))
    found = validated(model, data_of(root)).scores()
    masks = [np.asarray(Image.open(path)) for path in sorted((tmp_path / "out" / "dog").glob("*.png"))]
    assert np.array_equal(masks[0], ids(0))
    truth = np.stack([ids(time) for time in range(5)])
    scores = score_sequence(truth, np.stack(masks), 2)
    assert scores[1].region.mean == found.per_class["j"]["dog_2"]
    assert scores[0].contour.mean == found.per_class["f"]["dog_1"]


# ---- pieces
def test_masks_at_other_sizes_are_pils():
    mask = torch.randint(0, 3, (23, 31), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    for size in ((7, 9), (23, 31), (46, 93), (5, 31)):
        assert np.array_equal(nearest_mask(mask, size).numpy(), looped_nearest(mask.numpy(), size))
    found = one_hot(mask, (7, 9), 4)
    assert found.shape == (7, 9, 5)
    assert torch.equal(found.argmax(dim=-1).to(torch.uint8), nearest_mask(mask, (7, 9)))


def test_faint_constant_and_absent_labels():
    faint = torch.zeros(2, 2, 3)
    faint[..., 0] = torch.tensor([[0.75, 0.5], [1.0, 1.0]])
    faint[0, 0, 1] = 1e-20  # its own largest value: stretched to 1
    assert hard_mask(faint, (2, 2)).tolist() == [[1, 0], [0, 0]]
    assert hard_mask(faint, (2, 2), 1e-12).tolist() == [[0, 0], [0, 0]]
    everywhere = torch.zeros(2, 2, 3)
    everywhere[..., 2] = 1
    assert (hard_mask(everywhere, (4, 4)) == 2).all()
    assert (hard_mask(everywhere, (4, 4), 1e-12) == 0).all()


def test_strides_go_and_dilations_do_not_come():
    """VFS sets the stride of res4 to 1 and leaves the rest: torchvision's network with the same change."""
    torch.manual_seed(0)
    theirs, ours = resnet18().eval(), ResNet(18)
    ours.load_state_dict(
        {key: value for key, value in theirs.state_dict().items() if not key.startswith("fc")}
    )
    for part in (theirs.layer3[0].conv1, theirs.layer3[0].downsample[0]):
        part.stride = (1, 1)
    images = torch.randn(1, 3, 40, 56)
    wanted = images
    for name in ("conv1", "bn1", "relu", "maxpool", "layer1", "layer2", "layer3"):
        wanted = getattr(theirs, name)(wanted)
    dilated = dilate(ours, 8).eval()
    found = undilated(dilated).features(images).maps["layer3"]
    assert found.shape[-2:] == (5, 7)
    assert torch.allclose(found, wanted, atol=1e-5)
    assert not torch.allclose(dilated.features(images).maps["layer3"], wanted, atol=1e-2)
    model = LabelPropagation(ours, output_stride=8, dilation=False).eval()
    assert torch.allclose(model.encoder.features(images).maps["layer3"], wanted, atol=1e-5)


@pytest.mark.parametrize("changed", [{"topk": 0}, {"last": -1}, {"radius": 0}, {"deviation": (1.0, 1.0)}])
def test_settings_out_of_range(changed):
    with pytest.raises(UserError, match="PropagationRecipe"):
        PropagationRecipe(**changed)


def test_what_cannot_be_measured_is_one_line(root):
    with pytest.raises(UserError, match="no layer 'layer9'"):
        validated(LabelPropagation(tiny_encoder(), layer="layer9"), data_of(root))
    with pytest.raises(UserError, match="dilation false"):
        LabelPropagation(tiny_encoder(), dilation=False)
    with pytest.raises(UserError, match=r"ViT cannot be dilated.*--config evaluation/davis_dino\.yaml"):
        LabelPropagation(tiny_vit(), output_stride=8, dilation=False)
    with pytest.raises(UserError, match="no result yet"):
        LabelPropagation(tiny_encoder()).scores()
    broken = tiny_encoder()
    torch.nn.init.constant_(broken.conv1.weight, torch.nan)
    with pytest.raises(UserError, match="not finite"):
        validated(LabelPropagation(broken), data_of(root))


# ---- the command line
WORDS = ["--data.num_workers=0", "--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false"]


@pytest.mark.parametrize(
    ("config", "encoder", "words"),
    [
        ("davis_dino", tiny_vit, ["--data.view={short_side: 32, multiple: 8}", "--model.recipe.radius=2"]),
        ("davis_vfs", tiny_encoder, ["--data.view.short_side=32"]),
    ],
)
def test_one_command(root, tmp_path, monkeypatch, config, encoder, words):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    save_pretrained(encoder(), "encoder")
    given = ["evaluate", "--config", f"evaluation/{config}.yaml", "--encoder", "encoder"]
    words = [*WORDS, *words, "--data.root", str(root), "--model.save", "masks"]
    assert cli.main([*given, *words]) == 0
    (run,) = Path("runs", f"{config}-encoder").iterdir()
    found = json.loads((run / "result.json").read_text())
    assert found["headline"] == "j_and_f"
    assert 0 <= found["value"] <= 1
    assert found["counts"]["frames"] == 9
    assert "| dog_2 |" in (run / "result.md").read_text()
    assert len(list(Path("masks/dog").glob("*.png"))) == 5
    assert len(list((run / "pictures").glob("propagation_*.png"))) == 2
    assert cli.main(["report", "--run", str(run)]) == 0
    page = (run / "report/index.html").read_text(encoding="utf-8")
    assert "below them the true masks" in page
    assert "propagation_00001_swan" in page
    assert "object 2" in page


def test_a_missing_sequence_is_one_line(root, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    save_pretrained(tiny_vit(), "encoder")
    (root / "ImageSets/2017/val.txt").write_text("dog\ncat\n")
    words = ["--config", "evaluation/davis_dino.yaml", "--encoder", "encoder", "--data.root", str(root)]
    assert cli.main(["evaluate", *words, *WORDS]) == 2
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert len(said) == 1
    assert "480p/cat: no frames" in said[0]


# ---- the shipped protocols
def test_the_configs_have_the_numbers_of_the_public_code(root):
    dino, data = cli.build(["evaluation/davis_dino.yaml"], [f"--data.root={root}"])
    assert dino.recipe == PropagationRecipe(deviation=(0.228, 0.224, 0.225), pictures=6)
    assert (dino.recipe.last, dino.recipe.topk, dino.recipe.temperature, dino.recipe.radius) == (
        7,
        5,
        0.1,
        12,
    )
    assert data.view == FrameView(480, 64)
    vfs, data = cli.build(["evaluation/davis_vfs.yaml"], [f"--data.root={root}"])
    assert (vfs.recipe.last, vfs.recipe.topk, vfs.recipe.temperature) == (20, 10, 0.07)
    assert vfs.recipe.radius == 36 // 2  # neighbor_range is a diameter
    assert (vfs.layer, vfs.init_args["output_stride"], vfs.init_args["dilation"]) == ("layer3", 8, False)
    assert data.view == FrameView(480, 1)
    for name in ("davis_dino", "davis_vfs"):
        text = (CONFIGS / f"evaluation/{name}.yaml").read_text()
        assert f"--config evaluation/{name}.yaml" in text
        assert yaml.safe_load(text)["model"]["init_args"]["encoder"] is None
        for key in ("command", "hardware", "hours", "expected", "obtained"):
            assert f"\n# {key} " in text

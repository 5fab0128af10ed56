"""Detectors on our encoders: what is trained, what comes out, and from end to end."""

import json
import warnings
from pathlib import Path

import lightning as L
import pytest
import torch
from detection_trees import detection_tree

from poodle_lightning import cli, save_pretrained
from poodle_lightning.data.detection import DetectionDataModule
from poodle_lightning.data.detection_views import DetectionTestView, DetectionTrainView
from poodle_lightning.evaluation.detection import Detection
from poodle_lightning.nn.encoder import DecodedEncoder
from poodle_lightning.nn.fpn import SemanticFPN
from poodle_lightning.nn.head_optim import HeadRecipe
from poodle_lightning.nn.resnet import ResNet
from poodle_lightning.types import UserError

RECIPE = HeadRecipe(lr=1e-3, decay="constant")


def encoder(pyramid=True):
    torch.manual_seed(0)
    bare = ResNet(depth=10, width=8)
    return DecodedEncoder(bare, SemanticFPN(bare.channels, dims=32, pyramid=32)) if pyramid else bare


def batch_of(tmp_path, masks=True):
    view = DetectionTrainView(short_sides=(64,))
    root = str(detection_tree(tmp_path / "coco"))
    test = DetectionTestView(short_side=64)
    data = DetectionDataModule("coco", root, train=view, test=test, masks=masks, batch_size=2, num_workers=0)
    data.setup("fit")
    return data, next(iter(data.train_dataloader()))


def moved(model, batch):
    """Names of the top-level parts that get a gradient."""
    model.log_dict = lambda *_, **__: None
    loss = model.training_step(batch, 0)
    loss.backward()
    return loss, {
        name for name, p in model.named_parameters() if p.grad is not None and float(p.grad.abs().sum()) > 0
    }


def test_frozen_pyramid_gets_no_gradient_and_the_draws_are_keyed(tmp_path):
    _, batch = batch_of(tmp_path)
    model = Detection(encoder(), classes=2, frozen_pyramid=True, recipe=RECIPE).train()
    before = {name: value.clone() for name, value in model.encoder.state_dict().items()}
    torch.manual_seed(1)
    loss, names = moved(model, batch)
    torch.manual_seed(2)
    assert torch.equal(loss, model.training_step(batch, 0))
    parts = {name.split(".")[1] for name in names}
    assert parts == {"rpn", "roi_heads"}
    assert model.pyramid is None
    assert all(torch.equal(value, before[name]) for name, value in model.encoder.state_dict().items())


def test_fcos_finetunes_encoder_and_new_pyramid_but_no_norm(tmp_path):
    _, batch = batch_of(tmp_path, masks=False)
    model = Detection(
        encoder(), detector="fcos", decoder="drop", classes=2, frozen=False, recipe=RECIPE
    ).train()
    _, names = moved(model, batch)
    assert {"encoder", "pyramid", "network", "coarser"} == {name.split(".")[0] for name in names}
    assert not any(".bn" in name for name in names)
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trainable == names  # DDP needs a gradient for every one


def test_fcos_on_an_own_pyramid_trains_nothing_that_it_does_not_read(tmp_path):
    """DDP waits for the gradient of everything that is trained; FCOS begins at stride 8."""
    _, batch = batch_of(tmp_path, masks=False)
    model = Detection(encoder(), detector="fcos", classes=2, frozen=False, recipe=RECIPE).train()
    moved(model, batch)
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    assert any(".fpn." in name and p.requires_grad for name, p in model.named_parameters())


def test_detections_below_the_threshold_are_left_out(tmp_path):
    data, _ = batch_of(tmp_path)
    found = []
    for threshold in (0.5, 0.01):
        torch.manual_seed(0)
        model = Detection(encoder(pyramid=False), detector="fcos", classes=2, threshold=threshold).eval()
        found.append(sum(len(one["scores"]) for one in model.detect(next(iter(data.val_dataloader())))))
    assert found[0] < found[1]


def test_levels_are_the_encoders_own_pyramid():
    model = Detection(encoder(), classes=2, frozen_pyramid=True).eval()
    image = torch.rand(1, 3, 64, 96, generator=torch.Generator().manual_seed(0))
    levels = model._levels((image - model.encoder.mean) / model.encoder.std)
    own = model.encoder.decoder.fpn(model.encoder.encoder(image).maps)
    assert list(levels) == ["0", "1", "2", "3", "pool"]
    for level, name in zip(levels.values(), own, strict=False):
        assert torch.equal(level, own[name])
    assert levels["pool"].shape[-2:] == (1, 2)


def test_what_is_found_lies_in_the_files_pixels(tmp_path):
    data, _ = batch_of(tmp_path)
    model = Detection(encoder(), classes=2).eval()
    batch = next(iter(data.val_dataloader()))
    given = {
        "boxes": torch.tensor([[0.0, 0, 85, 64], [8, 16, 40, 32]]),
        "scores": torch.tensor([0.9, 0.8]),
        "labels": torch.tensor([1, 2]),
    }
    model._run = lambda *_: [dict(given)]
    (found,) = model.detect(batch)
    assert batch.shown == ((64, 85),)
    assert batch.sizes == ((96, 128),)
    want = torch.tensor([[0.0, 0, 128, 96], [8 * 128 / 85, 24, 40 * 128 / 85, 48]])
    assert torch.allclose(found["boxes"], want, atol=1e-4)
    assert found["labels"].tolist() == [0, 1]


@pytest.mark.parametrize("lvis", [False, True])
def test_perfect_detections_score_one(tmp_path, lvis, monkeypatch):
    name = "lvis" if lvis else "coco"
    root = detection_tree(tmp_path / name, lvis=lvis)
    data = DetectionDataModule(
        name, str(root), masks=False, test=DetectionTestView(short_side=48), num_workers=0
    )
    model = Detection(encoder(), detector="fcos")

    def exact(batch):
        source = data.objects("val")
        rows = [source.truth(source.images.index(i), False) for i in source.images if i["id"] in batch.ids]
        return [
            {
                "boxes": torch.from_numpy(boxes),
                "scores": torch.ones(len(boxes)),
                "labels": torch.from_numpy(labels),
            }
            for boxes, labels, _ in rows
        ]

    monkeypatch.setattr(model, "detect", exact)
    trainer = L.Trainer(
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        default_root_dir=tmp_path,
    )
    trainer.validate(model, data, verbose=False)
    scores = model.scores()
    assert scores.scores["box_ap"] == pytest.approx(1.0)
    assert scores.per_class["box_ap"]["green"] == 1.0
    assert ("box_ap_rare" in scores.scores) == lvis
    assert scores.counts == {"images": 3, "objects": 6, "detections": 6}


def test_evaluate_from_end_to_end(tmp_path):
    save_pretrained(encoder(), tmp_path / "encoder")
    root = detection_tree(tmp_path / "coco")
    told = ["--encoder", str(tmp_path / "encoder"), "--data.root", str(root)]
    told += ["--data.train.short_sides=[64]", "--data.test.short_side=64", "--data.batch_size=2"]
    told += ["--data.num_workers=0", "--model.recipe.decay=constant", "--model.recipe.milestones=[]"]
    told += ["--model.recipe.warmup_steps=0", "--trainer.max_steps=2", "--trainer.accelerator=cpu"]
    told += [f"--trainer.default_root_dir={tmp_path / 'runs'}"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert not cli.main(["evaluate", "--config", "evaluation/pico_coco_maskrcnn.yaml", *told])
    (result,) = Path(tmp_path / "runs").rglob("result.json")
    content = json.loads(result.read_text())
    assert content["headline"] == "box_ap"
    assert content["counts"]["images"] == 3
    assert {"box_ap", "box_ap50", "mask_ap", "mask_ap_large"} <= set(content["scores"])
    (checkpoint,) = list(result.parent.rglob("last.ckpt"))
    again = Detection.load_from_checkpoint(checkpoint)
    assert again.schedule is None
    assert isinstance(again.the_encoder(), DecodedEncoder)


def test_what_is_refused(tmp_path):
    with pytest.raises(UserError, match="strides 4, 8, 16, 32"):
        Detection(ResNet(depth=10, width=8, output_stride=8), classes=2)
    with pytest.raises(UserError, match="detections"):
        Detection(encoder(), detections=0)
    data, _ = batch_of(tmp_path, masks=False)
    trainer = L.Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, max_steps=1, default_root_dir=tmp_path
    )
    with pytest.raises(UserError, match=r"data\.masks"):
        trainer.fit(Detection(encoder(), recipe=RECIPE), data)

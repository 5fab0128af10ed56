"""The protocol: losses, what trains and what does not, scores, checkpoints, one process or two."""

import copy
import math
import os
import socket
import subprocess
import sys
from pathlib import Path

import lightning as L
import numpy as np
import pytest
import torch
from few_labels import NAMES, FewLabels, few, part
from sklearn.metrics import confusion_matrix
from tiny_models import tiny_encoder, tiny_sdm
from two_readouts import OFF, main, readout

from poodle_lightning import hub
from poodle_lightning.data.label_streets import StreetLabels
from poodle_lightning.data.labelled import LabelledDataModule
from poodle_lightning.evaluation.inference import Sliding
from poodle_lightning.evaluation.segmentation import Segmentation
from poodle_lightning.nn.encoder import DecodedEncoder
from poodle_lightning.nn.head_optim import HeadRecipe
from poodle_lightning.nn.seg_heads import FCN, LinearHead, ViTLinear
from poodle_lightning.nn.upernet import UPerNet
from poodle_lightning.nn.vit import ViT
from poodle_lightning.types import IGNORE, ClassSet, UserError

HERE = Path(__file__).parents[1]


def fitted(model, data=None, steps=8, **kwargs):
    trainer = L.Trainer(max_steps=steps, **{**OFF, "limit_val_batches": 0, **kwargs})
    trainer.fit(model, datamodule=data or FewLabels())
    return trainer


def validated(model, data=None):
    trainer = L.Trainer(**OFF)
    trainer.validate(model, datamodule=data or FewLabels(), verbose=False)
    return trainer


def tiny_vit(**kwargs):
    return ViT(patch=8, dim=16, depth=4, heads=2, image_size=(16, 16), **kwargs)


# ---- the loss
def naive_loss(logits, truth, mean_over):
    """Pixel by pixel in float64."""
    logits, truth = logits.double().numpy(), truth.numpy()
    total = count = 0
    for b, y, x in np.ndindex(truth.shape):
        count += mean_over == "all" or truth[b, y, x] != IGNORE
        if truth[b, y, x] != IGNORE:
            row = logits[b, :, y, x]
            total += np.log(np.exp(row - row.max()).sum()) + row.max() - row[truth[b, y, x]]
    return total / count


@pytest.mark.parametrize("mean_over", ["labelled", "all"])
def test_the_loss_is_cross_entropy_of_upsampled_logits(mean_over):
    model = readout(classes=4, mean_over=mean_over)
    torch.nn.init.normal_(model.head.conv_seg.weight)
    batch = few(2)
    with torch.no_grad():
        coarse = model.head(model.encoder(batch.images / 255))
        logits = torch.nn.functional.interpolate(coarse, (32, 64), mode="bilinear", align_corners=False)
    assert coarse.shape[-2:] == (4, 8)
    model.log_dict = lambda *args, **kwargs: None
    loss = float(model.training_step(batch, 0).detach())
    assert loss == pytest.approx(naive_loss(logits, batch.labels, mean_over), rel=1e-5)


def test_the_auxiliary_loss_is_weighted():
    head, auxiliary = LinearHead(), FCN("layer3", channels=4, convs=1, dilation=1)
    model = readout(classes=4, head=head, auxiliary=auxiliary, auxiliary_weight=0.4)
    logs = {}
    model.log_dict = lambda found, **kwargs: logs.update(found)
    total = model.training_step(few(2), 0)
    assert float(total.detach()) == pytest.approx(
        float(logs["train/loss_head"] + logs["train/loss_auxiliary"])
    )
    model.auxiliary_weight = 0.8
    first = float(logs["train/loss_auxiliary"])
    model.training_step(few(2), 0)
    assert float(logs["train/loss_auxiliary"]) == pytest.approx(2 * first, rel=1e-5)


def test_a_batch_without_labels_has_loss_0_and_moves_nothing():
    model = readout(classes=4, recipe=HeadRecipe(weight_decay=0.0))
    before = copy.deepcopy(model.state_dict())
    trainer = fitted(model, FewLabels(ignored=True), steps=2)
    assert float(trainer.callback_metrics["train/loss"]) == 0.0
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


# ---- what trains
def test_training_lowers_the_loss_and_a_frozen_encoder_keeps_every_bit():
    model = readout(head=LinearHead("layer1"), recipe=HeadRecipe(lr=0.2))
    before = copy.deepcopy(model.encoder.state_dict())
    first = validated(model).callback_metrics["val/loss"]
    assert float(first) == pytest.approx(math.log(4), rel=0.1)
    fitted(model, steps=24, max_epochs=-1)
    trainer = validated(model)
    assert trainer.callback_metrics["val/loss"] < 0.7 * first
    assert trainer.callback_metrics["val/miou"] > 0.4
    for name, value in model.encoder.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert all(parameter.grad is None for parameter in model.encoder.parameters())
    model.train()
    assert model.training
    assert not any(module.training for module in model.encoder.modules())


def test_a_finetuned_encoder_changes_and_the_one_that_was_given_does_not():
    given = tiny_encoder()
    before = copy.deepcopy(given.state_dict())
    model = Segmentation(given, frozen=False, recipe=HeadRecipe(lr=0.01))
    fitted(model, steps=2)
    after = model.encoder.state_dict()
    assert all(torch.equal(value, before[name]) for name, value in given.state_dict().items())
    for name in ("conv1.weight", "layer4.0.bn1.weight", "bn1.running_mean"):
        assert not torch.equal(after[name], before[name]), name
    assert model.encoder.training


def test_rates_follow_the_schedule_and_the_layers():
    recipe = HeadRecipe(optimizer="adamw", lr=0.01, min_lr=0.0, power=1.0, layer_decay=0.5)
    model = Segmentation(tiny_vit(), ViTLinear((1, 3)), frozen=False, recipe=recipe)
    seen = []

    class Watch(L.Callback):
        def on_before_zero_grad(self, trainer, module, optimizer):
            seen.append({group["lr_scale"]: group["lr"] for group in optimizer.param_groups})

    fitted(model, steps=4, callbacks=[Watch()])
    last = seen[-1]
    assert set(last) == {0.5**n for n in range(6)}
    for scale, rate in last.items():
        assert rate == pytest.approx(0.01 * (1 - 3 / 4) * scale)


def test_stochastic_depth_is_drawn_from_the_keys():
    model = Segmentation(tiny_vit(), ViTLinear((1, 3), dropout=0.5), frozen=False, drop_path=0.4, classes=4)
    model.log_dict = lambda *args, **kwargs: None
    state = torch.random.get_rng_state()
    losses = [float(model.training_step(few(4, seed=seed), 0).detach()) for seed in (0, 0, 1)]
    torch.random.manual_seed(5)
    again = float(model.training_step(few(4), 0).detach())
    assert losses[0] == losses[1] == again
    assert losses[0] != losses[2]
    torch.random.set_rng_state(state)
    model.training_step(few(4), 0)
    assert torch.equal(torch.random.get_rng_state(), state)
    plain = Segmentation(tiny_vit(), ViTLinear((1, 3)), frozen=False, drop_path=0.4, classes=4)
    assert any(type(module).__name__ == "DropPath" for module in plain.encoder.modules())


def test_heads_start_from_the_seed_alone():
    weights = []
    for seed, draws in ((0, 0), (0, 5), (1, 0)):
        torch.manual_seed(seed)
        encoder = tiny_encoder()
        torch.rand(draws)
        weights.append(Segmentation(encoder, classes=4).head.conv_seg.weight)
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


# ---- scores
@pytest.mark.parametrize("label_size", [None, (48, 100)])
def test_scores_are_those_of_the_predictions_at_the_labels_size(label_size):
    model = readout()
    fitted(model, steps=8)
    trainer = validated(model, FewLabels(label_size=label_size))
    truth = few(5, seed=100, label_size=label_size)
    guess = model.predict_labels(truth)
    assert guess.shape == truth.labels.shape
    counted = truth.labels != IGNORE
    matrix = confusion_matrix(truth.labels[counted], guess[counted], labels=range(4)).astype(float)
    iou = np.diag(matrix) / (matrix.sum(0) + matrix.sum(1) - np.diag(matrix))
    scores = model.scores()
    assert scores.headline == "miou"
    assert scores.scores["miou"] == pytest.approx(np.nanmean(iou), abs=1e-12)
    assert scores.scores["pixel_accuracy"] == pytest.approx(np.trace(matrix) / matrix.sum(), abs=1e-12)
    assert scores.scores["miou_colour"] == pytest.approx(np.nanmean(iou[1:]), abs=1e-12)
    assert list(scores.per_class["iou"]) == list(NAMES)
    assert scores.counts["images"] == 5
    assert scores.counts["ignored_pixels"] == int((~counted).sum())
    logged = trainer.callback_metrics
    for name in ("miou", "miou_present", "pixel_accuracy", "miou_colour", "miou_grey"):
        assert float(logged[f"val/{name}"]) == pytest.approx(scores.scores[name], rel=1e-6), name


def test_the_validation_loss_is_the_mean_over_all_labelled_pixels():
    model = readout()
    trainer = validated(model)
    batch = few(5, seed=100)
    with torch.no_grad():
        logits = model(batch.unit())
    assert float(trainer.callback_metrics["val/loss"]) == pytest.approx(
        naive_loss(logits, batch.labels, "labelled"), rel=1e-5
    )


def test_the_worst_images():
    model = readout()
    fitted(model, steps=8)
    validated(model)
    batch = few(5, seed=100)
    guess = model.predict_labels(batch)
    worst = model.scores().worst
    iou = model.scores().per_class["iou"]
    assert [name for name, _ in worst] == sorted(NAMES, key=iou.__getitem__)[:3]
    for name, number in worst:
        label = NAMES.index(name)
        rows = []
        for i in range(5):
            there, said = batch.labels[i] == label, (guess[i] == label) & (batch.labels[i] != IGNORE)
            if there.any():
                rows.append((float((there & said).sum() / (there | said).sum()), -int(there.sum()), i))
        assert min(rows)[2] == number


def test_predictions_do_not_depend_on_the_batch():
    model = readout(classes=4, inference=Sliding((16, 16), (11, 11)))
    torch.nn.init.normal_(model.head.conv_seg.weight)
    batch = few(3)
    alone = torch.cat([model.predict_labels(part(batch, slice(i, i + 1))) for i in range(3)])
    assert torch.equal(model.predict_labels(batch), alone)
    scores = []
    for size in (1, 3):
        validated(model, FewLabels(val_batch_size=size))
        scores.append(model.scores())
    assert scores[0] == scores[1]


def test_a_vit_takes_images_of_any_size():
    model = Segmentation(tiny_vit(), ViTLinear((1, 3)), classes=4)
    image = torch.rand(1, 3, 19, 42)
    found = model(image)
    assert found.shape == (1, 4, 19, 42)
    grey = model.encoder.mean.expand(1, 3, 24, 48).clone()
    grey[..., :19, :42] = image
    torch.testing.assert_close(found, model(grey)[..., :19, :42], rtol=1e-5, atol=1e-6)


def test_scores_before_validation_are_refused():
    with pytest.raises(UserError, match="no scores yet"):
        readout(classes=4).scores()


# ---- encoder and head
def test_the_decoder_is_kept_or_dropped():
    encoder = tiny_encoder()
    decoded = DecodedEncoder(encoder, tiny_sdm(encoder))
    kept = Segmentation(decoded, LinearHead(max_stride=8), output_stride=8, classes=4)
    assert kept.head.conv_seg.in_channels == 32
    assert kept.encoder.strides["layer4"] == 32  # never dilated
    dropped = Segmentation(decoded, UPerNet(channels=4), decoder="drop", classes=4)
    assert not isinstance(dropped.encoder, DecodedEncoder)
    with pytest.raises(UserError, match="output_stride 8"):
        Segmentation(decoded, LinearHead(max_stride=8), decoder="drop", classes=4)


def test_a_dilated_encoder_has_the_same_weights():
    encoder = tiny_encoder()
    model = Segmentation(encoder, LinearHead(max_stride=8), output_stride=8, classes=4)
    assert model.encoder.strides["layer4"] == 8
    assert torch.equal(model.encoder.layer4[0].conv1.weight, encoder.layer4[0].conv1.weight)


def test_an_encoder_by_name_and_from_a_folder(tmp_path):
    encoder = tiny_encoder()
    hub.save_pretrained(encoder, tmp_path / "e")
    model = Segmentation(str(tmp_path / "e"), classes=4)
    assert torch.equal(model.encoder.conv1.weight, encoder.conv1.weight)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Segmentation(classes=4), "no encoder to measure: give --encoder"),
        (lambda: Segmentation(tiny_encoder(), classes=7), "data have 4 classes.* made for 7"),
    ],
)
def test_what_the_user_can_mend(make, message):
    with pytest.raises(UserError, match=message):
        validated(make())


def test_settings_that_contradict_each_other():
    with pytest.raises(UserError, match="finetuning: set frozen false"):
        Segmentation(tiny_vit(), recipe=HeadRecipe(layer_decay=0.9))
    with pytest.raises(UserError, match="does not have it"):
        Segmentation(tiny_encoder(), frozen=False, drop_path=0.1)
    with pytest.raises(UserError, match="no blocks of a vision transformer"):
        fitted(Segmentation(tiny_encoder(), frozen=False, recipe=HeadRecipe(layer_decay=0.9)))


# ---- checkpoints
def test_a_checkpoint_holds_plain_data_and_rebuilds_the_readout(tmp_path):
    encoder = tiny_encoder()
    model = Segmentation(
        DecodedEncoder(encoder, tiny_sdm(encoder)),
        LinearHead(kernel=3),
        inference=Sliding((16, 16), (11, 11)),
        frozen=False,
        recipe=HeadRecipe(decay="step", milestones=(1, 2)),
    )
    trainer = fitted(model, steps=2)
    trainer.save_checkpoint(tmp_path / "r.ckpt")
    torch.load(tmp_path / "r.ckpt", weights_only=True)
    again = Segmentation.load_from_checkpoint(tmp_path / "r.ckpt")
    assert again.recipe == model.recipe
    assert again.class_set == ClassSet(NAMES, {"grey": ("dark",), "colour": NAMES[1:]})
    batch = few(2, seed=9)
    assert torch.equal(again.predict_labels(batch), model.predict_labels(batch))
    finetuned = hub.load_encoder(tmp_path / "r.ckpt")
    assert isinstance(finetuned, DecodedEncoder)
    state = finetuned.state_dict()
    assert all(torch.equal(state[name], value) for name, value in model.encoder.state_dict().items())


class SaveAt4(L.Callback):
    def __init__(self, file):
        self.file = file

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == 4:
            trainer.save_checkpoint(self.file)


def test_a_run_goes_on_exactly(tmp_path):
    """In the middle of the second epoch, with dropout, whatever the global random state."""
    few_streets = StreetLabels(train=6, val=1, size=(32, 64), supersample=1)

    def run(checkpoint=None, *callbacks):
        torch.manual_seed(3)
        head = UPerNet(channels=4, pools=(1, 2), dropout=0.3)
        model = Segmentation(tiny_encoder(), head, classes=19, frozen=False, recipe=HeadRecipe(lr=0.05))
        torch.manual_seed(99 if checkpoint else 4)
        settings = {**OFF, "limit_val_batches": 0, "callbacks": [*callbacks]}
        trainer = L.Trainer(max_steps=6, max_epochs=-1, **settings)
        data = LabelledDataModule("synthetic", synthetic=few_streets, batch_size=2, num_workers=0, seed=5)
        trainer.fit(model, datamodule=data, ckpt_path=checkpoint, weights_only=True if checkpoint else None)
        assert trainer.global_step == 6
        return model.state_dict()

    whole = run(None, SaveAt4(tmp_path / "r.ckpt"))
    again = run(str(tmp_path / "r.ckpt"))
    for name, value in whole.items():
        assert torch.equal(value, again[name]), name


# ---- devices
def test_two_processes_score_like_one(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE), "PYTHONWARNINGS": "ignore"}
    shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2"}
    command = [sys.executable, str(HERE / "two_readouts.py"), "2", str(tmp_path / "two")]
    started = [
        subprocess.Popen(
            command,
            env=shared | {"RANK": rank, "LOCAL_RANK": rank},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in "01"
    ]
    main(1, str(tmp_path / "one"))
    for process in started:
        said = process.communicate(timeout=240)[1]
        assert process.returncode == 0, said[-3000:]
    one = torch.load(tmp_path / "one.0", weights_only=True)
    for rank in (0, 1):
        two = torch.load(tmp_path / f"two.{rank}", weights_only=True)
        torch.testing.assert_close(two["head"], one["head"], rtol=1e-4, atol=1e-6)
        assert two["counts"] == one["counts"]
        assert two["worst"] == one["worst"]
        for name in ("scores", "iou", "logged"):
            assert two[name] == pytest.approx(one[name], rel=1e-3), name
        assert two["loss"] == pytest.approx(one["loss"], rel=1e-4)

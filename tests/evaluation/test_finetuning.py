"""Finetuned classification: one step by hand, the course of the rate, resuming, the command, the configs."""

import copy
import json
import re
from pathlib import Path

import image_trees
import lightning as L
import numpy as np
import pytest
import torch
import yaml
from device_reads import DeviceReads
from lightning.pytorch.callbacks import ModelCheckpoint
from PIL import Image
from tiny_models import tiny_encoder, tiny_sdm

from poodle_lightning import cli, save_pretrained
from poodle_lightning.data.image_classes import ImageClassDataModule, ImageViews
from poodle_lightning.data.label_streets import StreetLabels
from poodle_lightning.data.labelled import LabelledDataModule
from poodle_lightning.evaluation.finetuning import FineTune
from poodle_lightning.evaluation.mixing import Mixing
from poodle_lightning.nn.encoder import DecodedEncoder
from poodle_lightning.nn.layer_decay import FineTuneRecipe
from poodle_lightning.nn.vit import ViT
from poodle_lightning.ops.random import fold, key_of
from poodle_lightning.types import UserError

CONFIGS = Path(__file__).parents[2] / "configs"
COLOURS = {"ant": (200, 60, 60), "bee": (60, 200, 60), "cat": (60, 60, 200)}
QUICK = FineTuneRecipe(lr=1e-2, reference_batch=None, warmup_epochs=1, min_lr=1e-4)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder, draws = tmp_path_factory.mktemp("colours"), np.random.default_rng(0)
    for split, count in (("train", 8), ("val", 4)):
        for name, colour in COLOURS.items():
            (folder / split / name).mkdir(parents=True)
            for number in range(count):
                pixels = np.array(colour) + draws.normal(0, 20, 3) + draws.normal(0, 20, (24, 28, 3))
                image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
                image.save(folder / split / name / f"{number}.png")
    return str(folder)


def data(root, batch_size=8, **kwargs):
    views = kwargs.pop("views", ImageViews(size=16, resize=16, filter="bicubic", erase=0.25))
    return ImageClassDataModule(root, views=views, num_workers=0, batch_size=batch_size, **kwargs)


def trainer(**kwargs):
    kwargs = {"enable_checkpointing": False, "limit_val_batches": 0, **kwargs}
    return L.Trainer(
        accelerator="cpu", devices=1, logger=False, enable_progress_bar=False, enable_model_summary=False,
        use_distributed_sampler=False, **kwargs,
    )  # fmt: skip


def tiny_vit(**kwargs):
    torch.manual_seed(1)
    return ViT(patch=8, dim=24, depth=2, heads=2, image_size=(16, 16), **kwargs)


def fitted(module, root, epochs=2, seed=0, **kwargs):
    torch.manual_seed(7)
    running = trainer(max_epochs=epochs, **kwargs)
    running.fit(module, datamodule=data(root, seed=seed))
    return running


def weights(module):
    return {name: value.clone() for name, value in module.state_dict().items()}


def same(one, other):
    return all(torch.equal(one[name], other[name]) for name in other) and set(one) == set(other)


def test_a_step_is_adamw_on_mixed_images_and_classes(root):
    """Epoch 0 has one batch: worked out from the batch, the draws of mixing, and AdamW's first step."""
    recipe = FineTuneRecipe(lr=3e-3, reference_batch=12, warmup_epochs=0, layer_decay=0.5)
    module = FineTune(tiny_vit(), recipe=recipe, drop_path=0.0, classes=3)
    labelled, start = data(root, batch_size=24), copy.deepcopy(module)
    given = {}

    class Gradients(L.Callback):
        def on_before_optimizer_step(self, trainer, module, optimizer):
            given.update({name: p.grad.clone() for name, p in module.named_parameters()})

    running = trainer(max_epochs=1, callbacks=[Gradients()])
    running.fit(module, datamodule=labelled)
    loader = labelled.train_dataloader()
    loader.sampler.set_epoch(0)
    (batch,) = list(loader)
    mix = Mixing().draw(fold(key_of(0, "finetuning", 0, 0, 0).reshape(1), "mixing"), (16, 16))
    assert mix.share != 1.0
    images, flipped = batch.images.float() / 255, batch.images.flip(0).float() / 255
    if mix.box is None:
        images = mix.share * images + (1 - mix.share) * flipped
    else:
        top, bottom, left, right = mix.box
        images[..., top:bottom, left:right] = flipped[..., top:bottom, left:right]
    logits = start.head(start.encoder(images).vector).log_softmax(dim=1)
    loss = torch.zeros(())
    for row, (label, other) in enumerate(zip(batch.labels, batch.labels.flip(0), strict=True)):
        for who, share in ((label, mix.share), (other, 1 - mix.share)):
            loss = loss - share * (0.9 * logits[row, who] + 0.1 * logits[row].mean()) / 24
    loss.backward()
    assert float(running.callback_metrics["train/loss"]) == pytest.approx(float(loss.detach()), rel=1e-5)
    factors = {
        "patch_embed": 0.125,
        "cls_token": 0.125,
        "pos_embed": 0.125,
        "blocks.0": 0.25,
        "blocks.1": 0.5,
    }
    moved = 0
    after = dict(module.named_parameters())
    for name, parameter in start.named_parameters():
        rate = 3e-3 * 24 / 12
        rate *= next((f for part, f in factors.items() if name.startswith(f"encoder.{part}")), 1.0)
        decay = 0.0 if parameter.ndim < 2 else 0.05
        gradient, value = parameter.grad, parameter.detach()
        assert (given[name] - gradient).abs().max() < 1e-3 * gradient.abs().max() + 1e-8, name
        clear = gradient.abs() > 1e-5
        wanted = value * (1 - rate * decay) - rate * gradient / (gradient.abs() + 1e-8)
        assert ((after[name] - wanted)[clear]).abs().max() < 2e-3 * rate, name
        moved += int(clear.sum())
    assert moved > 5000


def test_the_rate_is_set_at_every_step_and_scaled_by_the_group(root):
    recipe = FineTuneRecipe(lr=1e-3, reference_batch=None, warmup_epochs=1, course="steps", layer_decay=0.5)
    seen = []

    class Watch(L.Callback):
        def on_before_zero_grad(self, trainer, module, optimizer):
            seen.append({group["lr_scale"]: group["lr"] for group in optimizer.param_groups})

    module = FineTune(tiny_vit(), recipe=recipe)
    fitted(module, root, epochs=3, callbacks=[Watch()])
    rates = recipe.rates(3, 3, 8)
    assert module.rates == rates
    assert len(seen) == 9
    for step, row in enumerate(seen):
        wanted = {scale: scale * rates.at(step // 3, step) for scale in (0.125, 0.25, 0.5, 1.0)}
        assert row == pytest.approx(wanted)


def test_a_training_step_reads_nothing_from_the_device(root):
    found = []

    class Watched(FineTune):
        def training_step(self, batch, batch_idx):
            with DeviceReads([batch.images, batch.labels, *self.parameters()]) as reads:
                loss = super().training_step(batch, batch_idx)
            found.append(reads.found)
            return loss

    fitted(Watched(tiny_vit(), recipe=QUICK, drop_path=0.5), root)
    assert found == [[]] * 6


def test_it_learns_and_reports_last_and_best(root):
    module = FineTune(tiny_vit(), recipe=QUICK, drop_path=0.1, watch_every=2, protocol="colours")
    running = fitted(module, root, epochs=6)
    watched = dict(module.best)
    running.limit_val_batches = 1.0
    running.validate(module, datamodule=running.datamodule, verbose=False)
    scores = module.scores()
    assert scores.scores["top1"] > 0.7
    assert scores.scores["top1_best"] == max(watched["top1"], scores.scores["top1"])
    assert (scores.protocol, scores.headline, scores.counts) == ("colours", "top1", {"images": 12})
    assert scores.details["mixing"]["init_args"]["cutmix"] == 1.0
    assert scores.details["drop_path"] == 0.1


def test_a_run_is_a_function_of_its_seed(root):
    made = []
    for disturbed, seed in ((False, 0), (True, 0), (False, 1)):
        module = FineTune(tiny_vit(), recipe=QUICK, drop_path=0.3, classes=3)
        if disturbed:
            torch.rand(5), np.random.rand(5)  # noqa: NPY002
        fitted(module, root, seed=seed)
        made.append(weights(module))
    assert same(made[0], made[1])
    assert not same(made[0], made[2])


def test_a_resumed_run_goes_on_as_if_nothing_had_been(root, tmp_path):
    whole = FineTune(tiny_vit(), recipe=QUICK, drop_path=0.2)
    keep = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    fitted(whole, root, epochs=4, callbacks=[keep], enable_checkpointing=True)
    torch.manual_seed(99)
    again = FineTune(tiny_vit(), recipe=QUICK, drop_path=0.2)
    trainer(max_epochs=4).fit(again, datamodule=data(root), ckpt_path=str(tmp_path / "epoch=1.ckpt"))
    assert same(weights(whole), weights(again))
    assert again.best == whole.best


def test_a_run_that_goes_on_with_other_epochs_keeps_its_horizon(root, tmp_path):
    keep = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    whole = FineTune(tiny_vit(), recipe=QUICK)
    fitted(whole, root, epochs=2, callbacks=[keep], enable_checkpointing=True)
    again = FineTune(tiny_vit(), recipe=QUICK)
    with pytest.warns(UserWarning, match=r"along the checkpoint's Rates.*horizon=2.*not Rates.*horizon=5"):
        trainer(max_epochs=5).fit(again, datamodule=data(root), ckpt_path=str(tmp_path / "epoch=0.ckpt"))
    assert again.rates == whole.rates == QUICK.rates(2, 3, 8)


def test_accumulated_batches_make_one_for_the_rate(root):
    recipe = FineTuneRecipe(lr=1e-3, reference_batch=4, warmup_epochs=1)
    module = FineTune(tiny_vit(), recipe=recipe)
    fitted(module, root, epochs=2, accumulate_grad_batches=3)
    assert module.rates.lr == pytest.approx(1e-3 * 8 * 3 / 4)


def test_a_look_before_training_is_no_result(root):
    """Lightning's sanity check scores an untrained layer: it must not be the best of all epochs."""
    seen = []

    class Watch(L.Callback):
        def on_sanity_check_end(self, trainer, module):
            seen.append((module.accuracy.images, dict(module.best)))

    module = FineTune(tiny_vit(), recipe=QUICK)
    fitted(module, root, limit_val_batches=1.0, num_sanity_val_steps=-1, callbacks=[Watch()])
    assert seen == [(12, {})]
    assert module.best


def test_a_checkpoint_gives_it_back(root, tmp_path):
    module = FineTune(tiny_vit(), recipe=QUICK, mixing=Mixing(mixup=0.0), drop_path=0.2)
    fitted(module, root).save_checkpoint(tmp_path / "tuned.ckpt")
    again = FineTune.load_from_checkpoint(tmp_path / "tuned.ckpt").eval()
    images = torch.randint(0, 256, (2, 3, 16, 16), generator=torch.Generator().manual_seed(0))
    assert torch.equal(again(images), module.eval()(images))
    assert again.mixing == Mixing(mixup=0.0)
    assert again.encoder.init_args["drop_path"] == 0.2
    assert again.details() == module.details()
    assert again.details()["drop_path"] == 0.2
    assert again.the_classes().names == ("ant", "bee", "cat")


def test_the_layer_begins_as_it_is_asked_to():
    made = FineTune(tiny_vit(), classes=[f"c{n}" for n in range(200)]).head
    small = FineTune(tiny_vit(), classes=200, head_scale=0.001).head
    assert torch.allclose(small.weight, 0.001 * made.weight)
    # cut at ±2, not at two deviations: 4.6 % of a normal lie beyond those
    assert float((made.weight.abs() > 0.04).float().mean()) == pytest.approx(0.0455, abs=0.012)
    assert float(made.weight.detach().std()) == pytest.approx(0.02, rel=0.04)
    assert not made.bias.any()


def test_the_given_encoder_stays_and_what_has_no_gradient_is_frozen():
    encoder = tiny_vit(mask_token=True)
    before = weights(encoder)
    for drop_path in (0.1, 0.0):
        module = FineTune(encoder, drop_path=drop_path, classes=3)
        assert module.encoder is not encoder
        assert not module.encoder.mask_token.requires_grad
        loss = module(torch.rand(2, 3, 16, 16)).square().sum()
        loss.backward()
        assert all(p.grad is not None for p in module.parameters() if p.requires_grad)
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.add_(1.0)
        assert same(weights(encoder), before)
        assert encoder.mask_token.requires_grad
        assert all(p.grad is None for p in encoder.parameters())


def test_of_an_encoder_with_a_decoder_only_the_encoder_is_trained():
    encoder = tiny_encoder()
    module = FineTune(DecodedEncoder(encoder, tiny_sdm(encoder)), drop_path=0.0, classes=3)
    assert type(module.encoder) is type(encoder)
    module(torch.rand(2, 3, 32, 32)).square().sum().backward()
    assert all(p.grad is not None for p in module.parameters())


def test_what_does_not_fit_is_one_line(root):
    with pytest.raises(UserError, match="set drop_path 0"):
        FineTune(tiny_encoder())
    module = FineTune(tiny_encoder(), recipe=FineTuneRecipe(layer_decay=0.75, warmup_epochs=0), drop_path=0.0)
    started = []

    class Watch(L.Callback):
        def on_fit_start(self, trainer, module):
            started.append(module)

    with pytest.raises(UserError, match="no blocks of a vision transformer"):
        fitted(module, root, callbacks=[Watch()])
    assert not started
    with pytest.raises(UserError, match=r"finetuned classification.*max_epochs"):
        trainer(max_epochs=-1, max_steps=1).fit(FineTune(tiny_vit()), datamodule=data(root))
    with pytest.raises(UserError, match="5 epochs does not end before the 2"):
        fitted(FineTune(tiny_vit()), root)
    with pytest.raises(UserError, match="fit and validate it first"):
        FineTune(tiny_vit(), classes=3).scores()
    streets = LabelledDataModule("synthetic", synthetic=StreetLabels(2, 2, (32, 64)), num_workers=0)
    with pytest.raises(UserError, match="ImageClassDataModule"):
        trainer(max_epochs=1).fit(FineTune(tiny_vit()), datamodule=streets)


# ---- the command and the shipped configurations
def test_evaluate_finetunes_cifar_from_its_own_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    image_trees.cifar10(tmp_path / "cifar")
    save_pretrained(tiny_vit(), "encoder")
    words = [
        "--data.root=cifar", "--data.views.size=16", "--data.views.resize=16", "--data.num_workers=0",
        "--data.batch_size=10", "--model.recipe.warmup_epochs=1", "--model.watch_every=1",
        "--trainer.max_epochs=2", "--trainer.devices=1", "--trainer.accelerator=cpu",
        "--trainer.precision=32-true", "--trainer.enable_progress_bar=false",
    ]  # fmt: skip
    config = "evaluation/finetune_cifar10.yaml"
    assert cli.main(["evaluate", "--config", config, "--encoder", "encoder", *words]) == 0
    (result,) = Path("runs").rglob("result.json")
    found = json.loads(result.read_text())
    assert (found["protocol"], found["headline"]) == ("CIFAR-10, finetuned", "top1")
    assert found["counts"]["images"] == 10
    assert found["step"] == 10
    assert found["details"]["recipe"]["init_args"]["lr"] == 7.5e-6


SMALL = {"cifar10": 7.5e-6, "cifar100": 7.5e-6, "flowers": 7.5e-6, "cars": 7.5e-5, "inat18": 5e-5}


def built(name, tmp_path):
    source = {"imagenet": "folder", "flowers": "flowers102"}.get(name, name)
    words = [f"--data.root={image_trees.TREES[source](tmp_path)}"]
    given = yaml.safe_load((CONFIGS / "evaluation" / f"finetune_{name}.yaml").read_text())
    return *cli.build([f"evaluation/finetune_{name}.yaml"], words), given["trainer"]


def test_there_is_a_config_for_every_column_of_table_11():
    names = {path.stem.removeprefix("finetune_") for path in (CONFIGS / "evaluation").glob("finetune_*.yaml")}
    assert names == {*SMALL, "imagenet"}


@pytest.mark.parametrize("name", sorted(SMALL))
def test_small_data_sets_have_ibots_numbers(name, tmp_path):
    """bytedance/ibot: run.sh, evaluation/eval_cls.py, evaluation/README.md (ViT-S on iNaturalist)."""
    module, labelled, given = built(name, tmp_path)
    recipe, views = module.recipe, labelled.views
    assert isinstance(module, FineTune)
    assert recipe == FineTuneRecipe(lr=SMALL[name])
    assert given["max_epochs"] == (360 if name == "inat18" else 1000)
    assert (labelled.batch_size, given["devices"], labelled.repeats) == (96, 8, 3)
    assert (recipe.reference_batch, recipe.min_lr, recipe.warmup_lr, recipe.warmup_epochs) == (
        512,
        1e-5,
        1e-6,
        5,
    )
    assert (recipe.weight_decay, recipe.layer_decay, module.init_args["drop_path"]) == (0.05, 1.0, 0.1)
    assert module.mixing == Mixing(0.8, 1.0, 1.0, 0.5, 0.1)
    assert (views.randaugment, views.filter) == ("rand-m9-mstd0.5-inc1", "bicubic")
    assert (views.erase, views.size, views.resize) == (0.1 if name == "inat18" else 0.25, 224, 256)
    assert module.head_scale == 1.0


def test_imagenet_has_beits_numbers(tmp_path):
    """bytedance/ibot: evaluation/classification_layer_decay, run.sh, evaluation/README.md (ViT-S)."""
    module, labelled, given = built("imagenet", tmp_path)
    recipe, views = module.recipe, labelled.views
    assert (given["max_epochs"], labelled.batch_size, given["devices"], labelled.repeats) == (200, 128, 8, 1)
    assert (recipe.course, recipe.layer_decay, recipe.warmup_epochs, recipe.min_lr) == (
        "steps",
        0.75,
        20,
        1e-6,
    )
    assert (recipe.weight_decay, recipe.decay_tokens, recipe.reference_batch) == (0.05, False, None)
    assert (module.head_scale, module.init_args["drop_path"], module.mixing) == (0.001, 0.1, Mixing())
    assert (views.test_filter, views.filter, views.erase) == ("bilinear", "bicubic", 0.25)


@pytest.mark.parametrize("name", [*sorted(SMALL), "imagenet"])
def test_configs_have_a_header(name):
    text = (CONFIGS / "evaluation" / f"finetune_{name}.yaml").read_text()
    head = [line for line in text.splitlines() if line.startswith("#")]
    for key in ("command", "hardware", "hours", "expected", "obtained"):
        assert any(re.match(rf"# {key}\s+\S", line) for line in head), f"finetune_{name}.yaml says no {key!r}"
    assert f"evaluation/finetune_{name}.yaml" in "\n".join(head)

from pathlib import Path

import lightning as L
import numpy as np
import pytest
import torch
import yaml
from tiny_models import make_clip, stirred, tiny_crops, tiny_encoder, tiny_head, tiny_recipe, tiny_vit
from torch.utils.data import DataLoader

import poodle_lightning
from poodle_lightning import DINO, IBOT, DoRA, from_pretrained, save_pretrained
from poodle_lightning.augment.geometric import ResizedCrop
from poodle_lightning.augment.multicrop import MultiCrop, crop_keys, first_frames
from poodle_lightning.methods.distillation import other_views, warmed_up
from poodle_lightning.nn.optim import Recipe
from poodle_lightning.types import UserError


def tiny(encoder=None, crops=None, **kwargs) -> DINO:
    torch.manual_seed(0)
    recipe = kwargs.pop("recipe", None) or tiny_recipe()
    return DINO(encoder or tiny_vit(), tiny_head(), crops or tiny_crops(), recipe=recipe, **kwargs)


def fit(method, clips, **kwargs) -> L.Trainer:
    trainer = L.Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, **kwargs,
    )  # fmt: skip
    trainer.fit(method, DataLoader(clips, batch_size=None, collate_fn=lambda clip: clip))
    return trainer


@pytest.mark.parametrize(("ends", "warmup"), [((0.04, 0.07), 30), ((0.04, 0.04), 0), ((0.02, 0.05), 1)])
def test_temperature_is_the_published_array_in_every_epoch(ends, warmup):
    """facebookresearch/dino DINOLoss: np.linspace(start, end, warm-up), then the end."""
    published = np.concatenate([np.linspace(*ends, warmup), np.full(100 - warmup, ends[1])])
    assert [warmed_up(epoch, ends, warmup) for epoch in range(100)] == pytest.approx(published, rel=1e-12)


class Epochs(L.Callback):
    """The last layer and the temperature behind every epoch."""

    def __init__(self) -> None:
        self.seen = []

    def on_train_epoch_start(self, trainer, method):
        layer = method.student.head.last_layer
        rest = method.student.head.mlp[0].weight.detach().clone()
        self.seen.append((layer.weight_v.detach().clone(), rest, method.temperature))

    on_train_end = on_train_epoch_start


def test_last_layer_is_frozen_for_the_first_epochs_and_the_temperature_rises():
    method = tiny(freeze_last_epochs=1, teacher_temperature=(0.04, 0.07), teacher_warmup_epochs=3)
    epochs = Epochs()
    fit(method, [make_clip(seed=0), make_clip(seed=1)], max_epochs=3, callbacks=[epochs])
    (start, rest, a), (first, moved, b), (second, _, c), _ = epochs.seen
    assert torch.equal(start, first)
    assert not torch.equal(rest, moved)
    assert not torch.equal(first, second)
    assert [a, b, c] == pytest.approx([0.04, 0.055, 0.07])


def test_centre_moves_once_per_optimiser_step_to_the_mean_of_all_teacher_outputs():
    clips = [make_clip(seed=0), make_clip(batch=4, seed=1)]
    method = tiny()
    with torch.no_grad():
        outputs = torch.cat([method.teacher.logits(method.crops(clip).large.flatten(0, 1)) for clip in clips])
    fit(method, clips, max_steps=1, accumulate_grad_batches=2)
    assert torch.allclose(method.centre.value, 0.1 * outputs.mean(dim=0), atol=1e-6)


def test_validation_and_pictures_leave_the_centre():
    method = tiny().eval()
    method.losses(make_clip())
    method.look(make_clip())
    method.after_step()
    assert method.centre.value.abs().max() == 0


def test_only_the_student_drops_paths_and_what_it_drops_follows_from_the_keys():
    method = tiny(tiny_vit(drop_path=0.5, depth=4)).train()
    clip = make_clip(batch=4)
    images = method.crops(clip).large.flatten(0, 1)
    assert torch.equal(method.teacher.logits(images), method.teacher.logits(images))
    assert not torch.equal(method.student.logits(images), method.student.logits(images))
    found = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        found.append(method.training_step(clip, 0))
        after = torch.rand(1)
        torch.manual_seed(seed)
        assert torch.equal(after, torch.rand(1))  # the global generator stays where it was
    assert torch.equal(found[0], found[1])


CONFIGS = Path(__file__).parents[2] / "configs" / "method"


@pytest.mark.parametrize("name", ["DINO", "IBOT", "AttMask", "DoRA", "MAE"])
def test_without_a_recipe_a_method_has_its_papers(name):
    config = yaml.safe_load((CONFIGS / f"{name.lower()}_vits.yaml").read_text())
    assert config["class_path"] == f"poodle_lightning.{name}"
    with torch.device("meta"):
        method = getattr(poodle_lightning, name)()
    assert method.recipe == Recipe(**config["init_args"]["recipe"])
    assert method.recipe != Recipe()


@pytest.mark.parametrize("kind", [DINO, DoRA])
def test_a_mask_token_that_nothing_uses_is_not_trained(kind):
    """DDP would wait for its gradient."""
    torch.manual_seed(0)
    crops = tiny_crops(views=1 if kind is DoRA else 2)
    method = kind(tiny_vit(mask_token=True), tiny_head(), crops, recipe=tiny_recipe())
    assert not method.student.encoder.mask_token.requires_grad
    sum(method.losses(make_clip()).values()).backward()
    assert all(p.grad is not None for p in method.parameters() if p.requires_grad)
    method.target.update(method.online, 0.5)  # which has as many parameters
    assert IBOT(method.student.encoder, tiny_head(), tiny_crops()).student.encoder.mask_token.requires_grad


def test_the_teacher_is_exported(tmp_path):
    method = stirred(tiny()).float()
    images = torch.rand(2, 3, 32, 32)
    ours = method.teacher.encoder(images).vector
    assert not torch.allclose(ours, method.student.encoder(images).vector, atol=1e-3)
    save_pretrained(method.backbone(), tmp_path / "folder")
    trainer = L.Trainer(accelerator="cpu", logger=False, barebones=True)
    trainer.strategy.connect(method)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    for place in ("folder", "a.ckpt"):
        assert torch.equal(ours, from_pretrained(tmp_path / place)(images).vector)
    again = DINO.load_from_checkpoint(tmp_path / "a.ckpt")
    assert torch.equal(again.centre.value, method.centre.value)


def test_pairs_of_the_same_view_are_left_out():
    """DINO's code: a mean over all teacher views u and student views v with u ≠ v."""
    losses = torch.rand(2, 5, dtype=torch.float64)
    apart = [losses[u, v] for u in range(2) for v in range(5) if u != v]
    assert float(other_views(losses)) == pytest.approx(float(sum(apart) / len(apart)))
    with pytest.raises(UserError, match=r"crops\.views"):
        tiny(crops=tiny_crops(views=1, locals=0)).losses(make_clip())


def test_keys_of_crops_do_not_depend_on_the_batch():
    clip = make_clip(batch=4, frames=3)
    keys = crop_keys(clip, "a", 2)
    assert keys.shape == (2, 4, 3)
    assert len(keys.unique()) == 24
    assert torch.equal(keys[:, 2:], crop_keys(clip[2:], "a", 2))
    rows = torch.arange(2 * 12).unflatten(0, (2, 12))
    assert first_frames(rows, 3).tolist() == [[0, 12], [3, 15], [6, 18], [9, 21]]


@pytest.mark.parametrize("which", ["large", "small"])
def test_a_patch_that_does_not_divide_the_crop_is_named(which):
    sizes = {"large": ResizedCrop((32, 32)), "small": ResizedCrop((16, 16)), which: ResizedCrop((36, 32))}
    with pytest.raises(UserError, match=rf"crops\.{which}\.size=\[36, 32\].*patches of 8"):
        tiny(crops=MultiCrop(**sizes))


def test_crops_that_are_not_made_and_convolutions_are_not_asked_to_divide():
    small = ResizedCrop((18, 18))
    tiny(crops=MultiCrop(ResizedCrop((32, 32)), small, locals=0))
    tiny(tiny_encoder(), crops=MultiCrop(ResizedCrop((36, 36)), small))

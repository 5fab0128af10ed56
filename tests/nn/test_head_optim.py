"""The recipe of readouts: every step's rate, every parameter's decay and factor."""

import pytest
import torch
from torch import nn

from poodle_lightning.nn.head_optim import HeadRecipe, build_head_optimizer, head_groups, layer_scales
from poodle_lightning.nn.optim import Schedule
from poodle_lightning.nn.resnet import ResNet
from poodle_lightning.nn.timm_encoder import TimmEncoder
from poodle_lightning.nn.vit import ViT
from poodle_lightning.types import UserError


def tiny_vit(depth=12, **kwargs):
    return ViT(patch=8, dim=8, depth=depth, heads=2, image_size=(16, 16), **kwargs)


def test_poly_equals_its_closed_form_at_every_step():
    schedule = HeadRecipe(lr=0.02, min_lr=1e-4, power=0.9).schedule(200)
    for step in range(260):
        expected = 1e-4 + (0.02 - 1e-4) * max(0.0, 1 - step / 200) ** 0.9
        assert schedule.lr(step) == pytest.approx(expected, rel=1e-12)


def test_warm_up_equals_mmcvs():
    """mmcv ``LrUpdaterHook.get_warmup_lr``: the regular rate times ``1 - (1 - i / n) (1 - ratio)``."""
    recipe = HeadRecipe(lr=6e-5, min_lr=0.0, power=1.0, warmup_steps=30, warmup_ratio=1e-6)
    schedule = recipe.schedule(100)
    for step in range(100):
        regular = 6e-5 * (1 - step / 100)
        factor = 1 - (1 - step / 30) * (1 - 1e-6) if step < 30 else 1.0
        assert schedule.lr(step) == pytest.approx(regular * factor, rel=1e-12)


def test_steps_equal_torchs():
    recipe = HeadRecipe(lr=0.02, decay="step", milestones=(6, 8))
    schedule = recipe.schedule(10)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.02)
    theirs = torch.optim.lr_scheduler.MultiStepLR(optimizer, [6, 8], gamma=0.1)
    for step in range(10):
        assert schedule.lr(step) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-12)
        optimizer.step()
        theirs.step()
    assert HeadRecipe(decay="constant").schedule(5).lr(4) == 0.02


def test_the_horizon_is_the_recipes_or_the_runs():
    assert HeadRecipe(horizon_steps=7).schedule(100).horizon == 7
    assert HeadRecipe().schedule(100).horizon == 100
    with pytest.raises(UserError, match="max_steps"):
        HeadRecipe().schedule(-1)
    with pytest.raises(UserError, match="warm-up of 9"):
        HeadRecipe(warmup_steps=9).schedule(9)


@pytest.mark.parametrize(
    "kwargs", [{"lr": 0.0}, {"layer_decay": 0.0}, {"milestones": (3,)}, {"decay": "step"}]
)
def test_recipes_that_make_no_sense(kwargs):
    with pytest.raises(UserError):
        HeadRecipe(**kwargs)


def test_schedule_survives_a_checkpoint(tmp_path):
    schedule = HeadRecipe(decay="step", milestones=(6, 8)).schedule(10)
    torch.save(schedule.state_dict(), tmp_path / "s.pt")
    assert Schedule.from_state(torch.load(tmp_path / "s.pt", weights_only=True)) == schedule


def test_a_checkpoint_of_before_has_the_methods_schedule():
    old = {"base_lr": 1.0, "min_lr": 0.0, "warmup": 2, "horizon": 10, "ema_start": 0.9, "ema_end": 1.0}
    assert Schedule.from_state(old).lr(1) == 0.5
    assert Schedule.from_state(old).lr(6) == pytest.approx(0.5)


def ibots_layer(name, layers):
    """The rule of iBOT's ``get_num_layer_for_vit``, as a table; names as in its ``backbone.``."""
    if name in ("cls_token", "mask_token", "pos_embed") or name.startswith("patch_embed"):
        return 0
    return int(name.split(".")[1]) + 1 if name.startswith("blocks") else layers - 1


@pytest.mark.parametrize("depth", [12, 3])
def test_layer_decay_equals_ibots(depth):
    encoder = tiny_vit(depth)
    layers = depth + 2
    scales = layer_scales(encoder, 0.9)
    assert set(scales) == {name for name, _ in encoder.named_parameters()}
    for name, scale in scales.items():
        assert scale == pytest.approx(0.9 ** (layers - ibots_layer(name, layers) - 1)), name
    assert scales["pos_embed"] == pytest.approx(0.9 ** (depth + 1))
    assert scales["norm.weight"] == 1.0


def test_layer_decay_of_a_timm_vit_is_the_same():
    with torch.device("meta"):
        theirs = layer_scales(TimmEncoder("vit_tiny_patch16_224"), 0.8)
        ours = layer_scales(ViT(dim=192, heads=3), 0.8)
    theirs = {name.removeprefix("model."): scale for name, scale in theirs.items()}
    assert theirs == ours


def test_what_does_not_decay():
    parts = {"encoder": tiny_vit(2), "head": nn.Conv2d(8, 3, 1)}
    recipe = HeadRecipe(optimizer="adamw", weight_decay=0.05, decay_all=False, layer_decay=0.9)
    found = {id(p): g for g in head_groups(recipe, parts) for p in g["params"]}
    for part, module in parts.items():
        for name, parameter in module.named_parameters():
            exempt = parameter.ndim == 1 or name in ("pos_embed", "cls_token")
            assert found[id(parameter)]["weight_decay"] == (0.0 if exempt else 0.05), f"{part}.{name}"
    assert found[id(parts["head"].weight)]["lr_scale"] == 1.0
    assert found[id(parts["encoder"].pos_embed)]["lr_scale"] == pytest.approx(0.9**3)
    everything = head_groups(HeadRecipe(weight_decay=0.05), parts)
    assert [group["weight_decay"] for group in everything] == [0.05]


def test_the_encoders_factor_and_frozen_parameters():
    parts = {"encoder": ResNet(10, width=8), "head": nn.Conv2d(8, 3, 1)}
    parts["encoder"].layer1.requires_grad_(False)
    groups = head_groups(HeadRecipe(encoder_lr=0.1), parts)
    assert {group["lr_scale"] for group in groups} == {0.1, 1.0}
    count = sum(p.numel() for group in groups for p in group["params"])
    assert count == sum(p.numel() for part in parts.values() for p in part.parameters() if p.requires_grad)
    built = build_head_optimizer(HeadRecipe(optimizer="adamw"), parts)
    assert isinstance(built, torch.optim.AdamW)


def test_what_cannot_be_optimised_is_refused():
    with pytest.raises(UserError, match="no blocks of a vision transformer"):
        head_groups(HeadRecipe(layer_decay=0.9), {"encoder": ResNet(10, width=8)})
    with pytest.raises(UserError, match="no trainable parameters"):
        build_head_optimizer(HeadRecipe(), {"head": nn.ReLU()})

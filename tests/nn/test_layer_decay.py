"""Layer decay against timm's, the courses of the rate against timm's scheduler and NumPy."""

import numpy as np
import pytest
import timm
import torch
from timm.optim import param_groups_layer_decay
from timm.scheduler import CosineLRScheduler
from tiny_models import tiny_encoder
from torch import nn

from poodle_lightning.nn.layer_decay import FineTuneRecipe, Rates, finetune_groups, finetune_optimizer
from poodle_lightning.nn.vit import ViT
from poodle_lightning.types import UserError


def tiny_vit(depth=4):
    return ViT(patch=8, dim=24, depth=depth, heads=2, image_size=(16, 16))


def by_name(groups, *modules):
    """Name → (factor of the rate, decay); the first module's names are bare, those of a head start so."""
    names = {}
    for prefix, module in zip(("", "head."), modules, strict=False):
        names |= {parameter: prefix + name for name, parameter in module.named_parameters()}
    return {
        names[parameter]: (group["lr_scale"], group["weight_decay"])
        for group in groups
        for parameter in group["params"]
    }


@pytest.mark.parametrize("decay", [0.75, 0.65, 0.9])
def test_factors_are_timms_but_for_the_final_norm(decay):
    """timm counts the final norm to the last block, BEiT to the head."""
    encoder, head = tiny_vit(), nn.Linear(24, 3)
    recipe = FineTuneRecipe(layer_decay=decay, decay_tokens=False)
    ours = by_name(finetune_groups(recipe, encoder, head), encoder, head)
    twin = timm.create_model(
        "vit_tiny_patch16_224", img_size=16, patch_size=8, depth=4, embed_dim=24, num_heads=2, num_classes=3
    )
    theirs = param_groups_layer_decay(
        twin, weight_decay=0.05, no_weight_decay_list=twin.no_weight_decay(), layer_decay=decay
    )
    theirs = by_name(theirs, twin)
    assert set(ours) == set(theirs)
    for name, (factor, weight_decay) in theirs.items():
        wanted = 1.0 if name.startswith("norm.") else factor
        assert ours[name] == (pytest.approx(wanted, abs=1e-12), weight_decay), name
    assert ours["pos_embed"][0] == pytest.approx(decay**5)
    assert ours["blocks.3.mlp.fc1.weight"][0] == pytest.approx(decay)


def test_without_layer_decay_all_have_the_rate_and_tokens_decay_where_asked():
    encoder, head = tiny_vit(1), nn.Linear(24, 3)
    found = by_name(finetune_groups(FineTuneRecipe(), encoder, head), encoder, head)
    assert {factor for factor, _ in found.values()} == {1.0}
    assert {name for name, (_, decay) in found.items() if not decay} == {
        name for name in found if name.endswith("bias") or "norm" in name
    }
    kept = by_name(finetune_groups(FineTuneRecipe(decay_tokens=False), encoder, head), encoder, head)
    assert {name for name in found if found[name] != kept[name]} == {"cls_token", "pos_embed"}


def test_frozen_parameters_are_in_no_group():
    encoder, head = tiny_vit(1), nn.Linear(24, 3)
    encoder.requires_grad_(False)
    optimizer = finetune_optimizer(FineTuneRecipe(betas=[0.9, 0.99]), encoder, head)
    assert sum(len(group["params"]) for group in optimizer.param_groups) == 2
    assert optimizer.defaults["betas"] == (0.9, 0.99)
    head.requires_grad_(False)
    with pytest.raises(UserError, match="nothing to finetune"):
        finetune_groups(FineTuneRecipe(), encoder, head)


def test_a_network_without_blocks_has_no_layer_decay():
    with pytest.raises(UserError, match="no blocks of a vision transformer"):
        finetune_groups(FineTuneRecipe(layer_decay=0.75), tiny_encoder(), nn.Linear(8, 3))
    assert finetune_groups(FineTuneRecipe(), tiny_encoder(), nn.Linear(8, 3))


@pytest.mark.parametrize(("epochs", "warmup", "lr"), [(1000, 5, 7.5e-6), (40, 0, 1e-3), (7, 3, 5e-5)])
def test_epochs_are_timms_cosine(epochs, warmup, lr):
    rates = FineTuneRecipe(lr=lr, warmup_epochs=warmup).rates(epochs, 12, 768)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=lr * 768 / 512)
    theirs = CosineLRScheduler(optimizer, t_initial=epochs, lr_min=1e-5, warmup_t=warmup, warmup_lr_init=1e-6)
    for epoch in range(epochs):
        assert rates.at(epoch, 12 * epoch + 5) == pytest.approx(theirs._get_lr(epoch)[0], rel=1e-12)


@pytest.mark.parametrize(("epochs", "warmup", "steps"), [(200, 20, 5), (6, 1, 7)])
def test_steps_are_beits_cosine(epochs, warmup, steps):
    recipe = FineTuneRecipe(lr=4e-3, reference_batch=None, min_lr=1e-6, warmup_epochs=warmup, course="steps")
    rates = recipe.rates(epochs, steps, 1024)
    first = np.linspace(0, 4e-3, warmup * steps)
    left = epochs * steps - len(first)
    wanted = [*first, *(1e-6 + 0.5 * (4e-3 - 1e-6) * (1 + np.cos(np.pi * np.arange(left) / left)))]
    found = [rates.at(step // steps, step) for step in range(epochs * steps)]
    assert found == pytest.approx(wanted, rel=1e-12, abs=1e-15)
    assert rates.at(epochs, epochs * steps) == 1e-6
    assert Rates.from_state(rates.state_dict()) == rates


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"lr": 0.0}, "above 0"), ({"min_lr": -1e-6}, "below 0"), ({"layer_decay": 0.0}, "up to 1"),
        ({"layer_decay": 1.5}, "up to 1"), ({"reference_batch": 0}, "at least 1"),
    ],
)  # fmt: skip
def test_numbers_out_of_range_are_refused(wrong, said):
    with pytest.raises(UserError, match=said):
        FineTuneRecipe(**wrong)


def test_a_warm_up_that_does_not_end_is_refused():
    with pytest.raises(UserError, match=r"of 5 epochs does not end before the 5 .*max_epochs"):
        FineTuneRecipe().rates(5, 10, 512)

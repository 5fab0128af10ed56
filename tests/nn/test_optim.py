import copy

import numpy as np
import pytest
import torch
from torch import nn

from poodle_lightning.nn.ema import EMA
from poodle_lightning.nn.heads import MLP
from poodle_lightning.nn.optim import Recipe, Schedule, build_optimizer, parameter_groups
from poodle_lightning.nn.resnet import ResNet
from poodle_lightning.types import UserError


def test_groups_leave_out_biases_and_one_dimensional_parameters():
    module = nn.ModuleDict({"encoder": ResNet(10, width=8), "head": MLP(64, 16, 8), "norm": nn.LayerNorm(3)})
    module["target"] = EMA(module["head"])
    decayed, exempt = parameter_groups(module, 0.01)
    assert (decayed["weight_decay"], exempt["weight_decay"]) == (0.01, 0.0)
    names = {id(p): name for name, p in module.named_parameters()}
    layers = dict(module.named_modules())
    for group, wanted in ((decayed, True), (exempt, False)):
        for parameter in group["params"]:
            name = names[id(parameter)]
            owner, _, kind = name.rpartition(".")
            assert (isinstance(layers[owner], nn.Conv2d | nn.Linear) and kind == "weight") is wanted, name
    found = [id(p) for group in (decayed, exempt) for p in group["params"]]
    assert sorted(found) == sorted(id(p) for p in module.parameters() if p.requires_grad)
    assert not {id(p) for p in module["target"].parameters()} & set(found)


class ManyBiases(nn.Module):
    def __init__(self):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(2, 3))
        self.position_bias = nn.Parameter(torch.zeros(2, 3))
        self.scale = nn.Parameter(torch.zeros(()))


def test_groups_equal_timms():
    from timm.optim import param_groups_weight_decay

    module = nn.Sequential(ResNet(10, width=8), MLP(64, 16, 8), ManyBiases())
    exempt, decayed = param_groups_weight_decay(module, 0.01)
    ours = parameter_groups(module, 0.01)
    for mine, theirs in zip(ours, (decayed, exempt), strict=True):
        assert {id(p) for p in mine["params"]} == {id(p) for p in theirs["params"]}
        assert mine["weight_decay"] == theirs["weight_decay"]


def test_empty_groups_are_left_out():
    assert len(parameter_groups(nn.Linear(2, 2, bias=False), 0.1)) == 1
    with pytest.raises(UserError, match="no trainable"):
        build_optimizer(Recipe(), nn.ReLU(), 1)


def numpy_run(optimizer, recipe, weights, gradients):
    """Each paper's update in float64, one parameter after the other. ``weights``: {name: array}."""
    state = {name: (np.zeros_like(w), np.zeros_like(w)) for name, w in weights.items()}
    for step, gradient in enumerate(gradients, start=1):
        for name, w in weights.items():
            g, decay = gradient[name], recipe.weight_decay if w.ndim > 1 else 0.0
            m, v = state[name]
            if optimizer == "adamw":
                b1, b2 = recipe.betas
                m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g
                w = w * (1 - recipe.lr * decay)
                w = w - recipe.lr * (m / (1 - b1**step)) / (np.sqrt(v / (1 - b2**step)) + recipe.eps)
            else:
                g = g + decay * w
                if optimizer == "lars" and w.ndim > 1:
                    norm_w, norm_g = np.linalg.norm(w), np.linalg.norm(gradient[name])
                    g = g * 0.001 * norm_w / (norm_g + decay * norm_w)
                m = recipe.sgd_momentum * m + g
                w = w - recipe.lr * m
            weights[name], state[name] = w, (m, v)
    return weights


@pytest.mark.parametrize("decay", [0.1, 0.0])
@pytest.mark.parametrize("optimizer", ["adamw", "sgd", "lars"])
def test_optimisers_equal_their_papers(optimizer, decay):
    torch.manual_seed(0)
    module = nn.Linear(5, 3).double()
    recipe = Recipe(optimizer=optimizer, lr=0.05, weight_decay=decay)
    gradients = [
        {n: np.random.default_rng([t, len(n)]).normal(size=p.shape) for n, p in module.named_parameters()}
        for t in range(6)
    ]
    expected = numpy_run(
        optimizer, recipe, {n: p.detach().numpy().copy() for n, p in module.named_parameters()}, gradients
    )
    built = build_optimizer(recipe, module, global_batch=128)
    for gradient in gradients:
        for name, parameter in module.named_parameters():
            parameter.grad = torch.from_numpy(gradient[name])
        built.step()
    for name, parameter in module.named_parameters():
        np.testing.assert_allclose(parameter.detach().numpy(), expected[name], rtol=1e-6, atol=1e-9)


def test_lars_does_not_adapt_one_dimensional_parameters():
    module = nn.Linear(4, 4)
    before = copy.deepcopy(module)
    built = build_optimizer(Recipe(optimizer="lars", lr=0.1, weight_decay=0.0), module, 128)
    for parameter in module.parameters():
        parameter.grad = torch.ones_like(parameter)
    built.step()
    torch.testing.assert_close(module.bias, before.bias - 0.1)  # plain SGD
    ratio = 0.001 * before.weight.norm() / 4.0  # the gradient of ones has the norm 4
    torch.testing.assert_close(module.weight, before.weight - 0.1 * ratio)


@pytest.mark.parametrize(("scale", "expected"), [("none", 0.2), ("linear", 0.8), ("sqrt", 0.4)])
def test_learning_rate_scales_with_the_global_batch(scale, expected):
    recipe = Recipe(lr=0.2, scale_lr=scale, reference_batch=64, warmup_steps=0, horizon_steps=10)
    assert build_optimizer(recipe, nn.Linear(2, 2), global_batch=256).param_groups[0]["lr"] == pytest.approx(
        expected
    )
    assert Schedule.from_recipe(recipe, 1, global_batch=256).lr(0) == pytest.approx(expected)


def test_schedule_converts_epochs_once():
    schedule = Schedule.from_recipe(Recipe(), steps_per_epoch=547)
    assert (schedule.warmup, schedule.horizon) == (1094, 164100)
    epochs = np.linspace(0, 300, 1000)
    for epoch in epochs:
        step = epoch * 547
        rate = 5e-4 * epoch / 2 if epoch < 2 else 2.5e-4 * (1 + np.cos(np.pi * (epoch - 2) / 298))
        assert schedule.lr(step) == pytest.approx(rate, rel=1e-9, abs=1e-15)
        momentum = 1 - (1 - 0.996) * (np.cos(np.pi * epoch / 300) + 1) / 2
        assert schedule.momentum(step) == pytest.approx(momentum, abs=1e-14)


def test_steps_replace_epochs():
    recipe = Recipe(warmup_steps=3, horizon_steps=11, warmup_epochs=50.0, horizon_epochs=None)
    schedule = Schedule.from_recipe(recipe, steps_per_epoch=100)
    assert (schedule.warmup, schedule.horizon) == (3, 11)


def test_schedule_survives_a_checkpoint(tmp_path):
    schedule = Schedule.from_recipe(Recipe(), steps_per_epoch=10)
    torch.save(schedule.state_dict(), tmp_path / "s.pt")
    assert Schedule.from_state(torch.load(tmp_path / "s.pt", weights_only=True)) == schedule


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        (Recipe(horizon_epochs=None), "no horizon"),
        (Recipe(warmup_steps=10, horizon_steps=10), "does not end before"),
        (Recipe(scale_lr="linear"), "global batch"),
    ],
)
def test_bad_recipes(recipe, message):
    with pytest.raises(UserError, match=message):
        Schedule.from_recipe(recipe, 10)


def test_unknown_optimiser():
    with pytest.raises(UserError, match="'adam' does not exist"):
        build_optimizer(Recipe(optimizer="adam"), nn.Linear(1, 1), 1)

import copy

import numpy as np
import pytest
import torch
from device_reads import DeviceReads
from torch import nn

from poodle_lightning.nn.ema import EMA
from poodle_lightning.nn.heads import MLP
from poodle_lightning.nn.optim import Recipe, Schedule, build_optimizer, clip_each, parameter_groups
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


DINO = {
    "lr": 5e-4,
    "min_lr": 1e-6,
    "weight_decay": 0.04,
    "weight_decay_end": 0.4,
    "warmup_epochs": 10.0,
    "warmup_closed": True,
    "horizon_epochs": 100.0,
    "scale_lr": "linear",
    "reference_batch": 256,
    "ema_start": 0.996,
}


def half_cosine(start, end, count):
    return end + 0.5 * (start - end) * (1 + np.cos(np.pi * np.arange(count) / count))


@pytest.mark.parametrize("per_epoch", [1, 2, 37])
def test_schedules_equal_dinos_at_every_step_of_a_hundred_epochs(per_epoch):
    """DINO's arrays: a line with both its ends, then half a cosine over the steps that are left."""
    schedule = Schedule.from_recipe(Recipe(**DINO), per_epoch, global_batch=512)
    warm, total = 10 * per_epoch, 100 * per_epoch
    rates = np.concatenate([np.linspace(0.0, 1e-3, warm), half_cosine(1e-3, 1e-6, total - warm)])
    decays, momenta = half_cosine(0.04, 0.4, total), half_cosine(0.996, 1.0, total)
    module = nn.Linear(2, 2)
    optimizer = build_optimizer(Recipe(**DINO), module, global_batch=512)
    for step in range(total):
        schedule.drive(optimizer, step)
        decayed, exempt = optimizer.param_groups
        assert decayed["lr"] == exempt["lr"] == pytest.approx(rates[step], rel=1e-12, abs=1e-18)
        assert decayed["weight_decay"] == pytest.approx(decays[step], rel=1e-12)
        assert exempt["weight_decay"] == 0.0
        assert schedule.momentum(step) == pytest.approx(momenta[step], rel=1e-12)


def test_a_closed_warm_up_of_one_step_starts_at_zero():
    schedule = Schedule.from_recipe(Recipe(lr=1.0, warmup_steps=1, horizon_steps=9, warmup_closed=True), 1)
    assert [schedule.lr(step) for step in range(2)] == [*np.linspace(0.0, 1.0, 1), 1.0]


@pytest.mark.parametrize("step", [0, 50, 99])
def test_a_decay_that_grows_is_the_one_that_is_used(step):
    """A step without a gradient shrinks AdamW's weights by rate times decay."""
    recipe = Recipe(lr=0.5, weight_decay=0.0, weight_decay_end=0.4, warmup_steps=0, horizon_steps=100)
    module = nn.Linear(3, 3)
    optimizer, before = build_optimizer(recipe, module, 1), copy.deepcopy(module)
    schedule = Schedule.from_recipe(recipe, 1)
    for parameter in module.parameters():
        parameter.grad = torch.zeros_like(parameter)
    schedule.drive(optimizer, step)
    optimizer.step()
    decay = half_cosine(0.0, 0.4, 100)[step]
    torch.testing.assert_close(module.weight, before.weight * (1 - schedule.lr(step) * decay))
    assert torch.equal(module.bias, before.bias)


def test_a_decay_without_an_end_is_left_alone_and_rates_keep_their_scale():
    recipe = Recipe(lr=0.5, weight_decay=0.03, warmup_steps=0, horizon_steps=100)
    optimizer = build_optimizer(recipe, nn.Linear(3, 3), 1)
    optimizer.param_groups[0].update(weight_decay=0.7, lr_scale=0.1)
    Schedule.from_recipe(recipe, 1).drive(optimizer, 30)
    rate = half_cosine(0.5, 0.0, 100)[30]
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.7, 0.0]
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.1 * rate, rate])


def test_a_schedule_of_an_older_checkpoint():
    """It had neither of the two newer numbers, and is the one that the same recipe plans today."""
    planned = Schedule.from_recipe(Recipe(), steps_per_epoch=10)
    old = {k: v for k, v in planned.state_dict().items() if k not in ("warmup_closed", "weight_decay")}
    assert Schedule.from_state(old) == planned


def test_a_schedule_with_a_decay_survives_a_checkpoint(tmp_path):
    schedule = Schedule.from_recipe(Recipe(**DINO), 10, global_batch=256)
    torch.save(schedule.state_dict(), tmp_path / "s.pt")
    assert Schedule.from_state(torch.load(tmp_path / "s.pt", weights_only=True)) == schedule


def test_every_gradient_is_clipped_by_itself():
    """One after the other in float64, with DINO's 1e-6."""
    generator = torch.Generator().manual_seed(0)
    sizes = [(3, 4), (5,), (), (2, 3, 2, 2), (7,)]
    scales = [0.01, 10.0, 3.0, 0.2, 0.0]
    parameters = [nn.Parameter(torch.zeros(size)) for size in sizes]
    for parameter, scale in zip(parameters, scales, strict=True):
        parameter.grad = scale * torch.randn(parameter.shape, generator=generator)
    expected = []
    for gradient in (parameter.grad.double().numpy() for parameter in parameters):
        norm = np.sqrt(np.square(gradient).sum())
        expected.append(gradient * 0.5 / (norm + 1e-6) if 0.5 / (norm + 1e-6) < 1 else gradient.copy())
    idle = nn.Parameter(torch.zeros(2))
    clip_each([*parameters, idle], 0.5)
    assert idle.grad is None
    for parameter, wanted in zip(parameters, expected, strict=True):
        np.testing.assert_allclose(parameter.grad.numpy(), wanted, rtol=1e-5)
    assert np.linalg.norm(parameters[1].grad) == pytest.approx(0.5, rel=1e-5)
    clip_each([idle], 0.5)


def test_clipping_reads_nothing_back():
    parameters = list(MLP(8, 16, 4).parameters())
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    with DeviceReads([parameter.grad for parameter in parameters]) as reads:
        clip_each(parameters, 0.1)
    assert reads.found == []
    assert max(float(parameter.grad.norm()) for parameter in parameters) == pytest.approx(0.1, rel=1e-4)


@pytest.mark.parametrize("limit", [0.0, -1.0])
def test_a_limit_that_leaves_nothing_is_refused(limit):
    with pytest.raises(UserError, match=r"recipe\.clip_each=.* set it above 0, or to null"):
        build_optimizer(Recipe(clip_each=limit), nn.Linear(1, 1), 1)

"""What every shipped method must hold, run over each ``configs/method/*.yaml`` in a tiny size."""

import copy
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from tiny_models import make_clip

from poodle_lightning import from_pretrained, save_pretrained
from poodle_lightning.cli import build
from poodle_lightning.methods.base import Method
from poodle_lightning.nn.optim import Schedule, build_optimizer
from poodle_lightning.nn.queue import Queue

# what tracks points trains nothing
CONFIGS = sorted(
    path
    for path in (Path(__file__).parents[1] / "configs" / "method").glob("*.yaml")
    if not path.stem.startswith("trace") and path.stem != "vito_swin"  # tests/methods/test_vito.py has it
)
NAMES = [path.stem for path in CONFIGS]
WITHOUT_TARGET = ("mae", "simclr", "swav", "vicreg")
WITH_TARGET = [name for name in NAMES if not name.startswith(WITHOUT_TARGET)]


HEAD = ["--model.head.hidden=32", "--model.head.bottleneck=16", "--model.head.out=64"]
CROPS = ["--model.crops.large.size=[32, 32]", "--model.crops.small.size=[16, 16]", "--model.crops.locals=2"]
DENSE = ("poodle", "flowe", "byol")  # of these half precision has tests of its own
PAIR = ["--model.hidden=16", "--model.out=8", "--model.crops.large.size=[32, 32]"]
FLOW = ["--model.hidden=16", "--model.out=8", "--model.flow=poodle_lightning.flow.given.Given"]
SMALLER = {
    "BYOL": ["--model.hidden=16", "--model.out=8", "--model.crop.size=[32, 32]"],
    "FlowE": FLOW,
    "PooDLe": [
        *FLOW,
        "--model.decoder={class_path: poodle_lightning.nn.sdm.SDM, init_args: {channels: [8, 16, 32, 64], "
        "dims: 32}}",
        "--model.subcrops.size=[16, 16]",
    ],
    "MAE": ["--model.crop.size=[32, 32]", "--model.decoder={dim: 16, depth: 1, heads: 2}"],
    **{kind: [*PAIR, "--model.queue=16"] for kind in ("MoCo", "DenseCL")},
    "PiCo": [
        *PAIR,
        "--model.queue=16",
        "--model.decoder={class_path: poodle_lightning.nn.fpn.SemanticFPN, init_args: {channels: "
        "{layer1: 8, layer2: 16, layer3: 32, layer4: 64}, dims: 32, pyramid: 32}}",
    ],
    **dict.fromkeys(("SimCLR", "VICReg"), PAIR),
    **{
        kind: ["--model.hidden=16", "--model.out=8", "--model.views=2", "--model.crop.size=[32, 32]"]
        for kind in ("MoCLR", "VITO")
    },
    "SwAV": ["--model.hidden=16", "--model.out=8", "--model.prototypes=8", "--model.queue=0", *CROPS],
    "PixPro": ["--model.hidden=16", "--model.out=8", "--model.crops.large.size=[64, 64]"],
    **{kind: [*HEAD, *CROPS] for kind in ("DINO", "IBOT", "AttMask", "DoRA")},
}
NETWORKS = {
    "ResNet": {"depth": 10, "width": 8, "weights": None},
    "TimmEncoder": {},
    "ViT": {"patch": 8, "dim": 24, "depth": 2, "heads": 3, "image_size": [32, 32], "weights": None},
}


def shipped(name: str) -> tuple[str, dict]:
    """Name of a config's method, and its arguments."""
    config = yaml.safe_load(next(p for p in CONFIGS if p.stem == name).read_text())
    return config["class_path"].rpartition(".")[2], config["init_args"]


def tiny(name: str) -> Method:
    """The config's method with a tiny encoder, tiny heads and the clips' own flow; all else as shipped."""
    kind, arguments = shipped(name)
    encoder = arguments["encoder"]
    smaller = NETWORKS[encoder["class_path"].rpartition(".")[2]]
    encoder = {**encoder, "init_args": {**encoder["init_args"], **smaller}}
    path = next(p for p in CONFIGS if p.stem == name)
    words = [f"--model.encoder={json.dumps(encoder)}", *SMALLER[kind]]
    torch.manual_seed(0)
    method, _ = build([], [f"--model={path}", "--data=VideoDataModule", "--data.source=synthetic", *words])
    assert isinstance(method, Method)
    for queue in queues(method):
        queue.eval()  # stays as it is: a loss would not be that of the call before
    return method


def queues(method: Method) -> list[Queue]:
    return [part for part in method.modules() if isinstance(part, Queue)]


def fill_queues(method: Method) -> None:
    """With keys of other clips: random rows are told from all images at once."""
    for queue in queues(method):
        queue.train()
    for seed in range(1, 4 if queues(method) else 1):
        total(method, make_clip(batch=4, seed=seed))
    for queue in queues(method):
        queue.eval()


def total(method: Method, clip) -> torch.Tensor:
    return torch.stack(list(method.losses(clip).values())).sum()


@pytest.mark.parametrize("name", NAMES)
def test_every_trainable_parameter_gets_a_gradient_and_nothing_else(name):
    method = tiny(name)
    loss = total(method, make_clip())
    assert loss.isfinite()
    loss.backward()
    for parameter_name, parameter in method.named_parameters():
        if parameter_name.startswith("target."):
            assert not parameter.requires_grad
        if not parameter.requires_grad:
            assert parameter.grad is None
        else:
            assert parameter.grad is not None, parameter_name
            assert parameter.grad.isfinite().all(), parameter_name


@pytest.mark.parametrize("name", WITH_TARGET)
def test_target_starts_equal_and_apart(name):
    method = tiny(name)
    for one, other in zip(method.online.parameters(), method.target.parameters(), strict=True):
        assert torch.equal(one, other)
        assert one.data_ptr() != other.data_ptr()


@pytest.mark.parametrize("name", NAMES)
def test_loss_falls_on_one_fixed_batch(name):
    """Fixed draws, no warm-up, target and queues frozen."""
    method = tiny(name)
    fill_queues(method)
    clip = make_clip(batch=4)
    recipe = replace(method.recipe, optimizer="adamw", lr=2e-3, scale_lr="none", weight_decay=0.0)
    optimizer = build_optimizer(recipe, method, 4)
    losses = []
    # eight pairs of nearly equal frames as each other's negatives: hard for a transformer of two blocks
    for _ in range(80 if name == "simclr_vits" else 30):
        loss = total(method, clip)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert sum(losses[-3:]) / 3 < 0.8 * losses[0], [round(x, 3) for x in losses]


@pytest.mark.parametrize("name", NAMES)
def test_the_configs_schedule_ends_where_it_says(name):
    recipe = tiny(name).recipe
    schedule = Schedule.from_recipe(recipe, steps_per_epoch=100, global_batch=recipe.reference_batch)
    assert schedule.lr(schedule.warmup) == pytest.approx(recipe.lr)
    assert schedule.lr(schedule.horizon) == pytest.approx(recipe.min_lr)
    assert schedule.momentum(0) == pytest.approx(recipe.ema_start)
    assert schedule.momentum(schedule.horizon) == pytest.approx(recipe.ema_end)


@pytest.mark.parametrize("name", NAMES)
def test_exported_encoder_is_the_methods_own_bit_by_bit(name, tmp_path):
    method = tiny(name).eval()
    save_pretrained(method.backbone(), tmp_path)
    images = torch.rand(2, 3, 32, 64)
    ours, theirs = method.backbone()(images), from_pretrained(tmp_path)(images)
    assert list(ours.maps) == list(theirs.maps)
    for layer, value in ours.maps.items():
        assert torch.equal(value, theirs.maps[layer])


@pytest.mark.parametrize("name", NAMES)
def test_steps_do_not_depend_on_the_global_random_state(name):
    method = tiny(name).eval()
    clip = make_clip()
    torch.manual_seed(1)
    one = total(method, clip)
    torch.manual_seed(2)
    assert torch.equal(one, total(method, clip))


@pytest.mark.parametrize("name", [n for n in NAMES if n.endswith("_tiny") and not n.startswith(DENSE)])
def test_half_precision_changes_the_loss_by_little(name):
    method, clip = tiny(name), make_clip(batch=8)  # BatchNorm over fewer rows magnifies rounding
    exact = total(method, clip)
    with torch.autocast("cpu", torch.bfloat16):
        rough = total(method, clip)
    assert rough.dtype == torch.float32
    assert float(rough.detach()) == pytest.approx(float(exact.detach()), rel=0.03)


@pytest.mark.parametrize("name", NAMES)
def test_look_and_embed_leave_the_method_as_it_was(name):
    method = tiny(name)
    before = copy.deepcopy(method.state_dict())
    method.eval()
    method.look(make_clip())
    rows = method.embed(torch.rand(4, 3, 32, 64))
    assert all(value.ndim == 2 and value.dtype == torch.float32 for value in rows.values())
    assert all(torch.equal(before[key], value) for key, value in method.state_dict().items())

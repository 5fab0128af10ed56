"""A training step never makes the device wait for the host."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from device_reads import DeviceReads
from test_contract import NAMES, tiny
from tiny_models import make_clip

from poodle_lightning.augment import photometric
from poodle_lightning.losses import regression
from poodle_lightning.methods import flowe, poodle
from poodle_lightning.nn.optim import build_optimizer

# the forms of the dense loss that a GPU uses
DEVICE_FORMS = ("all_pairs", "direct")


def on_device(method, clip):
    weights = [*method.parameters(), *method.buffers()]
    return [weights, clip.frames, clip.window.matrix, clip.flow, clip.points]


def step(method, clip, optimizer=None):
    optimizer = optimizer or build_optimizer(method.recipe, method, 2)
    torch.stack(list(method.losses(clip).values())).sum().backward()
    method.on_before_optimizer_step(optimizer)
    optimizer.step()
    if method.target is not None:
        method.target.update(method.online, 0.99)
    method.after_step()


TINY = [name for name in NAMES if name.endswith("_tiny") and not name.startswith(("poodle", "flowe", "byol"))]
DENSE = ("poodle", "flowe")
CASES = [(name, form) for name in NAMES for form in DEVICE_FORMS[: 2 if name.startswith(DENSE) else 1]]


@pytest.mark.parametrize(("name", "form"), CASES)
def test_a_step_reads_nothing_back(name, form, monkeypatch):
    for module in (poodle, flowe):
        monkeypatch.setattr(module, "warped_distance", partial(regression.warped_distance, form=form))
    monkeypatch.setattr(photometric, "one_by_one", lambda device: False)  # the form of a GPU
    method = tiny(name).train()
    clip = replace(make_clip(size=(64, 128)), present=torch.ones(2, 2, dtype=torch.bool))
    with DeviceReads(on_device(method, clip)) as reads:
        step(method, clip)
    assert reads.found == []


def test_the_watch_finds_what_it_is_for():
    """Each way to read is found on the device and let through on the host."""
    device, host = torch.arange(4.0), torch.arange(4.0)
    ways = {
        "_local_scalar_dense": lambda x: float(x.sum()),
        "nonzero": lambda x: (x > 1).nonzero(),
        "_unique2": lambda x: x.unique(),
        "masked_select": lambda x: x.masked_select(x > 1),
        "index by a mask": lambda x: x[x > 1],
        "tolist": lambda x: (x + 1).tolist(),
        "numpy": lambda x: (x + 1).numpy(),
        "cpu": lambda x: (x + 1).cpu(),
        "to": lambda x: (x + 1).to("cpu"),
        "copy_": lambda x: torch.empty(4).copy_(x + 1),
        "new_tensor": lambda x: (x + 1).new_tensor([1.0]),
        "linalg_inv_ex": lambda x: torch.linalg.inv(x.diag() + torch.eye(4)),
    }
    for name, way in ways.items():
        with DeviceReads([device]) as reads:
            way(host)
            assert reads.found == []
            way(device)
        assert name in reads.found


def test_flow_from_the_data_is_not_looked_at_but_asked_for():
    """Without the host's knowledge of its rows the flow itself has to be read: so the watch must see it."""
    method = tiny("poodle_tiny")
    clip = make_clip(size=(64, 128))
    with DeviceReads(on_device(method, clip)) as reads:
        method.flow(clip, clip.unit())
    assert reads.found


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("name", ["poodle_small", "flowe_small", "byol_small", *TINY])
def test_torch_itself_sees_no_wait_on_a_gpu(name):
    method = tiny(name).train().cuda()
    clip = replace(make_clip(size=(64, 128)), present=torch.ones(2, 2, dtype=torch.bool)).pin_memory()
    optimizer = build_optimizer(method.recipe, method, 2)
    for mode in ("default", "error"):  # the first step may wait: memory is taken, kernels are loaded
        torch.cuda.set_sync_debug_mode(mode)
        try:
            step(method, clip.to("cuda"), optimizer)
        finally:
            torch.cuda.set_sync_debug_mode("default")

"""Methods, flow and tracking work on a device that is not the host, and give the host's numbers there."""

import copy
from contextlib import contextmanager
from dataclasses import astuple, replace
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from pretended_device import PLACE, Mixed, Pretended, in_own_process, pretending
from test_contract import NAMES, tiny
from test_no_sync import DENSE, DEVICE_FORMS
from tiny_models import make_clip

from poodle_lightning.evaluation.metrics import Confusion
from poodle_lightning.flow.raft import RAFT
from poodle_lightning.losses import regression
from poodle_lightning.methods import flowe, poodle
from poodle_lightning.methods.base import Method
from poodle_lightning.methods.trace import Trace
from poodle_lightning.nn.optim import build_optimizer
from poodle_lightning.ops.geometry import Flow
from poodle_lightning.ops.tracks import follow

TINY = [name for name in NAMES if name.endswith("_tiny")]
CASES = [(name, form) for name in TINY for form in DEVICE_FORMS[: 2 if name.startswith(DENSE) else 1]]


@pytest.fixture(scope="module")
def process():
    if not hasattr(torch.utils.backend_registration, "_setup_privateuseone_for_python_backend"):
        pytest.skip("this torch has no devices that are written in Python")
    with in_own_process() as executor:
        yield executor


def train(method, clip):
    optimizer = build_optimizer(method.recipe, method, 2)
    loss = Method.training_step(method, clip, 0)  # DoRA's own asks its trainer
    loss.backward()
    method.on_before_optimizer_step(optimizer)
    optimizer.step()
    if method.target is not None:
        method.target.update(method.online, 0.99)
    method.after_step()
    return loss.detach()


def method_on_device(name, form):
    """The loss on the host and on the device, what a step read back, what stayed on the host."""
    for module in (poodle, flowe):
        module.warped_distance = partial(regression.warped_distance, form=form)
    method = tiny(name).train()
    clip = replace(make_clip(size=(64, 128)), present=torch.ones(2, 2, dtype=torch.bool))
    wanted = float(Method.training_step(copy.deepcopy(method), clip, 0))
    with pretending() as reads:
        method.to(PLACE)
        clip = clip.to(PLACE)
        found = train(method, clip)
        in_step = list(reads)
        left = [key for key, value in method.state_dict().items() if not isinstance(value, Pretended)]
        method.eval()
        with torch.no_grad():
            method.validation_step(clip, 0)
        method.look(clip)
        method.embed(clip.unit().flatten(0, 1))
        return wanted, float(found), in_step, left


@pytest.mark.parametrize(("name", "form"), CASES)
def test_a_step_on_a_device_has_the_hosts_loss(name, form, process):
    wanted, found, reads, left = process.submit(method_on_device, name, form).result()
    # colours are rounded otherwise there, and tiny maps are nearly constant before they are normalised
    assert found == pytest.approx(wanted, rel=1e-3)
    assert reads == []
    assert left == []


def flow_on_device(precision):
    torch.manual_seed(0)
    raft, clip = RAFT("small", None, 2, precision=precision), replace(make_clip(size=(64, 128)), flow=None)
    wanted = raft(clip, clip.unit()).displacement
    given = replace(make_clip(size=(64, 128)), present=torch.tensor([[True, True], [False, True]]))
    with pretending() as reads:
        raft.to(PLACE)
        clip, given = clip.to(PLACE), given.to(PLACE)
        found = raft(clip, clip.unit()).displacement
        raft(given, given.unit())
        assert isinstance(found, Pretended)
        in_both = list(reads)
        return wanted.numpy(), found.cpu().numpy(), in_both


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_raft_on_a_device_gives_the_hosts_flow(precision, process):
    wanted, found, reads = process.submit(flow_on_device, precision).result()
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-6)
    assert np.abs(wanted).max() > 0.01
    assert reads == []


class Film:
    """Four frames of a stretch, as a source would open it."""

    name, workers = "film", 1

    @contextmanager
    def opened(self, every):
        frames = make_clip(batch=1, size=(46, 62), frames=4).frames[0].permute(0, 2, 3, 1).numpy()
        yield SimpleNamespace(times=np.arange(4.0), chunks=lambda short_side: [frames[:3], frames[2:]])


def film_on_device():
    torch.manual_seed(0)
    trace = Trace(RAFT("small", None, 2), "tracks", points=9)
    wanted = trace.track(Film()).tracks
    with pretending():
        return astuple(wanted), astuple(trace.to(PLACE).track(Film()).tracks)


def test_a_film_traced_on_a_device_has_the_hosts_tracks(process):
    for wanted, found in zip(*process.submit(film_on_device).result(), strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-3, atol=1e-3)


def tracks_on_device():
    generator = torch.Generator().manual_seed(0)
    way = torch.rand(4, 2, 6, 8, generator=generator) * 0.5
    points, first = torch.rand(9, 2, generator=generator) * 2 - 1, torch.arange(9) % 4
    wanted = follow(Flow(way), Flow(-way), points, first)
    with pretending():
        found = follow(Flow(way.to(PLACE)), Flow(-way.to(PLACE)), points.to(PLACE), first)
    return astuple(wanted), astuple(found)


def test_tracks_on_a_device_are_the_hosts(process):
    for wanted, found in zip(*process.submit(tracks_on_device).result(), strict=True):
        np.testing.assert_array_equal(found, wanted)


def confusion_on_device():
    generator = torch.Generator().manual_seed(0)
    guess, labels = (torch.randint(0, 3, (2, 5, 4), generator=generator) for _ in range(2))
    labels[0, 0] = 255
    host, device = Confusion(3), Confusion(3)
    host.update(guess, labels)
    with pretending() as reads:
        device.update(guess.to(PLACE), labels)
        in_update = list(reads)
        return host.state_dict(), device.state_dict(), in_update


def test_counts_on_a_device_are_the_hosts(process):
    wanted, found, reads = process.submit(confusion_on_device).result()
    assert found == wanted
    assert reads == []


def mistakes():
    """What is said of each mistake on the device, and on the host."""
    ways = {
        "a sum": lambda x: x + torch.ones(3),
        "a product": lambda x: torch.ones(2, 3) @ x,
        "a row": lambda x: torch.cat([x, torch.zeros(1)]),
        "a number into rows": lambda x: torch.cat([x[:0], torch.zeros(1)]),
        "into the host": lambda x: torch.ones(3).add_(x),
        "picked from the host": lambda x: torch.ones(3)[x.long()],
        "a product of integers": lambda x: x.long()[None] @ x.long(),
    }
    found = {}
    for name, way in ways.items():
        way(torch.arange(3.0))  # fine on the host
        with pretending():
            try:
                way(torch.arange(3.0).to(PLACE))
            except Mixed as error:
                found[name] = str(error)
    with pretending() as reads:
        x = torch.arange(3.0, device=PLACE)
        fine = (x + 1) * torch.tensor(2.0) + x[torch.tensor([0, 1, 2])]
        assert fine.cpu().tolist() == [2.0, 5.0, 8.0]
        x[x > 1], float(x[0])
    return list(ways), found, reads


def test_mistakes_are_found(process):
    ways, found, reads = process.submit(mistakes).result()
    assert list(found) == ways
    assert reads == ["_to_copy", "index", "_local_scalar_dense"]

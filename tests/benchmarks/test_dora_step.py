"""DoRA's step against the published loops: the same numbers from fewer operations and bytes. No times."""

import importlib
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from device_reads import DeviceReads
from tiny_models import stirred
from torch import nn

ROOT = Path(__file__).parents[2]
TINY = {"dim": 24, "depth": 2, "heads": 3, "patch": 8, "large": 32, "small": 16, "hidden": 32, "out": 64}


@pytest.fixture
def dora_step(monkeypatch):
    monkeypatch.syspath_prepend(ROOT)
    return importlib.import_module("benchmarks.dora_step")


@pytest.fixture
def tiny(dora_step):
    return dora_step.Size(**TINY, frames=3, batch=2, objects=2, locals=2)


@pytest.fixture
def exact(dora_step, tiny, monkeypatch):
    """The three forms with the same weights, far from their start, in float64."""
    forms = importlib.import_module("benchmarks.dora_forms")
    made = forms.make_method

    def make(size):
        method = stirred(made(size)).train()
        method.centre.float()  # it takes its sums in float32
        return method

    monkeypatch.setattr(forms, "make_method", make)
    return dora_step.steps(tiny)


def test_the_forms_take_the_same_steps(dora_step, exact):
    package = exact["package"]
    before = [p.detach().clone() for p in package.method.parameters()]
    watch = dora_step.Watch("cpu")
    losses = {form: [step(watch).item() for _ in range(2)] for form, step in exact.items()}
    assert losses["package"][0] != losses["package"][1]
    for form in ("loops", "published"):
        assert losses[form] == pytest.approx(losses["package"], rel=1e-7)
        ours, theirs = package.method.state_dict(), exact[form].method.state_dict()
        assert ours.keys() == theirs.keys()
        for name, value in ours.items():
            torch.testing.assert_close(theirs[name], value, rtol=1e-5, atol=1e-7)
    assert all((a != b).any() for a, b in zip(before, package.method.parameters(), strict=True))
    assert package.method.centre.value.abs().min() > 0


def test_gradients_agree_and_masks_hide_something(exact):
    found = {}
    for form, step in exact.items():
        step.backward()
        found[form] = [p.grad for p in step.method.online.parameters() if p.grad is not None]
    for form in ("loops", "published"):
        for ours, theirs in zip(found["package"], found[form], strict=True):
            torch.testing.assert_close(theirs, ours, rtol=1e-6, atol=1e-8)  # positions are resized in float32
    step = exact["package"]
    seen = step.method.observe(step.crops.large)
    kept = step.method.masks_of(step.clip, seen).double().mean(dim=(2, 3, 4))
    assert (kept > 0).all()
    assert (kept < 1).all()


def test_another_head_would_be_seen(exact):
    heads = exact["package"].method.chosen()
    other = torch.tensor([head for head in range(3) if head not in heads.tolist()] + heads[1:].tolist())
    reference = exact["package"].loss()
    exact["loops"].method.chosen = lambda: other
    assert abs(exact["loops"].loss() - reference) / reference > 1e-6


def test_the_package_never_waits_and_its_operations_do_not_grow(dora_step, tiny):
    few = dora_step.counts(tiny)
    many = dora_step.counts(replace(tiny, frames=5, batch=3, objects=3, locals=4))
    assert few["package"] == many["package"]
    assert few["package"]["waits"] == 0
    assert few["package"]["computing"] * 5 <= many["published"]["computing"]
    for form in ("loops", "published"):
        assert many[form]["computing"] > 1.5 * few[form]["computing"]
        assert few[form]["waits"] > 10
    step = dora_step.steps(tiny, ("package",))["package"]
    with DeviceReads(step.on_device) as reads:
        step.backward()
        step.clip_gradients()
        step.follow()
    assert reads.found == []


def test_views_compute_nothing(dora_step):
    x = nn.Parameter(torch.zeros(4, 6))
    counter = dora_step.Launches([x])
    assert counter.count(lambda: x.t()[1:].unsqueeze(0) + 1.0)["operations"] - counter.views == 1


@pytest.mark.parametrize("form", ["package", "loops", "published"])
def test_bytes_of_more_frames_and_clips_follow_from_few(dora_step, tiny, form):
    size = replace(tiny, frames=4, batch=3)
    found = dora_step.kept_by_clip(form, size)
    assert 3 * found["per_clip"] + found["per_step"] == dora_step.kept(form, size)


def test_bytes_kept_of_a_clip_of_vit_s(dora_step):
    size = replace(dora_step.SIZES["ViT-S/16"], depth=1, hidden=64, out=dora_step.NO_HEAD)
    found = {form: dora_step.kept_by_clip(form, size)["per_clip"] for form in ("package", "published")}
    maps = size.frames * size.heads * (size.objects * 197**2 + size.locals * 50**2) * 4  # softmaxes
    # the package's head keeps copies of [CLS], the published one views of all tokens behind the last norm
    tokens = size.frames * (size.objects * 197 + size.locals * 50) * 384 * 4
    assert found["published"] - found["package"] == pytest.approx(maps + tokens, rel=0.05)


def test_a_tiny_run_is_written(dora_step, tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(dora_step, "SIZES", {"tiny": tiny})
    monkeypatch.setattr(dora_step, "COUNTED", tiny)
    words = ["--sizes", "tiny", "--last-rounds", "1", "--rounds", "1", "--no-peak", "--out", str(tmp_path)]
    dora_step.main([*words, "--pairs", "4", "2", "3", "50"])
    results = json.loads((tmp_path / "dora_step.json").read_text())["results"]
    forms = results["times"]["tiny"]["forms"]
    for found in forms.values():
        assert found["loss"] == pytest.approx(forms["package"]["loss"], rel=1e-4)
        assert found["seconds"]["median"] == pytest.approx(
            sum(part["median"] for part in found["parts"].values()), rel=1e-6
        )
    pairs = results["pairs"]["forms"]
    assert pairs["published"]["loss"] == pytest.approx(pairs["package"]["loss"], rel=1e-5)
    # six pairs, of each the log-softmax and the teacher's part: 3 rows of 50 in float32
    assert pairs["published"]["kept"] >= 6 * 2 * 3 * 50 * 4 > pairs["package"]["kept"]
    assert results["memory"]["64"]["package"]["kept"]["per_clip"] > 0

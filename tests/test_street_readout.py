"""The street benchmark at toy size: complete, resumable, and honest about what was run on what."""

import importlib
import json
from itertools import pairwise
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def street():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT)
        names = ("runs", "settings", "streets", "training", "readouts")
        parts = {name: importlib.import_module(f"benchmarks.street.{name}") for name in names}
        parts["main"] = importlib.import_module("benchmarks.street_readout").main
        yield parts


@pytest.fixture(scope="module")
def finished(street, tmp_path_factory):
    """One search run, then the final comparison with two seeds."""
    out, results = tmp_path_factory.mktemp("out"), tmp_path_factory.mktemp("results")
    where = ["--size", "toy", "--out", str(out), "--results", str(results), "--jobs", "1"]
    street["main"]([*where, "--methods", "flowe", "--note", "a try", "--try", "shift=0.25"])
    street["main"]([*where, "--seeds", "2", "--no-curve"])
    return where, out, results


def test_every_run_is_listed_with_its_numbers(street, finished, capsys):
    where, out, results = finished
    written = json.loads((results / "street_readout_toy.json").read_text())
    listed = written["results"]["runs"]
    tried = [x for x in listed if x["split"] == "val"]
    assert [(x["method"], x["setting"]["shift"], x["note"]) for x in tried] == [("flowe", 0.25, "a try")]
    final = [(x["method"], x["seed"]) for x in listed if x["split"] == "test"]
    methods = [*street["settings"].METHODS, "random poodle", "random flowe"]
    expected = [("position", 0)] + [(name, seed) for seed in (0, 1) for name in methods]
    assert sorted(final) == sorted(expected)
    for line in listed:
        assert set(street["readouts"].GROUPS) <= set(line)
        assert line["setting"]["steps"] == 4
    assert (results / "street_readout_toy.png").stat().st_size > 5000
    before = (out / "runs.jsonl").read_bytes()
    street["main"]([*where, "--seeds", "2", "--no-curve"])  # nothing is left to do
    assert (out / "runs.jsonl").read_bytes() == before
    shown = capsys.readouterr().out
    rows = [line for line in shown.splitlines() if line.startswith("| PooDLe ")]
    mean = sum(x["all"] for x in listed if x["method"] == "poodle") / 2
    assert rows[0].split("|")[2].split()[0] == f"{mean:.1f}"


def test_a_finished_search_stays_listed_when_the_folder_of_runs_is_new(street, finished, tmp_path):
    _, out, results = finished
    lines = (out / "runs.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "runs.jsonl").write_text("".join(x for x in lines if json.loads(x)["split"] == "test"))
    again = ["--size", "toy", "--out", str(tmp_path), "--results", str(results)]
    street["main"]([*again, "--seeds", "2", "--no-curve"])
    listed = json.loads((results / "street_readout_toy.json").read_text())["results"]["runs"]
    assert [x["method"] for x in listed if x["split"] == "val"] == ["flowe"]
    assert len({x["name"] for x in listed}) == len(listed)


def test_a_run_is_the_same_when_it_is_made_again(street, finished, tmp_path):
    _, out, _ = finished
    toy = street["settings"].TOY
    job = street["runs"].Job("poodle", toy, 1, "test", "final")
    again = street["runs"].run(job, tmp_path, "cpu")
    first = street["runs"].finished(out)[job.name]
    assert {g: again[g] for g in street["readouts"].GROUPS} == {
        g: first[g] for g in street["readouts"].GROUPS
    }
    assert again["curve"] == [tuple(point) for point in first["curve"]]


def test_no_street_is_in_two_parts(street):
    first = sorted(street["settings"].FIRST_STREET.values())
    apart = min(b - a for a, b in pairwise(first))
    for setting in street["settings"].SIZES.values():
        assert max(setting.streets, setting.readout_frames, setting.test_frames) < apart
    toy = street["settings"].TOY
    frames = [made[0] for made in _parts(street, toy)]
    flat = torch.cat(frames).flatten(1)
    assert len(flat.unique(dim=0)) == len(flat)


def _parts(street, setting):
    from poodle_lightning.data.synthetic import labelled_frames

    for part in ("readout", "val", "test"):
        first = street["settings"].FIRST_STREET[part]
        yield labelled_frames(setting.test_frames, setting.frame, first)


def test_all_methods_are_read_at_the_same_stride_and_width(street):
    setting = street["settings"].CPU
    for name in street["settings"].METHODS:
        learner = street["training"].method(name, setting, 0)
        found = street["readouts"].readable(learner, setting)(torch.rand(1, 3, *setting.frame)).last
        assert found.shape == (1, 192, 24, 48), name


def test_the_untrained_control_is_where_training_starts(street):
    toy = street["settings"].TOY
    for name in ("poodle", "flowe"):
        learner = street["training"].method(name, toy, 3)
        fresh = street["readouts"].untrained(street["readouts"].readable(learner, toy), 3)
        images = torch.rand(2, 3, *toy.frame)
        start = street["training"].method(name, toy, 3).backbone().eval()
        assert torch.equal(fresh(images).last, start(images).last)


def test_predictors_alone_have_their_own_rate(street):
    toy = street["settings"].TOY.changed({"predictor_rate": "3"})
    learner = street["training"].method("poodle", toy, 0)
    groups = street["training"]._groups(learner, toy)
    fast = sum(p.numel() for group in groups if group["lr_scale"] == 3 for p in group["params"])
    predictors = (learner.dense_predictor, learner.pooled_predictor)
    assert fast == sum(p.numel() for part in predictors for p in part.parameters())
    every = sum(p.numel() for group in groups for p in group["params"])
    assert every == sum(p.numel() for p in learner.parameters() if p.requires_grad)


def test_a_method_costs_what_its_convolutions_cost(street):
    """The dense passes alone, summed from the shapes that a hook sees; normalisation adds a few percent."""
    toy = street["settings"].CPU
    learner = street["training"].method("sdm_only", toy, 0)
    seen = 0

    def count(module, inputs, output):
        nonlocal seen
        seen += output.numel() * module.weight[0].numel()

    hooks = [
        m.register_forward_hook(count) for m in learner.online.modules() if isinstance(m, torch.nn.Conv2d)
    ]
    learner.online.dense(torch.rand(2, 3, *toy.crop_size))
    for hook in hooks:
        hook.remove()
    cost = street["training"].costs(learner, toy)
    assert 1.0 < cost["forward_gmac_per_pair"] / (2 * seen / 1e9) < 1.1
    assert cost["training_gmac_per_pair"] == pytest.approx(2 * cost["forward_gmac_per_pair"])


def test_an_unknown_setting_is_refused(street):
    with pytest.raises(ValueError, match="colour: no setting"):
        street["settings"].CPU.changed({"colour": "1"})

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
        names = ("runs", "settings", "streets", "training", "readouts", "report")
        parts = {name: importlib.import_module(f"benchmarks.street.{name}") for name in names}
        parts["main"] = importlib.import_module("benchmarks.street_readout").main
        yield parts


@pytest.fixture(scope="module")
def finished(street, tmp_path_factory):
    """One search run, then the final comparison with one seed."""
    out, results = tmp_path_factory.mktemp("out"), tmp_path_factory.mktemp("results")
    where = ["--size", "toy", "--out", str(out), "--results", str(results), "--jobs", "1"]
    street["main"]([*where, "--methods", "flowe", "--note", "a try", "--try", "shift=0.25"])
    street["main"]([*where, "--seeds", "1", "--no-curve"])
    return out, results


def test_every_run_is_listed_with_its_numbers(street, finished):
    _, results = finished
    listed = json.loads((results / "street_readout_toy.json").read_text())["results"]["runs"]
    tried = [x for x in listed if x["split"] == "val"]
    assert [(x["method"], x["setting"]["shift"], x["note"]) for x in tried] == [("flowe", 0.25, "a try")]
    final = [x["method"] for x in listed if x["split"] == "test"]
    methods = [*street["settings"].METHODS, "random poodle", "random flowe", "position"]
    assert sorted(final) == sorted(methods)
    for line in listed:
        assert set(street["readouts"].GROUPS) <= set(line)
        assert line["setting"]["steps"] == 4
    assert (results / "street_readout_toy.png").stat().st_size > 5000


def test_finished_runs_are_not_repeated_and_a_search_stays_listed(street, finished, tmp_path, capsys):
    """A folder with the final runs alone: nothing is left to do, and the results file keeps the search."""
    out, results = finished
    lines = (out / "runs.jsonl").read_text().splitlines(keepends=True)
    kept = "".join(x for x in lines if json.loads(x)["split"] == "test")
    (tmp_path / "runs.jsonl").write_text(kept)
    again = ["--size", "toy", "--out", str(tmp_path), "--results", str(results)]
    street["main"]([*again, "--seeds", "1", "--no-curve"])
    assert (tmp_path / "runs.jsonl").read_text() == kept
    listed = json.loads((results / "street_readout_toy.json").read_text())["results"]["runs"]
    assert [x["method"] for x in listed if x["split"] == "val"] == ["flowe"]
    assert len({x["name"] for x in listed}) == len(listed)
    row = next(x for x in capsys.readouterr().out.splitlines() if x.startswith("| PooDLe "))
    scored = next(json.loads(x) for x in kept.splitlines() if json.loads(x)["method"] == "poodle")
    assert row.split("|")[2].strip() == f"{scored['all']:.1f}"


def test_the_table_shows_mean_and_ends_over_seeds(street):
    lines = [
        {"method": "random flowe", "seed": seed, **dict.fromkeys(street["readouts"].GROUPS, value)}
        for seed, value in enumerate((1.0, 2.0, 6.0))
    ]
    row = street["report"].final_table(lines).splitlines()[-1]
    assert row.split("|")[2].strip() == "3.0 (1.0–6.0)"


def test_a_run_is_the_same_when_it_is_made_again(street, finished, tmp_path):
    out, _ = finished
    toy = street["settings"].TOY
    job = street["runs"].Job("poodle", toy, 0, "test", "final")
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
    learner.online.commute = False  # under hooks nothing is commuted
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

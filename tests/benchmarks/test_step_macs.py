"""The goal for the network's multiply-adds, and the numbers that it is measured against."""

import importlib
import json
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What the benchmark writes at its own size; only RAFT runs fewer iterations."""
    folder = tmp_path_factory.mktemp("results")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT)
        importlib.import_module("benchmarks.step_macs").main(["--iterations", "2", "--out", str(folder)])
    return json.loads((folder / "step_macs.json").read_text())["results"]


def test_network_costs_at_most_three_quarters_of_the_published_order(results):
    plain, commuted = results["plain"], results["commuted"]
    assert plain["pair"] == pytest.approx(1344, rel=1e-3)
    assert results["flowe"]["pair"] == pytest.approx(2316, rel=1e-3)
    assert commuted["pair"] <= 0.75 * plain["pair"]
    assert commuted["pair, counted"] <= 0.75 * plain["pair, counted"]
    assert results["commuted / plain"] == commuted["pair"] / plain["pair"]


def test_differences_by_hand(results):
    plain, commuted = results["plain"], results["commuted"]
    # 4096 x 2048 at a quarter of the cells, and 4096 x 512 in place of 2048 x 512 and 4096 x 2048
    cells = 64 * 128 / 1e9
    saved = cells * (2048 * 512 + 4096 * 2048 - 4096 * 512 - 4096 * 2048 / 4)
    name = "decoder and projector"
    assert plain[name] - commuted[name] == pytest.approx(saved, rel=1e-6)
    assert commuted["weight product per step"] == pytest.approx(4 * 4096 * 2048 * 513 / 1e9, rel=1e-6)
    assert plain["weight product per step"] == pytest.approx(0, abs=1e-9)
    # without the gradient to the images: a first convolution less per view and subcrop that is trained
    stem = 64 * 3 * 49 / 4 * (2 * 512 * 1024 + 12 * 192 * 192) / 1e9
    for found in (plain, commuted):
        assert found["pair"] - found["pair, counted"] == pytest.approx(stem, rel=1e-6)


def test_raft_in_the_package_costs_less(results):
    assert 0 < results["raft"]["package"] < 0.85 * results["raft"]["torchvision"]

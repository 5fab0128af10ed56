"""The dense loss's benchmark compares two forms of one loss: here they must agree. Nothing is timed."""

import importlib
import json
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]


@pytest.fixture
def dense_loss(monkeypatch):
    monkeypatch.syspath_prepend(ROOT)
    return importlib.import_module("benchmarks.dense_loss")


def test_a_tiny_run_is_written_and_both_forms_are_close(dense_loss, tmp_path):
    size = ["--h", "64", "--w", "96", "--channels", "8", "--rounds", "1", "--no-memory"]
    dense_loss.main([*size, "--out", str(tmp_path)])
    written = json.loads((tmp_path / "dense_loss_64x96x8.json").read_text())
    assert written["arguments"]["h"] == 64
    found = written["results"]["distance"]
    assert 0.1 < found["loss"] < 4
    # one bilinear look-up against three in a row: near, and not the same
    assert 0 < found["loss_relative"] < 0.02
    assert found["gradient_cosine"] > 0.999
    assert found["gradient_relative"] < 0.05


@pytest.mark.parametrize("shift", [(0, 0), (8, -16), (-24, 8)])
def test_without_views_and_by_whole_cells_there_is_nothing_to_interpolate_twice(dense_loss, shift):
    problem = dense_loss.make_problem(48, 64, 5, batch=2)
    problem.p, problem.z = problem.p.double(), problem.z.double()
    problem.a = problem.b = torch.eye(3, dtype=torch.float64)[:2].expand(2, 2, 3)
    problem.flow = torch.tensor(shift, dtype=torch.float64).reshape(1, 2, 1, 1).repeat(2, 1, 48, 64)
    loss, gradient = dense_loss.loss_and_gradient("composed", problem)
    plain, reference = dense_loss.loss_and_gradient("upsampled", problem)
    assert loss == pytest.approx(plain, rel=1e-12)
    torch.testing.assert_close(gradient, reference, rtol=1e-9, atol=1e-15)
    assert reference.abs().max() > 1e-6


def test_a_pixel_of_shift_would_be_seen(dense_loss):
    problem = dense_loss.make_problem(64, 96, 8)
    _, gradient = dense_loss.loss_and_gradient("composed", problem)
    problem.flow = problem.flow + 1.0
    _, off = dense_loss.loss_and_gradient("upsampled", problem)
    assert (gradient - off).norm() / gradient.norm() > 0.1

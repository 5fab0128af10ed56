"""The dense loss's benchmark compares forms of one loss: here they must agree. Nothing is timed."""

import importlib
import json
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
FORMS = ["direct", "cells", "all_pairs"]


@pytest.fixture
def dense_loss(monkeypatch):
    monkeypatch.syspath_prepend(ROOT)
    return importlib.import_module("benchmarks.dense_loss")


def test_a_tiny_run_is_written_and_the_forms_are_close_to_the_published_one(dense_loss, tmp_path):
    size = ["--h", "64", "--w", "96", "--channels", "8", "--rounds", "1", "--no-memory"]
    dense_loss.main([*size, "--forms", *FORMS, "--out", str(tmp_path)])
    written = json.loads((tmp_path / "dense_loss_64x96x8.json").read_text())
    assert written["arguments"]["h"] == 64
    results = written["results"]
    assert list(results) == ["published", *FORMS]
    for form in FORMS:
        found = results[form]
        assert 0.1 < found["loss"] < 4
        # one bilinear look-up against three in a row: near, and not the same
        assert 0 < abs(found["loss"] - results["published"]["loss"]) / found["loss"] < 0.02
        assert found["gradient_to_published"]["cosine"] > 0.999
        assert 1e-4 < found["gradient_to_published"]["relative"] < 0.05
        assert found["gradient_to_direct"]["relative"] < 1e-6
        assert found["seconds"]["median"] > 0


def test_gram_forms_move_an_eighth_of_the_published_bytes(dense_loss):
    problem = dense_loss.make_problem(128, 256, 256)
    _, reference, published = dense_loss.count_bytes("published", problem)
    for form in ("cells", "all_pairs"):
        _, gradient, moved = dense_loss.count_bytes(form, problem)
        assert moved * 8 <= published
        assert dense_loss.between(gradient, reference)["cosine"] >= 0.9999


def test_bytes_are_those_of_arguments_and_results(dense_loss):
    rows, weights = torch.zeros(4, 8), torch.zeros(10)
    with dense_loss.Traffic() as traffic:
        _ = rows[1:].t() + 1.0
    assert traffic.bytes == 2 * 3 * 8 * 4
    with dense_loss.Traffic() as traffic:
        torch.nn.functional.embedding_bag(
            torch.zeros(10, dtype=torch.long), rows, torch.tensor([0]), mode="sum", per_sample_weights=weights
        )
    assert traffic.bytes >= 10 * 8 * 4  # ten rows, though the table has four


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shift", [(0, 0), (8, -16), (-24, 8)])
def test_without_views_and_by_whole_cells_there_is_nothing_to_interpolate_twice(dense_loss, shift, form):
    problem = dense_loss.make_problem(48, 64, 5, batch=2)
    problem.p, problem.z = problem.p.double(), problem.z.double()
    problem.a = problem.b = torch.eye(3, dtype=torch.float64)[:2].expand(2, 2, 3)
    problem.flow = torch.tensor(shift, dtype=torch.float64).reshape(1, 2, 1, 1).repeat(2, 1, 48, 64)
    loss, gradient = dense_loss.loss_and_gradient(form, problem)
    plain, reference = dense_loss.loss_and_gradient("published", problem)
    assert loss.item() == pytest.approx(plain.item(), rel=1e-12)
    torch.testing.assert_close(gradient, reference, rtol=1e-9, atol=1e-15)
    assert reference.abs().max() > 1e-6


def test_a_pixel_of_shift_would_be_seen(dense_loss):
    problem = dense_loss.make_problem(64, 96, 8)
    _, gradient = dense_loss.loss_and_gradient("cells", problem)
    problem.flow = problem.flow + 1.0
    _, off = dense_loss.loss_and_gradient("published", problem)
    assert (gradient - off).norm() / gradient.norm() > 0.1

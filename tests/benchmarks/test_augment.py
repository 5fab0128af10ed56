"""The benchmark of augmentation compares forms of the same draws: here they must agree. Nothing is timed."""

import importlib
import json
from pathlib import Path

import pytest
import torch

from poodle_lightning.augment.photometric import Colour

ROOT = Path(__file__).parents[2]


@pytest.fixture
def augment(monkeypatch):
    monkeypatch.syspath_prepend(ROOT)
    return importlib.import_module("benchmarks.augment")


def test_all_exact_forms_give_the_same_images(augment):
    torch.manual_seed(0)
    x = torch.rand(6, 3, 64, 110)
    keys = torch.stack([augment.key_of(0, row) for row in range(6)])
    for setting in augment.SETTINGS.values():
        published, kornia, exact = (augment.recolour(form, x, keys, setting) for form in augment.FORMS[:3])
        assert (kornia - exact).abs().max() < 1e-5
        # 0.2989 for red in torchvision's grey, times the factors drawn (at most 1.8 each)
        assert (published - exact).abs().max() < 1e-3
        assert (exact - x).abs().mean() > 0.05
    assert any(Colour().draw(keys).blur)


def test_a_tiny_run_is_written(augment, tmp_path):
    size = ["--h", "64", "--w", "112", "--batch", "2", "--draws", "4", "--rounds", "1", "--no-streets"]
    augment.main([*size, "--out", str(tmp_path)])
    results = json.loads((tmp_path / "augment.json").read_text())["results"]
    assert results["recipe"]["distance"]["kornia_max"] < 1e-5
    assert results["everything"]["distance"]["matrix_mean"] > 1e-4
    assert set(results["geometry"]["ms_per_image"]) == {"published order", "crop first", "two samplings"}


def test_geometry_of_both_orders_shows_the_same_part(augment):
    ramp = torch.linspace(0, 255, 140).round().to(torch.uint8).expand(3, 100, 140)
    box, size = (14, 10, 110, 80), (70, 96)
    for first in (False, True):
        out = augment.published.geometry(ramp, box, size, 0.0, 1.0, first)
        expected = ramp[:, 10:80, 14:110].flip(-1) / 255.0
        assert (out - expected).abs().max() < 1e-5

"""The goal for the bytes kept for the backward pass, and the counter that measures them."""

import importlib
from pathlib import Path

import pytest
import torch
from torch import nn

ROOT = Path(__file__).parents[2]


@pytest.fixture
def saved_bytes(monkeypatch):
    monkeypatch.syspath_prepend(ROOT)
    return importlib.import_module("benchmarks.saved_bytes")


def test_bytes_by_hand(saved_bytes):
    layers = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 5, 1))
    x = torch.rand(2, 3, 4, 6)
    with saved_bytes.Kept(layers, x) as kept:
        layers(x)
    assert kept.total == 4 * 2 * 8 * 4 * 6  # what is behind the ReLU: once, though two layers keep it
    with saved_bytes.Kept(layers) as kept:
        layers(x)
    assert kept.total == 4 * 2 * (8 + 3) * 4 * 6


def test_at_most_55_percent_of_the_published_formulation(saved_bytes):
    results = saved_bytes.run((64, 128))
    assert results["ratio"]["package"] <= 0.55
    assert results["ratio"]["recompute"] <= 0.15
    published = results["published"]["per_image"]
    # the published loss alone: the upsampled, the sampled and the normalised map, each 256 x 512 x 1024
    assert published["loss"] > 2 * 256 * 512 * 1024 * 4
    # the network keeps less by the decoder's wide map
    wide = 2048 * 64 * 128 * 4
    gained = published["network"] - results["package"]["per_image"]["network"]
    assert gained == pytest.approx(wide, rel=0.02)
    # once per step: the product of the two weights
    assert results["package"]["per_step"]["network"] == pytest.approx(4096 * 512 * 4, rel=0.1)

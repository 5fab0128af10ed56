"""The end-to-end benchmark runs, and both ways step on the same pairs of moments."""

import importlib
import json
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def end_to_end(monkeypatch):
    monkeypatch.syspath_prepend(ROOT)
    return importlib.import_module("benchmarks.end_to_end")


def test_a_tiny_run_is_written(end_to_end, tmp_path):
    words = ["--tiny", "--h", "64", "--w", "128", "--seconds", "2", "--rounds", "1"]
    end_to_end.main([*words, "--videos", str(tmp_path / "videos"), "--out", str(tmp_path)])
    found = json.loads((tmp_path / "end_to_end.json").read_text())["results"]
    assert set(found) == {"published", "package", "package, bfloat16"}
    assert found["published"]["times_faster"]["median"] == 1.0
    assert all(way["pair_s"]["min"] > 0 for way in found.values())

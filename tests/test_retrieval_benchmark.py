"""The benchmark of the dense search compares two forms of one search: here they must agree."""

import importlib
import json
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture
def retrieval(monkeypatch):
    monkeypatch.syspath_prepend(ROOT)
    return importlib.import_module("benchmarks.retrieval")


def test_a_tiny_run_is_written_and_both_forms_find_the_same(retrieval, tmp_path):
    words = ["--sizes", "200", "700", "--queries", "40", "--width", "16", "--rounds", "1", "--no-memory"]
    retrieval.main([*words, "--budget-mib", "1", "--out", str(tmp_path)])
    written = json.loads((tmp_path / "retrieval.json").read_text())
    assert list(written["results"]) == ["200", "700"]
    for found in written["results"].values():
        assert found["share_of_equal_places"] > 0.99
        assert found["plain_over_blocks"]["min"] > 0

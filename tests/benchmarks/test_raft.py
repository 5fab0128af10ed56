"""The benchmark of RAFT: both forms give the same flow. Nothing is timed."""

import importlib
import json
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def raft(monkeypatch):
    monkeypatch.syspath_prepend(ROOT)
    return importlib.import_module("benchmarks.raft")


def test_a_tiny_run_is_written_and_the_forms_agree(raft, tmp_path):
    size = ["--h", "128", "--w", "136", "--size", "small", "--iterations", "2"]
    raft.main([*size, "--rounds", "0", "--out", str(tmp_path)])
    found = json.loads((tmp_path / "raft.json").read_text())["results"]
    assert found["mean_flow_px"] > 0.1
    assert found["largest_difference_px"] < 1e-4
    counts = found["multiply_adds"]
    assert counts["package"] < counts["torchvision"]
    assert found["share_of_multiply_adds"] == counts["package"] / counts["torchvision"]

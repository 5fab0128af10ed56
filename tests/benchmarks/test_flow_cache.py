"""The benchmark of flow formats: what it counts, on tiny streets. Nothing is timed."""

import importlib
import json
from pathlib import Path

import numpy as np
import pytest

from poodle_lightning.data.encode import write_video

ROOT = Path(__file__).parents[2]
SIZE = ["--h", "64", "--w", "96", "--preset", "fast"]


@pytest.fixture
def flow_cache(monkeypatch):
    monkeypatch.syspath_prepend(ROOT)
    return importlib.import_module("benchmarks.flow_cache")


def test_counts_bytes_and_errors_of_every_format(flow_cache, tmp_path, capsys):
    flow_cache.main([*SIZE, "--pairs", "2", "--rounds", "0", "--out", str(tmp_path)])
    assert "for DIS medium (here: fast)" in capsys.readouterr().out
    found = json.loads((tmp_path / "flow_cache_64x96.json").read_text())["results"]["formats"]
    assert found["float16"]["kb"] == pytest.approx(2 * 64 * 96 * 2 / 1e3)
    assert found["float16"]["gb_of_70k_pairs_both_ways"] == pytest.approx(4 * 64 * 96 * 2 * 70e3 / 1e9)
    assert found["float16"]["gb_per_hour_both_ways"] == pytest.approx(4 * 64 * 96 * 2 * 30 * 3600 / 1e9)
    # of two components with rounding errors even in ±1/16: the mean distance is 0.7652 of the half side
    assert found["delta"]["error_px"] == pytest.approx(0.7652 / 16, rel=0.1)
    assert found[flow_cache.GOAL]["kb"] < found["delta"]["kb"]
    assert found["JPEG 75"]["kb"] < found["JPEG 95"]["kb"]
    assert found["JPEG 75"]["error_px"] > found["JPEG 95"]["error_px"]


def test_a_film_is_named_without_its_folder(flow_cache, tmp_path):
    draw = np.random.default_rng(0)
    frames = draw.integers(0, 256, (12, 48, 64, 3), dtype=np.uint8)
    write_video(tmp_path / "drive.mp4", frames, 10)
    words = [*SIZE, "--pairs", "1", "--rounds", "1", "--gap", "0.2", "--out", str(tmp_path)]
    flow_cache.main([*words, "--video", str(tmp_path / "drive.mp4")])
    text = (tmp_path / "flow_cache_drive_0.2s_64x96.json").read_text()
    assert str(tmp_path) not in text
    assert json.loads(text)["arguments"]["video"] == "drive.mp4"
    assert json.loads(text)["results"]["formats"]["delta"]["decode_ms"]["min"] >= 0

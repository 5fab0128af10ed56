"""The benchmark of tracking: the loop that it compares with, and what it counts. Nothing is timed."""

import importlib
import json
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def benchmarks(monkeypatch):
    monkeypatch.syspath_prepend(ROOT)
    return importlib.import_module("benchmarks.tracking"), importlib.import_module(
        "benchmarks.published.tracking"
    )


def test_both_forms_leave_the_same_tracks(benchmarks, tmp_path, capsys):
    words = ["--points", "80", "--frames", "8", "--h", "64", "--w", "96", "--rounds", "0"]
    found = benchmarks[0].main([*words, "--preset", "fast", "--out", str(tmp_path)])
    assert found["share_of_other_lengths"] <= 0.03
    assert found["largest_difference_px"] < 0.01
    assert found["points_frames"] > 160
    assert json.loads((tmp_path / "tracking.json").read_text())["results"] == found
    kept = found["formats"]
    # 2 bytes a number and 2 of the consistency, against 4 and 2: places alone are 6 and 10 bytes
    added = (80 * 8 + 8 * 8) / (8 / 30) * 3600 / 1e6
    six, ten = (kept[name]["mb_per_hour"] - added for name in ("float16", "float32"))
    assert ten / six == pytest.approx(10 / 6)
    here = kept["int16 of the extent (here)"]
    assert here["mb_per_hour"] == kept["float16"]["mb_per_hour"]
    # half a step of the extent each way: W / 2 / 32767 px along x
    assert here["error_max_px"] <= np.hypot(96, 64) / 2 / 32767 / 2 + 1e-6
    assert kept["float32"]["error_max_px"] < here["error_px"] < kept["float16"]["error_px"]


def test_the_loop_follows_a_known_motion_and_stops(benchmarks):
    loop = benchmarks[1]
    ys, xs = np.mgrid[:10, :12].astype(float)
    forward = np.stack([np.stack([1 + 0.1 * xs, 0.5 + 0 * ys])] * 4)
    backward = np.stack([np.stack([-(xs - 1) / 11 - 1, -0.5 + 0 * ys])] * 4)
    np.testing.assert_allclose(loop.at(forward[0], 2.25, 3.5), (1.225, 0.5))
    (path,) = loop.follow_each(forward, backward, np.array([[2.0, 3.0]]), np.array([1]), 0.01, 0.5)
    x, wanted = 2.0, [(2.0, 3.0)]
    for k in range(1, 4):
        x = x + 1 + 0.1 * x
        wanted.append((x, 3.0 + 0.5 * k))
    np.testing.assert_allclose(path, wanted)
    backward[2] += 2  # there and back disagree on the second step
    (path,) = loop.follow_each(forward, backward, np.array([[2.0, 3.0]]), np.array([1]), 0.01, 0.5)
    assert len(path) == 2
    (path,) = loop.follow_each(forward, backward, np.array([[10.9, 3.0]]), np.array([0]), 0.01, 0.5)
    assert len(path) == 1  # leaves the frame

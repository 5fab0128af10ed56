"""Curves carry the numbers they were given."""

import numpy as np
import pytest

from poodle_lightning.draw.curves import curves, smooth


def test_smooth_equals_a_naive_loop():
    values = np.random.default_rng(0).normal(size=50).tolist()
    for window in (1, 4, 80):
        naive = [np.mean(values[max(0, i - window + 1) : i + 1]) for i in range(50)]
        assert smooth(values, window) == pytest.approx(naive)


def test_short_curves_are_drawn_as_they_are():
    drawn = curves({"loss": ([1, 2, 3], [3.0, 2.0, 1.0])}, floor=0.0, marks={"alarm": 0.2})
    axes = drawn.axes[0]
    line, mark = axes.get_lines()
    assert line.get_xdata().tolist() == [1, 2, 3]
    assert line.get_ydata().tolist() == [3.0, 2.0, 1.0]
    assert set(mark.get_ydata()) == {0.2}
    assert axes.get_ylim()[0] == 0.0
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["loss", "alarm"]


def test_long_curves_get_a_running_mean():
    values = [float(i % 2) for i in range(300)]
    raw, mean = curves({"loss": (range(300), values)}).axes[0].get_lines()
    assert list(raw.get_ydata()) == values
    assert np.ptp(mean.get_ydata()[20:]) < 0.11

"""What the plots of methods show is what was given to them."""

import math

import pytest

from poodle_lightning.draw.canvas import figure_png
from poodle_lightning.draw.comparison import over_seeds, seed_bars, seed_curves

RUNS = {
    "poodle": [([10, 20, 30], [0.1, 0.2, 0.4]), ([10, 20], [0.3, 0.4])],
    "byol": [([10, 20], [0.2, 0.1])],
}


def test_mean_and_band_at_the_steps_that_all_seeds_have():
    assert over_seeds(RUNS["poodle"]) == ([10, 20], pytest.approx([0.2, 0.3]), [0.1, 0.2], [0.3, 0.4])
    assert over_seeds([]) == ([], [], [], [])


def test_curves_show_means_in_percent_and_the_marks():
    axes = seed_curves(RUNS, marks={"position alone": 0.128}).axes[0]
    poodle, byol, mark = axes.lines
    assert list(poodle.get_xdata()) == [10, 20]
    assert list(poodle.get_ydata()) == pytest.approx([20, 30])
    assert list(byol.get_ydata()) == pytest.approx([20, 10])
    assert list(mark.get_ydata()) == pytest.approx([12.8, 12.8])
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["poodle", "byol", "position alone"]
    band = axes.collections[0].get_paths()[0].vertices
    assert (band[:, 1].min(), band[:, 1].max()) == pytest.approx((10, 40))


def test_bars_show_means_and_a_dot_per_seed():
    values = {"linear": [[0.1, 0.3], [0.2]], "k-NN": [[0.4, math.nan], []]}
    drawn = seed_bars(["poodle", "position"], values)
    axes = drawn.axes[0]
    assert [bar.get_width() for bar in axes.patches] == pytest.approx([20, 20, 40, 0])
    dots = [sorted(x for x, _ in part.get_offsets()) for part in axes.collections]
    assert dots == [pytest.approx([10, 20, 30]), pytest.approx([40])]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["poodle", "position"]
    # within a row the measures stand in the order they were given, from the top
    places = [bar.get_y() + bar.get_height() / 2 for bar in axes.patches]
    assert places[0] < places[2] < places[1] < places[3]
    assert axes.yaxis_inverted()
    assert figure_png(drawn).startswith(b"\x89PNG")

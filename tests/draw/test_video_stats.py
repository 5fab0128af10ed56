"""Panels of what there is, with the numbers given."""

import pytest

from poodle_lightning.draw.canvas import colour, figure_png
from poodle_lightning.draw.video_stats import stats_figure

LIGHT = {"venice": ([0.0, 60.0, 120.0, 240.0], [70.0, 65.0, 40.0, 20.0]), "film": ([0.0, 60.0], [30.0, 50.0])}
CLASSES = {"venice": [3, 90, 10], "film": [4]}


def lines(axes):
    return {line.get_label(): line for line in axes.get_lines()}


def test_four_panels_with_one_colour_per_video():
    drawn = stats_figure(LIGHT, {"venice": ([0.0, 1.0], [4, 6])}, CLASSES, {"venice": 2, "film": 2000})
    light, objects, classes, shots = drawn.axes
    assert light.get_ylim() == (0.0, 100.0)
    assert light.get_xlabel() == "time in min"
    assert lines(light)["venice"].get_xdata().tolist() == [0.0, 1.0, 2.0, 4.0]
    assert lines(light)["venice"].get_ydata().tolist() == LIGHT["venice"][1]
    assert objects.get_xlabel() == "time in s"
    assert lines(objects)["venice"].get_ydata().tolist() == [4, 6]
    assert classes.get_lines()[0].get_ydata().tolist() == [90, 10, 3]
    assert classes.get_yscale() == "log"
    assert [bar.get_width() for bar in shots.containers[0]] == [2, 2000]
    assert shots.get_xscale() == "log"
    for number, name in enumerate(LIGHT):
        assert lines(light)[name].get_color() == colour(number)
        assert shots.containers[0][number].get_facecolor()[:3] == pytest.approx(colour(number))
    assert [text.get_text() for text in drawn.legends[0].get_texts()] == ["venice", "film"]
    assert figure_png(drawn).startswith(b"\x89PNG")


def test_a_panel_without_data_is_left_out():
    assert len(stats_figure(LIGHT).axes) == 1
    found = stats_figure(LIGHT, shots={"venice": 1, "film": 3}, objects={}, classes={})
    assert len(found.axes) == 2
    assert found.axes[1].get_xscale() == "linear"


def test_many_points_are_drawn_with_their_running_mean():
    times = [float(t) for t in range(4 * 3600)]
    drawn = stats_figure({"long": (times, [50.0 + t % 2 for t in range(len(times))])})
    raw, mean = drawn.axes[0].get_lines()
    assert drawn.axes[0].get_xlabel() == "time in h"
    assert raw.get_ydata().max() == 51.0
    assert 50.4 < mean.get_ydata()[-1] < 50.6


def test_more_videos_than_colours_have_no_names():
    many = {f"{number}.mp4": ([0.0, 1.0], [number, number]) for number in range(9)}
    drawn = stats_figure(many, shots=dict.fromkeys(many, 1))
    assert not drawn.legends
    assert len({line.get_color() for line in drawn.axes[0].get_lines()}) == 1

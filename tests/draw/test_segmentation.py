"""Label maps in known colours and bars of the right length."""

import pytest
import torch

from poodle_lightning.draw.segmentation import class_bars, colour_labels, palette


def test_street_classes_have_their_known_colours():
    colours = palette(["road", "light", "unheard of"])
    assert (colours[0] * 255).tolist() == pytest.approx([128, 64, 128])
    assert (colours[1] * 255).tolist() == pytest.approx([250, 170, 30])
    assert colours[255].sum() == 0
    assert colours[2].sum() > 0


def test_invented_classes_get_different_colours():
    colours = palette([f"class {i}" for i in range(40)])[:40]
    assert torch.cdist(colours, colours).fill_diagonal_(1.0).min() > 0.02


def test_label_maps_take_the_colour_of_their_value():
    colours = palette(["road", "sky"])
    made = colour_labels(torch.tensor([[[0, 1], [255, 0]]], dtype=torch.uint8), colours)
    assert made.shape == (1, 3, 2, 2)
    assert torch.equal(made[0, :, 0, 1], colours[1])
    assert made[0, :, 1, 0].sum() == 0


def test_bars_have_the_values_in_percent_and_absent_classes_none():
    drawn = class_bars(["road", "sky"], {"trained": [0.5, float("nan")], "random": [0.1, 0.2]})
    axes = drawn.axes[0]
    trained, random = axes.containers
    assert [bar.get_width() for bar in trained] == [50.0, 0.0]
    assert [bar.get_width() for bar in random] == pytest.approx([10.0, 20.0])
    assert [text.get_text() for text in axes.get_yticklabels()] == ["road", "sky"]
    # first class on top, first series above the second
    assert axes.yaxis_inverted()
    assert trained[0].get_y() < random[0].get_y()

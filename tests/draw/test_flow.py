"""Colours of motion against the standard library, arrows and hidden pixels in their places."""

import colorsys
import math

import pytest
import torch

from poodle_lightning.draw.flow import arrows, flow_colours, hsv_to_rgb, longest_of, visibility, wheel


def constant(x, y, size=(4, 6)):
    return torch.tensor([x, y]).reshape(1, 2, 1, 1).expand(1, 2, *size).contiguous()


def test_hsv_equals_colorsys():
    values = torch.rand(3, 5, 7, generator=torch.Generator().manual_seed(0))
    made = hsv_to_rgb(*values)
    for i in range(5):
        for j in range(7):
            assert made[:, i, j].tolist() == pytest.approx(
                colorsys.hsv_to_rgb(*values[:, i, j].tolist()), abs=1e-6
            )


@pytest.mark.parametrize("degrees", [0, 45, 90, 135, 180, 225, 270, 315])
@pytest.mark.parametrize("share", [0.25, 1.0])
def test_constant_flow_has_one_hue_everywhere(degrees, share):
    angle = math.radians(degrees)
    flow = constant(8 * share * math.cos(angle), 8 * share * math.sin(angle))
    made = flow_colours(flow, longest=8.0)
    expected = torch.tensor(colorsys.hsv_to_rgb(degrees / 360, share, 1.0)).reshape(1, 3, 1, 1)
    assert torch.allclose(made, expected.expand_as(made), atol=1e-5)


def test_right_is_red_and_rest_is_white():
    assert flow_colours(constant(3.0, 0.0))[0, :, 0, 0].tolist() == [1.0, 0.0, 0.0]
    assert flow_colours(constant(0.0, 0.0)).min() == 1.0


def test_scale_is_the_99th_percentile():
    flow = torch.zeros(1, 2, 10, 20)
    flow[0, 0] = torch.arange(1.0, 201.0).reshape(10, 20)
    assert longest_of(flow) == 198.0


def test_wheel_shows_the_colour_of_its_own_direction():
    key = wheel(65)
    assert key.shape == (4, 65, 65)
    assert key[3, 0, 0] == 0
    assert key[3, 32, 32] == 1
    # nearly at the right border: nearly pure red; centre: white
    assert key[:3, 32, 63].tolist() == pytest.approx(colorsys.hsv_to_rgb(0, 62 / 65, 1.0), abs=1e-5)
    assert key[:3, 32, 32].tolist() == pytest.approx([1, 1, 1])


def test_arrows_change_pixels_along_the_motion_only():
    image = torch.full((3, 32, 48), 0.5)
    flow = torch.zeros(2, 32, 48)
    flow[0, 8, 8] = 20.0
    made = arrows(image, flow, step=16, scale=2)
    assert made.shape == (3, 64, 96)
    changed = ((made - 128 / 255).abs().amax(dim=0) > 0.02).nonzero()
    # tail at picture (17, 17), head 40 px further right; the rest of the grid stands still
    assert changed[:, 1].min() >= 14
    assert changed[:, 1].max() <= 60
    assert (changed[:, 0] - 17).abs().max() <= 14
    assert made[:, 17, 30].min() > 0.9


def test_hidden_pixels_turn_magenta():
    images = torch.zeros(1, 3, 2, 2)
    visible = torch.tensor([[[True, True], [True, False]]])
    made = visibility(images, visible)
    assert made[0, :, 1, 1].tolist() == pytest.approx([0.6, 0.0, 0.6])
    assert made[0, :, 0].sum() == 0

"""Boxes at the right pixels, in the same colour on both frames."""

import pytest
import torch

from poodle_lightning.draw.boxes import corners, frame_crops, outline
from poodle_lightning.draw.canvas import colour
from poodle_lightning.ops.geometry import Affine, pixels_to_extent

SIZE = (40, 60)


def boxes_of(pixels):
    """Affine boxes whose corners are centres of the given pixels (x0, y0, x1, y1)."""
    corner = pixels_to_extent(torch.tensor(pixels, dtype=torch.float32).reshape(-1, 2), SIZE)
    return Affine.box(corner.reshape(-1, 4))


def test_corners_run_clockwise_from_top_left():
    made = corners(Affine.box(torch.tensor([[-0.5, -0.25, 0.5, 0.75]])))
    assert made[0].tolist() == [[-0.5, -0.25], [0.5, -0.25], [0.5, 0.75], [-0.5, 0.75]]


def test_outline_covers_exactly_the_border_pixels():
    made = outline(torch.zeros(2, 3, *SIZE), boxes_of([(5, 4, 20, 15), (30, 10, 50, 35)] * 2), thickness=1)
    expected = torch.zeros(3, *SIZE)
    for k, (x0, y0, x1, y1) in enumerate([(5, 4, 20, 15), (30, 10, 50, 35)]):
        shade = torch.tensor(colour(k)).reshape(3, 1)
        expected[:, [y0, y1], x0 : x1 + 1] = shade[..., None].expand(3, 2, x1 - x0 + 1)
        for x in (x0, x1):
            expected[:, y0 : y1 + 1, x] = shade.expand(3, y1 - y0 + 1)
    assert torch.allclose(made[0], expected, atol=1 / 255)
    assert torch.equal(made[0], made[1])


def test_every_image_gets_its_own_rows():
    made = outline(torch.zeros(2, 3, *SIZE), boxes_of([(2, 2, 8, 8), (40, 20, 50, 30)]), thickness=1)
    assert made[0, :, 2, 2].tolist() == pytest.approx(list(colour(0)), abs=1 / 255)
    assert made[1, :, 2, 2].sum() == 0
    assert made[1, :, 20, 40].tolist() == pytest.approx(list(colour(0)), abs=1 / 255)


def test_scale_moves_the_box_with_the_picture():
    made = outline(
        torch.zeros(1, 3, *SIZE), Affine.box(torch.tensor([[-1.0, -1.0, 0.0, 0.0]])), scale=4, thickness=1
    )
    rows, columns = made[0].sum(dim=0).nonzero().unbind(-1)
    # the border at extent 0 is pixel edge 80 of 160 rows, 120 of 240 columns
    assert int(rows.max()) in (79, 80)
    assert int(columns.max()) in (119, 120)


def test_uneven_boxes_are_refused():
    with pytest.raises(ValueError, match="3 boxes"):
        outline(torch.zeros(2, 3, *SIZE), boxes_of([(1, 1, 2, 2)] * 3))


def test_crops_wear_their_colour():
    made = frame_crops(torch.zeros(3, 3, 4, 5), width=2, numbers=[0, 1, 4])
    assert made.shape == (3, 3, 8, 9)
    assert made[:, :, 2:6, 2:7].sum() == 0
    for k, number in enumerate([0, 1, 4]):
        assert made[k, :, 0, 0].tolist() == pytest.approx(list(colour(number)))

import torch

from poodle_lightning.draw.points import dots, place_colours, trails

RED = torch.tensor([[1.0, 0.0, 0.0]])


def reddest(image):
    """``(x, y)`` mean place of what is red, in pixels from the edge."""
    y, x = torch.nonzero((image[0] > 0.9) & (image[1] < 0.1), as_tuple=True)
    return float(x.float().mean()) + 0.5, float(y.float().mean()) + 0.5


def test_a_dot_lies_where_the_extent_says():
    image = torch.full((3, 60, 100), 0.5)
    x, y = reddest(dots(image, torch.tensor([[0.5, -0.25]]), RED))
    # extent 0.5 of 100 px wide is 75 px from the left edge, -0.25 of 60 px is 22.5 from the top
    assert abs(x - 75) < 0.6
    assert abs(y - 22.5) < 0.6


def test_the_image_is_left_alone_where_nothing_is_drawn():
    image = torch.rand(3, 40, 40)
    drawn = dots(image, torch.tensor([[float("nan"), 0.0]]), RED)
    assert (drawn - image).abs().max() <= 0.5 / 255 + 1e-6


def test_a_trail_joins_its_places_and_breaks_where_it_is_lost():
    image, nan = torch.zeros(3, 100, 100), float("nan")
    way = torch.tensor([[[-0.9, 0.0], [-0.5, 0.0], [nan, nan], [0.5, 0.0], [0.9, 0.0]]])
    row = trails(image, way, RED, thickness=3)[0, 50]
    assert row[6:24].min() > 0.9  # from x = 5 to 25 px
    assert row[28:72].max() == 0
    assert row[77:94].min() > 0.9


def test_colours_tell_places_apart_and_lost_ones_are_white():
    places = torch.tensor([[-1.0, 1.0], [1.0, 1.0], [-1.0, -1.0], [float("nan"), 0.0]])
    colours = place_colours(places)
    assert torch.cdist(colours[:3], colours[:3]).add(torch.eye(3)).min() > 0.3
    assert torch.equal(colours[3], torch.ones(3))
    assert place_colours(torch.empty(0, 2)).shape == (0, 3)

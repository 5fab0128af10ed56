import re

import torch

from poodle_lightning.report import points
from poodle_lightning.types import Look


def pictures(section) -> int:
    return len(re.findall(r"<img ", section.body))


def test_point_pairs_show_every_frame_of_every_clip():
    look = Look(torch.rand(2, 2, 3, 32, 48), points=torch.rand(2, 9, 2, 2) - 0.5)
    look.points[0, :4] = float("nan")
    section = points.pairs(look)
    assert pictures(section) == 4
    assert "clip 1, frame 1: 5 of its points" in section.body
    assert "clip 2, frame 2: 9 of its points" in section.body


def test_tracks_are_drawn_on_first_frames():
    look = Look(torch.rand(2, 2, 3, 32, 48))
    ways = torch.rand(70, 5, 2) - 0.5
    ways[:, 3:] = float("nan")
    ways[::2, 0] = float("nan")
    section = points.tracks(look, (ways, ways[:0]))
    assert pictures(section) == 2
    assert "60 of 70 tracks" in section.body
    assert "0 of 0 tracks" in section.body


def test_pooling_shows_each_layer_of_each_view():
    weights = {"layer3": torch.rand(2, 3, 4, 4), "layer4": torch.rand(2, 3, 2, 2)}
    section = points.pooling(
        Look(torch.rand(2, 1, 3, 32, 48), large=torch.rand(2, 3, 3, 32, 32), pooling=weights)
    )
    assert pictures(section) == 2 * 3
    assert "weights of layer3" in section.body


def test_nothing_is_shown_of_what_a_method_has_not():
    look = Look(torch.rand(1, 2, 3, 32, 48), large=torch.rand(1, 2, 3, 8, 8))
    assert points.pairs(look) is None
    assert points.tracks(look, ()) is None
    assert points.pooling(look) is None


def test_tracks_are_coloured_by_where_they_begin(monkeypatch):
    seen = []
    monkeypatch.setattr(
        points, "place_colours", lambda places: seen.append(places) or torch.zeros(len(places), 3)
    )
    nan = float("nan")
    way = torch.tensor([[[nan, nan], [0.25, 0.5], [0.5, 0.5]], [[-0.5, 0.0], [nan, nan], [nan, nan]]])
    points.tracks(Look(torch.rand(1, 2, 3, 32, 48)), (way,))
    assert torch.equal(seen[0], torch.tensor([[0.25, 0.5], [-0.5, 0.0]]))

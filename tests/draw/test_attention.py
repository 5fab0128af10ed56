"""Attention in pictures: which colour where, checked pixel by pixel against small cases."""

import matplotlib
import pytest
import torch

from poodle_lightning.draw.attention import (
    MEAN_COLOUR,
    attention_overlay,
    discovery,
    head_overlays,
    masked_frames,
    object_colours,
    pixel_boxes,
    spread,
    to_size,
    tracks_rgb,
)

BLUE, RED, GREEN = (0.0, 0.0, 1.0), (1.0, 0.0, 0.0), (0.0, 1.0, 0.0)


def at(image, y, x):
    return image[:, y, x].tolist()


def test_first_three_objects_are_blue_red_green_and_more_differ():
    assert object_colours(3).tolist() == [list(BLUE), list(RED), list(GREEN)]
    assert object_colours(1).tolist() == [list(BLUE)]
    for count in (4, 7, 32):
        colours = object_colours(count)
        apart = torch.cdist(colours, colours) + 9 * torch.eye(count)
        assert colours.shape == (count, 3)
        assert apart.min() > 1 / count
        assert torch.equal(colours, colours.clamp(0, 1))
    assert object_colours(4)[0].tolist() == pytest.approx(list(BLUE), abs=1e-6)


def test_spread_reaches_both_ends_and_a_flat_map_is_zero():
    maps = torch.tensor([[[1.0, 3.0], [2.0, 5.0]], [[4.0, 4.0], [4.0, 4.0]]])
    assert spread(maps).tolist() == [[[0.0, 0.5], [0.25, 1.0]], [[0.0, 0.0], [0.0, 0.0]]]
    # over two maps together
    assert spread(torch.tensor([[[0.0, 1.0]], [[2.0, 4.0]]]), (0, 1, 2)).tolist() == [[[0, 0.25]], [[0.5, 1]]]


def test_masks_are_repeated_and_maps_are_bilinear():
    mask = torch.tensor([[True, False], [False, True]])
    assert (
        to_size(mask, (4, 4)).bool().tolist() == mask.repeat_interleave(2, 0).repeat_interleave(2, 1).tolist()
    )
    # bilinear with pixel centres: cells at 0.5 and 1.5 of 2, read at 0.25, 0.75, 1.25, 1.75
    assert to_size(torch.tensor([[0.0, 1.0]]), (1, 4))[0].tolist() == [0.0, 0.25, 0.75, 1.0]


def test_overlay_is_the_colour_map_between_lowest_and_highest():
    image = torch.full((1, 3, 1, 4), 0.5)
    attention = torch.tensor([[[0.02, 0.04, 0.05, 0.10]]])
    made = attention_overlay(image, attention, strength=1.0)[0]
    table = matplotlib.colormaps["inferno"]
    for x, share in enumerate((0.0, 0.25, 0.375, 1.0)):
        assert at(made, 0, x) == pytest.approx(list(table(round(255 * share))[:3]), abs=1e-6)
    half = attention_overlay(image, attention, strength=0.5)[0]
    assert torch.allclose(half, 0.25 + 0.5 * made)
    assert torch.equal(attention_overlay(image, attention, strength=0.0), image)


def test_heads_are_overlays_of_one_image():
    image, heads = torch.rand(3, 8, 8), torch.rand(5, 2, 2)
    made = head_overlays(image, heads)
    assert torch.equal(made[3], attention_overlay(image[None], heads[3:4])[0])


def test_tracks_have_their_colour_and_mix_where_they_overlap():
    frames = torch.full((1, 3, 1, 4), 0.2)
    # objects: only the first; first and third alike; second half as strong; none
    tracks = torch.tensor([[[[1.0, 1.0, 0.0, 0.0]], [[0.0, 0.0, 0.5, 0.0]], [[0.0, 1.0, 0.0, 0.0]]]])
    tracks[0, 1, 0, 0] = 0.0
    made = tracks_rgb(frames, tracks, strength=1.0)[0]
    assert at(made, 0, 0) == pytest.approx(list(BLUE))
    assert at(made, 0, 1) == pytest.approx([0, 1, 1])  # cyan
    assert at(made, 0, 2) == pytest.approx(list(RED))  # its own largest is its full colour
    assert at(made, 0, 3) == pytest.approx([0.2, 0.2, 0.2])
    half = tracks_rgb(frames, tracks, strength=0.5)[0]
    assert at(half, 0, 0) == pytest.approx([0.1, 0.1, 0.6])


def test_a_fading_track_fades_only_over_the_clip():
    frames = torch.zeros(2, 3, 1, 2)
    tracks = torch.tensor([[[[0.0, 1.0]]], [[[0.0, 0.25]]]])
    assert at(tracks_rgb(frames, tracks, 1.0)[1], 0, 1) == pytest.approx([0, 0, 1])
    assert at(tracks_rgb(frames, tracks, 1.0, over="clip")[1], 0, 1) == pytest.approx([0, 0, 0.25])


def test_masked_frames_are_those_of_the_normalised_image():
    torch.manual_seed(0)
    frames, masks = torch.rand(2, 3, 4, 6), torch.rand(2, 3, 4, 6)
    mean, std = torch.tensor(MEAN_COLOUR).reshape(3, 1, 1), torch.tensor([0.2, 0.3, 0.25]).reshape(3, 1, 1)
    made = masked_frames(frames, masks)
    for t in range(2):
        for i in range(3):
            seen = (frames[t] - mean) / std * masks[t, i]
            assert torch.allclose(made[t, i], (seen * std + mean).clamp(0, 1), atol=1e-6)
    hard = masked_frames(frames, torch.tensor([[[[True, False]]], [[[False, False]]]]))
    assert torch.equal(hard[0, 0, :, :, :3], frames[0, :, :, :3])
    assert torch.allclose(hard[0, 0, :, :, 3:], mean.expand(3, 4, 3))
    assert torch.allclose(hard[1, 0], mean.expand(3, 4, 6))


def test_boxes_lie_on_their_pixels():
    made = pixel_boxes(torch.zeros(3, 8, 10), torch.tensor([[2, 1, 7, 6], [6, 5, 40, 40]]), (1, 1, 1), 1)[0]
    expected = torch.zeros(8, 10)
    expected[1, 2:7] = expected[5, 2:7] = expected[1:6, 2] = expected[1:6, 6] = 1
    expected[5, 6:] = expected[7, 6:] = expected[5:, 6] = expected[5:, 9] = 1
    assert made.tolist() == expected.tolist()
    whole = pixel_boxes(torch.zeros(3, 4, 4), torch.tensor([[0.0, 0.0, 4.0, 4.0]]), (1, 0, 0), 1)
    assert int(whole[0].sum()) == 12
    assert pixel_boxes(torch.zeros(3, 4, 4), torch.tensor([[1.0, 1.0, 2.0, 2.0]]), (1, 0, 0), 3)[0].sum() == 1


def test_discovery_shows_found_and_true():
    image, mask = torch.zeros(3, 16, 16), torch.zeros(16, 16, dtype=torch.bool)
    mask[:8] = True
    objects = torch.zeros(16, 16, dtype=torch.uint8)
    objects[8:, :8], objects[8:, 8:] = 3, 255
    box, truth = torch.tensor([0, 0, 16, 8]), torch.tensor([[0, 8, 8, 16]])
    cells = discovery(image, torch.rand(2, 2), mask, box, truth, objects)
    assert [cell.shape for cell in cells] == [(3, 16, 16)] * 4
    assert at(cells[0], 0, 0) == [1, 0, 1]
    assert at(cells[0], 15, 3)[1] > 0.8
    assert at(cells[2], 3, 3)[0] > 0.5
    assert at(cells[2], 12, 3) == [0, 0, 0]
    assert at(cells[3], 12, 3)[1] > 0.4
    assert at(cells[3], 12, 12) == [0, 0, 0]
    assert len(discovery(image, torch.rand(2, 2), mask, box, truth)) == 3


def test_numbers_that_do_not_agree_are_refused():
    frames = torch.zeros(2, 3, 4, 4)
    with pytest.raises(ValueError, match="3 attention maps for 2 images"):
        attention_overlay(frames, torch.zeros(3, 2, 2))
    with pytest.raises(ValueError, match="3 tracked frames for 2 frames"):
        tracks_rgb(frames, torch.zeros(3, 1, 2, 2))
    with pytest.raises(ValueError, match="masks of 1 frames for 2 frames"):
        masked_frames(frames, torch.zeros(1, 1, 2, 2))

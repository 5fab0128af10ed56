"""Masks over frames, pixel by pixel."""

import torch

from poodle_lightning.draw.masks import ids_overlay, mask_strip, spread_frames

COLOURS = torch.zeros(256, 3)
COLOURS[1], COLOURS[2] = torch.tensor([1.0, 0.0, 0.0]), torch.tensor([0.0, 0.0, 1.0])


def test_frames_go_from_the_first_to_the_last():
    assert spread_frames(70, 6) == [0, 14, 28, 41, 55, 69]
    assert spread_frames(4, 6) == [0, 1, 2, 3]
    assert spread_frames(9, 1) == [0]


def test_borders_are_full_insides_blended_and_the_rest_is_left():
    images = torch.full((1, 3, 7, 9), 0.4)
    ids = torch.zeros(1, 7, 9, dtype=torch.uint8)
    ids[0, 1:6, :5] = 1  # goes on beyond the left border: no line there
    ids[0, 2:5, 5:8] = 2
    found = ids_overlay(images, ids, COLOURS, 0.25)
    for y in range(7):
        for x in range(9):
            number = int(ids[0, y, x])
            near = [(y - 1, x), (y + 1, x), (y, x - 1), (y, x + 1)]
            edge = any(0 <= v < 7 and 0 <= u < 9 and int(ids[0, v, u]) != number for v, u in near)
            share = 0.0 if not number else 1.0 if edge else 0.25
            wanted = 0.4 + share * (COLOURS[number] - 0.4)
            assert torch.allclose(found[0, :, y, x], wanted), (y, x)


def test_a_strip_has_the_frames_the_true_masks_and_the_found_ones():
    frames = torch.rand(3, 3, 20, 24, generator=torch.Generator().manual_seed(0))
    truth, guess = torch.zeros(3, 20, 40, dtype=torch.uint8), torch.zeros(3, 20, 40, dtype=torch.uint8)
    truth[:, 5:15, 10:20], guess[:, 5:15, 20:30] = 1, 2
    found = mask_strip(frames, truth, guess, COLOURS, width=80)
    assert found.shape == (3, 3 * 40 + 2 * 4, 3 * 80 + 2 * 4)
    plain, true, seen = (found[:, top : top + 40, 84:164] for top in (0, 44, 88))
    inside = (slice(None), slice(10, 30))
    assert torch.allclose(true[:, 10, 20:40], COLOURS[1][:, None].expand(3, 20))
    assert torch.allclose(seen[:, 10, 40:60], COLOURS[2][:, None].expand(3, 20))
    assert torch.equal(true[..., 40:], plain[..., 40:])
    assert torch.equal(seen[..., :40], plain[..., :40])
    assert not torch.equal(true[inside][..., 20:40], plain[inside][..., 20:40])

"""Rows of pictures of objects: the right heads framed, the right patches kept."""

from dataclasses import replace

import pytest
import torch

from poodle_lightning.draw.attention import MEAN_COLOUR, object_colours
from poodle_lightning.draw.objects import chosen_heads, object_rows, restored_patches
from poodle_lightning.types import Objects


def found(clips=2, frames=4, k=2, heads=5, grid=(2, 4), patch=8):
    """White clips; object j of clip i is patch (i, j), in all frames."""
    tracks = torch.zeros(clips, frames, k, *grid)
    for i in range(clips):
        for j in range(k):
            tracks[i, :, j, i, j] = 1.0
    white = torch.ones(clips, frames, 3, grid[0] * patch, grid[1] * patch)
    return Objects(white, torch.rand(clips, heads, *grid), (3, 1), tracks.flip(-1), tracks, tracks > 0)


def test_chosen_heads_are_framed_in_the_colour_of_their_object():
    heads = found().heads[0]
    drawn = chosen_heads(torch.ones(3, 16, 32), heads, (3, 1), border=2)
    assert [tuple(picture.shape[1:]) for picture in drawn] == [
        (16, 32), (20, 36), (16, 32), (20, 36), (16, 32)
    ]  # fmt: skip
    blue, red = object_colours(2)
    for number, shade in ((3, blue), (1, red)):
        for corner in ((0, 0), (1, 20), (-1, -1)):
            assert torch.equal(drawn[number][:, corner[0], corner[1]], shade)
    plain = chosen_heads(torch.ones(3, 16, 32), heads, ())
    assert torch.equal(drawn[3][:, 2:-2, 2:-2], plain[3])


def test_rows_of_the_asked_clip():
    objects = found()
    rows = object_rows(objects, 1, width=64)
    assert list(rows) == ["frames", "attention", "refined", "object 1", "object 2"]
    assert {tuple(row.shape) for row in rows.values()} == {(4, 3, 32, 64)}
    # clip 1 has its objects in the lower row of patches, of 16 px once enlarged
    shown = rows["object 2"][0]
    assert torch.equal(shown[:, 16:, 16:32], torch.ones(3, 16, 16))
    assert shown[:, :16].mean(dim=(1, 2)).tolist() == pytest.approx(MEAN_COLOUR)
    assert shown[:, 16:, 32:].mean(dim=(1, 2)).tolist() == pytest.approx(MEAN_COLOUR)
    # the first object is blue on white: least red in the middle of its own patch
    red = rows["refined"][0, 0]
    assert red.argmin().item() in {y * 64 + x for y in range(16, 32) for x in range(16)}
    assert rows["attention"][0, 0].argmin().item() % 64 >= 48  # its raw attention is mirrored


def test_hard_masks_keep_whole_patches_and_soft_ones_are_smooth():
    objects = found()
    hard, soft = objects.masks.float(), objects.masks.float() * 0.9
    row = {
        name: object_rows(replace(objects, masks=m), 0, 32)["object 1"]
        for name, m in (("hard", hard), ("soft", soft))
    }
    assert torch.equal(row["hard"], object_rows(objects, 0, 32)["object 1"])
    assert len(row["hard"].unique()) == 4  # white, and the mean colour's three channels
    assert len(row["soft"].unique()) > 4


def test_unrefined_objects_have_one_row_of_tracks_and_many_objects_are_cut():
    objects = found()
    same = Objects(objects.frames, objects.heads, (3, 1), objects.tracks, objects.tracks, objects.masks)
    assert list(object_rows(same, 0, 32, most=1)) == ["frames", "attention", "object 1"]
    assert list(object_rows(same, 0, 32, most=0)) == ["frames", "attention"]


def test_only_hidden_patches_are_replaced():
    crops = torch.full((2, 3, 8, 8), 0.25)
    hidden = torch.tensor([[[True, False], [False, False]], [[False, False], [False, True]]])
    shown = restored_patches(crops, hidden, torch.full((2, 3, 8, 8), 1.5))
    assert torch.equal(shown[0, :, :4, :4], torch.ones(3, 4, 4))
    assert torch.equal(shown[1, :, 4:, 4:], torch.ones(3, 4, 4))
    assert shown.sum().item() == pytest.approx(2 * 3 * (16 + 48 * 0.25))

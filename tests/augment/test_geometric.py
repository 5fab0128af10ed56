import math

import pytest
import torch

from poodle_lightning.augment.geometric import AffineFlip, ResizedCrop, draw_views
from poodle_lightning.ops.geometry import extent_to_pixels, pixel_grid, pull
from poodle_lightning.ops.random import key_of

SIZE = (64, 128)


def keys(count, seed=0):
    return torch.stack([key_of(seed, i) for i in range(count)])


def in_pixels(affine, size=SIZE):
    """The linear part of a map in pixels of both frames, (B, 2, 2)."""
    scale = torch.tensor([size[1] / 2, size[0] / 2])
    return affine.matrix[:, :2, :2] * scale[:, None] / scale[None]


def test_rotation_scale_and_flip_lie_in_their_ranges():
    linear = in_pixels(AffineFlip(degrees=10, scale=(0.9, 1.1), flip=0.5).draw(keys(500), SIZE))
    determinant = torch.linalg.det(linear)
    scale = 1 / determinant.abs().sqrt()  # the view magnifies by the inverse of to_clean
    assert scale.min() >= 0.9 - 1e-4
    assert scale.max() <= 1.1 + 1e-4
    angle = torch.atan2(linear[:, 1, 0].abs(), linear[:, 0, 0].abs()) * 180 / math.pi
    assert angle.max() <= 10.001
    assert angle.max() > 9
    assert abs((determinant < 0).float().mean() - 0.5) < 0.08
    assert torch.allclose(
        linear[:, 0].norm(dim=1), linear[:, 1].norm(dim=1), atol=1e-4
    )  # no shear: pixels are square


def test_centre_stays_up_to_the_flip():
    maps = AffineFlip().draw(keys(50), SIZE)
    assert maps(torch.zeros(50, 1, 1, 2)).abs().max() < 1e-5


def test_image_shows_what_the_map_says():
    """A coordinate image drawn through a view holds, where seen, the clean coordinate of to_clean."""
    grid = pixel_grid(SIZE)
    coordinates = torch.cat([grid.permute(2, 0, 1), torch.ones(1, *SIZE)])[None].repeat(8, 1, 1, 1)
    view = AffineFlip(degrees=30, scale=(0.5, 2.0))(coordinates, keys(8))
    expected = view.to_clean(grid.expand(8, *SIZE, 2))
    seen = view.image[:, 2] > 0.5
    inner = seen & ((expected.abs() < 1 - 2 / 64).all(-1))
    error = extent_to_pixels(view.image[:, :2].permute(0, 2, 3, 1), SIZE) - extent_to_pixels(expected, SIZE)
    assert error.abs().amax(-1)[inner].max() < 1e-3
    assert (view.image[:, :, ...][(~seen)[:, None].expand_as(view.image)] == 0).all()
    assert inner.float().mean() > 0.3


def test_undoing_the_view_gives_the_image_back():
    low = torch.rand(4, 3, 8, 16)
    smooth = torch.nn.functional.interpolate(low, size=SIZE, mode="bicubic", align_corners=False).clamp(0, 1)
    view = AffineFlip()(smooth, keys(4))
    back, seen = pull(view.image, view.to_clean.inverse(), SIZE)
    inner = torch.nn.functional.max_pool2d((~seen[:, None]).float(), 5, 1, 2) == 0
    assert ((back - smooth).abs() * inner).mean() < 0.01


def test_resized_crop_ranges_and_flip():
    maps = ResizedCrop((32, 32), area=(0.2, 0.5), flip=0.5).draw(keys(400), SIZE)
    linear = in_pixels(maps)
    width, height = linear[:, 0, 0] * SIZE[1], linear[:, 1, 1] * SIZE[0]
    area = (width.abs() * height) / (SIZE[0] * SIZE[1])
    uncut = height < 63.9
    assert area.max() <= 0.5 + 1e-4
    assert area[uncut].min() >= 0.2 - 1e-4
    ratio = (width.abs() / height)[uncut]
    assert ratio.min() >= 0.75 - 1e-3
    assert ratio.max() <= 4 / 3 + 1e-3
    assert abs((width < 0).float().mean() - 0.5) < 0.08
    corners = maps(torch.tensor([[-1.0, -1.0], [1.0, 1.0]]).expand(400, 1, 2, 2))
    assert corners.abs().max() <= 1 + 1e-5


def test_views_of_the_two_branches_are_drawn_separately():
    x = torch.rand(3, 3, *SIZE)
    a, b = draw_views(AffineFlip(), x, x, keys(3))
    assert (a.to_clean.matrix - b.to_clean.matrix).abs().amax((1, 2)).min() > 1e-3
    same_a, same_b = draw_views(None, x, x, keys(3))
    assert torch.equal(same_a.image, x)
    assert torch.equal(same_b.to_clean.matrix, torch.eye(3).expand(3, 3, 3))


@pytest.mark.parametrize("make", [lambda: AffineFlip(scale=(1.2, 0.9)), lambda: ResizedCrop(area=(0.0, 1.0))])
def test_impossible_ranges_are_refused(make):
    with pytest.raises(ValueError, match="must be 0 <"):
        make()


def test_a_shift_moves_the_centre_within_its_share_and_nothing_else():
    still, moved = AffineFlip(flip=0.0), AffineFlip(flip=0.0, shift=0.2)
    a, b = still.draw(keys(300), SIZE), moved.draw(keys(300), SIZE)
    assert torch.allclose(a.matrix[:, :2, :2], b.matrix[:, :2, :2])
    # where the crop's centre stands in the view: twice the share, since the extent is 2 wide
    where = b.inverse()(torch.zeros(300, 1, 1, 2)).reshape(-1, 2)
    assert where.abs().max() <= 0.4 + 1e-5
    assert (where.abs().amax(dim=0) > 0.38).all()
    assert where.mean(dim=0).abs().max() < 0.05


def test_outside_the_crop_is_black_or_the_border_repeated():
    white = torch.ones(6, 3, *SIZE)
    small = {"degrees": 0.0, "scale": (0.5, 0.5)}
    assert AffineFlip(**small)(white, keys(6)).image.mean() == pytest.approx(0.25, abs=0.02)
    assert torch.equal(AffineFlip(**small, outside="border")(white, keys(6)).image, white)


@pytest.mark.parametrize("wrong", [{"shift": -0.1}, {"shift": 1.0}, {"outside": "grey"}])
def test_impossible_shifts_and_borders_are_refused(wrong):
    with pytest.raises(ValueError, match="must"):
        AffineFlip(**wrong)

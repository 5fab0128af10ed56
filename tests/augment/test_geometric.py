import math

import numpy as np
import pytest
import torch
from torchvision import transforms

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


def torchvisions(count, size, area, ratio):
    """Left, top, width and height that torchvision draws for an image of ``size``, as shares of it."""
    torch.manual_seed(0)
    image = torch.empty(1, 1, 1).expand(1, *size)
    drawn = [transforms.RandomResizedCrop.get_params(image, list(area), list(ratio)) for _ in range(count)]
    top, left, height, width = np.array(drawn, dtype=float).T
    return {
        "left": left / size[1],
        "top": top / size[0],
        "width": width / size[1],
        "height": height / size[0],
    }


def largest_gap(one, other):
    """Between two empirical distributions (Kolmogorov and Smirnov)."""
    at = np.sort(np.concatenate([one, other])) + 1e-4  # what torchvision rounds to whole pixels is one atom
    steps = [np.searchsorted(np.sort(sample), at, side="right") / len(sample) for sample in (one, other)]
    return np.abs(steps[0] - steps[1]).max()


@pytest.mark.parametrize("area", [(0.4, 1.0), (0.05, 0.4)])
@pytest.mark.parametrize("true", [(8000, 8000), (4500, 8000), (9000, 3000), (2000, 9000)])
def test_redrawn_crops_are_torchvisions(true, area):
    """Of a picture of any shape that was squeezed into a square; in float the same law, but for rounding."""
    count, ratio = 2000, (3 / 4, 4 / 3)
    crop = ResizedCrop((32, 32), area, ratio, flip=0.0, fit="redraw")
    matrix = crop.draw(keys(count), (64, 64), torch.full((count,), true[1] / true[0])).matrix.numpy()
    width, height = matrix[:, 0, 0], matrix[:, 1, 1]
    ours = {
        "left": (matrix[:, 0, 2] - width + 1) / 2,
        "top": (matrix[:, 1, 2] - height + 1) / 2,
        "width": width,
        "height": height,
    }
    theirs = torchvisions(count, true, area, ratio)
    bound = 1.95 * math.sqrt(2 / count)  # one of a thousand true pairs is further apart
    for name, values in ours.items():
        assert largest_gap(values, theirs[name]) < bound, name
    # and the other way of fitting is another law, where some crops do not fit
    cut = ResizedCrop((32, 32), area, ratio, flip=0.0).draw(
        keys(count), (64, 64), torch.full((count,), true[1] / true[0])
    )
    if area[1] == 1.0 and true[0] == true[1]:
        assert largest_gap(cut.matrix[:, 1, 1].numpy(), theirs["height"]) > bound


@pytest.mark.parametrize("true", [(1000, 9000), (9000, 1000)])
def test_what_never_fits_is_the_largest_crop_in_the_middle(true):
    """torchvision's way out, to the pixel."""
    crop = ResizedCrop((32, 32), (0.9, 1.0), flip=0.0, fit="redraw")
    matrix = crop.draw(keys(5), (64, 64), torch.full((5,), true[1] / true[0])).matrix
    theirs = torchvisions(5, true, crop.area, crop.ratio)
    for row in range(5):
        assert float(matrix[row, 0, 0]) == pytest.approx(theirs["width"][row], abs=1e-3)
        assert float(matrix[row, 1, 1]) == pytest.approx(theirs["height"][row], abs=1e-3)
        assert matrix[row, :2, 2].tolist() == [0.0, 0.0]
        assert theirs["left"][row] == pytest.approx((1 - theirs["width"][row]) / 2, abs=1e-3)


def test_ranges_hold_in_true_pixels_of_each_image():
    aspects = torch.tensor([0.5, 1.0, 2.0]).repeat(200)
    crop = ResizedCrop((32, 32), area=(0.1, 0.3), ratio=(0.5, 2.0), flip=0.5, fit="redraw")
    matrix = crop.draw(keys(600), (48, 96), aspects).matrix
    width, height = matrix[:, 0, 0].abs(), matrix[:, 1, 1]
    assert (width * height).min() >= 0.1 - 1e-5
    assert (width * height).max() <= 0.3 + 1e-5
    ratio = (width * aspects / height).reshape(200, 3)
    assert ratio.min() >= 0.5 - 1e-4
    assert ratio.max() <= 2.0 + 1e-4
    assert (ratio.amin(dim=0) < 0.55).all()
    assert (ratio.amax(dim=0) > 1.8).all()


@pytest.mark.parametrize("fit", ["cut", "redraw"])
def test_a_picture_of_its_own_shape_needs_no_aspect(fit):
    crop = ResizedCrop((32, 32), (0.3, 1.0), fit=fit)
    there = crop.draw(keys(100), SIZE, torch.full((100,), SIZE[1] / SIZE[0])).matrix
    torch.testing.assert_close(there, crop.draw(keys(100), SIZE).matrix)
    view = crop(torch.rand(3, 3, *SIZE), keys(3), torch.tensor([0.5, 1.0, 3.0]))
    assert torch.equal(view.to_clean.matrix, crop.draw(keys(3), SIZE, torch.tensor([0.5, 1.0, 3.0])).matrix)


def test_an_unknown_fit_is_refused():
    with pytest.raises(ValueError, match='fit must be "cut" or "redraw"'):
        ResizedCrop(fit="pad")

"""YUV planes made into RGB, against a loop over pixels in float64."""

import pytest
import torch

from poodle_lightning.ops.planes import planes_size, planes_to_rgb, split_planes

# ITU-R BT.601, limited range, with the usual rounded coefficients
BT601 = torch.tensor(
    [
        [1.164, 0.0, 1.596, -1.164 * 16 - 1.596 * 128],
        [1.164, -0.392, -0.813, -1.164 * 16 + (0.392 + 0.813) * 128],
        [1.164, 2.017, 0.0, -1.164 * 16 - 2.017 * 128],
    ]
)


def planes(batch, count, height, width, seed=0):
    draw = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (batch, count, height * 3 // 2, width), generator=draw, dtype=torch.uint8)


def test_rgb_by_hand():
    raw, matrices = planes(2, 2, 4, 6), torch.stack([BT601, BT601 * 0.9])
    found = planes_to_rgb(raw, matrices)
    assert found.shape == (2, 2, 3, 4, 6)
    assert found.dtype == torch.float32
    for b in range(2):
        for t in range(2):
            flat = raw[b, t].flatten().double()
            for y in range(4):
                for x in range(6):
                    place = (y // 2) * 3 + x // 2
                    sample = torch.stack(
                        [flat[y * 6 + x], flat[24 + place], flat[30 + place], flat.new_tensor(1.0)]
                    )
                    exact = (matrices[b].double() @ sample).clamp(0, 255)
                    assert (found[b, t, :, y, x] - exact).abs().max() <= 0.5 + 1e-4
                    assert torch.equal(found[b, t, :, y, x], found[b, t, :, y, x].round())


def test_grey_stays_grey_and_the_ends_of_the_range_are_black_and_white():
    raw = torch.full((1, 1, 3, 2), 128, dtype=torch.uint8)
    for luma, level in ((16, 0), (235, 255), (255, 255), (0, 0)):
        raw[:, :, :2] = luma
        assert (planes_to_rgb(raw, BT601[None]) - level).abs().max() <= 1


def test_planes_are_views_of_the_frame():
    raw = planes(1, 2, 4, 6)
    y, u, v = split_planes(raw)
    assert (y.shape, u.shape, v.shape) == ((1, 2, 4, 6), (1, 2, 2, 3), (1, 2, 2, 3))
    assert torch.equal(torch.cat([part.flatten(2) for part in (y, u, v)], dim=2), raw.flatten(2))
    u.zero_()
    assert not raw.flatten(2)[..., 24:30].any()


def test_not_even_under_autocast_are_the_products_rounded():
    raw = planes(1, 1, 4, 6)
    with torch.autocast("cpu", torch.bfloat16):
        found = planes_to_rgb(raw, BT601[None])
    assert torch.equal(found, planes_to_rgb(raw, BT601[None]))


@pytest.mark.parametrize("shape", [(1, 4, 6), (1, 6, 5), (1, 0, 6)])
def test_shapes_that_hold_no_planes(shape):
    with pytest.raises(ValueError, match="even height and width"):
        planes_size(shape)

import colorsys
import math

import kornia.enhance as enhance
import numpy as np
import pytest
import torch
import torchvision.transforms._functional_tensor as tensor_operations
import torchvision.transforms.functional as TF
from kornia.color import rgb_to_grayscale
from scipy.ndimage import correlate1d

from poodle_lightning.augment import operations


def planes(size=(24, 32)):
    """An image ``(3, n)`` with noise, greys, black, white, pure and mixed colours, and ties of channels."""
    torch.manual_seed(1)
    x = torch.rand(3, *size)
    levels = torch.tensor([0.0, 0.25, 0.5, 1.0])
    x[:, 0, :4] = levels
    x.flatten(1)[:, 64:128] = torch.cartesian_prod(levels, levels, levels).T
    return x.flatten(1)


def ours(name, factor, x):
    x = x.clone()
    if name == "contrast":
        operations.contrast_(x, factor, operations.gray(x).mean(dim=-1, keepdim=True))
    else:
        getattr(operations, f"{name}_")(x, factor)
    return x


OF_KORNIA = {
    "brightness": enhance.adjust_brightness_accumulative,
    "contrast": enhance.adjust_contrast_with_mean_subtraction,
    "saturation": enhance.adjust_saturation_with_gray_subtraction,
    "hue": lambda x, turns: enhance.adjust_hue(x, turns * (2 * math.pi)),
}
CASES = [
    *(("brightness", f) for f in (0.0, 0.3, 1.6)),
    *(("contrast", f) for f in (0.0, 0.2, 1.7)),
    *(("saturation", f) for f in (0.0, 0.1, 1.8)),
    *(("hue", f) for f in (0.0, 0.2, -0.2, 0.5, -0.5, 1 / 6)),
]


@pytest.mark.parametrize(("name", "factor"), CASES)
def test_each_operation_is_kornias(name, factor):
    x = planes()
    expected = OF_KORNIA[name](x.reshape(1, 3, 24, 32), torch.tensor([factor]))
    assert (ours(name, factor, x) - expected.flatten(2)[0]).abs().max() < 1e-5


@pytest.mark.parametrize(("name", "factor"), CASES)
def test_each_operation_is_torchvisions(name, factor, monkeypatch):
    x = planes()
    reference = getattr(TF, f"adjust_{name}")
    plain = reference(x.reshape(3, 24, 32), factor).flatten(1)
    # torchvision writes 0.2989 for the weight of red: the factor carries that over
    assert (ours(name, factor, x) - plain).abs().max() < 1e-5 + 1.01e-4 * abs(1 - factor)
    with_our_grey = lambda image, *_: operations.gray(image.flatten(-2)).unflatten(-1, image.shape[-2:])  # noqa: E731
    monkeypatch.setattr(tensor_operations, "rgb_to_grayscale", with_our_grey)
    assert (ours(name, factor, x) - reference(x.reshape(3, 24, 32), factor).flatten(1)).abs().max() < 1e-5


@pytest.mark.parametrize("turns", [-0.5, -0.2, 0.0, 0.07, 1 / 3, 0.5])
def test_hue_is_that_of_the_standard_library(turns):
    x = planes().double()
    out = ours("hue", turns, x)
    for pixel, got in zip(x.T.tolist(), out.T, strict=True):
        hue, saturation, value = colorsys.rgb_to_hsv(*pixel)
        expected = colorsys.hsv_to_rgb((hue + turns) % 1.0, saturation, value)
        assert (got - torch.tensor(expected, dtype=torch.float64)).abs().max() < 1e-12


@pytest.mark.parametrize("name", ["brightness", "contrast", "saturation", "hue"])
def test_factors_of_several_images_broadcast(name):
    x = torch.stack([planes(), planes().flip(1)])
    factors = [0.3, 0.17]
    together = ours(name, torch.tensor(factors)[:, None, None], x)
    alone = torch.stack([ours(name, factor, image) for factor, image in zip(factors, x, strict=True)])
    assert (together - alone).abs().max() < 1e-6


def test_grey_and_solarisation():
    x = planes()
    whole = x.reshape(1, 3, 24, 32)
    assert (operations.gray(x) - rgb_to_grayscale(whole).flatten(2)[0]).abs().max() < 1e-6
    assert torch.equal(operations.solarized(x), enhance.solarize(whole).flatten(2)[0])
    assert torch.equal(operations.solarized(x), TF.solarize(whole, 0.5).flatten(2)[0])
    operations.gray_(x)
    assert (x[0] == x[1]).all()
    assert (x[0] == x[2]).all()


# ---- blur
def scenes():
    """Images that ask most of a truncated kernel: noise, a step, single points, a chequered field."""
    torch.manual_seed(2)
    size = (64, 120)
    step = torch.zeros(size)
    step[:, 60:] = 1.0
    points = torch.zeros(size)
    points[::16, ::16] = 1.0
    far = torch.ones(size)
    far[23:42, 50:69] = 0.0  # all that a kernel of 19 × 19 sees is 0, all that it leaves out is 1
    return torch.stack([torch.rand(size), step, points, far, 1.0 - far, torch.rand(size).round()])


def blur_one_by_one(x, sigma):
    out = x.clone()
    operations.blur_(out, sigma)
    return out


def blur_together(x, sigma):
    return operations.blurred(x[None], torch.tensor([sigma]), 2.0)[0]


@pytest.mark.parametrize("blur", [blur_one_by_one, blur_together])
@pytest.mark.parametrize("sigma", [0.1, 0.35, 0.6, 1.0, 1.25, 1.7, 2.0])
def test_blur_is_the_untruncated_gaussian_in_float64(blur, sigma):
    for x in scenes().split(3):
        taps = [np.exp(-0.5 * (np.arange(-r, r + 1) / sigma) ** 2) for r in (26, 52)]
        expected = x.double().numpy()
        for axis, weights in zip((1, 2), taps, strict=True):  # 53 × 105
            expected = correlate1d(expected, weights / weights.sum(), axis=axis, mode="mirror")
        assert np.abs(blur(x, sigma).numpy() - expected).max() < 1e-5


@pytest.mark.parametrize("sigma", [0.4, 1.0, 2.0])
def test_blur_is_torchvisions_for_the_same_kernel(sigma):
    x = scenes()[:3]
    side = 2 * operations.reach(sigma, (64, 120)) + 1
    assert (blur_one_by_one(x, sigma) - TF.gaussian_blur(x, [side, side], [sigma, sigma])).abs().max() < 2e-6
    side = 2 * operations.reach(2.0, (64, 120)) + 1
    assert (blur_together(x, sigma) - TF.gaussian_blur(x, [side, side], [sigma, sigma])).abs().max() < 2e-6


def test_images_keep_their_own_sigma_when_blurred_together():
    x, sigma = scenes().reshape(2, 3, 64, 120), torch.tensor([0.5, 1.8])
    together = operations.blurred(x, sigma, 2.0)
    for image, own, got in zip(x, sigma.tolist(), together, strict=True):
        assert (blur_together(image, own) - got).abs().max() < 1e-6


def test_a_blur_needs_no_more_than_the_image_has():
    small = torch.rand(3, 5, 40)
    assert operations.reach(2.0, (5, 40)) == 4
    assert (blur_one_by_one(small, 2.0) - blur_together(small, 2.0)).abs().max() < 1e-6
    for size in ((1, 9), (9, 1)):
        assert torch.equal(blur_one_by_one(torch.ones(3, *size), 2.0), torch.ones(3, *size))
    assert torch.isfinite(blur_together(small, 0.0)).all()

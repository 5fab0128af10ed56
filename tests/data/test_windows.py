"""Windows fit, have the law their recipe states, and keep their margin."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from poodle_lightning.data.windows import TooSmall, WindowRule, extend, inside_frame, reduced
from poodle_lightning.ops.random import key_of
from poodle_lightning.types import UserError

KEYS = [key_of(5, number) for number in range(400)]


def boxes(rule, width, height):
    return np.array([rule.draw(width, height, key).inner for key in KEYS])


def test_scale_is_resize_then_random_crop():
    inner = boxes(WindowRule((512, 1024), scale=(0.75, 1.25)), 1280, 720)
    w, h = inner[:, 2] - inner[:, 0], inner[:, 3] - inner[:, 1]
    # a frame of 1080 s × 1920 s shows 1024 × 512 of itself, in pixels of the 720p frame
    resized = 1024 * 1280 / (1920 * w)
    np.testing.assert_allclose(512 * 720 / (1080 * h), resized)
    assert resized.min() >= 0.75
    assert resized.max() <= 1.25
    assert abs(resized.mean() - 1.0) < 3 * (0.5 / np.sqrt(12 * len(KEYS)))
    places = inner[:, 0] / (1280 - w), inner[:, 1] / (720 - h)
    for place in places:
        assert place.min() >= 0
        assert place.max() <= 1
        assert abs(place.mean() - 0.5) < 3 / np.sqrt(12 * len(KEYS))
    assert abs(np.corrcoef(*places)[0, 1]) < 3 / np.sqrt(len(KEYS))


def test_scale_of_the_videos_own_size_may_be_too_small():
    rule = WindowRule((64, 64), scale=(0.9, 0.9), reference=None)
    assert rule.draw(100, 80, KEYS[0]).inner[2] - rule.draw(100, 80, KEYS[0]).inner[0] == pytest.approx(
        64 / 0.9
    )
    with pytest.raises(TooSmall, match=r"100×70 px times 0.9 is smaller than the crop of 64×64 px"):
        rule.draw(100, 70, KEYS[0])


@pytest.mark.parametrize(("width", "height"), [(1280, 720), (33, 500), (500, 33), (7, 5)])
@pytest.mark.parametrize("area", [(0.16, 0.45), (1.0, 1.0), (0.01, 1.0)])
def test_area_has_the_crops_aspect_and_always_fits(width, height, area):
    inner = boxes(WindowRule((32, 64), area=area), width, height)
    w, h = inner[:, 2] - inner[:, 0], inner[:, 3] - inner[:, 1]
    assert inner.min() >= 0
    assert inner[:, 2].max() <= width
    assert inner[:, 3].max() <= height
    np.testing.assert_allclose(w, 2 * h, rtol=1e-9)
    fits = (w < width * (1 - 1e-9)) & (h < height * (1 - 1e-9))
    share = (w * h / (width * height))[fits]
    assert np.all((share >= area[0] - 1e-12) & (share <= area[1] + 1e-12))
    assert np.all((w * h / (width * height)) <= area[1] + 1e-9)


@pytest.mark.parametrize("antialias", [False, True])
def test_outer_holds_the_window_with_a_margin_of_one_stored_pixel(antialias):
    rule = WindowRule((16, 24), area=(0.05, 1.0), antialias=antialias)
    factors = set()
    for key in KEYS:
        window = rule.draw(200, 150, key)
        x0, y0, x1, y1 = window.stored
        (fx, fy), outer = window.factor, window.outer
        width, height = (outer[2] - outer[0]) / fx, (outer[3] - outer[1]) / fy
        assert width == int(width)
        assert height == int(height)
        assert 1 <= x0 < 2
        assert 1 <= y0 < 2
        assert 1 <= width - x1 < 2 + 1e-9
        assert 1 <= height - y1 < 2 + 1e-9
        factors.add(window.factor)
        expected = int((window.inner[2] - window.inner[0]) / 24 + 1e-9) if antialias else 1
        assert fx == max(1, expected)
    assert (len(factors) > 3) == antialias


def test_shift_is_whole_stays_inside_and_reaches_ten_percent():
    rule = WindowRule((16, 32), area=(0.2, 0.6), antialias=True)
    ratios = []
    for key in KEYS:
        window = rule.draw(300, 170, key)
        dx, dy = rule.shift(window, 300, 170, 0.1, key)
        moved = window.shifted(dx, dy).inner
        assert moved[0] >= 0
        assert moved[1] >= 0
        assert moved[2] <= 300
        assert moved[3] <= 170
        assert dx % window.factor[0] == 0
        assert dy % window.factor[1] == 0
        ratios.append(dx / (window.inner[2] - window.inner[0]))
    assert np.abs(ratios).max() <= 0.1
    assert max(ratios) > 0.08
    assert min(ratios) < -0.08


def test_pixels_over_the_border_repeat_it():
    frame = np.arange(2 * 4 * 5 * 3, dtype=np.uint8).reshape(2, 4, 5, 3)
    box, over = inside_frame((-2, -1, 6, 7), 5, 4)
    assert box == (0, 0, 5, 4)
    out = extend(frame, over)
    rows, columns = np.clip(np.arange(-1, 7), 0, 3), np.clip(np.arange(-2, 6), 0, 4)
    np.testing.assert_array_equal(out, frame[:, rows][:, :, columns])


def test_reduced_is_the_mean_of_blocks():
    pixels = np.random.default_rng(0).integers(0, 256, (2, 12, 20, 3), dtype=np.uint8)
    means = pixels.astype(np.float64).reshape(2, 4, 3, 4, 5, 3).mean(axis=(2, 4))
    assert np.abs(reduced(pixels, (5, 3)) - means).max() <= 0.5 + 1e-9


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"size": (0, 4)}, "size"),
        ({"scale": (1, 1), "area": (0.1, 0.2)}, "scale and area"),
        ({"area": (0.5, 0.2)}, "area"),
        ({"area": (0.5, 1.2)}, "at most 1"),
        ({"scale": (0.4, 0.5), "size": (512, 1024)}, "does not fit"),
        ({"ratio": (0.75, 1.3)}, "goes with area"),
        ({"ratio": (0.75, 1.3), "area": (0.2, 1.0), "aspect": 1.0}, "goes with area"),
        ({"ratio": (1.3, 0.75), "area": (0.2, 1.0)}, "the smaller one first"),
        ({"ratio": (0.0, 0.75), "area": (0.2, 1.0)}, "positive"),
        ({"whole": True, "area": (0.2, 1.0)}, "whole takes all of the frame"),
        ({"whole": True, "scale": (1.0, 1.0), "reference": None}, "whole takes all of the frame"),
    ],
)
def test_wrong_settings_are_refused(settings, message):
    with pytest.raises(UserError, match=message):
        WindowRule(**({"size": (8, 8)} | settings))


def test_aspect_is_that_of_the_window_not_of_the_crop():
    """Square windows of 12.5–25 % of the frame, as in PooDLe's study of the subcrops' area."""
    rule = WindowRule((256, 512), area=(0.125, 0.25), aspect=1.0)
    for number in range(50):
        x0, y0, x1, y1 = rule.draw(1280, 720, key_of(number)).inner
        assert x1 - x0 == pytest.approx(y1 - y0)
        assert 0.125 - 1e-9 <= (x1 - x0) * (y1 - y0) / (1280 * 720) <= 0.25 + 1e-9
    with pytest.raises(UserError, match="aspect"):
        WindowRule((256, 512), area=(0.125, 0.25), aspect=0.0)


@pytest.mark.parametrize(("mean", "std"), [(0.125, 0.1), (0.5, 0.2), (0.02, 0.05)])
def test_area_by_a_truncated_normal_law(mean, std):
    from scipy.stats import kstest, truncnorm

    low, high = 0.05, 0.95
    inner = boxes(WindowRule((64, 64), area=(low, high), area_normal=(mean, std)), 1000, 1000)
    share = (inner[:, 2] - inner[:, 0]) * (inner[:, 3] - inner[:, 1]) / 1e6
    law = truncnorm((low - mean) / std, (high - mean) / std, loc=mean, scale=std)
    assert share.min() >= low - 1e-9
    assert share.max() <= high + 1e-9
    assert kstest(share, law.cdf).pvalue > 0.01


def test_a_normal_law_needs_an_interval_and_a_spread():
    with pytest.raises(UserError, match="area_normal"):
        WindowRule((64, 64), area_normal=(0.5, 0.1))
    with pytest.raises(UserError, match="area_normal"):
        WindowRule((64, 64), area=(0.1, 0.9), area_normal=(0.5, 0.0))


@pytest.mark.parametrize(("width", "height"), [(1280, 720), (300, 300), (500, 333)])
@pytest.mark.parametrize("area", [(0.2, 1.0), (0.6, 1.0)])
def test_a_ratio_gives_the_windows_of_torchvision(width, height, area):
    from scipy.stats import ks_2samp
    from torchvision.transforms import RandomResizedCrop

    inner = boxes(WindowRule((300, 300), area=area, ratio=(3 / 4, 4 / 3)), width, height)
    assert inner.min() >= 0
    assert inner[:, 2].max() <= width + 1e-9
    assert inner[:, 3].max() <= height + 1e-9
    with torch.random.fork_rng():
        torch.manual_seed(0)
        image, ratio = torch.empty(3, height, width), [3 / 4, 4 / 3]
        top, left, h, w = np.array(
            [RandomResizedCrop.get_params(image, list(area), ratio) for _ in range(3000)], float
        ).T
    ours = inner[:, 0], inner[:, 1], inner[:, 2] - inner[:, 0], inner[:, 3] - inner[:, 1]
    for mine, theirs in zip(ours, (left, top, w, h), strict=True):
        blurred = theirs + np.random.default_rng(0).uniform(-0.5, 0.5, len(theirs))  # theirs are whole pixels
        blurred = np.where((theirs == 0) | (theirs == theirs.max()), theirs, blurred)
        assert ks_2samp(np.round(mine), np.round(blurred)).pvalue > 1e-3


@pytest.mark.parametrize(("width", "height", "w", "h"), [(900, 100, 400 / 3, 100), (60, 800, 60, 80)])
def test_where_no_ratio_fits_the_window_is_in_the_middle(width, height, w, h):
    inner = boxes(WindowRule((8, 8), area=(0.9, 1.0), ratio=(3 / 4, 4 / 3)), width, height)
    expected = [(width - w) / 2, (height - h) / 2, (width + w) / 2, (height + h) / 2]
    np.testing.assert_allclose(inner, np.tile(expected, (len(inner), 1)))


def test_the_whole_frame():
    window = WindowRule((30, 30), whole=True).draw(50, 40, KEYS[0])
    assert window.inner == (0, 0, 50, 40)
    assert window.outer == (-1, -1, 51, 41)
    assert WindowRule((8, 20), whole=True, antialias=True).draw(50, 40, KEYS[0]).factor == (2, 5)

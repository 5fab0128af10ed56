"""Occlusion against a float64 loop over pixels, on flows whose answer is known."""

import math

import numpy as np
import pytest
import torch

from poodle_lightning.ops.geometry import Flow
from poodle_lightning.ops.occlusion import visible_ddflow, visible_endpoint


def bilinear(field, x, y):
    """Value of ``field (2, H, W)`` at a point in pixels, clamped at the border."""
    height, width = field.shape[1:]
    x, y = min(max(x, 0.0), width - 1.0), min(max(y, 0.0), height - 1.0)
    x0, y0 = min(int(x), width - 2), min(int(y), height - 2)
    a, b = x - x0, y - y0
    top = (1 - a) * field[:, y0, x0] + a * field[:, y0, x0 + 1]
    low = (1 - a) * field[:, y0 + 1, x0] + a * field[:, y0 + 1, x0 + 1]
    return (1 - b) * top + b * low


def loop(there, back, tolerated):
    """The definition, pixel by pixel; ``tolerated(f, g)`` is the squared distance allowed."""
    height, width = there.shape[1:]
    visible = np.zeros((height, width), bool)
    for y in range(height):
        for x in range(width):
            f = there[:, y, x]
            tx, ty = x + f[0], y + f[1]
            inside = -0.5 <= tx <= width - 0.5 and -0.5 <= ty <= height - 0.5
            g = bilinear(back, tx, ty)
            visible[y, x] = inside and ((f + g) ** 2).sum() <= tolerated(f, g)
    return visible


CHECKS = {
    "ddflow": (visible_ddflow, lambda f, g: 0.1 * ((f**2).sum() + (g**2).sum()) + 0.5),
    "strict": (
        lambda flow: visible_ddflow(flow, alpha1=0.01),
        lambda f, g: 0.01 * ((f**2).sum() + (g**2).sum()) + 0.5,
    ),
    "endpoint": (visible_endpoint, lambda f, g: 3.54**2),
}


def shift(height, width, dx, dy):
    return np.broadcast_to(np.array([dx, dy], float).reshape(2, 1, 1), (2, height, width)).copy()


def zoom(height, width, factor):
    ys, xs = np.mgrid[:height, :width].astype(float)
    return (factor - 1) * np.stack([xs - (width - 1) / 2, ys - (height - 1) / 2])


def waves(height, width, seed):
    """A smooth flow whose way back is only roughly its inverse."""
    ys, xs = np.mgrid[:height, :width].astype(float)
    a, b, c, d = np.random.default_rng(seed).uniform(0.15, 0.5, 4)
    u, v = 3 * np.sin(a * xs + b * ys), 2 * np.cos(c * xs - d * ys)
    return np.stack([u, v])


def pair(there, back, dtype=torch.float32):
    return Flow.from_pixels(torch.from_numpy(np.stack([there, back])).to(dtype))


CASES = {
    "shift": (shift(13, 18, 4, -3), shift(13, 18, -4, 3)),
    "fractional shift": (shift(13, 18, 1.3, 2.6), shift(13, 18, -1.3, -2.6)),
    "zoom in": (zoom(15, 22, 1.25), zoom(15, 22, 0.8)),
    "zoom out": (zoom(15, 22, 0.7), zoom(15, 22, 1 / 0.7)),
    "waves": (waves(17, 23, 0), -waves(17, 23, 0)),
    "unrelated": (waves(17, 23, 1), waves(17, 23, 2)),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("check", CHECKS)
def test_equals_the_loop_in_both_directions(case, check):
    there, back = CASES[case]
    ours, tolerated = CHECKS[check]
    # float64: a pixel exactly on a threshold must not depend on rounding
    visible = ours(pair(there, back, torch.float64)).numpy()
    assert visible.shape == (2, *there.shape[1:])
    assert visible.dtype == bool
    np.testing.assert_array_equal(visible[0], loop(there, back, tolerated))
    np.testing.assert_array_equal(visible[1], loop(back, there, tolerated))


@pytest.mark.parametrize("check", CHECKS)
def test_float32_agrees_with_float64(check):
    ours = CHECKS[check][0]
    for there, back in CASES.values():
        assert (ours(pair(there, back)) == ours(pair(there, back, torch.float64))).float().mean() > 0.995


@pytest.mark.parametrize("ours", [visible_ddflow, visible_endpoint])
def test_shift_hides_exactly_the_strip_that_leaves_the_frame(ours):
    visible = ours(pair(*CASES["shift"]))  # 4 to the right, 3 up
    expected = torch.zeros(2, 13, 18, dtype=torch.bool)
    expected[0, 3:, :14] = True
    expected[1, :10, 4:] = True
    assert torch.equal(visible, expected)


@pytest.mark.parametrize("ours", [visible_ddflow, visible_endpoint])
def test_moving_square_hides_the_background_it_moves_onto(ours):
    """The square goes 6 right and 3 down, the background 1 left: what it covers and uncovers is known."""
    height, width = 40, 48
    first = np.zeros((height, width), bool)
    first[10:22, 12:26] = True
    second = np.zeros_like(first)
    second[13:25, 18:32] = True
    there = np.where(first, np.array([6.0, 3.0]).reshape(2, 1, 1), np.array([-1.0, 0.0]).reshape(2, 1, 1))
    back = np.where(second, np.array([-6.0, -3.0]).reshape(2, 1, 1), np.array([1.0, 0.0]).reshape(2, 1, 1))
    visible = ours(pair(there, back)).numpy()

    covered = ~first & np.roll(second, 1, axis=1)  # background pixel x of frame 1 is at x − 1 in frame 2
    uncovered = ~second & np.roll(first, -1, axis=1)
    covered[:, 0] = True  # leaves the frame
    uncovered[:, -1] = True
    assert covered[:, 1:].sum() == 12 * 14 - 9 * 7  # the square less its overlap with where it was
    np.testing.assert_array_equal(visible[0], ~covered)
    np.testing.assert_array_equal(visible[1], ~uncovered)


@pytest.mark.parametrize("length", [0.0, 3.0, 20.0])
def test_ddflow_threshold_just_below_and_above(length):
    """F12 = u, F21 = e − u along x: e² = α₁ (u² + (e − u)²) + α₂ is solved for e."""
    a, b, c = 1 - 0.1, 2 * 0.1 * length, -(2 * 0.1 * length**2 + 0.5)
    error = (-b + math.sqrt(b * b - 4 * a * c)) / (2 * a)
    for slack, expected in ((-1e-3, True), (1e-3, False)):
        flow = pair(shift(9, 64, length, 0), shift(9, 64, error + slack - length, 0))
        assert (visible_ddflow(flow)[0, :, 25:35] == expected).all()


@pytest.mark.parametrize("length", [0.0, 3.0, 20.0])
def test_endpoint_threshold_just_below_and_above(length):
    for error, expected in ((3.539, True), (3.541, False)):
        flow = pair(
            shift(9, 64, 0.6 * error, 0) + shift(9, 64, length, 0), shift(9, 64, -length, 0.8 * error)
        )
        assert (visible_endpoint(flow)[0, :4, 20:30] == expected).all()


def test_thresholds_are_in_pixels_of_the_flow_not_in_extent_units():
    """The same pixels of error give the same answer at every size, square or not."""
    for height, width in ((16, 16), (16, 64), (64, 16)):
        for error, expected in ((0.70, True), (0.72, False)):  # α₂ = 0.5 px² with α₁ = 0
            for dx, dy in ((error, 0), (0, error)):
                flow = pair(shift(height, width, dx, dy), shift(height, width, 0, 0))
                visible = visible_ddflow(flow, alpha1=0.0)
                assert (visible[0, 2:-2, 2:-2] == expected).all()


def test_same_under_autocast():
    flow = pair(*CASES["zoom in"])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = visible_ddflow(flow)
    assert torch.equal(inside, visible_ddflow(flow))


def test_rows_pair_up_across_the_halves():
    """Rows i and N + i belong together: two pairs at once are as one by one."""
    cases = [CASES["waves"], CASES["unrelated"]]
    together = visible_ddflow(
        Flow.from_pixels(torch.from_numpy(np.stack([cases[0][0], cases[1][0], cases[0][1], cases[1][1]])))
    )
    for i, (there, back) in enumerate(cases):
        assert torch.equal(together[i::2], visible_ddflow(pair(there, back, torch.float64)))


def test_a_flow_that_is_not_finite_is_visible_nowhere():
    there, back = CASES["shift"]
    for bad in (np.nan, np.inf):
        broken = there.copy()
        broken[0, 8, 4] = bad
        assert not visible_ddflow(pair(broken, back))[0, 8, 4]
        assert not visible_endpoint(pair(broken, back))[0, 8, 4]


def test_an_odd_number_of_rows_is_refused():
    with pytest.raises(ValueError, match="both directions"):
        visible_ddflow(Flow.from_pixels(torch.zeros(3, 2, 4, 4)))

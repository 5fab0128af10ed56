"""Half-resolution planes: what comes back, against matrices in float64 and against the waves' closed form."""

import numpy as np
import pytest

from poodle_lightning.data.flow_planes import Part, stored_planes


def reading(count):
    """The matrix ``(2n, n)`` of linear reading, the ends repeated: value i stands at 2i + 1/2."""
    matrix = np.zeros((2 * count, count))
    for fine in range(2 * count):
        at = np.clip((fine - 0.5) / 2, 0, count - 1)
        low = min(int(at), max(count - 2, 0))
        matrix[fine, low] += 1 - (at - low)
        matrix[fine, min(low + 1, count - 1)] += at - low
    return matrix


def blocks(count):
    """The matrix ``(n, 2n)`` of the means of two."""
    return np.kron(np.eye(count), [[0.5, 0.5]])


def flow_of(plane):
    return np.broadcast_to(plane, (2, 2, *plane.shape)).astype(np.float32)


def test_values_are_the_means_and_two_steps_of_what_reading_them_misses():
    flow = np.random.default_rng(0).normal(0, 30, (2, 2, 6, 10))
    up_y, up_x, mean_y, mean_x = reading(3), reading(5), blocks(3), blocks(5)
    expected = mean_y @ flow @ mean_x.T
    for _ in range(2):
        missed = flow - up_y @ expected @ up_x.T
        expected = expected + mean_y @ missed @ mean_x.T
    values = stored_planes(flow.astype(np.float32), 2)
    np.testing.assert_allclose(values, expected.reshape(4, 3, 5), atol=1e-4)
    back = Part((6, 10), 2).flow(values)
    np.testing.assert_allclose(back, up_y @ expected @ up_x.T, atol=1e-4)


@pytest.mark.parametrize(("u", "v"), [(np.pi, 0.0), (np.pi, np.pi), (np.pi / 2, 0.0), (np.pi / 2, np.pi / 4)])
def test_of_a_wave_the_stated_share_is_missing(u, v):
    """Block means of what comes back, far from the border: short by (1 - l)³."""
    rows, columns = np.mgrid[:48, :48].astype(float)
    wave = np.cos(u * columns) * np.cos(v * rows)  # of the means, so constant in each 2x2
    plane = np.kron(wave, np.ones((2, 2)))
    back = Part((96, 96), 2).flow(stored_planes(flow_of(plane), 2))[0, 0]
    means = (blocks(48) @ back @ blocks(48).T)[16:-16, 16:-16]
    share = (3 + np.cos(u)) * (3 + np.cos(v)) / 16
    np.testing.assert_allclose(means, (1 - (1 - share) ** 3) * wave[16:-16, 16:-16], atol=1e-5)


def test_flow_made_at_half_resolution_comes_back_nearly_whole():
    """DIS estimates at half resolution and doubles; here smooth knots 4 values apart, doubled."""
    knots = np.random.default_rng(1).normal(0, 20, (9, 9))
    smooth = reading(18) @ reading(9) @ knots @ reading(9).T @ reading(18).T
    fine = reading(36) @ smooth @ reading(36).T
    back = Part((72, 72), 2).flow(stored_planes(flow_of(fine), 2))[0, 0]
    plain = reading(36) @ (blocks(36) @ fine @ blocks(36).T) @ reading(36).T
    assert np.abs(back - fine).mean() < 0.05
    assert np.abs(back - fine).mean() < np.abs(plain - fine).mean() / 5


@pytest.mark.parametrize("step", [1, 2])
@pytest.mark.parametrize("box", [(0, 0, 0, 4), (-1, 0, 4, 4), (0, 0, 7, 4), (3, 3, 2, 4)])
def test_a_box_outside_of_the_frame_is_refused(step, box):
    with pytest.raises(ValueError, match="is not inside a frame of 5 x 6"):
        Part((5, 6), step, box)


def test_full_resolution_is_left_as_it_is():
    flow = np.random.default_rng(0).normal(0, 30, (2, 2, 5, 7)).astype(np.float32)
    values = stored_planes(flow, 1)
    np.testing.assert_array_equal(values, flow.reshape(4, 5, 7))
    part = Part((5, 7), 1, (1, 2, 6, 4))
    np.testing.assert_array_equal(part.flow(values[:, part.rows, part.columns]), flow[..., 2:4, 1:6])

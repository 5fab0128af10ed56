"""Flow as differences: exact to the rounding; small and near on a street, which is the speed goal's bound."""

import zlib

import cv2
import numpy as np
import pytest

from poodle_lightning.data.flow_delta import decode, encode
from poodle_lightning.data.flow_planes import Part, stored_planes
from poodle_lightning.data.synthetic import Street
from poodle_lightning.flow.dis import DIS

SIZE = (512, 1024)


def drive(height=512, width=1024, horizon=200.0, ahead=0.4, way=3.0):
    """A camera that drives along a street between two walls, and a car: exact motion there and back, px.

    A point at depth z and offset (x, y) from the vanishing point moves to (x, y) z / (z - ahead).
    """
    ys, xs = np.mgrid[:height, :width].astype(float)
    x, y = xs - (width - 1) / 2, ys - horizon
    walls, road = 400.0 * way / np.maximum(np.abs(x), 1e-3), 600.0 / np.maximum(y, 1e-3)
    depth = np.clip(np.minimum(walls, road), 2.0, 80.0)
    both = np.stack([np.stack([x, y]) * (sign * ahead / (depth - sign * ahead)) for sign in (1, -1)])
    both[0, :, 260:380, 600:800] = np.array([9.3, -1.7]).reshape(2, 1, 1)
    both[1, :, 260:380, 610:810] = np.array([-9.3, 1.7]).reshape(2, 1, 1)
    return both.astype(np.float32)


def test_a_street_at_full_resolution_is_within_the_rounding():
    flow = drive()
    off = np.abs(decode(encode(flow, 1), SIZE, 1) - flow)
    assert np.abs(flow).max() > 20
    assert off.max() <= 1 / 16 + 1e-5
    assert abs(off.mean() - 1 / 32) < 0.006  # rounding errors lie evenly


def test_a_street_at_half_resolution_is_small_and_near():
    """Where the flow is smooth: the rounding, and h²/8 of the curvature both ways; elsewhere borders."""
    flow = drive()
    data = encode(flow, 2)
    back = decode(data, SIZE, 2)
    off = np.abs(back - flow)
    rough = np.zeros(SIZE, np.uint8)
    rough[1:-1] |= np.abs(np.diff(flow, 2, axis=2)).max(axis=(0, 1)) > 0.02
    rough[:, 1:-1] |= np.abs(np.diff(flow, 2, axis=3)).max(axis=(0, 1)) > 0.02
    rough[[0, -1]] = rough[:, [0, -1]] = 1
    calm = cv2.dilate(rough, np.ones((17, 17), np.uint8)) == 0  # as far as two steps of 2x2 blocks reach
    assert calm.mean() > 0.5
    assert off[..., calm].max() <= 1 / 16 + 2 * 0.02
    assert np.hypot(*back.transpose(1, 0, 2, 3) - flow.transpose(1, 0, 2, 3)).mean() <= 0.15
    assert len(data) / 2 <= 200_000


@pytest.fixture(scope="module")
def estimated():
    """DIS on frames of a generated street, 0.66 s apart: rough, with much motion."""
    frames, _ = Street(3, SIZE, "hard", 1).read([1.0, 1.66])
    return DIS("medium").pixels(*frames)


def test_estimated_flow_of_a_street_meets_the_goal(estimated):
    """At most 200 KB per ordered pair at a mean error of at most 0.15 px."""
    data = encode(estimated, 2)
    error = np.linalg.norm(decode(data, SIZE, 2) - estimated, axis=1)
    assert np.linalg.norm(estimated, axis=1).mean() > 20
    assert len(data) / 2 <= 200_000
    assert error.mean() <= 0.15
    assert np.percentile(error, 99) <= 1.0


def edge(height):
    """A motion border between two columns of a 2x2 block."""
    plane = np.full((16, 24), -height)
    plane[:, 11:] = height
    return plane


def checker(height):
    """2x2 blocks that alternate."""
    return height * np.kron(np.indices((8, 12)).sum(axis=0) % 2 * 2 - 1, np.ones((2, 2)))


@pytest.mark.parametrize("plane", [edge(3550.0), edge(4094.0), checker(1800.0), checker(4094.0)])
def test_what_overshoots_is_cut_off_and_does_not_wrap_around(plane):
    """The nearest values that 16 bits hold, read bilinearly: at most half a step off in each."""
    flow = np.broadcast_to(plane, (2, 2, *plane.shape)).astype(np.float32)
    values = stored_planes(flow, 2)
    assert np.abs(values).max() > 4096
    expected = Part(plane.shape, 2).flow(np.clip(values, -32767 / 8, 32767 / 8))
    back = decode(encode(flow, 2), plane.shape, 2)
    assert np.abs(back - expected).max() <= 1 / 16 + 1e-3


def test_only_the_box_is_read_and_it_is_the_same(estimated):
    data = encode(estimated, 2)
    whole = decode(data, SIZE, 2)
    for x0, y0, x1, y1 in ((0, 0, 1024, 512), (13, 27, 500, 301), (1023, 511, 1024, 512)):
        part = decode(data, SIZE, 2, (x0, y0, x1, y1))
        np.testing.assert_array_equal(part, whole[..., y0:y1, x0:x1])
        assert part.flags.c_contiguous


def test_bytes_that_are_no_such_flow_are_refused():
    for bad in (b"", b"no zlib", zlib.compress(b"short")):
        with pytest.raises(ValueError):  # noqa: PT011  (zlib's own words)
            decode(bad, (8, 8), 1)

"""Colour conversion of a box against the formula and against the conversion of the whole frame."""

import av
import numpy as np
import pytest
import torch

from poodle_lightning.data.pixels import one_box_each, piece, rgb, yuv_matrix
from poodle_lightning.ops.planes import planes_to_rgb

EIGHT_BITS = [
    "yuv420p",
    "yuv422p",
    "yuv444p",
    "yuv411p",
    "yuv410p",
    "yuvj420p",
    "yuva420p",
    "nv12",
    "gray",
    "gbrp",
]
MORE_BITS = ["yuv420p10le", "yuv444p10le", "yuv420p12le", "p010le"]
FORMATS = [*EIGHT_BITS, *MORE_BITS, "gray", "rgb24", "bgra", "yuyv422", "rgb555le", "pal8"]
SIZES = [(64, 48), (63, 47), (62, 47), (65, 48), (5, 3), (1, 1)]


def random_frame(form, width, height, seed=0):
    """A frame with random samples inside the limited range of its depth."""
    rng = np.random.default_rng(seed)
    frame = av.VideoFrame(width, height, form)
    bits = frame.format.components[0].bits
    for plane in frame.planes:
        if bits > 8:
            shift = 6 if form.startswith("p0") else 0
            samples = (
                rng.integers(16 << bits - 8, 235 << bits - 8, plane.buffer_size // 2, dtype=np.uint16)
                << shift
            )
        else:
            samples = rng.integers(16, 235, plane.buffer_size, dtype=np.uint8)
        plane.update(samples.tobytes())
    return frame


@pytest.mark.parametrize("form", FORMATS)
def test_a_converted_crop_is_the_crop_of_the_conversion(form):
    rng = np.random.default_rng(1)
    for width, height in SIZES:
        frame = random_frame(form, width, height)
        whole = rgb(frame, None, 0)
        assert whole.shape == (height, width, 3)
        for _ in range(15):
            x0, y0 = int(rng.integers(0, width)), int(rng.integers(0, height))
            x1, y1 = int(rng.integers(x0 + 1, width + 1)), int(rng.integers(y0 + 1, height + 1))
            np.testing.assert_array_equal(rgb(frame, (x0, y0, x1, y1), 0), whole[y0:y1, x0:x1])


@pytest.mark.parametrize("form", FORMATS)
def test_even_frames_are_converted_as_ffmpeg_does(form):
    frame = random_frame(form, 64, 48)
    expected = frame.to_ndarray(format="rgb24", interpolation="POINT", threads=1)
    np.testing.assert_array_equal(rgb(frame, None, 0), expected)


@pytest.mark.parametrize(("width", "height"), SIZES)
@pytest.mark.parametrize(
    "form", ["yuv420p", "yuv422p", "yuv444p", "yuv420p10le", "yuv444p10le", "yuv420p12le"]
)
def test_against_the_formula(form, width, height):
    """ITU-R BT.601-7, limited range, nearest chroma, float64; FFmpeg's integers are off by up to 4."""
    frame = random_frame(form, width, height)
    bits = frame.format.components[0].bits
    kind = np.dtype(np.uint8 if bits == 8 else np.uint16)
    y, u, v = (
        np.frombuffer(p, kind).reshape(-1, p.line_size // kind.itemsize)[: p.height, : p.width]
        / 2.0 ** (bits - 8)
        for p in frame.planes
    )
    rows, columns = 1 if "420" not in form else 2, 1 if "444" in form else 2
    u, v = (c.repeat(rows, 0).repeat(columns, 1)[:height, :width] for c in (u, v))
    y, u, v = 255 / 219 * (y - 16), 255 / 224 * (u - 128), 255 / 224 * (v - 128)
    expected = np.stack([y + 1.402 * v, y - 0.344136 * u - 0.714136 * v, y + 1.772 * u], -1).clip(0, 255)
    error = np.abs(rgb(frame, None, 0) - expected)
    assert error.max() <= 4
    if width > 60:
        assert error.mean() < 1.1


@pytest.mark.parametrize("rotation", [0, 90, 180, 270])
def test_a_box_of_a_rotated_frame(rotation):
    frame = random_frame("yuv420p", 62, 46)
    turned = np.rot90(rgb(frame, None, 0), rotation // 90)
    height, width = turned.shape[:2]
    rng = np.random.default_rng(2)
    for _ in range(30):
        x0, y0 = int(rng.integers(0, width)), int(rng.integers(0, height))
        x1, y1 = int(rng.integers(x0 + 1, width + 1)), int(rng.integers(y0 + 1, height + 1))
        np.testing.assert_array_equal(rgb(frame, (x0, y0, x1, y1), rotation), turned[y0:y1, x0:x1])


def test_colour_tags_reach_the_conversion():
    """BT.709 and full range change the numbers of the same samples."""
    frame = random_frame("yuv420p", 64, 48)
    plain = rgb(frame, None, 0)
    frame.colorspace, frame.color_range = 1, 2
    tagged = rgb(frame, None, 0)
    np.testing.assert_array_equal(tagged, frame.to_ndarray(format="rgb24", interpolation="POINT", threads=1))
    assert np.abs(tagged.astype(int) - plain).max() > 20


def test_boxes_for_times():
    assert one_box_each(None, 2) == [None, None]
    assert one_box_each((1, 2, 3, 4), 2) == [(1, 2, 3, 4)] * 2
    assert one_box_each([[1, 2, 3, 4], [2, 2, 4, 4]], 2) == [(1, 2, 3, 4), (2, 2, 4, 4)]
    assert one_box_each(np.array([1, 2, 3, 4]), 1) == [(1, 2, 3, 4)]


# ---- planes
def from_planes(found):
    """A piece of planes as ``Clip.unit`` makes it RGB: ``(h, w, 3)``."""
    matrix = torch.from_numpy(found.matrix)[None]
    return planes_to_rgb(torch.from_numpy(found.pixels)[None, None], matrix)[0, 0].permute(1, 2, 0).numpy()


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("space", [1, 2, 5, 6, 9])
@pytest.mark.parametrize(("width", "height"), [(64, 48), (63, 47), (5, 3), (1, 1)])
def test_planes_and_rgb_agree_within_a_level(width, height, space, full):
    """All samples at random, also those outside the range: FFmpeg's converter cuts off each product.

    Of a million random pixels up to four were two levels off; none of these is.
    """
    rng = np.random.default_rng(space)
    frame = av.VideoFrame(width, height, "yuv420p")
    for plane in frame.planes:
        plane.update(rng.integers(0, 256, plane.buffer_size, dtype=np.uint8).tobytes())
    frame.colorspace, frame.color_range = space, 2 if full else 1
    for _ in range(10):
        x0, y0 = int(rng.integers(0, width)), int(rng.integers(0, height))
        x1, y1 = int(rng.integers(x0 + 1, width + 1)), int(rng.integers(y0 + 1, height + 1))
        found = piece(frame, (x0, y0, x1, y1), 0, 1.5, True)
        left, top, right, bottom = found.box
        assert left % 2 == top % 2 == right % 2 == bottom % 2 == 0
        assert x0 - 1 <= left <= x0 < x1 <= right <= x1 + 1
        assert found.pixels.shape == ((bottom - top) * 3 // 2, right - left)
        assert found.time == 1.5
        part = from_planes(found)[y0 - top : y1 - top, x0 - left : x1 - left]
        assert np.abs(part - rgb(frame, (x0, y0, x1, y1), 0)).max() <= 1
    error = from_planes(piece(frame, None, 0, 0.0, True))[:height, :width] - rgb(frame, None, 0)
    if width > 60:
        assert np.abs(error).mean() < 0.25
        assert abs(error.mean()) < 0.05


def test_beyond_an_odd_border_planes_repeat_it():
    frame = random_frame("yuv420p", 5, 3)
    found = from_planes(piece(frame, None, 0, 0.0, True))
    assert found.shape == (4, 6, 3)
    np.testing.assert_array_equal(found[:, 5], found[:, 4])
    np.testing.assert_array_equal(found[3], found[2])


def test_the_old_name_of_the_full_range_is_one():
    frame = random_frame("yuvj420p", 64, 48)
    error = from_planes(piece(frame, None, 0, 0.0, True)) - rgb(frame, None, 0)
    assert np.abs(error).max() <= 1


@pytest.mark.parametrize(
    ("form", "rotation", "space"),
    [(form, 0, 2) for form in FORMATS if form not in ("yuv420p", "yuvj420p")]
    + [("yuv420p", 90, 2), ("yuv420p", 180, 2), ("yuv420p", 0, 0)],
)
def test_what_is_not_stored_as_upright_planes_comes_as_rgb(form, rotation, space):
    frame = random_frame(form, 64, 48)
    frame.colorspace = space
    box = (3, 5, 31, 40)
    found = piece(frame, box, rotation, 0.0, True)
    assert found.matrix is None
    assert found.box == box
    np.testing.assert_array_equal(found.pixels, rgb(frame, box, rotation))


def test_matrices_are_those_of_the_standards():
    """The rounded coefficients that are printed everywhere, e.g. in ITU-R BT.601-7 and BT.709-6."""
    expected = {
        (2, False): [[1.164, 0, 1.596], [1.164, -0.392, -0.813], [1.164, 2.017, 0]],
        (1, False): [[1.164, 0, 1.793], [1.164, -0.213, -0.533], [1.164, 2.112, 0]],
        (5, True): [[1, 0, 1.402], [1, -0.344, -0.714], [1, 1.772, 0]],
        (1, True): [[1, 0, 1.5748], [1, -0.1873, -0.4681], [1, 1.8556, 0]],
        (9, True): [[1, 0, 1.4746], [1, -0.1646, -0.5714], [1, 1.8814, 0]],
    }
    for (space, full), matrix in expected.items():
        found = yuv_matrix(space, full)
        np.testing.assert_allclose(found[:, :3], matrix, atol=6e-4)
        black, white = ([0, 255], [16, 235])[not full]
        np.testing.assert_allclose(found @ [black, 128, 128, 1], [0, 0, 0], atol=1e-9)
        np.testing.assert_allclose(found @ [white, 128, 128, 1], [255, 255, 255], atol=1e-9)

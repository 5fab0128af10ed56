"""DIS against motions that are known: an integer shift, a zoom."""

import pickle
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch

from poodle_lightning.configured import build, spec
from poodle_lightning.flow.dis import DIS
from poodle_lightning.ops.geometry import Affine
from poodle_lightning.types import Clip, FlowEstimator, UserError

HEIGHT, WIDTH = 96, 128


def texture(x, y):
    """A smooth, rich texture at any real point; 3 channels in 0 … 255."""
    waves = np.random.default_rng(0).uniform([-0.5, -0.5, 0], [0.5, 0.5, 6.28], (40, 3))
    total = sum(np.sin(a * x + b * y + c) for a, b, c in waves)
    grey = np.clip(128 + 14 * total, 0, 255)
    return np.stack([grey, 0.9 * grey, 0.7 * grey], axis=-1).round().astype(np.uint8)


def grid(height=HEIGHT, width=WIDTH):
    ys, xs = np.mgrid[:height, :width].astype(float)
    return xs, ys


def error(flow, u, v):
    """Mean end-point error inside, away from what enters the frame."""
    return np.hypot(flow[0] - u, flow[1] - v)[16:-16, 16:-16].mean()


@pytest.mark.parametrize("preset", ["ultrafast", "fast", "medium"])
@pytest.mark.parametrize("shift", [(5, 0), (-3, 4), (0, 0)])
def test_integer_shift(preset, shift):
    xs, ys = grid()
    dx, dy = shift
    flow = DIS(preset).pixels(texture(xs, ys), texture(xs - dx, ys - dy))
    assert flow.shape == (2, 2, HEIGHT, WIDTH)
    assert flow.dtype == np.float32
    limit = 0.1 if preset == "medium" else 0.25
    assert error(flow[0], dx, dy) < limit
    assert error(flow[1], -dx, -dy) < limit


def test_zoom():
    xs, ys = grid()
    cx, cy, factor = (WIDTH - 1) / 2, (HEIGHT - 1) / 2, 1.06
    zoomed = texture(cx + (xs - cx) / factor, cy + (ys - cy) / factor)  # p → c + factor (p − c)
    flow = DIS().pixels(texture(xs, ys), zoomed)
    u, v = (factor - 1) * (xs - cx), (factor - 1) * (ys - cy)
    assert error(flow[0], u, v) < 0.1
    assert error(flow[1], -u / factor, -v / factor) < 0.1


def frames():
    xs, ys = grid()
    pairs = [[texture(xs, ys), texture(xs - 4, ys)], [texture(xs, ys - 2), texture(xs + 1, ys + 1)]]
    return np.stack([np.stack(pair) for pair in pairs])


def clip_of(count, flow=None):
    return Clip(
        frames=torch.zeros(count, 2, 3, HEIGHT, WIDTH, dtype=torch.uint8),
        window=Affine.identity(count),
        size=(HEIGHT, WIDTH),
        times=torch.zeros(count, 2, dtype=torch.float64),
        index=torch.arange(count),
        key=torch.arange(count),
        flow=flow,
    )


def test_estimator_puts_all_pairs_there_before_all_pairs_back():
    stored = frames()
    clean = torch.from_numpy(stored).permute(0, 1, 4, 2, 3) / 255.0
    flow = DIS("fast")(clip_of(2), clean).to_pixels().numpy()
    first, second = (DIS("fast").pixels(*pair) for pair in stored)
    np.testing.assert_allclose(flow, np.stack([first[0], second[0], first[1], second[1]]), atol=1e-5)


def test_no_pairs_have_no_flow():
    flow = DIS().estimate(torch.zeros(0, 2, 3, HEIGHT, WIDTH))
    assert flow.to_pixels().shape == (0, 2, HEIGHT, WIDTH)


def test_estimator_keeps_the_flow_that_the_clip_has():
    given = torch.full((2, 2, 2, HEIGHT, WIDTH), torch.nan)
    given[1] = 7.0
    clean = torch.from_numpy(frames()).permute(0, 1, 4, 2, 3) / 255.0
    flow = DIS("ultrafast")(clip_of(2, given), clean).to_pixels()
    torch.testing.assert_close(flow[1::2], torch.full((2, 2, HEIGHT, WIDTH), 7.0))
    assert abs(flow[0, 0, 20:-20, 20:-20].mean() - 4) < 0.2


def test_result_depends_neither_on_opencv_threads_nor_on_earlier_calls():
    import cv2

    (a, b), (c, d) = frames()
    before = cv2.getNumThreads()
    try:
        cv2.setNumThreads(1)
        alone = DIS().pixels(a, b)
        cv2.setNumThreads(4)
        DIS().pixels(c, d)
        np.testing.assert_array_equal(DIS().pixels(a, b), alone)
    finally:
        cv2.setNumThreads(before)


def test_a_small_image_does_not_change_the_flow_of_the_next_one():
    (a, b), _ = frames()
    expected = DIS("fast").pixels(a, b)
    DIS("fast").pixels(a[:14, :20], b[:14, :20])
    np.testing.assert_array_equal(DIS("fast").pixels(a, b), expected)


def test_low_wide_images_do_not_crash_the_process():
    """OpenCV's own choice of scales kills the process at these sizes, so another one tries."""
    work = (
        "import numpy as np; from poodle_lightning.flow.dis import DIS\n"
        "for h, w in [(12, 100), (12, 200), (13, 500), (16, 200), (24, 300)]:\n"
        "    image = np.random.default_rng(0).integers(0, 256, (h, w, 3), dtype=np.uint8)\n"
        "    for preset in ('ultrafast', 'fast', 'medium'):\n"
        "        for _ in range(5): flow = DIS(preset).pixels(image, image)\n"
        "        assert np.abs(flow).max() < 0.5, (h, w, preset)\n"
    )
    done = subprocess.run([sys.executable, "-c", work], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_survives_pickling_after_use_and_threads():
    (a, b), _ = frames()
    estimator = DIS("fast")
    expected = estimator.pixels(a, b)
    copied = pickle.loads(pickle.dumps(estimator))
    found = [None] * 4

    def work(i):
        for _ in range(3):
            found[i] = copied.pixels(a, b)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for flow in found:
        np.testing.assert_array_equal(flow, expected)


@pytest.mark.parametrize("size", [(12, 12), (12, 200), (13, 17), (40, 12)])
def test_small_images_work(size):
    xs, ys = grid(*size)
    flow = DIS().pixels(texture(xs, ys), texture(xs, ys))
    assert flow.shape == (2, 2, *size)
    assert np.abs(flow).max() < 0.5


@pytest.mark.parametrize("size", [(11, 40), (40, 8), (1, 1)])
def test_smaller_images_are_refused_in_one_line(size):
    image = np.zeros((*size, 3), np.uint8)
    with pytest.raises(UserError, match=f"at least 12 x 12 px, these are {size[0]} x {size[1]}") as caught:
        DIS().pixels(image, image)
    assert "\n" not in str(caught.value)


def test_crops_that_are_not_contiguous_are_taken():
    (a, b), _ = frames()
    view = DIS("fast").pixels(a[8:80, 10:100], b[8:80, 10:100])
    np.testing.assert_array_equal(view, DIS("fast").pixels(a[8:80, 10:100].copy(), b[8:80, 10:100].copy()))


def test_wrong_images_are_refused():
    image = np.zeros((20, 20, 3), np.uint8)
    for other in (image[:, :16], image[..., 0], image.astype(np.float32)):
        with pytest.raises(ValueError, match="uint8 images of one size"):
            DIS().pixels(image, other)


def test_unknown_preset_is_refused():
    with pytest.raises(UserError, match="preset 'slow'"):
        DIS("slow")


def test_is_an_estimator_and_plain_data():
    assert isinstance(DIS(), FlowEstimator)
    assert build(spec(DIS("fast"))).preset == "fast"
    assert DIS("fast").fingerprint != DIS("medium").fingerprint

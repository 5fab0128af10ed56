"""Views with boxes and masks: a box is where its pixels are."""

import numpy as np
import pytest
import torch

from poodle_lightning.data.detection_views import DetectionTestView, DetectionTrainView, Placed
from poodle_lightning.ops.random import key_of
from poodle_lightning.types import UserError


@pytest.mark.parametrize("size", [None, (64, 80)])
@pytest.mark.parametrize("number", range(6))
def test_box_mask_and_image_move_together(size, number):
    mask = np.zeros((96, 128), np.uint8)
    mask[24:72, 32:96] = 1
    view = DetectionTrainView(short_sides=(48, 192), size=size, jitter=(0.6, 2.0))
    placed = view.place((96, 128), key_of(3, number))
    box = placed.boxes(np.array([[32.0, 24, 96, 72]]), (96, 128))[0]
    shown = placed.mask(mask)
    rows, columns = np.nonzero(shown)
    seen = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
    assert np.abs(box - seen).max() <= 1
    assert shown.shape == placed.view == placed.image(np.repeat(mask[..., None], 3, 2)).shape[:2]
    assert size is None or shown.shape == size
    image = placed.image(np.repeat(mask[..., None] * 255, 3, 2))
    left, top, right, bottom = np.round(box).astype(int)
    inside = image[top + 2 : bottom - 2, left + 2 : right - 2]
    assert inside.size == 0 or (inside == 255).all()


def test_a_view_is_a_function_of_the_key():
    view = DetectionTrainView(size=(64, 80))
    places = [view.place((96, 128), key_of(0, i)) for i in range(20)]
    assert places == [view.place((96, 128), key_of(0, i)) for i in range(20)]
    assert {place.mirrored for place in places} == {True, False}
    scales = torch.tensor([place.size[0] / 60 for place in places])  # 128 → 80 is the tight fit
    assert 0.78 < float(scales.min()) < 0.95
    assert 1.05 < float(scales.max()) < 1.27


def test_test_view():
    assert DetectionTestView().place((480, 640)) == Placed((800, 1067), (800, 1067))
    assert DetectionTestView(size=(800, 1024)).place((480, 640)) == Placed((768, 1024), (800, 1024))


def test_bad_numbers():
    with pytest.raises(UserError, match="jitter"):
        DetectionTrainView(jitter=(2.0, 1.0))
    with pytest.raises(UserError, match="1 px"):
        DetectionTestView(short_side=0)

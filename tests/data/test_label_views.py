"""Views: image and mask stay together to the pixel, labels are never mixed, draws follow the key."""

from __future__ import annotations

import colorsys

import cv2
import label_trees
import numpy as np
import pytest
import torch
from label_trees import ENCODED, encoded

from poodle_lightning.data import label_views
from poodle_lightning.data.label_views import (
    PADDING,
    TestView,
    TrainView,
    covering,
    distorted,
    limited,
    padded,
    resized,
)
from poodle_lightning.ops.random import key_of
from poodle_lightning.types import UserError


def key(number):
    return key_of(0, 0, number)


def blocks(size=(96, 160), cell=16, seed=0):
    """Labels in cells, of two kinds that lie far apart in grey."""
    rng = np.random.default_rng(seed)
    small = rng.integers(0, 2, (size[0] // cell, size[1] // cell)) * 20
    return np.kron(small, np.ones((cell, cell))).astype(np.uint8)


def test_crop_and_flip_move_image_and_mask_alike_to_the_pixel():
    labels = np.random.default_rng(0).integers(0, 19, (40, 60), dtype=np.uint8)
    view = TrainView(crop=(17, 23))
    flips, places = 0, set()
    for number in range(40):
        image, mask = view(encoded(labels), labels, key(number))
        assert image.shape == (17, 23, 3)
        assert np.array_equal(image[..., 0], mask * ENCODED)
        found = [
            (mirrored, y, x)
            for mirrored in (False, True)
            for y in range(24)
            for x in range(38)
            if np.array_equal(labels[y : y + 17, x : x + 23], mask[:, ::-1] if mirrored else mask)
        ]
        assert len(found) == 1  # a cut of the labels, perhaps mirrored
        flips += found[0][0]
        places.add(found[0][1:])
    assert 10 <= flips <= 30
    assert len(places) > 30
    assert min(y for y, _ in places) < 3
    assert max(x for _, x in places) > 34


@pytest.mark.parametrize("size", [(192, 320), (48, 80), (131, 219), (37, 61)])
def test_resized_masks_lie_where_the_bilinear_image_says(size):
    labels = blocks()
    image, mask = resized(encoded(labels), labels, size)
    assert mask.shape == size
    assert set(np.unique(mask)) == {0, 20}
    # a bilinear mix of two greys is nearer to that of the pixel which is nearest, but for ties at corners
    grey = image[..., 0].astype(int)
    clear = np.abs(grey - 120) > 60  # the mix is decided by more than half of one side
    assert clear.mean() > 0.8
    assert ((grey > 120) == (mask == 20))[clear].all()


@pytest.mark.parametrize("size", [(131, 219), (37, 61), (300, 47)])
def test_nearest_is_that_of_the_pixel_centres(size):
    labels = np.random.default_rng(1).integers(0, 250, (96, 160), dtype=np.uint8)
    _, mask = resized(encoded(labels), labels, size)
    # the source pixel that holds the centre of each target pixel, in whole numbers; ties may go either way
    (rows, clear_rows), (columns, clear_columns) = (
        zip(*[divmod((2 * i + 1) * have, 2 * want) for i in range(want)], strict=True)
        for have, want in zip((96, 160), size, strict=True)
    )
    clear = np.outer(clear_rows, clear_columns) > 0
    assert clear.mean() > 0.9
    assert (mask == labels[np.ix_(rows, columns)])[clear].all()


def test_images_are_resized_as_opencv_does_it():
    image = label_trees.noise(0, (50, 70))
    made, _ = resized(image, None, (33, 91))
    assert np.array_equal(made, cv2.resize(image, (91, 33), interpolation=cv2.INTER_LINEAR))


def test_whole_view_keeps_labels_unmixed_and_aligned():
    labels = np.where(blocks() == 20, 20, 255).astype(np.uint8)
    image = np.where(labels == 20, 240, 0).astype(np.uint8)[..., None].repeat(3, axis=2)
    view = TrainView(crop=(64, 64), short_side=(48, 192), cat_max_ratio=0.75)
    for number in range(20):
        seen, mask = view(image, labels, key(number))
        assert set(np.unique(mask)) <= {20, 255}
        inside = ~np.all(seen == PADDING, axis=-1)
        grey = seen[..., 0].astype(int)
        clear = inside & (np.abs(grey - 120) > 60)
        assert ((grey > 120) == (mask == 20))[clear].all()


def sides(view, size, count=400):
    return np.array([view.size(size, key(number).reshape(1)) for number in range(count)])


def test_random_short_side_of_flowe():
    found = sides(TrainView(short_side=(512, 2048)), (720, 1280))
    assert (found[:, 0].min(), found[:, 0].max()) >= (512, 1990)
    assert found[:, 0].max() <= 2048
    assert abs(found[:, 0].mean() - 1280) < 4 * 1537 / np.sqrt(12 * 400)  # four standard errors
    assert np.abs(found[:, 1] - found[:, 0] * 1280 / 720).max() <= 1
    both = sides(TrainView(short_side=(7, 8)), (7, 14), 50)
    assert set(both[:, 0]) == {7, 8}  # both ends occur


def test_ratio_of_mmsegmentation():
    found = sides(TrainView(scale=(2048, 512)), (600, 800))  # the short side binds: 256 to 1024
    assert found[:, 0].min() < 270
    assert 1000 < found[:, 0].max() <= 1024
    wide = sides(TrainView(scale=(2048, 512)), (100, 1000))  # the long side binds: 1024 to 4096
    assert wide[:, 1].max() > 4000
    assert np.abs(wide[:, 0] - wide[:, 1] / 10).max() <= 1
    fixed = TrainView(scale=(2048, 512), ratio=(1.0, 1.0))
    assert fixed.size((600, 800), key(0).reshape(1)) == (512, 683)


def test_choice_of_detectron2():
    view = TrainView(short_sides=(640, 672, 704, 736, 768, 800), long_side=1333)
    found = sides(view, (480, 640))
    assert set(found[:, 0]) == {640, 672, 704, 736, 768, 800}
    assert limited((480, 1280), 800, 1333) == (500, 1333)  # detectron2: 1333/1280·480 = 499.9
    assert limited((426, 640), 800, 1333) == (800, 1202)


def test_too_small_images_are_padded_with_the_mean_colour_and_ignored():
    labels = np.full((10, 12), 3, np.uint8)
    image, mask = TrainView(crop=(16, 20), flip=0.0)(np.full((10, 12, 3), 9, np.uint8), labels, key(0))
    assert image.shape == (16, 20, 3)
    assert (mask[:10, :12] == 3).all()
    assert (mask == 3).sum() == 120
    assert (mask[mask != 3] == 255).all()
    assert (image[:10, :12] == 9).all()
    assert (image[10:] == PADDING).all()
    assert (image[:, 12:] == PADDING).all()
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    assert np.abs((np.array(PADDING) / 255 - mean) / std).max() < 0.01
    assert padded(image, mask, (4, 4))[0] is image


def test_crops_of_one_class_are_drawn_again_up_to_ten_times():
    labels = np.zeros((32, 320), np.uint8)
    labels[:, 300:] = 1  # a crop is mixed enough only near x = 300

    def share(ratio):
        view = TrainView(crop=(32, 32), cat_max_ratio=ratio, flip=0.0)
        good = 0
        for number in range(300):
            counts = np.bincount(view(encoded(labels), labels, key(number))[1].ravel(), minlength=2)
            good += counts.max() < 0.75 * 32 * 32
        return good / 300

    # places 0 to 288, of which 277 to 288 leave the larger class below three quarters
    once = 12 / 289
    assert abs(share(1.0) - once) < 0.035
    assert abs(share(0.75) - (1 - (1 - once) ** 11)) < 0.1


def test_ignored_pixels_do_not_count_as_a_class():
    labels = np.full((8, 8), 255, np.uint8)
    labels[:, 0] = 0
    labels[:, 1] = 1
    view = TrainView(crop=(8, 8), cat_max_ratio=0.75)
    assert view._mixed(labels)  # half and half of what is labelled
    assert not view._mixed(np.where(labels == 1, 255, labels))  # a single class


def test_distortion_steps_have_mmsegmentations_ranges():
    grey = np.full((4, 4, 3), 128, np.uint8)
    seen = np.array([distorted(grey, key(number).reshape(1))[0, 0] for number in range(400)])
    assert (seen == seen[:, :1]).all()  # grey has no hue and no saturation
    unchanged = (seen[:, 0] == 128).mean()
    assert abs(unchanged - 0.25) < 0.09  # neither brightness nor contrast
    assert seen.min() >= (128 - 32) * 0.5 - 1
    assert seen.max() <= (128 + 32) * 1.5
    assert seen.min() < 60
    assert seen.max() > 220
    red = np.zeros((1, 1, 3), np.uint8)
    red[..., 0] = 200
    hues = [cv2.cvtColor(distorted(red, key(n).reshape(1)), cv2.COLOR_RGB2HSV)[0, 0, 0] for n in range(400)]
    turned = np.array([hue if hue < 90 else int(hue) - 180 for hue in hues])
    assert abs((turned == 0).mean() - 0.5) < 0.12
    assert (np.abs(turned) <= 19).mean() > 0.97  # dark and pale colours are rounded to other hues
    assert turned.min() < -14
    assert turned.max() > 13


def only(monkeypatch, *steps):
    """Let distortion take these of its steps and no other."""
    names = ("brightness", "contrast", "saturation", "hue", "contrast first")
    chosen = torch.tensor([[name in steps for name in names]])
    monkeypatch.setattr(label_views, "bernoulli", lambda *_: chosen)


def colours(change, image):
    """An image with its HSV values (0 to 1, by colorsys) changed."""
    hsv = [change(*colorsys.rgb_to_hsv(*(pixel / 255))) for pixel in image.reshape(-1, 3)]
    return np.array([colorsys.hsv_to_rgb(*pixel) for pixel in hsv]).reshape(image.shape) * 255


def test_the_steps_of_distortion_one_by_one(monkeypatch):
    image = np.array([[[200, 90, 40], [60, 150, 90], [90, 110, 190]]], np.uint8)

    def seen():
        return [distorted(image, key(number).reshape(1)).astype(float) for number in range(60)]

    only(monkeypatch, "brightness")
    shifts = np.array([(made - image).ravel() for made in seen()])
    assert (shifts == shifts[:, :1]).all()
    assert (-32 <= shifts.min() < -26, 26 < shifts.max() <= 32) == (True, True)
    only(monkeypatch, "contrast")
    factors = np.array([made[0, 1, 1] / 150 for made in seen()])
    assert (0.49 <= factors.min() < 0.6, 1.4 < factors.max() <= 1.5) == (True, True)
    for made, factor in zip(seen(), factors, strict=True):
        assert np.abs(made - (image * factor).clip(0, 255)).max() <= 2
    only(monkeypatch, "saturation")
    for made in seen():
        before, after = (colorsys.rgb_to_hsv(*(x[0, 0] / 255))[1] for x in (image, made))
        factor = after / before
        assert 0.48 <= factor <= 1.26  # 0.8 · 1.25 is full
        if factor < 1.2:
            wanted = colours(lambda h, s, v, f=factor: (h, min(1, f * s), v), image)
            assert np.abs(made - wanted).max() <= 5
    only(monkeypatch, "hue")
    turns = set()
    for made in seen():
        errors = {
            turn: np.abs(made - colours(lambda h, s, v, t=turn: ((h + t / 180) % 1, s, v), image)).max()
            for turn in range(-22, 22)
        }
        turn = min(errors, key=errors.get)
        assert errors[turn] <= 5
        turns.add(turn)
    assert min(turns) >= -19
    assert max(turns) <= 18
    assert len(turns) > 20


def test_contrast_comes_before_or_after_the_colours(monkeypatch):
    image = np.full((1, 1, 3), 100, np.uint8)
    for number in range(20):
        made = {}
        for steps in ((), ("brightness",), ("contrast",), ("brightness", "contrast")):
            only(monkeypatch, *steps)
            made[steps] = int(distorted(image, key(number).reshape(1))[0, 0, 0])
        shift, factor = made["brightness",] - 100, made["contrast",] / 100
        assert abs(made["brightness", "contrast"] - min(255, (100 + shift) * factor)) <= 2
    red = np.array([[[250, 40, 40]]], np.uint8)
    orders = []
    for number in range(20):
        for steps in (("saturation", "contrast"), ("saturation", "contrast", "contrast first")):
            only(monkeypatch, *steps)
            orders.append(distorted(red, key(number).reshape(1)).tolist())
    assert any(a != b for a, b in zip(orders[::2], orders[1::2], strict=True))


def test_distortion_changes_the_image_only():
    labels = np.random.default_rng(0).integers(0, 19, (20, 30), dtype=np.uint8)
    image = label_trees.noise(0, (20, 30))
    before = image.copy()
    plain, bright = (TrainView(crop=(12, 12), distort=on) for on in (False, True))
    changed = 0
    for number in range(10):
        (a, mask_a), (b, mask_b) = plain(image, labels, key(number)), bright(image, labels, key(number))
        assert np.array_equal(mask_a, mask_b)
        changed += not np.array_equal(a, b)
    assert changed >= 8
    assert np.array_equal(image, before)


def test_a_view_is_a_function_of_its_key():
    labels, image = blocks(), label_trees.noise(0, (96, 160))
    view = TrainView(crop=(32, 32), short_side=(64, 128), cat_max_ratio=0.75, distort=True)
    first = view(image, labels, key(5))
    torch.manual_seed(7)
    np.random.seed(7)  # noqa: NPY002
    again = view(image, labels, key(5))
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    assert not np.array_equal(first[0], view(image, labels, key(6))[0])


def test_test_views():
    image = label_trees.noise(0, (72, 128))
    assert np.array_equal(TestView()(image), image)
    assert TestView(short_side=36)(image).shape == (36, 64, 3)
    assert TestView(short_side=144, long_side=200)(image).shape == (113, 200, 3)
    assert TestView(size=(50, 50))(image).shape == (50, 50, 3)


def test_covering_is_the_middle_of_the_image():
    labels = np.repeat(np.arange(40, dtype=np.uint8)[None], 20, axis=0)
    image, mask = covering(encoded(labels), labels, (20, 20))
    assert mask[0].tolist() == list(range(10, 30))
    assert np.array_equal(image[..., 0], (mask.astype(int) * ENCODED).astype(np.uint8))
    image, mask = covering(encoded(labels), labels, (10, 7))
    assert image.shape == (10, 7, 3)
    assert np.abs(np.diff(mask[0].astype(int)) - 2).max() == 0  # shrunk by two, never mixed
    assert covering(encoded(labels), labels, (33, 66))[1].shape == (33, 66)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"short_side": (1, 2), "scale": (3, 4)}, "give one of short_side and scale"),
        ({"long_side": 5}, "long_side limits short_side"),
        ({"long_side": 5, "scale": (3, 4)}, "long_side limits short_side"),
        ({"short_side": (9, 3)}, "from a smaller to a larger"),
        ({"ratio": (0.0, 3.0)}, "from a smaller to a larger"),
        ({"crop": (0, 3)}, "1 px or more"),
        ({"short_sides": (640, 0)}, "1 px or more"),
        ({"short_side": (3, 4), "long_side": 0}, "1 px or more"),
        ({"cat_max_ratio": 0.0}, "shares"),
        ({"flip": 1.5}, "shares"),
    ],
)
def test_train_view_settings_that_make_no_sense(settings, said):
    with pytest.raises(UserError, match=said):
        TrainView(**settings)


@pytest.mark.parametrize("settings", [{"long_side": 5}, {"short_side": 5, "size": (3, 3)}, {"short_side": 0}])
def test_test_view_settings_that_make_no_sense(settings):
    with pytest.raises(UserError, match="test view"):
        TestView(**settings)

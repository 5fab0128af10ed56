"""What the values in a mask mean, and what is refused by name."""

from __future__ import annotations

import label_trees
import numpy as np
import pytest
from PIL import Image

from poodle_lightning.data.label_files import (
    Codes,
    colour_value,
    image_size,
    look_up,
    read_image,
    read_mask,
    read_pair,
)
from poodle_lightning.types import UserError

IDS = Codes.plain(19)
COLOURS = Codes("colours", {colour_value((128, 64, 128)): 0, colour_value((0, 0, 142)): 1}, "the 2 colours")


def refused(act, *parts):
    with pytest.raises(UserError) as caught:
        act()
    line = str(caught.value)
    assert "\n" not in line
    for part in parts:
        assert part in line, line


def test_bytes_are_labels(tmp_path):
    path = label_trees.save(tmp_path / "a.png", [[0, 1, 18], [255, 7, 0]])
    labels = read_mask(path, IDS)
    assert labels.dtype == np.uint8
    assert labels.tolist() == [[0, 1, 18], [255, 7, 0]]


def test_an_id_out_of_range_says_which_and_how_often(tmp_path):
    path = label_trees.save(tmp_path / "a.png", [[0, 19, 19], [200, 7, 19]])
    refused(lambda: read_mask(path, IDS), "a.png: id 19 in 3 pixels", "(1 more such ids)", "0 to 18")


@pytest.mark.parametrize("kind", ["I;16", "I"])
def test_16_bits_are_read_where_the_ids_fit(tmp_path, kind):
    path = tmp_path / "a.tif"
    stored = np.array([[0, 18], [255, 3]], np.uint16 if kind == "I;16" else np.int32)
    Image.fromarray(stored).save(path)
    assert Image.open(path).mode == kind
    assert read_mask(path, IDS).tolist() == stored.tolist()
    Image.fromarray(stored + np.array(300, stored.dtype)).save(path)
    refused(lambda: read_mask(path, IDS), "a.tif: id 300 in 1 pixels", "(3 more such ids)")
    many = Codes("ids", {300: 4, 318: 5, 555: 255, 303: 6}, "four ids")
    assert read_mask(path, many).tolist() == [[4, 5], [255, 6]]


def test_palette_images_are_read_as_indices_where_that_is_meant(tmp_path):
    path = label_trees.save(tmp_path / "a.png", [[0, 1, 18], [255, 7, 0]], "P")
    assert Image.open(path).mode == "P"
    assert read_mask(path, Codes.plain(19, kind="palette")).tolist() == [[0, 1, 18], [255, 7, 0]]
    refused(
        lambda: read_mask(path, IDS), "a.png: a palette mask, but label ids are expected", "masks: palette"
    )


def test_colours_become_labels_from_rgb_and_from_a_palette(tmp_path):
    rgb = np.array([[[128, 64, 128], [0, 0, 142]], [[0, 0, 142], [0, 0, 142]]], np.uint8)
    path = label_trees.save(tmp_path / "a.png", rgb)
    assert read_mask(path, COLOURS).tolist() == [[0, 1], [1, 1]]
    Image.fromarray(rgb).quantize(4).save(path)
    assert Image.open(path).mode == "P"
    assert read_mask(path, COLOURS).tolist() == [[0, 1], [1, 1]]
    rgba = np.concatenate([rgb, np.full((2, 2, 1), 255, np.uint8)], axis=2)
    label_trees.save(path, rgba)
    assert read_mask(path, COLOURS).tolist() == [[0, 1], [1, 1]]
    rgba[0, 0, 3] = 10
    label_trees.save(path, rgba)
    refused(lambda: read_mask(path, COLOURS), "a.png: the mask has transparent pixels")


def test_a_colour_that_no_class_has(tmp_path):
    rgb = np.full((3, 4, 3), 142, np.uint8)
    path = label_trees.save(tmp_path / "a.png", rgb)
    refused(lambda: read_mask(path, COLOURS), "a.png: colour (142, 142, 142) in 12 pixels", "the 2 colours")


def test_rgb_where_ids_are_expected_and_the_reverse(tmp_path):
    path = label_trees.save(tmp_path / "a.png", np.zeros((2, 2, 3)))
    refused(lambda: read_mask(path, IDS), "a.png: an RGB mask, but label ids are expected")
    path = label_trees.save(tmp_path / "b.png", np.zeros((2, 2)))
    refused(lambda: read_mask(path, COLOURS), "b.png: a mask of kind L, but colours are expected")


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.bmp", "a.tif"])
@pytest.mark.parametrize("what", ["image", "mask"])
def test_truncated_files(tmp_path, name, what):
    whole = label_trees.save(tmp_path / name, label_trees.noise(0, (64, 64))[..., 0])
    whole.write_bytes(whole.read_bytes()[: whole.stat().st_size * 2 // 3])
    act = (lambda: read_image(whole)) if what == "image" else (lambda: read_mask(whole, Codes.plain(255)))
    refused(act, f"{name}: the {what} cannot be read")


def test_damage_anywhere_in_a_png_is_an_error_that_names_it_or_none(tmp_path):
    path = label_trees.save(tmp_path / "a.png", label_trees.mask(0, 19, (32, 32)))
    good, said = path.read_bytes(), []
    for place in range(8, len(good), 3):
        path.write_bytes(good[:place] + bytes([good[place] ^ 0xFF]) + good[place + 1 :])
        try:
            read_mask(path, IDS)
        except UserError as error:
            said.append(str(error))
    assert len(said) > 5
    assert all("a.png" in line for line in said)


def test_not_an_image_and_nothing_there(tmp_path):
    (tmp_path / "a.png").write_text("<html>")
    refused(lambda: read_mask(tmp_path / "a.png", IDS), "a.png: the mask cannot be read")
    refused(lambda: read_image(tmp_path / "b.jpg"), "b.jpg: the image is missing")


def test_too_large_is_refused_before_it_is_decoded(tmp_path, monkeypatch):
    path = label_trees.save(tmp_path / "a.png", label_trees.mask(0, 19))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    refused(lambda: read_mask(path, IDS), "a.png: the mask is too large")


def test_a_mask_of_another_size(tmp_path):
    image = label_trees.save(tmp_path / "a.jpg", label_trees.noise(0, (12, 20)))
    mask = label_trees.save(tmp_path / "a.png", label_trees.mask(0, 19, (12, 21)))
    refused(lambda: read_pair(image, mask, IDS), "a.png: the mask is 21×12 px, its image a.jpg is 20×12 px")


def test_images_of_other_kinds(tmp_path):
    grey = np.arange(240, dtype=np.uint8).reshape(12, 20)
    path = label_trees.save(tmp_path / "a.png", grey)
    assert np.array_equal(read_image(path), np.repeat(grey[..., None], 3, axis=2))
    Image.fromarray(grey.astype(np.uint16) * 256 + 77).save(path)
    assert np.array_equal(read_image(path)[..., 1], grey)
    Image.fromarray(label_trees.noise(0)).convert("CMYK").save(tmp_path / "b.jpg")
    assert read_image(tmp_path / "b.jpg").shape == (12, 20, 3)


@pytest.mark.parametrize("turn", [3, 6, 8])
def test_the_camera_turn_is_applied_unless_only_the_raw_image_fits_the_mask(tmp_path, turn):
    pixels = label_trees.noise(0, (12, 20))
    exif = Image.Exif()
    exif[0x0112] = turn
    path = label_trees.save(tmp_path / "a.png", pixels, exif=exif)
    upright = np.rot90(pixels, {3: 2, 6: 3, 8: 1}[turn])
    label_trees.save(tmp_path / "m.png", label_trees.mask(0, 19, upright.shape[:2]))
    assert np.array_equal(read_pair(path, tmp_path / "m.png", IDS)[0], upright)
    assert image_size(path, upright.shape[:2]) == upright.shape[:2]
    label_trees.save(tmp_path / "m.png", label_trees.mask(0, 19, (12, 20)))
    wanted = upright if turn == 3 else pixels  # half a turn keeps the size: the tag decides
    assert np.array_equal(read_pair(path, tmp_path / "m.png", IDS)[0], wanted)
    assert image_size(path, (12, 20)) == (12, 20)


def test_look_up_of_large_values():
    values = np.array([[0, 16_777_215], [65_536, 5]])
    assert look_up(values, {65_536: 3, 0: 255, 5: 0}).tolist() == [[255, -1], [3, 0]]
    assert look_up(values, {}).tolist() == [[-1, -1], [-1, -1]]

"""Folders of images as videos."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from poodle_lightning.data import frames as module
from poodle_lightning.data.frames import FramesSource, load_image
from poodle_lightning.data.info import DecodeError
from poodle_lightning.types import UserError


def noise(seed, height=20, width=30):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.fixture
def root(tmp_path):
    for number in range(11):
        for video in ("a", "deep/b"):
            (tmp_path / video).mkdir(parents=True, exist_ok=True)
            Image.fromarray(noise(number)).save(tmp_path / video / f"frame{number}.png")
    (tmp_path / "a" / "notes.txt").write_text("no image")
    (tmp_path / "a" / ".hidden.png").write_bytes(b"no image")
    return tmp_path


def test_images_come_in_natural_order_at_their_times(root):
    source = FramesSource(root, rate=5.0)
    assert [entry.path for entry in source.entries] == [str(root / "a"), str(root / "deep" / "b")]
    entry = source.entries[0]
    assert (entry.start, entry.stop, entry.width, entry.height) == (0.0, 2.0, 30, 20)
    pixels, times = source.open(entry).read([0.0, 0.2, 0.21, 2.0], (3, 4, 13, 10))
    # the first image that is not before the time asked for; 10 comes after 9, not after 1
    for row, number in enumerate((0, 1, 2, 10)):
        np.testing.assert_array_equal(pixels[row], noise(number)[4:10, 3:13])
    np.testing.assert_allclose(times, [0.0, 0.2, 0.4, 2.0])


def test_the_root_itself_may_be_the_video(root):
    assert [entry.path for entry in FramesSource(root / "a", 5.0).entries] == [str(root / "a")]


def test_a_time_after_the_last_image_is_refused(root):
    source = FramesSource(root, 5.0)
    with pytest.raises(DecodeError) as caught:
        source.open(source.entries[0]).read([2.1])
    assert caught.value.reason == "past_end"


@pytest.mark.parametrize("cut", [0, 10, 300])
def test_damaged_images_are_named_with_their_time(root, cut):
    path = root / "a" / "frame4.png"
    path.write_bytes(path.read_bytes()[:cut])
    source = FramesSource(root, 5.0)
    with pytest.raises(DecodeError) as caught:
        source.open(source.entries[0]).read([0.8])
    assert (caught.value.reason, caught.value.time) == ("corrupt", pytest.approx(0.8))
    assert "frame4.png" in caught.value.detail


def test_other_sizes_and_missing_images_are_refused(root):
    source = FramesSource(root, 5.0)
    Image.fromarray(noise(1, 10, 30)).save(root / "a" / "frame1.png")
    (root / "a" / "frame2.png").unlink()
    reader = source.open(source.entries[0])
    for time, reason in ((0.2, "size_changed"), (0.4, "missing")):
        with pytest.raises(DecodeError) as caught:
            reader.read([time])
        assert caught.value.reason == reason


def test_images_are_turned_as_the_camera_was_held(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn clockwise for display
    Image.fromarray(noise(0)).save(tmp_path / "0.png", exif=exif)
    source = FramesSource(tmp_path, 1.0)
    assert (source.entries[0].width, source.entries[0].height) == (20, 30)
    pixels, _ = source.open(source.entries[0]).read([0.0])
    np.testing.assert_array_equal(pixels[0], np.rot90(noise(0), -1))


def test_grey_deep_and_print_images_become_rgb(tmp_path):
    deep = np.random.default_rng(0).integers(0, 65536, (20, 30), dtype=np.uint16)
    Image.fromarray(deep).save(tmp_path / "0.png")
    Image.fromarray(noise(1)[..., 0]).save(tmp_path / "1.png")
    Image.new("CMYK", (30, 20), (0, 255, 255, 0)).save(tmp_path / "2.jpg")
    source = FramesSource(tmp_path, 1.0)
    pixels, _ = source.open(source.entries[0]).read([0.0, 1.0, 2.0])
    np.testing.assert_array_equal(pixels[0], np.repeat((deep // 256)[..., None], 3, axis=2))
    np.testing.assert_array_equal(pixels[1], np.repeat(noise(1)[..., :1], 3, axis=2))
    assert np.abs(pixels[2].astype(int) - [255, 0, 0]).max() <= 4  # full magenta and yellow are red


def test_bombs_are_refused_by_their_header(tmp_path):
    (tmp_path / "bomb").mkdir()
    Image.new("1", (20_000, 20_000)).save(tmp_path / "bomb" / "0.png")
    (tmp_path / "sound").mkdir()
    Image.fromarray(noise(0)).save(tmp_path / "sound" / "0.png")
    source = FramesSource(tmp_path, 1.0)
    assert [(skip.reason, skip.path) for skip in source.refused] == [
        ("too_many_pixels", str(tmp_path / "bomb" / "0.png"))
    ]


def test_missing_and_empty_folders_are_named(tmp_path):
    for root, rate, message in (
        (tmp_path / "none", 1.0, "no such folder"),
        (tmp_path, 1.0, "no images"),
        (tmp_path, 0.0, "rate"),
    ):
        with pytest.raises(UserError, match=message):
            FramesSource(root, rate)


# byte of the EXIF block's TIFF part, and what is written there: the ids of the tags 0x010f and 0x011a, a type
@pytest.mark.parametrize(("place", "value"), [(11, 0), (35, 13), (37, 2)])
@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
def test_a_damaged_exif_block_is_a_damaged_image(tmp_path, place, value):
    exif = Image.Exif()
    exif[0x010F], exif[0x0112], exif[0x011A] = "Maker", 6, 72.0
    path = tmp_path / "0.jpg"
    Image.fromarray(noise(0)).save(path, exif=exif)
    assert load_image(path).shape == (30, 20, 3)
    content = bytearray(path.read_bytes())
    content[content.index(b"Exif\0\0") + 6 + place] = value
    path.write_bytes(content)
    # Pillow: struct.error, AttributeError, TypeError
    with pytest.raises(DecodeError, match=r"0\.jpg: \S") as caught:
        load_image(path)
    assert caught.value.reason == "corrupt"


def test_what_is_no_fault_of_the_file_is_not_taken_for_one(tmp_path, monkeypatch):
    Image.fromarray(noise(0)).save(tmp_path / "0.png")
    for error in (MemoryError, KeyboardInterrupt):

        def fail(*args, error=error, **kwargs):
            raise error

        monkeypatch.setattr("PIL.ImageOps.exif_transpose", fail)
        with pytest.raises(error):
            module.load_image(tmp_path / "0.png")

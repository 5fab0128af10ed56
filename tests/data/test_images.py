"""Folders of images: listed but not measured, whole or cut, skipped where they are damaged."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch
from PIL import Image

from poodle_lightning.data.images import ImageEntries, ImagesSource
from poodle_lightning.data.info import DecodeError
from poodle_lightning.data.sampling import ClipSampler
from poodle_lightning.data.video import VideoDataModule
from poodle_lightning.types import UserError

SHAPES = {"n01/a.JPEG": (20, 30), "n01/b.jpg": (40, 24), "n02/c.png": (16, 16), "n02/deep/d.JPEG": (30, 60)}


def picture(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.fixture
def root(tmp_path):
    for number, (name, shape) in enumerate(SHAPES.items()):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture(*shape, number)).save(tmp_path / name, quality=95)
    (tmp_path / "n01" / ".hidden.jpg").write_bytes(b"no image")
    (tmp_path / "n01" / "notes.txt").write_text("no image")
    return tmp_path


def module(root, **changes):
    settings = {"sampler": ClipSampler(1, 1.0), "size": (12, 12), "batch_size": 2, "num_workers": 0}
    settings |= {"val_fraction": 0.0, "whole": True}
    data = VideoDataModule("images", str(root), **(settings | changes))
    data.setup("fit")
    return data


def test_every_image_is_listed_and_none_opened(root, monkeypatch):
    monkeypatch.setattr(Image, "open", None)
    source = ImagesSource(root)
    assert [entry.path for entry in source.entries] == [str(root / name) for name in sorted(SHAPES)]
    assert [entry.id for entry in source.entries] == [0, 1, 2, 3]
    assert source.entries[-1] == source.entries[3]
    assert source.entries[1:3] == [source.entries[1], source.entries[2]]
    with pytest.raises(IndexError):
        source.entries[4]
    assert pickle.loads(pickle.dumps(source.entries))[2] == source.entries[2]


def test_a_long_list_is_a_block_of_bytes():
    names = [b"n%08d/n%08d_%05d.JPEG" % (k % 1000, k % 1000, k) for k in range(50_000)]
    entries = ImageEntries("/data", names)
    assert len(pickle.dumps(entries)) < 45 * len(names)
    assert entries[49_999].path == "/data/" + names[-1].decode()


def test_an_image_is_a_clip_of_one_frame(root):
    source = ImagesSource(root)
    reader = source.open(source.entries[2])
    assert reader.size == (16, 16)
    pixels, times = reader.read([0.0], (3, 4, 13, 10))
    np.testing.assert_array_equal(pixels[0], picture(16, 16, 2)[4:10, 3:13])
    assert times.tolist() == [0.0]


@pytest.mark.parametrize("workers", [0, 1])
def test_whole_images_are_squeezed_and_tell_their_shape(root, workers):
    data = module(root, num_workers=workers)
    batches = list(data.train_dataloader())
    assert len(batches) == 2
    seen = {}
    for clip in batches:
        assert clip.frames.shape[:3] == (2, 1, 3)
        for row, crop in enumerate(clip.unit()[:, 0]):
            path = data.train_entries[int(clip.index[row])].path
            seen[path] = (float(clip.aspect[row]), crop)
    for name, (height, width) in SHAPES.items():
        aspect, crop = seen[str(root / name)]
        assert aspect == pytest.approx(width / height)
        pixels = torch.from_numpy(np.array(Image.open(root / name).convert("RGB"))).permute(2, 0, 1)
        # the mapping of pixel centres that the whole extent has, by another sampler
        expected = torch.nn.functional.interpolate(
            pixels[None].double(), (12, 12), mode="bilinear", align_corners=False
        )
        assert (crop.double() * 255 - expected[0]).abs().max() < 0.01


def test_windows_of_images_tell_no_shape(root):
    clip = next(iter(module(root, whole=False, area=(0.2, 1.0), ratio=(0.75, 4 / 3)).train_dataloader()))
    assert clip.aspect is None
    assert clip.unit().shape == (2, 1, 3, 12, 12)


def test_one_image_may_be_seen_twice(root):
    data = module(root, sampler=None, gap=(0.0, 0.0), whole=False, area=(0.3, 0.6))
    assert next(iter(data.train_dataloader())).frames.shape[1] == 2


def test_held_out_images_are_others(root):
    data = module(root, val_fraction=0.25)
    train, val = ({entry.path for entry in part} for part in (data.train_entries, data.val_entries))
    assert (len(train), len(val)) == (3, 1)
    assert not train & val


def test_a_damaged_image_is_skipped_when_its_turn_comes(root):
    (root / "n01" / "a.JPEG").write_bytes(b"\xff\xd8 no")
    (root / "n02" / "folder.jpg").mkdir()
    source = ImagesSource(root)
    assert len(source.entries) == 5
    with pytest.raises(DecodeError) as caught:
        source.open(source.entries[0])
    assert caught.value.reason == "corrupt"
    clips = list(module(root, batch_size=1).train_dataloader())
    assert len(clips) == 5  # each replaced by the next
    skipped = {skip.path for clip in clips for skip in clip.skipped}
    assert skipped == {str(root / "n01" / "a.JPEG"), str(root / "n02" / "folder.jpg")}


def test_missing_folders_and_wrong_settings_are_named(root, tmp_path):
    (tmp_path / "empty").mkdir()
    for wrong, message in ((tmp_path / "none", "no such folder"), (tmp_path / "empty", "no image below it")):
        with pytest.raises(UserError, match=message):
            ImagesSource(wrong)
    for changes in ({"sampler": None}, {"hours": 1.0}, {"sampler": ClipSampler(2, 1.0)}):
        with pytest.raises(UserError, match="source images: an image has one moment"):
            module(root, **changes)
    with pytest.raises(UserError, match="cuts avoid is for video files"):
        module(root, cuts="avoid")

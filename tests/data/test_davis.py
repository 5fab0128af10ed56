"""DAVIS 2017 by its layout: what is read, at which size it is shown, what is written, what is refused."""

import cv2
import numpy as np
import pytest
import torch
from davis_trees import SIZE, davis, ids, painted
from label_trees import save
from PIL import Image

from poodle_lightning.data.davis import DavisDataModule, FrameView, voc_colours, write_masks
from poodle_lightning.types import UserError

WHOLE = FrameView(short_side=None)


def module(root, **kwargs):
    return DavisDataModule(str(root), **{"view": WHOLE, "num_workers": 0, **kwargs})


@pytest.fixture
def root(tmp_path):
    return davis(tmp_path / "DAVIS")


def test_sequences_are_batches_in_the_order_of_the_list(root):
    found = list(module(root).val_dataloader())
    assert [video.name for video in found] == ["dog", "swan"]
    assert [len(video) for video in found] == [5, 4]
    dog = found[0]
    assert dog.frames.shape == (5, 3, *SIZE)
    assert (dog.objects, dog.index, dog.stems[:2]) == (2, 0, ("00000", "00001"))
    for time in range(5):
        assert np.array_equal(dog.masks[time].numpy(), ids(time))
    shown = dog.frames[1].permute(1, 2, 0).numpy().astype(int)
    assert np.abs(shown - painted(ids(1), 1)).mean() < 20  # JPEG
    assert dog.to("cpu").frames.equal(dog.frames)


def test_the_folder_above_will_do_and_workers_change_nothing(root):
    above = list(module(root.parent, num_workers=1).val_dataloader())
    here = list(module(root).val_dataloader())
    assert all(torch.equal(one.frames, two.frames) for one, two in zip(above, here, strict=True))


def test_some_sequences_alone(root):
    assert [video.name for video in module(root, sequences=["swan"]).val_dataloader()] == ["swan"]
    with pytest.raises(UserError, match=r"cat is not in .*val\.txt"):
        module(root, sequences=["cat"])
    with pytest.raises(UserError, match=r"sequences: swan is named more than once"):
        module(root, sequences=["swan", "dog", "swan"])


def test_void_is_background(root):
    mask = ids(0)
    mask[0, :5] = 255
    save(root / "Annotations/480p/dog/00000.png", mask, "P")
    video = module(root).read(0)
    assert video.objects == 2
    assert np.array_equal(video.masks[0].numpy(), ids(0))


@pytest.mark.parametrize(
    ("size", "multiple", "shown"),
    [
        ((480, 854), 64, (480, 832)),  # DINO, read_frame
        ((854, 480), 64, (832, 480)),
        ((480, 910), 64, (480, 896)),
        ((1080, 1920), 64, (480, 832)),
        ((480, 854), 1, (480, 854)),  # VFS, mmcv's rescale_size
        ((1080, 1920), 1, (480, 853)),
        ((720, 1281), 1, (480, 854)),
        ((1080, 1921), 1, (480, 854)),  # 853.8
        ((960, 1709), 1, (480, 855)),  # 854.5 goes up
        ((1709, 960), 1, (855, 480)),
        ((500, 500), 1, (480, 480)),
    ],
)
def test_sizes(size, multiple, shown):
    assert FrameView(480, multiple).size(*size) == shown


def test_frames_are_resized_as_opencv_does(root):
    frame = painted(ids(0))
    found = FrameView(16, 8)(frame)
    assert np.array_equal(found, cv2.resize(frame, (24, 16)))
    assert found.shape == (16, 24, 3)
    assert WHOLE(frame) is frame
    video = module(root, view=FrameView(16, 8)).read(0)
    assert video.frames.shape == (5, 3, 16, 24)
    assert video.masks.shape == (5, *SIZE)


def test_masks_are_written_in_the_official_layout(root, tmp_path):
    video = module(root).read(0)
    written = write_masks(tmp_path / "results", video, video.masks)
    assert written[3] == tmp_path / "results/dog/00003.png"
    with Image.open(written[3]) as found, Image.open(root / "Annotations/480p/dog/00003.png") as given:
        assert found.mode == "P"
        assert np.array_equal(np.asarray(found), np.asarray(given))
        assert found.getpalette()[: 3 * 8] == given.getpalette()[: 3 * 8]
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be written"):
        write_masks(tmp_path / "file", video, video.masks)


def test_colours_of_grey_masks_are_davis_own():
    """The first ten colours as PASCAL VOC lists them (and mmaction's DavisDataset in xvjiarui/VFS)."""
    wanted = [
        *([0, 0, 0], [128, 0, 0], [0, 128, 0], [128, 128, 0], [0, 0, 128]),
        *([128, 0, 128], [0, 128, 128], [128, 128, 128], [64, 0, 0], [192, 0, 0]),
    ]
    assert voc_colours()[:10].tolist() == wanted
    assert voc_colours()[255].tolist() == [224, 224, 192]


# ---- what is refused, in one line
def drop_sequence(root):
    for path in (root / "JPEGImages/480p/swan").iterdir():
        path.unlink()


def drop(path):
    return lambda root: (root / path).unlink()


def put(path, pixels, mode=None):
    return lambda root: save(root / path, pixels, mode)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (drop("ImageSets/2017/val.txt"), "val.txt: no such list of sequences"),
        (drop_sequence, "JPEGImages/480p/swan: no frames"),
        (drop("Annotations/480p/dog/00000.png"), "dog/00000.png: no such file: without a first mask"),
        (drop("Annotations/480p/dog/00002.png"), r"dog/00002.png: no such file \(1 of 5 masks"),
        (
            put("Annotations/480p/dog/00003.png", np.zeros((30, 48)), "P"),
            "dog/00003.png: 48×30 px, but the first mask of dog is 48×32",
        ),
        (put("JPEGImages/480p/dog/00001.jpg", np.zeros((32, 40, 3))), "dog/00001.jpg: 40×32 px, but"),
        (put("Annotations/480p/dog/00000.png", np.zeros(SIZE), "P"), "dog/00000.png: shows no object"),
        (put("Annotations/480p/dog/00002.png", np.zeros((*SIZE, 3))), "dog/00002.png: an RGB mask"),
    ],
)
def test_one_line_says_what_is_wrong(root, damage, message):
    damage(root)
    with pytest.raises(UserError, match=message) as raised:
        module(root).read(0)
    assert "\n" not in str(raised.value)


def test_short_sequences_and_settings(tmp_path):
    with pytest.raises(UserError, match="2 frames; the first and the last do not count"):
        module(davis(tmp_path / "short", [("dog", 2, 1)])).setup()
    with pytest.raises(UserError, match="give --data"):
        DavisDataModule()
    with pytest.raises(UserError, match="num_workers"):
        DavisDataModule(str(tmp_path / "short"), num_workers=-1)
    with pytest.raises(UserError, match="short_side 8 must be at least multiple"):
        FrameView(8, 16)

"""What the data module accepts, what it refuses, and what comes out of it without a trainer."""

from __future__ import annotations

import os
import signal
import warnings

import cv2
import numpy as np
import pytest
from films import film
from PIL import Image

from poodle_lightning.data.cached_flow import CachedFlow
from poodle_lightning.data.encode import write_video
from poodle_lightning.data.order import single_thread
from poodle_lightning.data.sampling import ClipSampler
from poodle_lightning.data.streets import StreetSet
from poodle_lightning.data.video import VideoDataModule
from poodle_lightning.flow.dis import DIS
from poodle_lightning.types import UserError


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Seven videos of 12 smooth images at 10 per second."""
    root = tmp_path_factory.mktemp("frames")
    for video in range(7):
        (root / f"video{video}").mkdir()
        coarse = np.random.default_rng(video).integers(0, 256, (5, 8, 3), dtype=np.uint8)
        for number in range(12):
            picture = Image.fromarray(np.roll(coarse, number, axis=1)).resize(
                (80, 50), Image.Resampling.BICUBIC
            )
            picture.save(root / f"video{video}" / f"{number}.png")
    return root


def module(folder, **changes):
    settings = {"source": "frames", "root": str(folder), "size": (8, 16), "gap": (0.2, 0.4)}
    return VideoDataModule(**(settings | {"num_workers": 0, "batch_size": 2, "val_fraction": 0.0} | changes))


def test_synthetic_streets_bring_flow_and_labels(tmp_path):
    streets = StreetSet(videos=3, seconds=2.0, size=(48, 96), supersample=1)
    data = VideoDataModule(
        "synthetic", synthetic=streets, size=(24, 48), area=(0.3, 0.6), batch_size=2, num_workers=0
    )
    data.setup("fit")
    clip = next(iter(data.train_dataloader()))
    flow, present = clip.given_flow()
    assert present.all()
    assert flow.size == (24, 48)
    assert clip.unit_labels().shape == (2, 2, 24, 48)
    assert int(clip.unit_labels().max()) < 19


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"flow": DIS()}, "flow DIS has to see RGB"),
        ({"antialias": True, "size": (8, 16)}, "antialias averages"),
        ({"gap": (0, 0)}, "two windows"),
        ({"antialias": True, "size": (32, 48)}, None),  # windows are enlarged
        ({"flow": "cached"}, None),
        ({}, None),
    ],
)
def test_planes_that_never_come_are_said_once(tmp_path, monkeypatch, settings, words):
    monkeypatch.setenv("POODLE_CACHE", str(tmp_path / "cache"))
    (tmp_path / "films").mkdir()
    for name in "ab":
        write_video(tmp_path / "films" / f"{name}.mp4", film(12), 10)
    given = {"source": "folder", "root": str(tmp_path / "films"), "area": (0.5, 0.6), "pixels": "yuv"}
    if settings.get("flow") == "cached":
        settings = {"flow": CachedFlow(str(tmp_path / "flow"), DIS())}
    data = module(tmp_path, **(given | settings))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        data.setup("fit")
        data.setup("validate")
    said = [str(one.message) for one in caught if "yuv has no effect" in str(one.message)]
    assert len(said) == (words is not None)
    assert words is None or words in said[0]
    # the warning tells the truth
    assert (next(iter(data.train_dataloader())).yuv is None) == (words is not None)


@pytest.mark.filterwarnings("error:pixels yuv")
def test_sources_without_planes_are_said(folder):
    for source, root in (("frames", str(folder)), ("synthetic", None)):
        with pytest.raises(Warning, match=f"source {source} has no planes"):
            module(root, source=source, root=root, pixels="yuv").setup("fit")
        module(root, source=source, root=root).setup("fit")


def test_many_frames_need_no_pair(folder):
    data = module(folder, sampler=ClipSampler(3, 0.2), size=(8, 8))
    data.setup("fit")
    assert next(iter(data.train_dataloader())).frames.shape[:3] == (2, 3, 3)


def test_an_estimator_runs_in_the_worker_on_stored_pixels(folder):
    data = module(folder, size=(24, 48), area=(0.4, 0.9), flow=DIS("ultrafast"), num_workers=1)
    data.setup("fit")
    clip = next(iter(data.train_dataloader()))
    assert clip.flow.shape == (2, 2, 2, *clip.frames.shape[-2:])
    for row in range(2):
        # where nothing was padded, it is the estimate of the stored pixels themselves
        first, second = clip.frames[row].permute(0, 2, 3, 1).numpy()
        alone = data.train_dataloader().dataset[(0, row)].items
        height, width = alone[0].frames.shape[-2:]
        expected = DIS("ultrafast").pixels(first[:height, :width].copy(), second[:height, :width].copy())
        np.testing.assert_allclose(clip.flow[row, ..., :height, :width].numpy(), expected, atol=1e-5)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="workers are not forked here")
def test_a_forked_worker_does_not_wait_for_opencvs_threads():
    picture = np.random.default_rng(0).integers(0, 256, (300, 400), dtype=np.uint8)
    moved = np.roll(picture, 2, axis=1)
    before = cv2.getNumThreads()
    cv2.setNumThreads(4)
    cv2.DISOpticalFlow.create(1).calc(picture, moved, None)  # the threads exist now, but not in a fork
    ends = []
    for _ in range(8):
        child = os.fork()
        if child == 0:
            signal.alarm(60)  # ends a child that hangs
            single_thread(0)
            cv2.DISOpticalFlow.create(1).calc(picture, moved, None)
            os._exit(0)
        ends.append(os.waitpid(child, 0)[1])
    cv2.setNumThreads(before)
    assert ends == [0] * 8


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"root": None}, "needs a folder: give --data.root"),
        ({"batch_size": 3, "pairs_per_video": 2}, "multiple of pairs_per_video"),
        ({"val_fraction": 1.0}, "val_fraction"),
        ({"repeats": 0}, "repeats"),
        ({"gap": (1.0, 0.5)}, "gap"),
        ({"clip_seconds": 0.1}, "clip_seconds"),
        ({"max_skip_fraction": 2.0}, "max_skip_fraction"),
        ({"flow": object(), "sampler": ClipSampler(3, 0.2)}, "draws no pairs"),
        ({"sampler": ClipSampler(0, 0.2)}, "a clip needs frames >= 1"),
        ({"cuts": "avoid"}, "set --data.cuts keep for source frames"),
        ({"source": "images", "gap": (0, 0), "clip_seconds": 1.0}, "no hours, clip_seconds or start_every"),
        ({"source": "images", "gap": (0, 0), "start_every": 1.0}, "no hours, clip_seconds or start_every"),
        ({"source": "images", "gap": (0, 0), "hours": 1.0}, "no hours, clip_seconds or start_every"),
    ],
)
def test_wrong_settings_are_refused_in_one_line(folder, changes, message):
    with pytest.raises(UserError, match=message) as caught:
        module(folder, **changes)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"root": "/nowhere"}, "no such folder"),
        ({"source": "folder", "root": "/nowhere"}, "/nowhere"),
        ({"source": "film", "root": "/nowhere.mp4"}, "'/nowhere.mp4': no such film; set --data.root"),
        ({"source": "bdd100k"}, "not laid out as BDD100K"),
        ({"source": "walking_tours", "city": "paris"}, "city 'paris'"),
        ({"gap": (5.0, 6.0)}, "none of 7 videos lasts the 6 s"),
    ],
)
def test_missing_data_are_named_in_one_line(folder, changes, message):
    with pytest.raises(UserError, match=message) as caught:
        module(folder, **changes).setup("fit")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("workers", [0, 1])
def test_planes_of_video_files_reach_the_batch(tmp_path, monkeypatch, workers):
    monkeypatch.setenv("POODLE_CACHE", str(tmp_path / "cache"))
    (tmp_path / "films").mkdir()
    for number in range(2):
        write_video(tmp_path / "films" / f"{number}.mp4", film(30, seed=number), 30, gop=5)
    units = []
    for pixels in ("yuv", "rgb"):
        settings = {"source": "folder", "pixels": pixels, "num_workers": workers}
        data = module(tmp_path / "films", **settings)
        data.setup("fit")
        clip = next(iter(data.train_dataloader()))
        assert (clip.yuv is not None) == (pixels == "yuv")
        units.append(clip.unit())
    assert (units[0] - units[1]).abs().max() * 255 <= 1 + 1e-3


@pytest.mark.filterwarnings("ignore:pixels yuv")
def test_image_folders_have_no_planes(folder):
    data = module(folder, pixels="yuv")
    data.setup("fit")
    assert next(iter(data.train_dataloader())).yuv is None


def test_pixels_are_rgb_or_yuv(folder):
    with pytest.raises(UserError, match="pixels 'jpeg': choose rgb or yuv"):
        module(folder, pixels="jpeg")

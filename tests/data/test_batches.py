"""Batches of RGB and of planes: what is equal in both, how they mix, and how many bytes they hold."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from films import FPS, film

from poodle_lightning.data.batches import collate
from poodle_lightning.data.cached_flow import CachedFlow
from poodle_lightning.data.clips import ClipDataset
from poodle_lightning.data.encode import write_video
from poodle_lightning.data.order import Order
from poodle_lightning.data.sampling import PairSampler
from poodle_lightning.data.sources import FolderSource
from poodle_lightning.data.streets import StreetSet, SyntheticSource
from poodle_lightning.data.windows import WindowRule
from poodle_lightning.ops.planes import split_planes

RULE = WindowRule((24, 36), area=(0.1, 1.0))


class Constant:
    """An estimator that needs to see the frames."""

    def __init__(self, value=1.5):
        self.value, self.seen = value, []
        self.fingerprint = "constant"

    def pixels(self, first, second):
        self.seen.append(first.shape)
        return np.full((2, 2, *first.shape[:2]), self.value, np.float32)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """One film that is stored as planes."""
    root = tmp_path_factory.mktemp("planar")
    write_video(root / "a.mp4", film(), FPS, gop=10)
    return root


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("POODLE_CACHE", str(tmp_path / "cache"))


def dataset(root, pixels, rule=RULE, gap=(0.1, 0.3), length=30, source=None, **settings):
    source = source or FolderSource(root)
    entries = list(source.entries) * length
    order = Order(len(entries), 1, len(entries), 1, seed=1)
    sampler = PairSampler(gap, pairs_per_video=settings.pop("pairs", 1), spread=settings.pop("spread", None))
    repeats = sampler.pairs_per_video
    return ClipDataset(
        source, entries, order, sampler, rule, seed=1, pixels=pixels, repeats=repeats, **settings
    )


def batch(data, count=12):
    return collate([data[(0, position)] for position in range(count)], data.rule.size)


@pytest.mark.parametrize("settings", [{}, {"pairs": 3}, {"pairs": 3, "spread": 0.3}])
def test_planes_give_the_training_crops_of_rgb(folder, settings):
    """At all borders of the frame too: within a level before, so within a level after sampling."""
    planes, rgb = (batch(dataset(folder, kind, **settings)) for kind in ("yuv", "rgb"))
    assert planes.yuv is not None
    assert rgb.yuv is None
    difference = (planes.unit() - rgb.unit()).abs() * 255
    assert difference.max() <= 1 + 1e-3
    assert difference.mean() < 0.35
    assert torch.equal(planes.times, rgb.times)
    assert torch.equal(planes.key, rgb.key)
    assert 1.9 < rgb.frames.numel() / planes.frames.numel() < 2.1


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("a.mp4", {"rotation": 90}),
        ("a.mp4", {"pix_fmt": "yuv420p10le"}),
        ("a.mp4", {"pix_fmt": "yuv444p"}),
    ],
)
def test_what_has_no_planes_is_rgb(tmp_path, name, options):
    (tmp_path / "films").mkdir()
    write_video(tmp_path / "films" / name, film(20), FPS, **options)
    asked, rgb = (batch(dataset(tmp_path / "films", kind), 4) for kind in ("yuv", "rgb"))
    assert asked.yuv is None
    assert torch.equal(asked.frames, rgb.frames)
    assert torch.equal(asked.window.matrix, rgb.window.matrix)


def test_odd_frames_have_planes(tmp_path):
    (tmp_path / "films").mkdir()
    write_video(tmp_path / "films" / "a.webm", film(20, 47, 63), FPS, codec="libvpx-vp9")
    planes, rgb = (batch(dataset(tmp_path / "films", kind)) for kind in ("yuv", "rgb"))
    assert planes.yuv is not None
    assert (planes.unit() - rgb.unit()).abs().max() * 255 <= 1 + 1e-3


def test_what_needs_rgb_in_the_worker_gets_it(folder):
    seen = Constant()
    for settings in (
        {"flow": seen},
        {"rule": WindowRule((6, 9), area=(0.5, 1.0), antialias=True)},
        {"rule": WindowRule((24, 36), area=(0.1, 0.4)), "gap": (0.0, 0.0), "jitter": 0.3},
    ):
        asked, rgb = (batch(dataset(folder, kind, **settings), 8) for kind in ("yuv", "rgb"))
        assert asked.yuv is None
        assert torch.equal(asked.frames, rgb.frames)
    assert len(seen.seen) == 16
    still = batch(dataset(folder, "yuv", gap=(0.0, 0.0), jitter=0.0), 4)  # one window: one frame twice
    assert still.yuv is not None
    assert not still.flow.any()


def test_whole_frames_tell_their_shape(folder):
    for kind in ("yuv", "rgb"):
        for antialias in (False, True):
            data = dataset(folder, kind, rule=WindowRule((12, 12), whole=True, antialias=antialias))
            clip = batch(data, 3)
            assert clip.aspect.dtype == torch.float32
            np.testing.assert_allclose(clip.aspect, [64 / 48] * 3, rtol=1e-6)
            assert clip[1:].aspect.shape == (2,)
    planes, rgb = (
        batch(dataset(folder, kind, rule=WindowRule((12, 12), whole=True)), 3) for kind in ("yuv", "rgb")
    )
    assert planes.yuv is not None
    assert (planes.unit() - rgb.unit()).abs().max() * 255 <= 1 + 1e-3
    assert batch(dataset(folder, "rgb"), 3).aspect is None


def test_generated_streets_are_rgb(folder):
    streets = SyntheticSource(StreetSet(videos=2, seconds=1.0, size=(48, 64), supersample=1))
    assert batch(dataset(folder, "yuv", source=streets), 2).yuv is None


def test_cached_flow_lies_on_the_planes(folder, tmp_path):
    """A flow that grows across the frame, in raw pixels: each stored pixel has that of its place."""

    class Ramp(Constant):
        def pixels(self, first, second):
            y, x = np.mgrid[: first.shape[0], : first.shape[1]].astype(np.float32)
            return np.stack([np.stack([x / 8, y / 8])] * 2)

    flow = CachedFlow(str(tmp_path / "flow"), Ramp(), full_resolution=True)
    planes, rgb = (batch(dataset(folder, kind, flow=flow)) for kind in ("yuv", "rgb"))
    assert planes.yuv is not None
    assert planes.flow.shape[-2:] == planes.pixels
    a, b = planes.given_flow()[0].to_pixels(), rgb.given_flow()[0].to_pixels()
    torch.testing.assert_close(a[..., 2:-2, 2:-2], b[..., 2:-2, 2:-2], atol=0.02, rtol=0)


def test_padding_repeats_the_border_of_every_plane(folder):
    data = dataset(folder, "yuv")
    items = [data[(0, position)].items[0] for position in range(12)]
    clip = batch(data)
    height, width = clip.pixels
    for row, item in enumerate(items):
        for plane, whole, half in zip(
            split_planes(item.frames), split_planes(clip.frames[row]), (1, 2, 2), strict=True
        ):
            expected = np.pad(
                plane.numpy(),
                [(0, 0), (0, height // half - plane.shape[1]), (0, width // half - plane.shape[2])],
                mode="edge",
            )
            np.testing.assert_array_equal(whole.numpy(), expected)


def test_a_mixed_batch_is_rgb(folder):
    planes, rgb = dataset(folder, "yuv"), dataset(folder, "rgb")
    mixed = collate([planes[(0, 0)], rgb[(0, 1)], planes[(0, 2)]], RULE.size)
    alone = collate([rgb[(0, position)] for position in range(3)], RULE.size)
    assert mixed.yuv is None
    assert mixed.frames.dtype == torch.uint8
    assert (mixed.unit() - alone.unit()).abs().max() * 255 <= 1 + 1e-3
    torch.testing.assert_close(mixed.unit()[1], alone.unit()[1], atol=1e-4, rtol=0)  # other padding


def test_a_stream_whose_colours_change_is_rgb(folder, monkeypatch):
    from poodle_lightning.data.decode import VideoReader

    pieces = VideoReader.pieces

    def changing(self, times, boxes, planes=False):
        found = pieces(self, times, boxes, planes)
        return [replace(found[0], matrix=found[0].matrix * 0.9), *found[1:]] if planes else found

    rgb = batch(dataset(folder, "rgb"), 4)
    monkeypatch.setattr(VideoReader, "pieces", changing)
    asked = batch(dataset(folder, "yuv"), 4)
    assert asked.yuv is None
    assert torch.equal(asked.frames, rgb.frames)


def test_bytes_per_pair_of_the_papers_crops(tmp_path):
    """512 × 1024 of 720p at 0.75 to 1.25 of 1080 × 1920, batches of 4 with their padding.

    The goal is 1.6 MB. The published loader hands over two coloured and two clean crops in float32.
    """
    (tmp_path / "films").mkdir()
    still = [np.zeros((720, 1280, 3), np.uint8)] * 40
    write_video(tmp_path / "films" / "a.mp4", still, FPS, gop=10, preset="ultrafast")
    rule = WindowRule((512, 1024), scale=(0.75, 1.25))
    data = dataset(tmp_path / "films", "yuv", rule, gap=(0.5, 1.0))
    sizes = []
    for start in range(0, 24, 4):
        clip = collate([data[(0, start + k)] for k in range(4)], rule.size)
        assert clip.yuv is not None
        sizes.append((clip.frames.numel() + clip.yuv.numel() * 4 + clip.window.matrix.numel() * 4) / 4)
    assert max(sizes) <= 1.6e6
    assert np.mean(sizes) <= 4 * 3 * 512 * 1024 * 4 / 20


def test_points_of_all_clips_are_stacked(folder):
    """As they are, NaN too; of clips that bring none there are none."""
    data = dataset(folder, "rgb")
    groups = [data[(0, position)] for position in range(3)]
    assert collate(groups, RULE.size).points is None
    places = torch.arange(3 * 5 * 2 * 2, dtype=torch.float32).reshape(3, 5, 2, 2)
    places[1, 2] = torch.nan
    groups = [
        replace(group, items=(replace(group.items[0], points=rows),))
        for group, rows in zip(groups, places, strict=True)
    ]
    clip = collate(groups, RULE.size)
    torch.testing.assert_close(clip.points, places, equal_nan=True, rtol=0, atol=0)
    torch.testing.assert_close(clip[1:].points, places[1:], equal_nan=True, rtol=0, atol=0)

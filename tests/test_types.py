import pickle
from dataclasses import replace

import pytest
import torch
from tiny_models import make_clip

from poodle_lightning.ops.geometry import Affine, Flow
from poodle_lightning.types import ClassSet, Clip, Features, LabelledBatch


def plain(**changes):
    fields = {
        "frames": torch.zeros(2, 2, 3, 6, 8, dtype=torch.uint8),
        "window": Affine.identity(2),
        "size": (6, 8),
        "times": torch.zeros(2, 2, dtype=torch.float64),
        "index": torch.arange(2),
        "key": torch.arange(2),
    }
    return Clip(**{**fields, **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"frames": torch.zeros(2, 3, 6, 8, dtype=torch.uint8)}, "frames"),
        ({"times": torch.zeros(2, 3)}, "times"),
        ({"window": Affine.identity(3)}, "window"),
        ({"index": torch.arange(1)}, "index"),
        ({"flow": torch.zeros(2, 2, 2, 5, 8)}, "flow"),
        ({"labels": torch.zeros(2, 2, 5, 8, dtype=torch.uint8)}, "labels"),
    ],
)
def test_shapes_are_checked_by_name(changes, message):
    with pytest.raises(ValueError, match=f"Clip.{message}"):
        plain(**changes)


def planar(height=6, width=8, **changes):
    """A clip of planes whose matrix takes Y for all three channels, and U and V for nothing."""
    frames = torch.randint(0, 256, (2, 2, height * 3 // 2, width), dtype=torch.uint8)
    grey = torch.tensor([[1.0, 0.0, 0.0, 0.0]] * 3).expand(2, 3, 4)
    return plain(**({"frames": frames, "yuv": grey, "size": (height, width)} | changes))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (
            {"frames": torch.zeros(2, 2, 3, 6, 8, dtype=torch.uint8)},
            ValueError,
            r"Clip\.frames with Clip\.yuv",
        ),
        ({"frames": torch.zeros(2, 2, 8, 8, dtype=torch.uint8)}, ValueError, r"Clip\.frames with Clip\.yuv"),
        ({"frames": torch.zeros(2, 2, 9, 7, dtype=torch.uint8)}, ValueError, r"Clip\.frames with Clip\.yuv"),
        ({"frames": torch.zeros(2, 2, 9, 8)}, TypeError, "uint8"),
        ({"yuv": torch.zeros(3, 3, 4)}, ValueError, r"Clip\.yuv"),
        ({"yuv": torch.zeros(2, 3, 3)}, ValueError, r"Clip\.yuv"),
        ({"yuv": torch.zeros(2, 3, 4, dtype=torch.float64)}, TypeError, r"Clip\.yuv"),
        ({"flow": torch.zeros(2, 2, 2, 9, 8)}, ValueError, r"Clip\.flow"),
        ({"labels": torch.zeros(2, 2, 9, 8, dtype=torch.uint8)}, ValueError, r"Clip\.labels"),
    ],
)
def test_shapes_of_planes_are_checked_by_name(changes, error, message):
    with pytest.raises(error, match=message):
        planar(**changes)


def test_planes_and_rgb_of_the_same_pixels_are_one_clip():
    clip = planar(flow=torch.zeros(2, 2, 2, 6, 8), labels=torch.zeros(2, 2, 6, 8, dtype=torch.uint8))
    grey = clip.frames[:, :, None, :6].expand(2, 2, 3, 6, 8).contiguous()
    same = replace(clip, frames=grey, yuv=None)
    assert clip.pixels == same.pixels == (6, 8)
    half = {"size": (5, 3), "window": Affine.box(torch.tensor([[-0.9, -0.5, 0.3, 1.0]] * 2))}
    for changes in ({}, half):
        assert torch.equal(replace(clip, **changes).unit(), replace(same, **changes).unit())
    assert torch.equal(clip.given_flow()[0].displacement, same.given_flow()[0].displacement)
    assert torch.equal(clip.unit_labels(), same.unit_labels())


def test_planes_travel_with_their_matrix():
    clip = planar()
    moved = clip.to("meta")
    assert moved.yuv.device.type == moved.frames.device.type == "meta"
    assert torch.equal(clip[1:].yuv, clip.yuv[1:])
    assert torch.equal(pickle.loads(pickle.dumps(clip)).unit(), clip.unit())


def test_frames_must_be_bytes():
    with pytest.raises(TypeError, match="uint8"):
        plain(frames=torch.zeros(2, 2, 3, 6, 8))


def test_unit_is_the_window_of_the_stored_pixels():
    """A window on whole pixels reads them exactly; 1 px margin on each side."""
    clip = make_clip()
    inner = clip.frames[:, :, :, 1:-1, 1:-1].float() / 255
    assert (clip.unit() - inner).abs().max() < 1e-4


def test_labels_are_taken_by_nearest_neighbour():
    labels = torch.randint(0, 19, (2, 2, 6, 8), dtype=torch.uint8)
    assert torch.equal(plain(labels=labels).unit_labels(), labels)
    half = plain(labels=labels, size=(3, 4), window=Affine.box(torch.tensor([[-1.0, -1, 0, 0]] * 2)))
    assert torch.equal(half.unit_labels()[:, :, :, :], labels[:, :, :3, :4])
    assert plain().unit_labels() is None


def test_given_flow_is_in_the_crops_units_and_marks_what_is_missing():
    clip = make_clip(shift=(3.0, 1.0))
    clip.flow[1, 0] = float("nan")
    flow, present = clip.given_flow()
    assert present.tolist() == [True, False, True, True]
    assert (flow.to_pixels()[0, 0] - 3.0).abs().max() < 1e-4
    assert (flow.to_pixels()[2, 1] + 1.0).abs().max() < 1e-4
    assert plain().given_flow() is None


def test_what_the_host_knows_of_the_flow_is_not_looked_up():
    """Rows said to be missing are missing, whatever the flow holds: it is never read to find out."""
    clip = make_clip(shift=(3.0, 1.0))
    told = replace(clip, present=torch.tensor([[True, False], [False, True]]))
    assert told.given_flow()[1].tolist() == [True, False, False, True]
    with pytest.raises(ValueError, match=r"Clip\.present"):
        replace(clip, present=torch.zeros(2, dtype=torch.bool))


def test_host_fields_stay_on_the_host():
    moved = replace(make_clip(), present=torch.ones(2, 2, dtype=torch.bool)).to("meta")
    assert moved.frames.device.type == "meta"
    assert moved.window.matrix.device.type == "meta"
    assert moved.flow.device.type == "meta"
    for kept in (moved.key, moved.index, moved.times, moved.present):
        assert kept.device.type == "cpu"


def test_rows_and_pickle():
    clip = make_clip(batch=3)
    part = clip[1:]
    assert len(part) == 2
    assert torch.equal(part.key, clip.key[1:])
    again = pickle.loads(pickle.dumps(clip))
    assert torch.equal(again.frames, clip.frames)


def test_last_map_is_the_deepest():
    maps = {"layer1": torch.zeros(1), "layer4": torch.ones(1)}
    assert Features(maps, {"layer1": 4, "layer4": 32}).last == 1


def test_flow_rows():
    assert len(Flow(torch.zeros(4, 2, 3, 3))[1:3]) == 2


def labelled(**changes):
    fields = {
        "images": torch.arange(2 * 3 * 4 * 6, dtype=torch.uint8).reshape(2, 3, 4, 6),
        "labels": torch.zeros(2, 8, 12, dtype=torch.uint8),
        "index": torch.arange(2),
        "key": torch.arange(2),
        "names": ("a.png", "b.png"),
    }
    return LabelledBatch(**{**fields, **changes})


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"images": torch.zeros(2, 4, 6, dtype=torch.uint8)}, ValueError, "images"),
        ({"labels": torch.zeros(2, 1, 4, 6, dtype=torch.uint8)}, ValueError, "labels"),
        ({"labels": torch.zeros(2, 4, 6, dtype=torch.int64)}, TypeError, "uint8"),
        ({"names": ("a.png",)}, ValueError, "lengths"),
    ],
)
def test_labelled_batches_check_themselves(changes, error, message):
    with pytest.raises(error, match=message):
        labelled(**changes)


def test_labelled_batches_move_as_a_whole_and_images_are_in_the_unit_interval():
    batch = labelled()
    assert len(batch) == 2
    moved = batch.to("meta")
    assert moved.images.device.type == moved.labels.device.type == "meta"
    assert moved.index.device.type == moved.key.device.type == "cpu"
    assert moved.names == batch.names
    assert torch.equal(batch.unit() * 255, batch.images.float())
    assert pickle.loads(pickle.dumps(batch)).names == batch.names


def test_groups_of_classes_are_by_name_and_must_exist():
    classes = ClassSet(("road", "sky", "pole"), {"small": ("pole",), "large": ("sky", "road")})
    assert len(classes) == 3
    assert classes.numbered() == {"small": [2], "large": [1, 0]}
    with pytest.raises(ValueError, match="group 'small' names classes that do not exist: tram"):
        ClassSet(("road",), {"small": ("tram",)})

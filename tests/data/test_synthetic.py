"""Streets: what the data, its motion and its classes promise."""

from __future__ import annotations

import pickle

import cv2
import numpy as np
import pytest
import torch

from poodle_lightning.data.synthetic import (
    CLASSES,
    LARGE,
    PALETTE,
    SMALL,
    Street,
    flow_between,
    labelled_frames,
    render,
    write_videos,
)
from poodle_lightning.types import UserError

SIZE = (48, 96)


@pytest.fixture(scope="module")
def scenes():
    return [
        render(seed, SIZE, (1.0, 1.4), difficulty) for seed in range(4) for difficulty in ("easy", "hard")
    ]


def targets(flow):
    height, width = flow.shape[1:]
    x, y = np.meshgrid(np.arange(width, dtype=np.float32), np.arange(height, dtype=np.float32))
    return x + flow[0], y + flow[1]


def looked_up(values, flow):
    x, y = targets(flow)
    height, width = values.shape
    return values[np.rint(y).astype(int).clip(0, height - 1), np.rint(x).astype(int).clip(0, width - 1)]


def uniform_around(values):
    """Pixels whose 3×3 neighbourhood has one value: one pixel away from any border between values."""
    wide = np.pad(values, 1, mode="edge")
    height, width = values.shape
    shifted = [wide[i : i + height, j : j + width] for i in range(3) for j in range(3)]
    return np.all([s == values for s in shifted], axis=0)


def test_classes_are_those_of_bdd100k():
    assert len(CLASSES) == len(PALETTE) == 19
    assert sorted(SMALL + LARGE) == list(range(19))
    assert [CLASSES[i] for i in (0, 10, 13, 18)] == ["road", "sky", "car", "bicycle"]
    assert {CLASSES[i] for i in SMALL} == {
        "pole", "bicycle", "person", "motorcycle", "traffic sign", "rider", "traffic light",
    }  # fmt: skip


def test_shapes_and_types():
    scene = render(0, SIZE, (0.0, 0.5, 1.0))
    assert scene.frames.shape == (3, *SIZE, 3)
    assert scene.flow_forward.shape == scene.flow_backward.shape == (2, 2, *SIZE)
    assert scene.visible_forward.shape == scene.visible_backward.shape == (2, *SIZE)
    assert scene.labels.shape == scene.instances.shape == scene.depth.shape == (3, *SIZE)
    kinds = (
        scene.frames,
        scene.flow_forward,
        scene.visible_forward,
        scene.labels,
        scene.instances,
        scene.times,
    )
    assert [str(x.dtype) for x in kinds] == ["uint8", "float32", "bool", "uint8", "int32", "float64"]
    assert np.isfinite(scene.flow_forward).all()
    assert np.isfinite(scene.flow_backward).all()
    assert len(scene.boxes) == 3
    assert (scene.depth > 0).all()
    alone = render(0, SIZE, (0.5,))
    assert alone.flow_forward.shape == (0, 2, *SIZE)


def test_labels_pulled_through_the_flow_agree(scenes):
    for scene in scenes:
        for flow, visible, there, here in (
            (scene.flow_forward[0], scene.visible_forward[0], scene.labels[1], scene.labels[0]),
            (scene.flow_backward[0], scene.visible_backward[0], scene.labels[0], scene.labels[1]),
        ):
            inner = visible & looked_up(uniform_around(there), flow)
            assert inner.mean() > 0.2
            assert (looked_up(there, flow) == here)[inner].mean() > 0.98


def test_objects_keep_their_number(scenes):
    for scene in scenes:
        there, flow = scene.instances[1], scene.flow_forward[0]
        inner = scene.visible_forward[0] & looked_up(uniform_around(there), flow)
        assert (looked_up(there, flow) == scene.instances[0])[inner].mean() > 0.98


def test_colours_pulled_through_the_flow_agree_better_than_unmoved_ones(scenes):
    for scene in scenes:
        x, y = targets(scene.flow_forward[0])
        visible = scene.visible_forward[0]
        pulled = cv2.remap(scene.frames[1], x, y, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
        first, second = scene.frames[0].astype(float), scene.frames[1].astype(float)
        assert np.abs(pulled - first)[visible].mean() < 0.5 * np.abs(second - first)[visible].mean()


def test_depth_of_what_stands_still_agrees_with_the_cameras_motion():
    street = Street(5, SIZE)
    pair = street.pair(0.5, 1.2)
    a, b = (street.layout.plan.pose(t, SIZE) for t in (0.5, 1.2))
    still = np.isin(
        pair.first.labels, [CLASSES.index(n) for n in ("road", "sidewalk", "building", "vegetation")]
    )
    still &= np.isfinite(pair.first.depth) & pair.visible_forward
    rows, columns = np.nonzero(still)
    rays = np.stack([columns, rows, np.ones(len(rows))]) * pair.first.depth[rows, columns]
    points = a.rotation.T @ np.linalg.inv(a.intrinsics) @ rays + a.centre[:, None]
    seen = b.intrinsics @ b.rotation @ (points - b.centre[:, None])
    x, y = (t[rows, columns] for t in targets(pair.flow_forward))
    np.testing.assert_allclose(x, seen[0] / seen[2], atol=2e-2)
    np.testing.assert_allclose(y, seen[1] / seen[2], atol=2e-2)
    inner = looked_up(uniform_around(pair.second.labels), pair.flow_forward)[rows, columns]
    there = looked_up(pair.second.depth, pair.flow_forward)[rows, columns]
    # half a pixel of rounding on a slanted plane changes its depth by several per cent
    assert np.median(np.abs(there - seen[2])[inner] / seen[2][inner]) < 0.02
    assert (np.abs(there - seen[2]) < 0.15 * seen[2])[inner].mean() > 0.98


def test_forward_and_backward_lead_home(scenes):
    for scene in scenes:
        flow, back = scene.flow_forward[0], scene.flow_backward[0]
        x, y = targets(flow)
        home = [cv2.remap(back[k], x, y, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE) for k in (0, 1)]
        error = np.hypot(flow[0] + home[0], flow[1] + home[1])
        inner = scene.visible_forward[0] & looked_up(uniform_around(scene.instances[1]), flow)
        inner &= looked_up(uniform_around(scene.labels[1]), flow) & looked_up(scene.visible_backward[0], flow)
        assert np.median(error[inner]) < 0.02
        assert (error[inner] < 0.5).mean() > 0.97  # the rest: two surfaces of one class meet


def test_a_frame_depends_on_seed_and_time_only():
    many, few = render(7, SIZE, (0.0, 0.25, 3.0)), render(7, SIZE, (3.0,))
    np.testing.assert_array_equal(many.frames[2], few.frames[0])
    np.testing.assert_array_equal(many.labels[2], few.labels[0])
    np.testing.assert_array_equal(many.instances[2], few.instances[0])
    flow, visible = flow_between(7, 0.25, 3.0, SIZE)
    np.testing.assert_array_equal(many.flow_forward[1], flow)
    np.testing.assert_array_equal(many.visible_forward[1], visible)
    assert (many.frames[0] != many.frames[1]).mean() > 0.2
    assert (many.frames[0] != render(8, SIZE, (0.0,)).frames[0]).mean() > 0.5
    street = pickle.loads(pickle.dumps(Street(7, SIZE)))
    np.testing.assert_array_equal(street.read([3.0])[0][0], few.frames[0])


def test_long_after_its_start_a_street_is_the_same_in_any_order():
    street = Street(2, SIZE, "hard", 1)
    late = street.frame(40.0)
    street.frame(0.0)
    again = Street(2, SIZE, "hard", 1).frame(40.0)
    np.testing.assert_array_equal(late.image, again.image)
    assert len(np.unique(late.labels)) >= 5


def test_a_box_is_a_piece_of_the_frame():
    street, box = Street(4, SIZE), (20, 7, 61, 40)
    view = (slice(7, 40), slice(20, 61))
    whole, part = street.frame(0.8), street.frame(0.8, box)
    np.testing.assert_array_equal(part.labels, whole.labels[view])
    np.testing.assert_array_equal(part.instances, whole.instances[view])
    np.testing.assert_allclose(part.depth, whole.depth[view], rtol=1e-5)
    # vector and scalar arithmetic may round differently
    assert np.abs(part.image.astype(int) - whole.image[view]).max() <= 1
    frames, times = street.read([0.8, 1.0], [box, (0, 0, 41, 33)])
    np.testing.assert_array_equal(frames[0], part.image)
    np.testing.assert_array_equal(times, [0.8, 1.0])
    flow, visible = street.flow(0.8, 1.0, box)
    np.testing.assert_array_equal(flow, street.flow(0.8, 1.0)[0][:, view[0], view[1]])
    x, y = targets(flow)
    outside = (x < -0.5) | (x >= 40.5) | (y < -0.5) | (y >= 32.5)
    assert outside.any()
    assert not visible[outside].any()


def test_patch_numbers_are_unique():
    for seed in range(6):
        patches = Street(seed, SIZE).layout.patches(2.0)
        assert len(np.unique(patches["uid"])) == len(patches)


def test_boxes_enclose_their_objects(scenes):
    things = {"person", "rider", "car", "truck", "bus", "bicycle", "traffic light", "traffic sign"}
    for scene in scenes:
        for instances, labels, boxes in zip(scene.instances, scene.labels, scene.boxes, strict=True):
            assert {box[5] for box in boxes} == set(np.unique(instances)) - {0}
            for name, x0, y0, x1, y1, number in boxes:
                mask = instances == number
                assert name in things
                assert set(labels[mask]) == {CLASSES.index(name)}
                rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
                assert (x0, y0, x1, y1) == (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1)


@pytest.fixture(scope="module", params=["easy", "hard"])
def labelled(request):
    return labelled_frames(60, SIZE, seed=100, difficulty=request.param, supersample=1)


def test_classes_are_as_unbalanced_as_in_driving(labelled):
    share = np.bincount(labelled[1].numpy().reshape(-1), minlength=19) / labelled[1].numel()
    assert len(share) == 19  # nothing but the 19 classes
    assert sum(share[i] for i in LARGE) > 0.8
    assert all(share[i] < 0.03 for i in SMALL)
    assert sum(share[i] for i in SMALL) > 0.005
    drawn = {name for name, part in zip(CLASSES, share, strict=True) if part > 0}
    assert drawn >= set(CLASSES) - {"train", "motorcycle", "truck", "bus", "wall"}
    for name, low, high in (
        ("road", 0.15, 0.35),
        ("sky", 0.1, 0.3),
        ("building", 0.07, 0.25),
        ("car", 0.03, 0.2),
    ):
        assert low < share[CLASSES.index(name)] < high, name


def test_colour_tells_less_of_the_class_than_the_place_does(labelled):
    images, labels = labelled
    colour = (images.permute(0, 2, 3, 1).long() // 32 * torch.tensor([64, 8, 1])).sum(-1)
    place = torch.arange(SIZE[0] * SIZE[1]).reshape(1, *SIZE).expand_as(colour)

    def accuracy(code):
        votes = torch.zeros(int(code.max()) + 1, 19)
        votes.index_put_(
            (code[:30].flatten(), labels[:30].flatten().long()), torch.tensor(1.0), accumulate=True
        )
        guess = votes.argmax(1)[code[30:]]
        return torch.stack([(guess == c)[labels[30:] == c].float().mean() for c in (0, 2, 8, 10, 13)]).mean()

    assert accuracy(colour) < accuracy(place)


def test_labelled_frames_show_one_street_each(labelled):
    images, labels = labelled
    assert images.dtype == labels.dtype == torch.uint8
    assert images.shape == (60, 3, *SIZE)
    assert len({bytes(image.numpy()) for image in images}) == 60


def test_processes_do_not_change_the_result():
    alone, shared = (labelled_frames(2, (16, 32), 3, supersample=1, workers=n) for n in (1, 2))
    assert torch.equal(alone[0], shared[0])
    assert torch.equal(alone[1], shared[1])


def test_videos_decode_back_to_the_frames(tmp_path):
    paths = write_videos(tmp_path / "new", 2, seconds=0.5, fps=10, seed=11)
    assert [p.name for p in paths] == ["street_0000.mp4", "street_0001.mp4"]
    for number, path in enumerate(paths):
        expected = render(11 + number, times=[k / 10 for k in range(5)]).frames
        video, shown = cv2.VideoCapture(str(path)), []
        assert video.get(cv2.CAP_PROP_FPS) == pytest.approx(10)
        while True:
            more, frame = video.read()
            if not more:
                break
            shown.append(frame[..., ::-1])
        assert len(shown) == 5
        error = np.mean((np.stack(shown).astype(float) - expected) ** 2)
        assert 10 * np.log10(255**2 / error) > 30


def test_wrong_arguments_are_refused_in_one_line(tmp_path):
    street = Street(0, SIZE)
    for act in (
        lambda: Street(0, (4, 4)),
        lambda: Street(0, SIZE, "medium"),
        lambda: Street(0, SIZE, supersample=0),
        lambda: render(0, SIZE, ()),
        lambda: street.read([-1.0]),
        lambda: street.read([0.0], (0, 0, 97, 10)),
        lambda: street.read([0.0, 1.0, 2.0], [(0, 0, 9, 9), (0, 0, 9, 9)]),
        lambda: labelled_frames(0),
        lambda: write_videos(tmp_path, 1, seconds=0.0),
        lambda: write_videos(tmp_path, 1, size=(47, 96)),
    ):
        with pytest.raises(UserError) as error:
            act()
        assert "\n" not in str(error.value)

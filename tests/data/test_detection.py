"""COCO's and LVIS's annotations in batches, and what is refused."""

import json

import pytest
import torch
from detection_trees import detection_tree

from poodle_lightning.data.detection import DetectionDataModule
from poodle_lightning.data.detection_views import DetectionTestView, DetectionTrainView
from poodle_lightning.types import UserError


def module(root, source="coco", **kwargs):
    view = DetectionTrainView(short_sides=(96,), flip=0.0)
    test = DetectionTestView(short_side=48)
    return DetectionDataModule(source, str(root), train=view, test=test, num_workers=0, **kwargs)


def test_boxes_enclose_masks_and_masks_are_bright(tmp_path):
    data = module(detection_tree(tmp_path / "coco"), batch_size=3)
    data.setup("fit")
    (batch,) = list(data.train_dataloader())
    assert data.classes.names == ("red", "green")
    assert len(batch) == 3
    for image, boxes, labels, masks in zip(batch.images, batch.boxes, batch.labels, batch.masks, strict=True):
        for box, label, mask in zip(boxes, labels, masks, strict=True):
            rows, columns = mask.nonzero().unbind(1)
            found = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
            assert torch.equal(box, torch.tensor(found, dtype=torch.float32))
            assert image[int(label)][mask.bool()].float().mean() > 230  # JPEG


def test_test_images_come_once_and_without_truth(tmp_path):
    data = module(detection_tree(tmp_path / "lvis", lvis=True), "lvis")
    data.setup("validate")
    batches = list(data.val_dataloader())
    assert [batch.ids for batch in batches] == [(1,), (2,), (3,)]
    assert all(batch.sizes == ((96, 128),) and batch.shown == ((48, 64),) for batch in batches)
    assert data.federated
    assert batches[0].images[0].shape == (3, 48, 64)
    assert not len(batches[0].boxes[0])


def change(root, act, file="instances_train2017.json"):
    path = root / "annotations" / file
    content = json.loads(path.read_text())
    act(content)
    path.write_text(json.dumps(content))


def test_crowds_and_empty_images_are_not_trained_on(tmp_path):
    root = detection_tree(tmp_path / "coco")

    def act(content):
        for one in content["annotations"]:
            one["iscrowd"] = int(one["image_id"] == 1)
        content["annotations"] = [one for one in content["annotations"] if one["image_id"] != 2]

    change(root, act)
    assert [one["id"] for one in module(root).objects("train").images] == [3]


def test_what_is_left_of_a_box_has_an_area_in_float32(tmp_path):
    """A detector refuses boxes without one."""
    root = detection_tree(tmp_path / "coco")

    def act(content):
        for k in range(40):  # wider than what is left out, but narrower than the step of float32 there
            box = [127.5 + k * 1e-6, 10, 1.01e-5, 20]
            content["annotations"].append({**content["annotations"][0], "id": 100 + k, "bbox": box})

    change(root, act)
    view = DetectionTrainView(short_sides=(97,), flip=0.0)
    data = DetectionDataModule("coco", str(root), train=view, batch_size=3, num_workers=0)
    (batch,) = list(data.train_dataloader())
    assert sum(len(boxes) for boxes in batch.boxes) > 6
    for boxes, labels, masks in zip(batch.boxes, batch.labels, batch.masks, strict=True):
        assert (boxes[:, 2:] > boxes[:, :2]).all()
        assert len(boxes) == len(labels) == len(masks)


def containers(value):
    """Lists, dicts and tuples in it: what workers would copy by counting references."""
    if hasattr(value, "__dict__"):
        value = vars(value)
    if isinstance(value, dict):
        return 1 + sum(map(containers, value.values()))
    return 1 + sum(map(containers, value)) if isinstance(value, list | tuple) else 0


def test_objects_that_are_trained_on_are_no_objects_of_python(tmp_path):
    root = detection_tree(tmp_path / "coco")
    few = containers(module(root).objects("train"))

    def act(content):
        first = content["annotations"][0]
        content["annotations"] += [{**first, "id": 100 + k} for k in range(50)]

    change(root, act)
    more = module(root).objects("train")
    assert len(more.truth(0, True)[2]) == 52
    assert containers(more) == few


@pytest.mark.parametrize(
    ("outline", "message"),
    [
        ([], "the mask of object 1 cannot be read"),
        (None, "the mask of object 1 cannot be read"),
        ([[]], "the mask of object 1 is 0×0 px, its image 128×96 px"),
        ({"counts": [20], "size": [4, 5]}, "the mask of object 1 is 5×4 px, its image 128×96 px"),
    ],
)
def test_outlines_that_are_none(tmp_path, outline, message):
    root = detection_tree(tmp_path / "coco", images=1)
    change(root, lambda content: content["annotations"][0].update(segmentation=outline))
    with pytest.raises(UserError, match=message):
        next(iter(module(root, batch_size=1).train_dataloader()))


def test_what_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"data\.root"):
        DetectionDataModule("coco")
    with pytest.raises(UserError, match=r"instances_val2017\.json: no such file"):
        module(tmp_path).objects("val")
    root = detection_tree(tmp_path / "coco")
    (root / "train2017" / "000000000002.jpg").unlink()
    with pytest.raises(UserError, match=r"000000000002\.jpg: no such image"):
        module(root).objects("train")
    change(root, lambda content: content["images"][0].update(width=99), "instances_val2017.json")
    with pytest.raises(UserError, match=r"128×96 px, but instances_val2017\.json says 99×96 px"):
        next(iter(module(root).val_dataloader()))
    change(root, lambda content: content["annotations"][0].update(category_id=5), "instances_val2017.json")
    with pytest.raises(UserError, match=r"instances_val2017\.json: damaged: KeyError 5"):
        module(root).objects("val")
    (root / "annotations" / "instances_val2017.json").write_text("{")
    with pytest.raises(UserError, match="damaged"):
        module(root).objects("val")
    root = detection_tree(tmp_path / "lvis", lvis=True)
    change(root, lambda content: content["categories"][0].pop("frequency"), "lvis_v1_val.json")
    with pytest.raises(UserError, match=r"lvis_v1_val\.json: damaged: KeyError 'frequency'"):
        module(root, "lvis").objects("val")

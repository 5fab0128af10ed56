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
    (root / "annotations" / "instances_val2017.json").write_text("{")
    with pytest.raises(UserError, match="damaged"):
        module(root).objects("val")

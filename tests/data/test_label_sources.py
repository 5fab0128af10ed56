"""The layouts of the published sets, on small trees that look like them."""

from __future__ import annotations

import json

import label_trees
import numpy as np
import pytest

from poodle_lightning.data import label_sets
from poodle_lightning.data.label_lists import CocoSource, VocSource
from poodle_lightning.data.label_sources import LayoutSource
from poodle_lightning.types import UserError


def refused(act, *parts):
    with pytest.raises(UserError) as caught:
        act()
    line = str(caught.value)
    assert "\n" not in line
    for part in parts:
        assert part in line


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("above", [False, True])
def test_bdd100k_in_both_layouts_and_from_the_folder_above(tmp_path, old, above):
    label_trees.bdd100k(tmp_path / "bdd100k", old=old)
    source = LayoutSource("bdd100k", tmp_path if above else tmp_path / "bdd100k")
    assert [name.rsplit("/", 1)[1] for name in source.names("val")] == ["val0.jpg", "val1.jpg"]
    assert len(source.names("train")) == 3
    assert source.problems("val") == ()
    image, labels = source.read("val", 1)
    assert image.shape == (12, 20, 3)
    assert image.dtype == labels.dtype == np.uint8
    assert np.array_equal(labels, label_trees.mask(1, 19))
    assert source.sizes("val", 1) == ((12, 20), (12, 20))
    assert source.classes.names[:3] == ("road", "sidewalk", "building")


def test_cityscapes_ids_become_train_ids(tmp_path):
    source = LayoutSource("cityscapes", label_trees.cityscapes(tmp_path))
    assert len(source.names("train")) == 2
    assert source.names("val")[0].endswith("val/ulm/ulm_000000_000019_leftImg8bit.png")
    _, labels = source.read("val", 0)
    # the ids of the mask are 0 to 23 in this tree; written down from cityscapesScripts' table
    wanted = [255] * 7 + [0, 1, 255, 255, 2, 3, 4, 255, 255, 255, 5, 255, 6, 7, 8, 9, 10]
    assert labels.reshape(-1, 10)[:, 0].tolist() == wanted
    assert source.classes.names[18] == "bicycle"


def test_every_cityscapes_id_as_torchvision_knows_it():
    from torchvision.datasets import Cityscapes

    for known in Cityscapes.classes:
        if known.id >= 0:
            wanted = 255 if known.train_id in (-1, 255) else known.train_id
            assert label_sets.CITYSCAPES_IDS.get(known.id, 255) == wanted
            if wanted != 255:
                assert label_sets.CITYSCAPES.names[wanted] == known.name


def test_ade20k_loses_its_zero(tmp_path):
    source = LayoutSource("ade20k", label_trees.ade20k(tmp_path / "ADEChallengeData2016").parent)
    _, labels = source.read("val", 0)
    stored = label_trees.mask(0, 151).astype(int)
    assert np.array_equal(labels, np.where(stored == 0, 255, stored - 1))
    assert len(source.classes) == 150
    assert len(source.names("train")) == 3


def test_pascal_voc_lists_and_palette_masks(tmp_path):
    label_trees.voc(tmp_path / "VOCdevkit" / "VOC2012")
    source = VocSource(tmp_path)
    assert [name[-15:-4] for name in source.names("train")] == ["2007_000032", "2008_000002"]
    assert source.listing("train").items[0].mask.parent.name == "SegmentationClassAug"
    assert [name[-15:-4] for name in VocSource(tmp_path, "train").names("train")] == ["2007_000032"]
    _, labels = source.read("val", 0)  # a palette image
    assert (labels[0] == 255).all()
    assert np.array_equal(labels[1:], label_trees.mask(2, 21)[1:])
    _, labels = source.read("train", 1)  # a grey one
    assert np.array_equal(labels[1:], label_trees.mask(1, 21)[1:])


def test_pascal_voc_list_with_paths_and_what_is_missing(tmp_path):
    root = label_trees.voc(tmp_path)
    lists = root / "ImageSets" / "Segmentation"
    paths = "/JPEGImages/2008_000002.jpg /SegmentationClassAug/2008_000002.png\n"
    (lists / "train_aug.txt").rename(lists / "trainaug.txt").write_text(paths)
    assert [name[-15:-4] for name in VocSource(root).names("train")] == ["2008_000002"]
    (root / "SegmentationClass" / "2007_000033.png").unlink()
    assert "val.txt: no mask for 2007_000033" in VocSource(root).problems("val")[0]
    (lists / "trainaug.txt").unlink()
    refused(lambda: VocSource(root).names("train"), "train_aug.txt: no such list", "voc_train")
    (lists / "val.txt").write_text("")
    refused(lambda: VocSource(root).names("val"), "val.txt: the split is empty")


def test_coco_panoptic_becomes_54_classes(tmp_path):
    wanted = label_trees.coco(tmp_path / "coco")
    source = CocoSource(tmp_path)
    assert len(source.names("train")) == len(source.names("val")) == 1
    _, labels = source.read("val", 0)
    assert np.array_equal(labels, wanted)
    assert set(np.unique(labels)) == {*range(54), 255}
    assert (len(source.classes), source.classes.names[0], source.classes.names[53]) == (
        54,
        "things",
        "rug-merged",
    )


def test_coco_as_detectron2_converted_it(tmp_path):
    wanted = label_trees.coco(tmp_path)
    label_trees.save(tmp_path / "panoptic_stuff_val2017" / "000000000139.png", wanted)
    (tmp_path / "annotations" / "panoptic_val2017.json").unlink()
    _, labels = CocoSource(tmp_path).read("val", 0)
    assert np.array_equal(labels, wanted)


def test_coco_faults(tmp_path):
    label_trees.coco(tmp_path)
    path = tmp_path / "annotations" / "panoptic_val2017.json"
    content = json.loads(path.read_text())
    content["annotations"][0]["segments_info"][0]["category_id"] = 12
    path.write_text(json.dumps(content))
    refused(lambda: CocoSource(tmp_path).names("val"), "panoptic_val2017.json: category 12 is none")
    content["annotations"][0]["segments_info"].pop(0)
    path.write_text(json.dumps(content))
    refused(lambda: CocoSource(tmp_path).read("val", 0), "000000000139.png: colour (44, 1, 0) in 16 pixels")
    path.write_text(path.read_text()[:100])
    refused(lambda: CocoSource(tmp_path).names("val"), "panoptic_val2017.json: cannot be read")
    path.write_text("[]")
    refused(lambda: CocoSource(tmp_path).names("val"), "panoptic_val2017.json: cannot be read")
    path.unlink()
    refused(lambda: CocoSource(tmp_path).names("val"), "panoptic_val2017.json: no such file")
    refused(lambda: CocoSource(tmp_path / "nowhere").names("val"), "nowhere: no such folder")


def test_coco_categories_number_133():
    assert len(label_sets.COCO_LABELS) == 133
    assert sorted(set(label_sets.COCO_LABELS.values())) == list(range(54))
    # torchvision writes the 80 things with N/A where an id is not used
    from torchvision.models.detection import MaskRCNN_ResNet50_FPN_Weights

    names = MaskRCNN_ResNet50_FPN_Weights.COCO_V1.meta["categories"]
    things = {number for number, name in enumerate(names) if name not in ("__background__", "N/A")}
    assert things == label_sets.COCO_THINGS


def test_voc_names_are_those_torchvision_knows():
    from torchvision.models.segmentation import FCN_ResNet50_Weights

    known = FCN_ResNet50_Weights.COCO_WITH_VOC_LABELS_V1.meta["categories"]
    assert label_sets.VOC.names == ("background", *known[1:])


def test_wt_sem(tmp_path):
    for split in ("train", "val"):
        label_trees.save(tmp_path / f"images/{split}/rome/000001.jpg", label_trees.noise(0))
        label_trees.save(tmp_path / f"masks/{split}/rome/000001.png", label_trees.mask(0, 150))
    source = LayoutSource("wt_sem", tmp_path)
    assert np.array_equal(source.read("val", 0)[1], label_trees.mask(0, 150))
    assert len(source.names("train")) == 1


@pytest.mark.parametrize("old", [False, True])
def test_missing_masks_and_images_are_named_and_counted(tmp_path, old):
    root = label_trees.bdd100k(tmp_path, train=4, old=old)
    masks = root / ("seg/labels/train" if old else "labels/sem_seg/masks/train")
    for path in sorted(masks.iterdir())[:2]:
        path.unlink()
    (root / ("seg/images/train" if old else "images/10k/train") / "train3.jpg").unlink()
    without_mask, without_image = LayoutSource("bdd100k", root).problems("train")
    assert "train0.jpg: no mask for this image in" in without_mask
    assert without_mask.endswith("(and 1 more such images)")
    assert "train3" in without_image
    assert "no image for this mask" in without_image


def test_wrong_roots_say_what_was_looked_for_and_what_is_there(tmp_path):
    (tmp_path / "videos").mkdir()
    (tmp_path / "readme.txt").write_text("")
    act = LayoutSource("bdd100k", tmp_path).names
    refused(lambda: act("val"), "images/10k/val or seg/images/val", "readme.txt, videos/")
    refused(
        lambda: LayoutSource("bdd100k", tmp_path / "no").names("val"), "no: no such folder", "--data.root"
    )
    (tmp_path / "images/10k/val").mkdir(parents=True)
    refused(lambda: act("val"), "labels/sem_seg/masks/val: no such folder")
    (tmp_path / "labels/sem_seg/masks/val").mkdir(parents=True)
    refused(lambda: LayoutSource("bdd100k", tmp_path).names("val"), "the split is empty")
    refused(lambda: VocSource(tmp_path).names("val"), "ImageSets/Segmentation", "VOCdevkit/VOC2012/")
    refused(lambda: CocoSource(tmp_path).names("val"), "val2017 or images/val2017")

"""Small labelled data sets on disk, in the layouts in which the real ones are published."""

from __future__ import annotations

import json

import numpy as np
from PIL import Image

from poodle_lightning.data.label_sets import COCO_LABELS, COCO_STUFF

SIZE = (12, 20)
ENCODED = 12  # grey levels per label in the images of `encoded`


def save(path, pixels, mode=None, **kwargs):
    """Write an array as an image; folders are made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(np.asarray(pixels, np.uint8))
    if mode == "P":
        image = Image.fromarray(np.asarray(pixels, np.uint8), "L").convert("L")
        image.putpalette([value * 37 % 256 for value in range(768)])
    image.save(path, **kwargs)
    return path


def mask(number, classes, size=SIZE, first=0):
    """Labels in vertical stripes, others for every number."""
    columns = np.arange(size[1]) * 5 // size[1]
    return np.broadcast_to(first + (columns + 3 * number) % classes, size).astype(np.uint8)


def noise(number, size=SIZE):
    return np.random.default_rng(number).integers(0, 256, (*size, 3), dtype=np.uint8)


def bdd100k(root, train=3, val=2, old=False):
    for split, count in (("train", train), ("val", val)):
        images = root / (f"seg/images/{split}" if old else f"images/10k/{split}")
        masks = root / (f"seg/labels/{split}" if old else f"labels/sem_seg/masks/{split}")
        for number in range(count):
            save(images / f"{split}{number}.jpg", noise(number))
            end = "_train_id.png" if old else ".png"
            save(masks / f"{split}{number}{end}", mask(number, 19))
    return root


def cityscapes(root):
    for split, city in (("train", "aachen"), ("train", "bochum"), ("val", "ulm")):
        stem = f"{city}_000000_000019"
        save(root / f"leftImg8bit/{split}/{city}/{stem}_leftImg8bit.png", noise(0))
        folder = root / f"gtFine/{split}/{city}"
        save(folder / f"{stem}_gtFine_labelIds.png", np.arange(34).repeat(10).reshape(17, 20)[:12])
        save(folder / f"{stem}_gtFine_color.png", noise(1))  # the archive holds these too
        (folder / f"{stem}_gtFine_polygons.json").write_text("{}")
    return root


def ade20k(root):
    for split, name, count in (("training", "train", 3), ("validation", "val", 2)):
        for number in range(count):
            stem = f"ADE_{name}_{number + 1:08d}"
            save(root / f"images/{split}/{stem}.jpg", noise(number))
            save(root / f"annotations/{split}/{stem}.png", mask(number, 151))
    return root


def voc(root):
    lists = {"train": ["2007_000032"], "train_aug": ["2007_000032", "2008_000002"], "val": ["2007_000033"]}
    for name, stems in lists.items():
        path = root / f"ImageSets/Segmentation/{name}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(f"{stem}\n" for stem in stems))
    for number, stem in enumerate(("2007_000032", "2008_000002", "2007_000033")):
        save(root / f"JPEGImages/{stem}.jpg", noise(number))
        labels = mask(number, 21).copy()
        labels[0] = 255
        if not stem.startswith("2008"):
            save(root / f"SegmentationClass/{stem}.png", labels, "P")
        if stem != "2007_000033":
            save(root / f"SegmentationClassAug/{stem}.png", labels)
    return root


def coco(root):
    """One image per split; returns what detectron2's rule makes of its mask."""
    kinds = [1, 90, *COCO_STUFF]  # a person, a toothbrush, all kinds of stuff
    for split in ("train", "val"):
        ids = {kind: 70_000 * number + 300 + number for number, kind in enumerate(kinds)}
        columns = np.array([*ids.values(), 0])[np.arange(60) % (len(ids) + 1)]
        panoptic = np.broadcast_to(columns, (8, 60))
        rgb = np.stack([panoptic % 256, panoptic // 256 % 256, panoptic // 65536], axis=-1)
        save(root / f"{split}2017/000000000139.jpg", noise(0, (8, 60)))
        save(root / f"annotations/panoptic_{split}2017/000000000139.png", rgb)
        segments = [{"id": value, "category_id": kind, "iscrowd": 0} for kind, value in ids.items()]
        entry = {"image_id": 139, "file_name": "000000000139.png", "segments_info": segments}
        path = root / f"annotations/panoptic_{split}2017.json"
        path.write_text(json.dumps({"images": [], "annotations": [entry]}))
    wanted = [COCO_LABELS[kind] for kind in kinds] + [255]
    return np.broadcast_to(np.array(wanted, np.uint8)[np.arange(60) % len(wanted)], (8, 60))


def folder(root, count=6, classes=4, size=SIZE, splits=("",), yaml=None):
    """Images and masks of one's own."""
    root.mkdir(parents=True, exist_ok=True)
    names = ", ".join(f"c{label}" for label in range(classes))
    (root / "classes.yaml").write_text(yaml or f"names: [{names}]\n")
    for split in splits:
        for number in range(count):
            save(root / "images" / split / f"{number}.png", noise(number, size))
            save(root / "masks" / split / f"{number}.png", mask(number, classes, size))
    return root


def encoded(labels):
    """An image that shows its own labels in grey."""
    return np.repeat((np.asarray(labels) * ENCODED).astype(np.uint8)[..., None], 3, axis=2)

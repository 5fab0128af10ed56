"""The classes of the data sets that encoders are measured on, in the order of their label values.

How many images each split has, as published, is in ``PUBLISHED``.
"""

from __future__ import annotations

from poodle_lightning.types import ClassSet


def _split(names: tuple[str, ...], some: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(name for name in names if name not in some)


# BDD100K and Cityscapes share these 19 classes in trainId order. The groups are those of PooDLe, appendix H,
# Table 10: by average share of an image's pixels (small, large), by share of images (rare, common).
STREET = (
    "road", "sidewalk", "building", "wall", "fence", "pole", "traffic light", "traffic sign", "vegetation",
    "terrain", "sky", "person", "rider", "car", "truck", "bus", "train", "motorcycle", "bicycle",
)  # fmt: skip
SMALL = ("pole", "bicycle", "person", "motorcycle", "traffic sign", "rider", "traffic light")
LARGE = _split(STREET, SMALL)
RARE = ("bus", "wall", "train", "bicycle", "motorcycle", "rider")
COMMON = _split(STREET, RARE)
BDD100K = ClassSet(STREET, {"small": SMALL, "large": LARGE, "rare": RARE, "common": COMMON})
CITYSCAPES = BDD100K

# labelId → trainId (cityscapesScripts, helpers/labels.py); every other labelId is ignored.
CITYSCAPES_IDS = {
    7: 0, 8: 1, 11: 2, 12: 3, 13: 4, 17: 5, 19: 6, 20: 7, 21: 8, 22: 9, 23: 10, 24: 11, 25: 12, 26: 13,
    27: 14, 28: 15, 31: 16, 32: 17, 33: 18,
}  # fmt: skip
CITYSCAPES_LAST = 33

# ADE20K's scene parsing challenge, the first word of each line of CSAILVision/sceneparsing objectInfo150.txt;
# in the files the class at place i has the value i + 1, and 0 is everything else.
ADE20K = ClassSet(
    (
        "wall", "building", "sky", "floor", "tree", "ceiling", "road", "bed", "windowpane", "grass",
        "cabinet", "sidewalk", "person", "earth", "door", "table", "mountain", "plant", "curtain", "chair",
        "car", "water", "painting", "sofa", "shelf", "house", "sea", "mirror", "rug", "field",
        "armchair", "seat", "fence", "desk", "rock", "wardrobe", "lamp", "bathtub", "railing", "cushion",
        "base", "box", "column", "signboard", "chest of drawers", "counter", "sand", "sink", "skyscraper",
        "fireplace", "refrigerator", "grandstand", "path", "stairs", "runway", "case", "pool table", "pillow",
        "screen door", "stairway", "river", "bridge", "bookcase", "blind", "coffee table", "toilet", "flower",
        "book", "hill", "bench", "countertop", "stove", "palm", "kitchen island", "computer", "swivel chair",
        "boat", "bar", "arcade machine", "hovel", "bus", "towel", "light", "truck", "tower", "chandelier",
        "awning", "streetlight", "booth", "television", "airplane", "dirt track", "apparel", "pole", "land",
        "bannister", "escalator", "ottoman", "bottle", "buffet", "poster", "stage", "van", "ship", "fountain",
        "conveyer belt", "canopy", "washer", "plaything", "swimming pool", "stool", "barrel", "basket",
        "waterfall", "tent", "bag", "minibike", "cradle", "oven", "ball", "food", "step", "tank",
        "trade name", "microwave", "pot", "animal", "bicycle", "lake", "dishwasher", "screen", "blanket",
        "sculpture", "hood", "sconce", "vase", "traffic light", "tray", "ashcan", "fan", "pier",
        "crt screen", "plate", "monitor", "bulletin board", "shower", "radiator", "glass", "clock", "flag",
    )
)  # fmt: skip

# The names of PASCAL VOC's development kit; 0 is background, 255 the border between objects.
VOC = ClassSet(
    (
        "background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow",
        "diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train",
        "tvmonitor",
    )
)  # fmt: skip

# COCO panoptic's stuff categories by id (cocodataset/panopticapi, panoptic_coco_categories.json), in the
# order in which detectron2 numbers them from 1 on (datasets/prepare_panoptic_fpn.py).
COCO_STUFF = {
    92: "banner", 93: "blanket", 95: "bridge", 100: "cardboard", 107: "counter", 109: "curtain",
    112: "door-stuff", 118: "floor-wood", 119: "flower", 122: "fruit", 125: "gravel", 128: "house",
    130: "light", 133: "mirror-stuff", 138: "net", 141: "pillow", 144: "platform", 145: "playingfield",
    147: "railroad", 148: "river", 149: "road", 151: "roof", 154: "sand", 155: "sea", 156: "shelf",
    159: "snow", 161: "stairs", 166: "tent", 168: "towel", 171: "wall-brick", 175: "wall-stone",
    176: "wall-tile", 177: "wall-wood", 178: "water-other", 180: "window-blind", 181: "window-other",
    184: "tree-merged", 185: "fence-merged", 186: "ceiling-merged", 187: "sky-other-merged",
    188: "cabinet-merged", 189: "table-merged", 190: "floor-other-merged", 191: "pavement-merged",
    192: "mountain-merged", 193: "grass-merged", 194: "dirt-merged", 195: "paper-merged",
    196: "food-other-merged", 197: "building-other-merged", 198: "rock-merged", 199: "wall-other-merged",
    200: "rug-merged",
}  # fmt: skip
# Its 80 things are 1 to 90 without these.
COCO_THINGS = frozenset(range(1, 91)) - {12, 26, 29, 30, 45, 66, 68, 69, 71, 83}
COCO_SEMANTIC = ClassSet(("things", *COCO_STUFF.values()))
COCO_LABELS = dict.fromkeys(COCO_THINGS, 0) | {
    category: label for label, category in enumerate(COCO_STUFF, start=1)
}
"""COCO category id → label."""

PUBLISHED: dict[str, dict[str, int]] = {
    "bdd100k": {"train": 7_000, "val": 1_000},
    "cityscapes": {"train": 2_975, "val": 500},
    "ade20k": {"train": 20_210, "val": 2_000},
    "voc": {"train": 10_582, "val": 1_449},
    "coco": {"train": 118_287, "val": 5_000},
    "wt_sem": {"train": 25_910, "val": 6_170},
}
"""Labelled images per split; PASCAL VOC's ``train`` is ``train_aug``."""
VOC_TRAIN = 1_464
"""Images of PASCAL VOC's own ``train``."""

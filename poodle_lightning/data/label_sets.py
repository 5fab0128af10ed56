"""The classes of the data sets that encoders are measured on, in the order of their label values."""

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

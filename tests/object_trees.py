"""Small trees in PASCAL VOC's layout, with boxes and masks of objects."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from label_trees import save

XML = """<annotation><filename>{name}.jpg</filename>{objects}</annotation>"""
OBJECT = """<object><name>{kind}</name><truncated>{truncated}</truncated><difficult>{difficult}</difficult>
<bndbox><xmax>{right}</xmax><xmin>{left}</xmin><ymax>{bottom}</ymax><ymin>{top}</ymin></bndbox>
<part><name>head</name><bndbox><xmin>1</xmin><ymin>1</ymin><xmax>2</xmax><ymax>2</ymax></bndbox></part>
</object>"""


@dataclass(frozen=True)
class Thing:
    """An object: rows and columns from … up to, not including; its brightness; VOC's marks."""

    top: int
    left: int
    bottom: int
    right: int
    level: int = 220
    truncated: int = 0
    difficult: int = 0

    def xml(self):
        """As VOC writes it: from 1, the last pixel included; with a part, which is no object."""
        return OBJECT.format(
            kind="cat", truncated=self.truncated, difficult=self.difficult,
            left=self.left + 1, top=self.top + 1, right=self.right, bottom=self.bottom,
        )  # fmt: skip


def image(root, name, size, things, noise=0):
    """A dark picture with bright objects, its annotation, its mask with a void row above each object."""
    draws = np.random.default_rng(len(things) + size[1])
    pixels = np.full((*size, 3), 20, np.uint8)
    numbers = np.zeros(size, np.uint8)
    for number, thing in enumerate(things, 1):
        inside = slice(thing.top, thing.bottom), slice(thing.left, thing.right)
        pixels[inside] = thing.level - draws.integers(0, noise + 1, pixels[inside].shape)
        numbers[inside] = number
        if thing.top:
            numbers[thing.top - 1, inside[1]] = 255
    save(root / f"JPEGImages/{name}.jpg", pixels, quality=100, subsampling=0)
    save(root / f"SegmentationObject/{name}.png", numbers, "P")
    path = root / f"Annotations/{name}.xml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(XML.format(name=name, objects="".join(thing.xml() for thing in things)))


SCENES = {
    "2007_000033": ((40, 64), [Thing(8, 16, 24, 40)]),
    "2007_000042": ((40, 64), [Thing(0, 0, 16, 16), Thing(16, 40, 40, 64, 150)]),
    "2008_000001": ((51, 37), [Thing(9, 3, 40, 30, 240, truncated=1)]),
    "2009_000007": ((40, 64), [Thing(2, 50, 10, 58, 255, difficult=1), Thing(10, 2, 39, 30, 120)]),
}


def voc_objects(root, scenes=None):
    """A devkit folder of the given scenes, or of ``SCENES``, whose objects are uneven; returns ``root``."""
    noise = 100 if scenes is None else 0
    scenes = SCENES if scenes is None else scenes
    for name, (size, things) in scenes.items():
        image(root, name, size, things, noise)
    for task, split in (("Segmentation", "val"), ("Main", "trainval")):
        path = root / f"ImageSets/{task}/{split}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(f"{name}\n" for name in scenes))
    return root

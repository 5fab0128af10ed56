"""The classes of BDD100K and Cityscapes, in trainId order, and their groups by size.

Source: BDD100K (Yu et al. 2020), ``doc/source/format.rst``; Cityscapes (Cordts et al. 2016) uses the same 19.
The split in small and large classes is the one of PooDLe (Wang et al. 2024), Table 10.
"""

from __future__ import annotations

from typing import Final

CLASSES: Final[tuple[str, ...]] = (
    "road", "sidewalk", "building", "wall", "fence", "pole", "traffic light", "traffic sign", "vegetation",
    "terrain", "sky", "person", "rider", "car", "truck", "bus", "train", "motorcycle", "bicycle",
)  # fmt: skip
"""Names; the place in the tuple is the label."""

IGNORE: Final = 255
"""The label of pixels without a class; the generator never writes it."""

SMALL: Final[tuple[int, ...]] = tuple(
    CLASSES.index(name)
    for name in ("pole", "traffic light", "traffic sign", "person", "rider", "motorcycle", "bicycle")
)
"""Labels of the classes that cover little of a frame."""

LARGE: Final[tuple[int, ...]] = tuple(label for label in range(len(CLASSES)) if label not in SMALL)
"""Labels of all other classes."""

PALETTE: Final[tuple[tuple[int, int, int], ...]] = (
    (128, 64, 128), (244, 35, 232), (70, 70, 70), (102, 102, 156), (190, 153, 153), (153, 153, 153),
    (250, 170, 30), (220, 220, 0), (107, 142, 35), (152, 251, 152), (70, 130, 180), (220, 20, 60),
    (255, 0, 0), (0, 0, 142), (0, 0, 70), (0, 60, 100), (0, 80, 100), (0, 0, 230), (119, 11, 32),
)  # fmt: skip
"""The colours in which Cityscapes draws its labels, RGB."""

"""The annotations of COCO and LVIS: images, boxes, classes and masks of a split.

::

    root/train2017/*.jpg, root/val2017/*.jpg                      or below root/images/
    root/annotations/instances_{train,val}2017.json               COCO
    root/annotations/lvis_v1_{train,val}.json                     LVIS v1, or in root itself

LVIS shares COCO's images, but not its splits: the folder of an image is the last but one part of its
``coco_url``. In training, crowds and images without an object are left out, as detectron2 does.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import numpy as np

from poodle_lightning.data.label_files import Array, read_image
from poodle_lightning.types import UserError

DetectionName = Literal["coco", "lvis"]
Split = Literal["train", "val"]
LEAST = 1e-5  # px, sides of a box from which on it counts in training (detectron2)
_FILES = {"coco": "instances_{}2017.json", "lvis": "lvis_v1_{}.json"}


def mask_api() -> Any:
    """``faster_coco_eval``'s masks.

    Raises:
        UserError: it is not installed.
    """
    try:
        from faster_coco_eval.core import mask
    except ImportError as error:
        raise UserError(
            "masks of COCO and average precision need faster-coco-eval: "
            "pip install 'poodle-lightning[detection]'"
        ) from error
    return mask


class CocoObjects:
    """One split of COCO or LVIS v1.

    Args:
        root: see the module.
        name: which.
        split: ``train`` or ``val``.

    Attributes:
        content: the annotations as plain data.
        categories: in the order of their ids; class i of the package is ``categories[i]``.
        images: of the split, in the order of their ids; in training those with an object.

    Raises:
        UserError: the annotations are not there or damaged, or an image is missing.
    """

    def __init__(self, root: Path, name: DetectionName, split: Split) -> None:
        self.root, self.name, self.split = root, name, split
        file = _FILES[name].format(split)
        places = [root / "annotations" / file, root / file]
        path = next((place for place in places if place.is_file()), None)
        if path is None:
            raise UserError(f"{places[0]}: no such file; --data.root must be the folder of {name.upper()}")
        self.path = path
        try:
            self.content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            self.categories = sorted(self.content["categories"], key=lambda one: one["id"])
            images = sorted(self.content["images"], key=lambda one: one["id"])
            numbers = {one["id"]: number for number, one in enumerate(self.categories)}
            self.objects: dict[int, list[dict[str, Any]]] = {one["id"]: [] for one in images}
            for one in self.content["annotations"]:
                self.objects[one["image_id"]].append(one)
                one["category_id"], one["bbox"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path}: damaged: {type(error).__name__} {error}: download it again") from error
        self.numbers = numbers
        self.images = images if split == "val" else [one for one in images if self.usable(one["id"])]
        if not self.images:
            raise UserError(f"{path}: names no image{' with an object' * (split == 'train')}")
        self.files = self._found()

    def usable(self, image: int) -> list[dict[str, Any]]:
        """The objects of an image that are trained on."""
        return [
            one for one in self.objects[image] if not one.get("iscrowd", 0) and min(one["bbox"][2:]) > LEAST
        ]

    def _found(self) -> list[Path]:
        """The files of all images."""
        wanted = [self._parts(one) for one in self.images]
        bases = {}
        for folder in {folder for folder, _ in wanted}:
            places = [self.root / folder, self.root / "images" / folder]
            base = next((place for place in places if place.is_dir()), None)
            if base is None:
                raise UserError(f"{places[0]}: no such folder, but {self.path.name} names images in it")
            bases[folder] = base, {path.name for path in base.iterdir()}
        lacking = [bases[folder][0] / name for folder, name in wanted if name not in bases[folder][1]]
        if lacking:
            more = f" (and {len(lacking) - 1} more)" if len(lacking) > 1 else ""
            raise UserError(f"{lacking[0]}: no such image{more}, but {self.path.name} names it")
        return [bases[folder][0] / name for folder, name in wanted]

    def _parts(self, image: dict[str, Any]) -> tuple[str, str]:
        where = image.get("coco_url") if self.name == "lvis" else None
        if where:
            folder, name = str(where).split("/")[-2:]
            return folder, name
        return f"{self.split}2017", str(image.get("file_name") or f"{image['id']:012d}.jpg")

    def read(self, number: int) -> Array:
        """An image ``(H, W, 3)`` uint8, as stored: boxes are in pixels of the file.

        Raises:
            UserError: it cannot be read, or has another size than the annotations say.
        """
        said = (int(self.images[number]["height"]), int(self.images[number]["width"]))
        image = read_image(self.files[number], said)
        if image.shape[:2] != said:
            (h, w), (sh, sw) = image.shape[:2], said
            raise UserError(f"{self.files[number]}: {w}×{h} px, but {self.path.name} says {sw}×{sh} px")
        return image

    def truth(self, number: int, masks: bool) -> tuple[Array, Array, list[Array]]:
        """What is trained on of an image: boxes ``(k, 4)`` float64, classes ``(k,)``, masks ``(H, W)``."""
        image = self.images[number]
        found = self.usable(image["id"])
        corners = np.array([one["bbox"] for one in found], np.float64).reshape(-1, 4)
        corners[:, 2:] += corners[:, :2]
        labels = np.array([self.numbers[one["category_id"]] for one in found], np.int64)
        if not masks:
            return corners, labels, []
        size = (int(image["height"]), int(image["width"]))
        return corners, labels, [_drawn(one, size, self.path) for one in found]


def _drawn(one: dict[str, Any], size: tuple[int, int], path: Path) -> Array:
    """The mask of an object, ``(H, W)`` uint8, from polygons or run lengths."""
    api = mask_api()
    try:
        parts = one["segmentation"]
        if isinstance(parts, dict):
            whole = api.frPyObjects(parts, *size) if isinstance(parts["counts"], list) else parts
        else:
            whole = api.merge(api.frPyObjects(parts, *size))
        mask: Array = np.asarray(api.decode(whole), np.uint8)
    except (KeyError, ValueError, TypeError, IndexError, RuntimeError) as error:
        raise UserError(f"{path}: the mask of object {one.get('id')} cannot be read: {error}") from error
    return mask

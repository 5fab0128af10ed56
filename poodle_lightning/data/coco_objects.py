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
from collections.abc import Mapping, Sequence
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
        masks: keep the outlines of the objects, for ``truth``.

    What is known of the objects is in a few flat arrays: workers share them, where counting references to
    objects of Python's would copy gigabytes into every one.

    Attributes:
        categories: in the order of their ids; class i of the package is ``categories[i]``.
        numbers: of the classes, by their ids.
        images: of the split, in the order of their ids; in training those with an object.
        objects: all of every held-out image, by its id, as plain data; none of training.

    Raises:
        UserError: the annotations are not there or damaged, or an image is missing.
    """

    def __init__(self, root: Path, name: DetectionName, split: Split, masks: bool = True) -> None:
        self.root, self.name, self.split = root, name, split
        file = _FILES[name].format(split)
        places = [root / "annotations" / file, root / file]
        path = next((place for place in places if place.is_file()), None)
        if path is None:
            raise UserError(f"{places[0]}: no such file; --data.root must be the folder of {name.upper()}")
        self.path = path
        try:
            content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            self.categories = sorted(content["categories"], key=lambda one: one["id"])
            self.numbers = {one["id"]: number for number, one in enumerate(self.categories)}
            if name == "lvis" and (strange := {one["frequency"] for one in self.categories} - set("rcf")):
                raise ValueError(f"frequency {strange.pop()} of a class is none of r, c, f")
            images = sorted(content["images"], key=lambda one: one["id"])
            objects: dict[int, list[dict[str, Any]]] = {one["id"]: [] for one in images}
            for one in content["annotations"]:
                objects[one["image_id"]].append(one)
            self.images = images if split == "val" else [one for one in images if _usable(objects[one["id"]])]
            used = [_usable(objects[one["id"]]) for one in self.images]
            self._packed = _Packed(used, self.numbers, masks)
            self._sizes = np.array([(one["height"], one["width"]) for one in self.images], np.int64)
        except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
            raise UserError(f"{path}: damaged: {type(error).__name__} {error}: download it again") from error
        if not self.images:
            raise UserError(f"{path}: names no image{' with an object' * (split == 'train')}")
        self.objects = objects if split == "val" else {}
        self.files = self._found()

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
        sh, sw = self._sizes[number].tolist()
        image = read_image(self.files[number], (sh, sw))
        if image.shape[:2] != (sh, sw):
            h, w = image.shape[:2]
            raise UserError(f"{self.files[number]}: {w}×{h} px, but {self.path.name} says {sw}×{sh} px")
        return image

    def truth(self, number: int, masks: bool) -> tuple[Array, Array, list[Array]]:
        """What is trained on of an image: boxes ``(k, 4)`` float64, classes ``(k,)``, masks ``(H, W)``."""
        part = self._packed.part(number)
        corners, labels = self._packed.boxes[part].copy(), self._packed.labels[part].copy()
        corners[:, 2:] += corners[:, :2]
        if not masks:
            return corners, labels, []
        height, width = self._sizes[number].tolist()
        parts = zip(self._packed.outlines(number), self._packed.ids[part].tolist(), strict=True)
        return corners, labels, [_drawn(one, name, (height, width), self.path) for one, name in parts]


class _Packed:
    """Objects image by image, in flat arrays; outlines as JSON."""

    def __init__(
        self, objects: Sequence[Sequence[Mapping[str, Any]]], numbers: Mapping[int, int], outlines: bool
    ) -> None:
        flat = [one for found in objects for one in found]
        self.boxes = np.array([one["bbox"] for one in flat], np.float64).reshape(-1, 4)
        self.labels = np.array([numbers[one["category_id"]] for one in flat], np.int64)
        self.ids = np.array([one["id"] for one in flat], np.int64)
        drawn = objects if outlines else []
        texts = [json.dumps([one.get("segmentation") for one in found]).encode() for found in drawn]
        self._ends, self._text_ends = (
            np.cumsum([0, *map(len, parts)], dtype=np.int64) for parts in (objects, texts)
        )
        self._text = np.frombuffer(b"".join(texts), np.uint8)

    def part(self, image: int) -> slice:
        """The rows of an image."""
        return slice(*self._ends[image : image + 2].tolist())

    def outlines(self, image: int) -> list[Any]:
        """Polygons or run lengths of an image's objects, as the annotations have them."""
        found: list[Any] = json.loads(
            self._text[slice(*self._text_ends[image : image + 2].tolist())].tobytes()
        )
        return found


def _usable(objects: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """What is trained on."""
    return [one for one in objects if not one.get("iscrowd", 0) and min(one["bbox"][2:]) > LEAST]


def _drawn(parts: Any, name: int, size: tuple[int, int], path: Path) -> Array:
    """The mask of an object, ``(H, W)`` uint8, from polygons or run lengths."""
    api = mask_api()
    try:
        if isinstance(parts, dict):
            whole = api.frPyObjects(parts, *size) if isinstance(parts["counts"], list) else parts
        else:
            whole = api.merge(api.frPyObjects(parts, *size))
        mask: Array = np.asarray(api.decode(whole), np.uint8)
    except (KeyError, ValueError, TypeError, IndexError, RuntimeError) as error:
        raise UserError(f"{path}: the mask of object {name} cannot be read: {error}") from error
    if mask.shape != size:
        (h, w), (mh, mw) = size, mask.shape
        raise UserError(f"{path}: the mask of object {name} is {mw}×{mh} px, its image {w}×{h} px")
    return mask

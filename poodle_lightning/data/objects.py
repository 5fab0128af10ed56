"""Images with the objects in them, as PASCAL VOC gives them: a box per object, and its pixels where known.

::

    root/JPEGImages/<name>.jpg
    root/Annotations/<name>.xml                boxes, also which objects are cut off or hard to see
    root/SegmentationObject/<name>.png         palette: 0 none, 1, 2, … the objects, 255 the border between
    root/ImageSets/Segmentation/<split>.txt    names of the images with such a mask
    root/ImageSets/Main/<split>.txt            names of all images

``root`` is that folder or one above it (``VOCdevkit/VOC2012``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal
from xml.etree import ElementTree

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from poodle_lightning.data.label_files import Array, Codes, read_image, read_mask
from poodle_lightning.data.label_sources import not_there
from poodle_lightning.data.loading import SharedDataModule, each_once
from poodle_lightning.data.order import ClipLoader, Order, Request, RequestSampler
from poodle_lightning.data.video import HELD_OUT_EPOCH
from poodle_lightning.types import UserError

Task = Literal["segmentation", "detection"]
Hard = Literal["keep", "drop"]
_LISTS: dict[Task, str] = {"segmentation": "ImageSets/Segmentation", "detection": "ImageSets/Main"}
_OBJECTS = Codes.plain(255, kind="palette")


@dataclass(frozen=True)
class ObjectBatch:
    """Images of any sizes, each with its objects.

    Args:
        images: ``(3, h, w)`` uint8 RGB each, at the size at which the network sees it.
        sizes: height and width of each image's file, in whose pixels boxes and masks are.
        boxes: ``(k, 4)`` float64 each: left, top, right, bottom; stays on the host.
        objects: ``(H, W)`` uint8 each, the number of the object at a pixel: 0 = none, 255 = not judged; None
            where nobody has drawn them; stays on the host.
        index: ``(B,)`` int64, place in the split; stays on the host.
        names: of the files.
    """

    images: tuple[Tensor, ...]
    sizes: tuple[tuple[int, int], ...]
    boxes: tuple[Tensor, ...]
    objects: tuple[Tensor | None, ...]
    index: Tensor
    names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.images)

    def to(self, device: torch.device | str, non_blocking: bool | None = None) -> ObjectBatch:
        """With its images on a device (to CUDA without waiting); all else stays on the host."""
        on = torch.device(device).type == "cuda" if non_blocking is None else non_blocking
        return replace(self, images=tuple(image.to(device, non_blocking=on) for image in self.images))

    def pin_memory(self) -> ObjectBatch:
        """With its images in page-locked memory, so that the copy to the device does not block."""
        return replace(self, images=tuple(image.pin_memory() for image in self.images))


@dataclass(frozen=True)
class Scene:
    """One image with its objects, before it is put in a batch; see :class:`ObjectBatch`."""

    image: Array
    size: tuple[int, int]
    boxes: Array
    objects: Array | None
    index: int
    name: str


class VocObjects:
    """The images of one of VOC's lists, with their objects; see ``ObjectDataModule`` for the arguments."""

    def __init__(self, root: str | Path, year: int, task: Task, split: str, hard: Hard = "keep") -> None:
        self.root, self.year, self.task, self.split, self.hard = Path(root), year, task, split, hard
        self._found: tuple[Path, list[str]] | None = None

    def listed(self) -> tuple[Path, list[str]]:
        """The folder that holds the layout, and the names of the images in the order of the list.

        Raises:
            UserError: the layout is not there, the list is empty, or a file of one of its images is missing.
        """
        if self._found is None:
            self._found = self._find()
        return self._found

    def _find(self) -> tuple[Path, list[str]]:
        below = (f"VOC{self.year}", f"VOCdevkit/VOC{self.year}")
        wanted = _LISTS[self.task]
        base = next((b for part in ("", *below) if ((b := self.root / part) / wanted).is_dir()), None)
        if base is None:
            raise not_there(self.root, f"VOC {self.year}", [wanted], below)
        path = base / wanted / f"{self.split}.txt"
        if not path.is_file():
            splits = ", ".join(sorted(p.stem for p in path.parent.glob("*.txt"))) or "none"
            raise UserError(f"{path}: no such list; data.split can be: {splits}")
        names = [line.split()[0] for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        if not names:
            raise UserError(f"{path}: the split is empty: the list has no line")
        folders = [("JPEGImages", ".jpg"), ("Annotations", ".xml")]
        if self.task == "segmentation":
            folders.append(("SegmentationObject", ".png"))
        for folder, end in folders:
            inside = base / folder
            files = {p.name for p in inside.iterdir()} if inside.is_dir() else set()
            if lacking := [name for name in names if name + end not in files]:
                more = f" (and {len(lacking) - 1} more)" if len(lacking) > 1 else ""
                raise UserError(f"{path}: {inside / (lacking[0] + end)} is missing{more}")
        return base, names

    def read(self, number: int) -> Scene:
        """One image at the size of its file.

        Raises:
            UserError: a file cannot be read, or image and mask differ in size.
        """
        base, names = self.listed()
        name = names[number]
        image = read_image(base / "JPEGImages" / f"{name}.jpg")
        size = (image.shape[0], image.shape[1])
        objects = None
        if self.task == "segmentation":
            path = base / "SegmentationObject" / f"{name}.png"
            objects = read_mask(path, _OBJECTS)
            if objects.shape != size:
                (h, w), (mh, mw) = size, objects.shape
                raise UserError(f"{path}: the mask is {mw}×{mh} px, its image is {w}×{h} px")
        boxes = read_boxes(base / "Annotations" / f"{name}.xml", easy=self.hard == "drop")
        return Scene(image, size, boxes, objects, number, name)


class ObjectDataModule(SharedDataModule):
    """Images with their objects, for object discovery; there is nothing to train on.

    Args:
        root: see the module.
        year: 2012 or 2007, which folders above ``root`` may be called.
        task: ``segmentation``: the images whose objects are drawn (VOC 2012 val: 1,449). ``detection``: those
            with boxes, drawn or not (VOC 2007 trainval: 5,011; LOST's set).
        split: name of the list.
        size: at which the network sees an image: None its own, a number for the short side, or height and
            width, with PIL's bilinear filter as torchvision's ``Resize``.
        hard: ``drop`` leaves out objects that are cut off or hard to see (LOST's ``--no_hard``); an image
            with no other then has no box.
        batch_size: images per device; those of one size go through the network together.
        num_workers: processes that read images.

    Raises:
        UserError: a setting is out of range.
    """

    def __init__(
        self,
        root: str | None = None,
        *,
        year: Literal[2012, 2007] = 2012,
        task: Task = "segmentation",
        split: str = "val",
        size: tuple[int, int] | int | None = None,
        hard: Hard = "keep",
        batch_size: int = 16,
        num_workers: int = 2,
    ) -> None:
        super().__init__()
        if root is None:
            raise UserError("images with objects need a folder: give --data.root (VOCdevkit/VOC2012)")
        sides = (size,) if isinstance(size, int) else tuple(size or ())
        if batch_size < 1 or num_workers < 0 or min(sides, default=1) < 1:
            raise UserError("data: batch_size and size must be at least 1, num_workers at least 0")
        self.source = VocObjects(root, year, task, split, hard)
        self.size = size if isinstance(size, int) or size is None else (size[0], size[1])
        self.batch_size, self.num_workers = batch_size, num_workers

    def setup(self, stage: str | None = None) -> None:
        """List the images.

        Raises:
            UserError: the layout is not there, the list is empty, or one of its files is missing.
        """
        self.source.listed()

    def count(self) -> int:
        """Images of the split."""
        return len(self.source.listed()[1])

    def train_dataloader(self) -> ClipLoader:
        """There is none.

        Raises:
            UserError: always.
        """
        raise UserError("object discovery trains nothing: use `evaluate`")

    def val_dataloader(self) -> ClipLoader:
        """Every image exactly once over all devices.

        Raises:
            UserError: there are fewer images than devices.
        """
        total = self.count()
        order = each_once(total, self._world, f"{self.source.root}: {total} images")
        return ClipLoader(
            _Scenes(self.source, self.size, order),
            batch_size=self.batch_size,
            sampler=RequestSampler(order, self._rank, HELD_OUT_EPOCH),
            collate_fn=collate,
            num_workers=self.num_workers,
            seed=0,
        )


class _Scenes(Dataset[Scene]):
    """Images at the size at which the network sees them; a file that cannot be read ends the run."""

    def __init__(self, source: VocObjects, size: tuple[int, int] | int | None, order: Order) -> None:
        self.source, self.size, self.order = source, size, order

    def __len__(self) -> int:
        return self.order.length

    def __getitem__(self, request: Request) -> Scene:
        scene = self.source.read(self.order.item(*request))
        return replace(scene, image=resized(scene.image, self.size))


def collate(scenes: Sequence[Scene]) -> ObjectBatch:
    """A batch of images, which may differ in size."""
    images = [torch.from_numpy(np.ascontiguousarray(scene.image.transpose(2, 0, 1))) for scene in scenes]
    objects = [None if s.objects is None else torch.from_numpy(s.objects) for s in scenes]
    return ObjectBatch(
        images=tuple(images),
        sizes=tuple(scene.size for scene in scenes),
        boxes=tuple(torch.from_numpy(scene.boxes) for scene in scenes),
        objects=tuple(objects),
        index=torch.tensor([scene.index for scene in scenes], dtype=torch.int64),
        names=tuple(scene.name for scene in scenes),
    )


def read_boxes(path: Path, easy: bool = False) -> Array:
    """The boxes of a VOC annotation, ``(k, 4)`` float64: left, top, right, bottom in pixels from 0.

    The file counts pixels from 1 and includes the last one, so 1 is taken from left and top (LOST
    ``datasets.py``, ``extract_gt_VOC``). Parts of objects (VOC's ``<part>``) are no objects.

    Args:
        path: of the XML file.
        easy: leaves out objects marked as truncated or difficult.

    Raises:
        UserError: the file cannot be read, or an object has no box.
    """
    try:
        found = ElementTree.parse(path).getroot().findall("object")
        boxes = [_box(one) for one in found if not (easy and _is_hard(one))]
    except (OSError, ElementTree.ParseError, ValueError) as error:
        raise UserError(f"{path}: cannot be read: {' '.join(str(error).split())}") from error
    return np.array(boxes, np.float64).reshape(-1, 4)


def _is_hard(one: ElementTree.Element) -> bool:
    return any(one.findtext(mark, "0").strip() == "1" for mark in ("truncated", "difficult"))


def _box(one: ElementTree.Element) -> tuple[float, float, float, float]:
    said = [one.findtext(f"bndbox/{side}") for side in ("xmin", "ymin", "xmax", "ymax")]
    left, top, right, bottom = (float(text) if text else float("nan") for text in said)
    if not (left - 1 < right and top - 1 < bottom):  # nor where a side is missing
        raise ValueError(f"an object {one.findtext('name')!r} has no box: {said}")
    return left - 1, top - 1, right, bottom


def resized(image: Array, size: tuple[int, int] | int | None) -> Array:
    """An image ``(H, W, 3)`` uint8 at another size: see ``ObjectDataModule.size``."""
    height, width = image.shape[:2]
    if size is None:
        return image
    if isinstance(size, int):
        short = min(height, width)
        size = (int(size * height / short), int(size * width / short))
    made: Any = Image.fromarray(image).resize((size[1], size[0]), Image.Resampling.BILINEAR)
    return np.asarray(made)

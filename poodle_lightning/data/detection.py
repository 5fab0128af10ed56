"""Images with boxes, classes and masks of their objects in batches; layouts in ``data.coco_objects``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from poodle_lightning.data.coco_objects import LEAST, CocoObjects, DetectionName, Split, mask_api
from poodle_lightning.data.detection_views import DetectionTestView, DetectionTrainView
from poodle_lightning.data.label_files import Array
from poodle_lightning.data.loading import SharedDataModule, each_once, whole_batches
from poodle_lightning.data.order import ClipLoader, Order, Request, RequestSampler, batches_used
from poodle_lightning.data.video import HELD_OUT_EPOCH
from poodle_lightning.ops.random import key_of
from poodle_lightning.types import ClassSet, UserError


@dataclass(frozen=True)
class DetectionBatch:
    """Images of any sizes, each with its objects, all in pixels of the view.

    Args:
        images: ``(3, h, w)`` uint8 RGB each.
        boxes: ``(k, 4)`` float32 each: left, top, right, bottom. Empty in a test.
        labels: ``(k,)`` int64 each, 0 = the first class. Empty in a test.
        masks: ``(k, h, w)`` uint8 each, or None where no masks are wanted.
        sizes: height and width of each image's file.
        shown: height and width of that part of the view that is image, from its upper left corner; only of
            use in a test, where nothing is cut off.
        ids: of the images, as the annotations have them.
        key: ``(B,)`` int64, f(seed, epoch, index); stays on the host.
    """

    images: tuple[Tensor, ...]
    boxes: tuple[Tensor, ...]
    labels: tuple[Tensor, ...]
    masks: tuple[Tensor, ...] | None
    sizes: tuple[tuple[int, int], ...]
    shown: tuple[tuple[int, int], ...]
    ids: tuple[int, ...]
    key: Tensor

    def __len__(self) -> int:
        return len(self.images)

    def to(self, device: torch.device | str, non_blocking: bool | None = None) -> DetectionBatch:
        """Moved to a device (to CUDA without waiting); sizes, ids and keys stay on the host."""
        on = torch.device(device).type == "cuda" if non_blocking is None else non_blocking
        return self._each(lambda x: x.to(device, non_blocking=on))

    def pin_memory(self) -> DetectionBatch:
        """With its tensors in page-locked memory, so that the copy to the device does not block."""
        return self._each(lambda x: x.pin_memory())

    def _each(self, act: Any) -> DetectionBatch:
        masks = None if self.masks is None else tuple(map(act, self.masks))
        parts: dict[str, Any] = {
            name: tuple(map(act, getattr(self, name))) for name in ("images", "boxes", "labels")
        }
        return replace(self, masks=masks, **parts)


@dataclass(frozen=True)
class _Item:
    image: Array
    boxes: Array
    labels: Array
    masks: Array | None
    size: tuple[int, int]
    shown: tuple[int, int]
    id: int
    key: Tensor


class _Images(Dataset[_Item]):
    """Views of a split's images."""

    def __init__(
        self,
        source: CocoObjects,
        order: Order,
        view: DetectionTrainView | DetectionTestView,
        seed: int,
        masks: bool,
    ) -> None:
        self.source, self.order, self.view, self.seed, self.masks = source, order, view, seed, masks

    def __len__(self) -> int:
        return self.order.length

    def __getitem__(self, request: Request) -> _Item:
        epoch, position = request
        item = self.order.item(epoch, position)
        number = item % len(self.source.images)
        key = key_of(self.seed, epoch, number, item // len(self.source.images))
        image = self.source.read(number)
        size = (image.shape[0], image.shape[1])
        boxes, labels, masks = np.zeros((0, 4), np.float32), np.zeros(0, np.int64), None
        if isinstance(self.view, DetectionTrainView):
            placed = self.view.place(size, key)
            boxes, labels, drawn = self.source.truth(number, self.masks)
            boxes = placed.boxes(boxes, size).astype(np.float32)  # what is left of a box once it is rounded
            kept = np.asarray((boxes[:, 2:] - boxes[:, :2] > LEAST).all(axis=1))
            boxes, labels = boxes[kept], labels[kept]
            if self.masks:
                shown = [placed.mask(mask) for mask, keep in zip(drawn, kept.tolist(), strict=True) if keep]
                masks = np.stack(shown) if shown else np.zeros((0, *placed.view), np.uint8)
        else:
            placed = self.view.place(size)
        identity = int(self.source.images[number]["id"])
        return _Item(placed.image(image), boxes, labels, masks, size, placed.size, identity, key)


def collate(items: Sequence[_Item]) -> DetectionBatch:
    """A batch of images, which may differ in size."""
    masks = [torch.from_numpy(np.ascontiguousarray(i.masks)) for i in items if i.masks is not None]
    return DetectionBatch(
        images=tuple(torch.from_numpy(np.ascontiguousarray(i.image.transpose(2, 0, 1))) for i in items),
        boxes=tuple(torch.from_numpy(i.boxes) for i in items),
        labels=tuple(torch.from_numpy(i.labels) for i in items),
        masks=tuple(masks) if len(masks) == len(items) else None,
        sizes=tuple(i.size for i in items),
        shown=tuple(i.shown for i in items),
        ids=tuple(i.id for i in items),
        key=torch.stack([i.key for i in items]),
    )


class DetectionDataModule(SharedDataModule):
    """COCO 2017 or LVIS v1 for training and scoring a detector.

    Training: an order that is a function of the seed and the epoch; it can stop and go on at any batch.
    Held-out data: every image exactly once over all devices.

    Args:
        source: which.
        root: see ``data.coco_objects``.
        train: the random view; None is detectron2's.
        test: how the network sees a test image; None is detectron2's.
        masks: masks in training, for Mask R-CNN.
        batch_size: images per device and step.
        val_batch_size: images per device in a test.
        num_workers: processes that read images.
        seed: of the order and of all draws; None is 0, or ``seed_everything`` on the command line.

    Raises:
        UserError: a setting is out of range.
    """

    def __init__(
        self,
        source: DetectionName = "coco",
        root: str | None = None,
        *,
        train: DetectionTrainView | None = None,
        test: DetectionTestView | None = None,
        masks: bool = True,
        batch_size: int = 16,
        val_batch_size: int = 1,
        num_workers: int = 2,
        seed: int | None = None,
    ) -> None:
        super().__init__()
        if root is None:
            raise UserError(f"{source} needs a folder: give --data.root, the one that holds annotations")
        if min(batch_size, val_batch_size) < 1 or num_workers < 0:
            raise UserError("data: batch_size and val_batch_size must be at least 1, num_workers at least 0")
        self.root, self.source_name, self.masks, self.seed = Path(root), source, masks, seed or 0
        self.train_view, self.test_view = train or DetectionTrainView(), test or DetectionTestView()
        self.batch_size, self.val_batch_size, self.num_workers = batch_size, val_batch_size, num_workers
        self._sources: dict[Split, CocoObjects] = {}
        self._resumed_order: dict[str, int] | None = None

    @property
    def federated(self) -> bool:
        """Whether only some classes are judged in an image (LVIS)."""
        return self.source_name == "lvis"

    @property
    def classes(self) -> ClassSet:
        """Names of the classes, in the order of their ids."""
        loaded = self._sources.get("train") or self.objects("val")
        return ClassSet(tuple(str(one["name"]) for one in loaded.categories))

    def objects(self, split: Split) -> CocoObjects:
        """A split, read once.

        Raises:
            UserError: see ``CocoObjects``; or the splits have other classes.
        """
        if split not in self._sources:
            masks = self.masks and split == "train"
            found = CocoObjects(self.root, self.source_name, split, masks)
            for other in self._sources.values():
                if list(other.numbers) != list(found.numbers):
                    raise UserError(f"{found.path}: has other classes than {other.path.name}")
            self._sources[split] = found
        return self._sources[split]

    def setup(self, stage: str | None = None) -> None:
        """Read the annotations and look for the images.

        Raises:
            UserError: see ``CocoObjects``; masks are wanted and cannot be drawn.
        """
        for split in ("train", "val") if stage in ("fit", None) else ("val",):
            self.objects(split)
        mask_api()

    def train_dataloader(self) -> ClipLoader:
        """Random views in batches of ``batch_size``; starts where training stands."""
        source = self.objects("train")
        order = whole_batches(len(source.images), self.batch_size, self._world, self.seed)
        requests = RequestSampler(order, self._rank)
        data = _Images(source, order, self.train_view, self.seed, self.masks)
        return self._loader(data, requests, self.batch_size, consumed=self._consumed)

    def val_dataloader(self) -> ClipLoader:
        """Every held-out image exactly once over all devices.

        Raises:
            UserError: there are fewer images than devices.
        """
        source = self.objects("val")
        total = len(source.images)
        order = each_once(total, self._world, f"{self.root}: {total} images")
        requests = RequestSampler(order, self._rank, HELD_OUT_EPOCH)
        return self._loader(
            _Images(source, order, self.test_view, self.seed, False), requests, self.val_batch_size
        )

    def _loader(self, data: _Images, requests: RequestSampler, batch_size: int, **kwargs: Any) -> ClipLoader:
        return ClipLoader(
            data,
            batch_size=batch_size,
            sampler=requests,
            collate_fn=collate,
            num_workers=self.num_workers,
            seed=self.seed,
            **kwargs,
        )

    # ---- going on
    def state_dict(self) -> dict[str, Any]:
        """What the order depends on, as plain data."""
        return {"order": self._order_facts()} if "train" in self._sources else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Remembers the order for a check when the epoch goes on."""
        self._resumed_order = state_dict.get("order")

    def _order_facts(self) -> dict[str, int]:
        images = len(self.objects("train").images)
        return {"images": images, "images per step": self.batch_size * self._world, "seed": self.seed}

    def _consumed(self) -> int:
        if self.trainer is None or not self.trainer.training:
            return 0
        before, self._resumed_order = self._resumed_order, None
        return batches_used(self.trainer, before, self._order_facts())

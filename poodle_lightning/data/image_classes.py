"""Images with one class each, in batches: for k-NN, linear and finetuned classification.

Which data sets there are and how they lie on disk: ``data.image_sets``; what a network is shown of an image:
``data.image_views``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from poodle_lightning.data.image_sets import ImageSet, Source, open_images
from poodle_lightning.data.image_views import ImageViews
from poodle_lightning.data.label_files import Array
from poodle_lightning.data.label_sources import SPLITS, Split
from poodle_lightning.data.loading import SharedDataModule, each_once
from poodle_lightning.data.order import ClipLoader, Order, Request, RequestSampler
from poodle_lightning.data.video import HELD_OUT_EPOCH
from poodle_lightning.ops.random import key_of, permutation
from poodle_lightning.types import ClassSet, UserError

__all__ = ["ImageBatch", "ImageClassDataModule", "ImageViews"]


@dataclass(frozen=True)
class ImageBatch:
    """Images with a class each.

    Args:
        images: ``(B, 3, H, W)`` uint8 RGB; float16 from 0 to 255 with ``ImageViews.erase``.
        labels: ``(B,)`` int64.
        index: ``(B,)`` int64, place in the split; stays on the host.
        names: of the files; stays on the host.
    """

    images: Tensor
    labels: Tensor
    index: Tensor
    names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.images)

    def to(self, device: torch.device | str, non_blocking: bool | None = None) -> ImageBatch:
        """Moved to a device (to CUDA without waiting); index and names stay on the host."""
        on = torch.device(device).type == "cuda" if non_blocking is None else non_blocking
        images, labels = (part.to(device, non_blocking=on) for part in (self.images, self.labels))
        return replace(self, images=images, labels=labels)

    def pin_memory(self) -> ImageBatch:
        """With its tensors in page-locked memory, so that the copy to the device does not block."""
        return replace(self, images=self.images.pin_memory(), labels=self.labels.pin_memory())


class ImageClassDataModule(SharedDataModule):
    """Images with a class each, for k-NN, linear and finetuned classification.

    Training: random crops in an order that is a function of the seed and the epoch. ``memory_dataloader`` and
    ``val_dataloader``: every image exactly once over all devices, as a test sees it.

    Args:
        root: the folder of the data set.
        views: what a network is shown.
        batch_size: images per device and step.
        val_batch_size: images per device in a test.
        num_workers: processes that read images.
        seed: of the order and of all draws; None is 0, or ``seed_everything`` on the command line.
        subset: share of the training images of every class that is used, drawn by the seed, at least one.
        source: the layout, see ``data.image_sets``: ``folder``, ``cifar10``, ``cifar100``, ``flowers102``,
            ``cars`` or ``inat18``.
        repeats: times that an image comes in a row in training, another view each time (repeated
            augmentation, Hoffer et al., 2020; DeiT: 3). An epoch has as many views as without, so of fewer
            images; with several devices the views of an image are on different ones.

    Raises:
        UserError: a setting is out of range, something is missing, or classes differ between the splits.
    """

    def __init__(
        self,
        root: str | None = None,
        *,
        views: ImageViews | None = None,
        batch_size: int = 256,
        val_batch_size: int = 64,
        num_workers: int = 2,
        seed: int | None = None,
        subset: float = 1.0,
        source: Source = "folder",
        repeats: int = 1,
    ) -> None:
        super().__init__()
        if root is None:
            raise UserError("images with classes need a folder: give --data.root")
        if min(batch_size, val_batch_size) < 1 or num_workers < 0 or not 0 < subset <= 1:
            raise UserError(
                "data: batch sizes must be at least 1, num_workers at least 0, subset above 0 up to 1"
            )
        if repeats < 1:
            raise UserError(f"data: repeats {repeats} must be at least 1; 1 shows an image once")
        self.root, self.views = Path(root), views or ImageViews()
        self.batch_size, self.val_batch_size, self.num_workers = batch_size, val_batch_size, num_workers
        self.seed, self.subset, self.repeats = seed or 0, subset, repeats
        self._opened = open_images(source, self.root)
        self.classes = ClassSet(self._opened.classes)
        self._images: dict[Split, ImageSet] = {}

    def setup(self, stage: str | None = None) -> None:
        """List the images.

        Raises:
            UserError: a class has no image.
        """
        for split in SPLITS:
            self.images(split)

    def images(self, split: Split) -> ImageSet:
        """The images of a split with their labels; of ``train`` the subset.

        Raises:
            UserError: a class has no image.
        """
        if split not in self._images:
            self._images[split] = self._listed(split)
        return self._images[split]

    def _listed(self, split: Split) -> ImageSet:
        found = self._opened.split(split)
        each = np.bincount(found.labels, minlength=len(self.classes))
        if lacking := np.flatnonzero(each == 0).tolist():
            name = self.classes.names[lacking[0]]
            more = f" (and {len(lacking) - 1} more)" if len(lacking) > 1 else ""
            raise UserError(
                f"{self.root}: the class {name} has no image in {split}{more}: add some, or remove the class"
            )
        if split == "val" or self.subset == 1:
            return found
        by_class = np.split(found.labels.argsort(kind="stable"), each.cumsum()[:-1])
        kept: list[int] = []
        for label, places in enumerate(by_class):
            drawn = permutation(key_of(self.seed, "subset", label).reshape(1), len(places))[0]
            chosen = drawn[: max(1, round(self.subset * len(places)))].sort().values
            kept += places[chosen.numpy()].tolist()
        return found.part(kept)

    def count(self, split: Split) -> int:
        """Images that are used of a split."""
        return len(self.images(split))

    # ---- loaders
    def train_dataloader(self) -> ClipLoader:
        """Random crops in batches of ``batch_size``; starts where training stands."""
        total, batch = self.count("train"), self.batch_size * self._world
        passes = max(1, -(-batch // total))
        order = Repeated(self.repeats, total, passes, total * passes // batch * batch, self._world, self.seed)
        return self._loader("train", order, None, self.batch_size, consumed=self._consumed)

    def val_dataloader(self) -> ClipLoader:
        """Every held-out image exactly once over all devices, as a test sees it."""
        return self._whole("val")

    def memory_dataloader(self) -> ClipLoader:
        """Every training image (of the subset) exactly once over all devices, as a test sees it."""
        return self._whole("train")

    def _whole(self, split: Split) -> ClipLoader:
        total = self.count(split)
        order = each_once(total, self._world, f"{self.root}: {total} images of the split {split}")
        return self._loader(split, order, HELD_OUT_EPOCH, self.val_batch_size)

    def _loader(
        self, split: Split, order: Order, epoch: int | None, batch_size: int, **kwargs: Any
    ) -> ClipLoader:
        views = _Views(self.images(split), order, self.views, self.seed, random=epoch is None)
        return ClipLoader(
            views,
            batch_size=batch_size,
            sampler=RequestSampler(order, self._rank, epoch),
            collate_fn=_collate,
            num_workers=self.num_workers,
            seed=self.seed,
            **kwargs,
        )


class Repeated(Order):
    """Every item several times in a row; see ``ImageClassDataModule.repeats``.

    Item ``i`` is image ``i mod videos``, and each of its views is another item.

    Args:
        repeats: how often.
        *args: of ``Order``.
    """

    def __init__(self, repeats: int, *args: Any) -> None:
        super().__init__(*args)
        self.repeats = repeats

    def item(self, epoch: int, position: int) -> int:
        """The item at a position."""
        place, view = divmod(position % self.length, self.repeats)
        return super().item(epoch, place) + view * self.videos * self.passes


class _Views(Dataset[tuple[Array, int, int, str]]):
    """Views of a split's images; an image that cannot be read ends the run with its name."""

    def __init__(self, images: ImageSet, order: Order, views: ImageViews, seed: int, random: bool) -> None:
        self.images, self.order, self.views, self.seed, self.random = images, order, views, seed, random

    def __len__(self) -> int:
        return self.order.length

    def __getitem__(self, request: Request) -> tuple[Array, int, int, str]:
        epoch, position = request
        item = self.order.item(epoch, position)
        index = item % len(self.images)
        image, label = self.images.read(index), int(self.images.labels[index])
        if self.random:
            view = self.views.train(image, key_of(self.seed, epoch, index, item // len(self.images)))
        else:
            view = self.views.test(image)
        return view, label, index, self.images.names[index]


def _collate(items: Sequence[tuple[Array, int, int, str]]) -> ImageBatch:
    images, labels, index, names = zip(*items, strict=True)
    stacked = np.stack([np.ascontiguousarray(image.transpose(2, 0, 1)) for image in images])
    return ImageBatch(torch.from_numpy(stacked), torch.tensor(labels), torch.tensor(index), tuple(names))

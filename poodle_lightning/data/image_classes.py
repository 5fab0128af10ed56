"""Images with one class each: a folder per class, as ImageNet is laid out for torchvision's ``ImageFolder``.

::

    root/train/<class>/**/*.jpg
    root/val/<class>/**/*.jpg

Classes are the names of the folders in ``train``, sorted. Files are listed in the order of their paths.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from poodle_lightning.data.label_files import IMAGES, Array, read_image
from poodle_lightning.data.label_sources import SPLITS, Split
from poodle_lightning.data.order import ClipLoader, Order, Request, RequestSampler
from poodle_lightning.data.video import HELD_OUT_EPOCH, single_thread
from poodle_lightning.ops.random import bernoulli, fold, key_of, permutation, randint, uniform
from poodle_lightning.types import ClassSet, UserError

_TRIES = 10  # torchvision's RandomResizedCrop


@dataclass(frozen=True)
class ImageBatch:
    """Images with a class each.

    Args:
        images: ``(B, 3, H, W)`` uint8 RGB.
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


@dataclass(frozen=True)
class ImageViews:
    """What a network is shown of an image; the defaults are DINO's ``eval_linear.py``.

    Args:
        size: height and width, px.
        resize: the short side in a test, before the centre is cut out.
        scale: share of the image's area that a random crop covers.
        ratio: its width over height.
        flip: probability of a mirror image.
    """

    size: int = 224
    resize: int = 256
    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: float = 0.5

    def __post_init__(self) -> None:
        if not 1 <= self.size <= self.resize:
            raise UserError(f"views: size {self.size} must be from 1 to resize, {self.resize}")

    def test(self, image: Array) -> Array:
        """Short side to ``resize`` with PIL's bicubic filter, then the centre; ``(size, size, 3)`` uint8."""
        height, width = image.shape[:2]
        short = min(height, width)
        whole = [int(self.resize * side / short) for side in (width, height)]
        made = np.asarray(Image.fromarray(image).resize((whole[0], whole[1]), Image.Resampling.BICUBIC))
        top, left = (round((side - self.size) / 2) for side in made.shape[:2])
        return made[top : top + self.size, left : left + self.size]

    def train(self, image: Array, key: Tensor) -> Array:
        """A random crop at ``size`` with PIL's bilinear filter, mirrored or not; draws from a key ``()``."""
        key = key.reshape(1)
        top, left, height, width = self.box((image.shape[0], image.shape[1]), fold(key, "crop"))
        part = Image.fromarray(np.ascontiguousarray(image[top : top + height, left : left + width]))
        made = np.asarray(part.resize((self.size, self.size), Image.Resampling.BILINEAR))
        return made[:, ::-1] if bool(bernoulli(fold(key, "flip"), self.flip)[0, 0]) else made

    def box(self, size: tuple[int, int], key: Tensor) -> tuple[int, int, int, int]:
        """Top, left, height and width of a random crop: area uniform, aspect uniform in its logarithm.

        The first of ten draws that lies inside, else the largest centred crop of an allowed aspect, as
        torchvision's ``RandomResizedCrop`` has it.
        """
        rows, columns = size
        low, high = (math.log(end) for end in self.ratio)
        draws = uniform(key, 2 * _TRIES, dtype=torch.float64)[0].reshape(_TRIES, 2).tolist()
        for number, (area, aspect) in enumerate(draws):
            target = rows * columns * (self.scale[0] + area * (self.scale[1] - self.scale[0]))
            ratio = math.exp(low + aspect * (high - low))
            width, height = round(math.sqrt(target * ratio)), round(math.sqrt(target / ratio))
            if 0 < width <= columns and 0 < height <= rows:
                place = fold(key, "place", number)
                top = int(randint(fold(place, "top"), rows - height + 1))
                return top, int(randint(fold(place, "left"), columns - width + 1)), height, width
        height, width = rows, columns
        if columns / rows < self.ratio[0]:
            height = round(columns / self.ratio[0])
        elif columns / rows > self.ratio[1]:
            width = round(rows * self.ratio[1])
        return (rows - height) // 2, (columns - width) // 2, height, width


class ImageClassDataModule(L.LightningDataModule):
    """Images with a class each, for k-NN and linear classification.

    Training: random crops in an order that is a function of the seed and the epoch. ``memory_dataloader`` and
    ``val_dataloader``: every image exactly once over all devices, as a test sees it.

    Args:
        root: the folder with ``train`` and ``val``.
        views: what a network is shown.
        batch_size: images per device and step.
        val_batch_size: images per device in a test.
        num_workers: processes that read images.
        seed: of the order and of all draws; None is 0, or ``seed_everything`` on the command line.
        subset: share of the training images of every class that is used, drawn by the seed, at least one.

    Raises:
        UserError: a setting is out of range, a folder is missing, or classes differ between the splits.
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
    ) -> None:
        super().__init__()
        if root is None:
            raise UserError("images with classes need a folder: give --data.root")
        if min(batch_size, val_batch_size) < 1 or num_workers < 0 or not 0 < subset <= 1:
            raise UserError(
                "data: batch sizes must be at least 1, num_workers at least 0, subset above 0 up to 1"
            )
        self.root, self.views = Path(root), views or ImageViews()
        self.batch_size, self.val_batch_size, self.num_workers = batch_size, val_batch_size, num_workers
        self.seed, self.subset = seed or 0, subset
        self.classes = ClassSet(_class_names(self.root))
        self._files: dict[Split, list[tuple[Path, int]]] = {}

    def setup(self, stage: str | None = None) -> None:
        """List the images.

        Raises:
            UserError: a class has no image.
        """
        for split in SPLITS:
            self.files(split)

    def files(self, split: Split) -> list[tuple[Path, int]]:
        """Images of a split with their labels; of ``train`` the subset.

        Raises:
            UserError: a class has no image.
        """
        if split not in self._files:
            self._files[split] = self._listed(split)
        return self._files[split]

    def _listed(self, split: Split) -> list[tuple[Path, int]]:
        found: list[tuple[Path, int]] = []
        for label, name in enumerate(self.classes.names):
            folder = self.root / split / name
            paths = sorted(
                Path(where, file)
                for where, _, files in os.walk(folder, followlinks=True)
                for file in files
                if file.lower().endswith(IMAGES)
            )
            if not paths:
                raise UserError(f"{folder}: the class {name} has no image in {split}: add some, or remove it")
            if split == "train" and self.subset < 1:
                drawn = permutation(key_of(self.seed, "subset", label).reshape(1), len(paths))[0]
                kept = sorted(drawn[: max(1, round(self.subset * len(paths)))].tolist())
                paths = [paths[place] for place in kept]
            found += [(path, label) for path in paths]
        return found

    def count(self, split: Split) -> int:
        """Images that are used of a split."""
        return len(self.files(split))

    # ---- loaders
    def train_dataloader(self) -> ClipLoader:
        """Random crops in batches of ``batch_size``; starts where training stands."""
        total, batch = self.count("train"), self.batch_size * self._world
        passes = max(1, -(-batch // total))
        order = Order(total, passes, total * passes // batch * batch, self._world, self.seed)
        return self._loader("train", order, None, self.batch_size, consumed=self._consumed)

    def val_dataloader(self) -> ClipLoader:
        """Every held-out image exactly once over all devices, as a test sees it."""
        return self._whole("val")

    def memory_dataloader(self) -> ClipLoader:
        """Every training image (of the subset) exactly once over all devices, as a test sees it."""
        return self._whole("train")

    def _whole(self, split: Split) -> ClipLoader:
        total = self.count(split)
        if total < self._world:
            raise UserError(f"{self.root}: {total} images of the split {split} for {self._world} devices")
        order = Order(total, 1, total, self._world, shuffle=False)
        return self._loader(split, order, HELD_OUT_EPOCH, self.val_batch_size)

    def _loader(
        self, split: Split, order: Order, epoch: int | None, batch_size: int, **kwargs: Any
    ) -> ClipLoader:
        views = _Views(self.files(split), order, self.views, self.seed, random=epoch is None)
        return ClipLoader(
            views,
            batch_size=batch_size,
            sampler=RequestSampler(order, 0 if self.trainer is None else self.trainer.global_rank, epoch),
            collate_fn=_collate,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            worker_init_fn=single_thread,
            pin_memory=torch.cuda.is_available(),
            # its own generator: making an iterator must not advance the global one
            generator=torch.Generator().manual_seed(self.seed),
            **kwargs,
        )

    def _consumed(self) -> int:
        """Batches of this epoch that were used: Lightning's own count, right after a restart too."""
        if self.trainer is None or not self.trainer.training:
            return 0
        return int(self.trainer.fit_loop.epoch_loop.batch_progress.current.ready)

    @property
    def _world(self) -> int:
        return 1 if self.trainer is None else self.trainer.world_size


class _Views(Dataset[tuple[Array, int, int, str]]):
    """Views of a split's images; an image that cannot be read ends the run with its name."""

    def __init__(
        self, files: Sequence[tuple[Path, int]], order: Order, views: ImageViews, seed: int, random: bool
    ) -> None:
        self.files, self.order, self.views, self.seed, self.random = files, order, views, seed, random

    def __len__(self) -> int:
        return self.order.length

    def __getitem__(self, request: Request) -> tuple[Array, int, int, str]:
        epoch, position = request
        item = self.order.item(epoch, position)
        index = item % len(self.files)
        path, label = self.files[index]
        image = read_image(path)
        if self.random:
            key = key_of(self.seed, epoch, index, item // len(self.files))
            return self.views.train(image, key), label, index, str(path)
        return self.views.test(image), label, index, str(path)


def _collate(items: Sequence[tuple[Array, int, int, str]]) -> ImageBatch:
    images, labels, index, names = zip(*items, strict=True)
    stacked = np.stack([np.ascontiguousarray(image.transpose(2, 0, 1)) for image in images])
    return ImageBatch(torch.from_numpy(stacked), torch.tensor(labels), torch.tensor(index), tuple(names))


def _class_names(root: Path) -> tuple[str, ...]:
    found: list[list[str]] = []
    for split in SPLITS:
        folder = root / split
        if not folder.is_dir():
            raise UserError(f"{folder}: no such folder; it must hold one folder of images per class")
        found.append(sorted(entry.name for entry in folder.iterdir() if entry.is_dir()))
    train, val = found
    if not train:
        raise UserError(f"{root / 'train'}: holds no folders; each class needs one")
    if lacking := sorted(set(train) - set(val)):
        raise UserError(
            f"{root / 'val'}: the class {lacking[0]} of train is not there (and {_more(lacking)})"
        )
    if strange := sorted(set(val) - set(train)):
        raise UserError(f"{root / 'val'}: the class {strange[0]} is not in train (and {_more(strange)})")
    return tuple(train)


def _more(names: Sequence[str]) -> str:
    return f"{len(names) - 1} more"

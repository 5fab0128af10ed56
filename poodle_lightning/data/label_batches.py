"""Labelled images one by one, and as batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from poodle_lightning.data.label_files import Array
from poodle_lightning.data.label_sources import LabelSource, Split
from poodle_lightning.data.label_views import TestView, TrainView
from poodle_lightning.data.order import Order, Request
from poodle_lightning.ops.random import key_of
from poodle_lightning.types import IGNORE, LabelledBatch, UserError


@dataclass(frozen=True)
class Example:
    """One labelled image before it is put in a batch: ``(H, W, 3)`` and ``(h, w)`` uint8."""

    image: Array
    labels: Array
    index: int
    key: Tensor
    name: str


class LabelledDataset(Dataset[Example]):
    """Views of a split's images.

    Args:
        source: reads them.
        split: which.
        numbers: places in the split.
        order: which of ``numbers`` stands at which position of an epoch.
        view: a random one for training, or a test's.
        seed: of all draws.
    """

    def __init__(
        self,
        source: LabelSource,
        split: Split,
        numbers: Sequence[int],
        order: Order,
        view: TrainView | TestView,
        seed: int = 0,
    ) -> None:
        self.source, self.split, self.numbers, self.order = source, split, numbers, order
        self.view, self.seed = view, seed
        self.names = source.names(split)

    def __len__(self) -> int:
        """Positions in an epoch, of all ranks together."""
        return self.order.length

    def __getitem__(self, request: Request | int) -> Example:
        """The view at a position; a bare position is of epoch 0.

        Raises:
            UserError: image or mask is not what it should be, or nothing of a held-out image is labelled.
        """
        epoch, position = (0, request) if isinstance(request, int) else request
        item = self.order.item(epoch, position)
        index = int(self.numbers[item % len(self.numbers)])
        image, labels = self.source.read(self.split, index)
        if self.split == "val" and (labels == IGNORE).all():
            raise UserError(f"{self.names[index]}: every pixel is ignored: there is nothing to measure")
        # an epoch of several passes takes an image several times, with other draws
        key = key_of(self.seed, epoch, index, item // len(self.numbers))
        if isinstance(self.view, TrainView):
            image, labels = self.view(image, labels, key)
        else:
            image = self.view(image)
        return Example(image, labels, index, key, self.names[index])


def collate(examples: Sequence[Example]) -> LabelledBatch:
    """A batch of images of one size.

    Raises:
        UserError: the sizes differ.
    """
    for what in ("image", "labels"):
        heights = [getattr(example, what).shape[:2] for example in examples]
        for example, (height, width) in zip(examples, heights, strict=True):
            if (height, width) != heights[0]:
                sizes = f"{what} of {width}×{height} px beside {heights[0][1]}×{heights[0][0]} px"
                raise UserError(
                    f"{example.name}: {sizes} of {examples[0].name}: a batch needs one size; set"
                    " val_batch_size to 1, in training a crop"
                )
    images = np.stack([np.ascontiguousarray(example.image.transpose(2, 0, 1)) for example in examples])
    return LabelledBatch(
        images=torch.from_numpy(images),
        labels=torch.from_numpy(np.stack([example.labels for example in examples])),
        index=torch.tensor([example.index for example in examples], dtype=torch.int64),
        key=torch.stack([example.key for example in examples]),
        names=tuple(example.name for example in examples),
    )

"""The data module of readouts: labelled images on disk to batches with a class per pixel."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from poodle_lightning.data.label_batches import LabelledDataset, collate
from poodle_lightning.data.label_checks import Finding, Survey, survey
from poodle_lightning.data.label_folder import FolderLabels, read_groups
from poodle_lightning.data.label_lists import CocoSource, VocSource
from poodle_lightning.data.label_sources import LabelSource, LayoutSource, Split
from poodle_lightning.data.label_streets import StreetLabels, SyntheticLabels
from poodle_lightning.data.label_views import TestView, TrainView, covering
from poodle_lightning.data.loading import SharedDataModule, each_once, whole_batches
from poodle_lightning.data.order import ClipLoader, Order, RequestSampler, batches_used
from poodle_lightning.data.video import HELD_OUT_EPOCH
from poodle_lightning.ops.random import key_of, permutation
from poodle_lightning.types import ClassSet, LabelledBatch, UserError

LabelledName = Literal["folder", "bdd100k", "cityscapes", "ade20k", "voc", "coco", "wt_sem", "synthetic"]
# FlowE's readout on BDD100K, which PooDLe's follows: short side from 512 to 2048, crop 512×1024.
_PAPER_VIEW = TrainView(short_side=(512, 2048))


class LabelledDataModule(SharedDataModule):
    """Labelled images for readouts, from any of the sources in ``poodle_lightning.data.label_sources``.

    Training: random views in an order that is a function of the seed and the epoch, as ``VideoDataModule``'s;
    it can stop and go on at any batch, and nothing depends on the number of workers. Held-out data: every
    image exactly once over all devices, none twice and none left out, so that devices may have unequal
    numbers of batches. What cannot be read or makes no sense stops the run with a line that names the file.

    Args:
        source: the data set; layouts in ``data.label_sources`` and docs/labelled_data.md.
        root: the folder that holds its layout, or the one above; not for ``synthetic``.
        train: the random view; None is FlowE's for BDD100K (short side 512 to 2048, crop 512×1024), and for
            ``synthetic`` the whole image, mirrored or not.
        test: how the network sees an image in a test; None is its own size.
        batch_size: images per device and step.
        val_batch_size: images per device in a test; above 1 they must have one size.
        num_workers: processes that read images.
        seed: of the order and of all draws; None is 0, or ``seed_everything`` on the command line.
        subset: share of the training images that is used, drawn by the seed, at least one.
        groups: a YAML file of class groups, ``{group: [class, …]}``, instead of the data set's own.
        synthetic: what to generate.
        classes_file: of ``folder``: the YAML file of its classes; None is ``<root>/classes.yaml``.
        val_fraction: of ``folder`` without folders for it: share of the images that is held out.
        split_seed: of ``folder``: which images; not ``seed``, so that runs of all seeds are comparable.
        voc_train: of ``voc``: the training list.

    Raises:
        UserError: the settings contradict each other, or a small file that names classes is wrong.
    """

    def __init__(
        self,
        source: LabelledName = "folder",
        root: str | None = None,
        *,
        train: TrainView | None = None,
        test: TestView | None = None,
        batch_size: int = 16,
        val_batch_size: int = 1,
        num_workers: int = 2,
        seed: int | None = None,
        subset: float = 1.0,
        groups: str | None = None,
        synthetic: StreetLabels | None = None,
        classes_file: str | None = None,
        val_fraction: float = 0.2,
        split_seed: int = 0,
        voc_train: Literal["train_aug", "train"] = "train_aug",
    ) -> None:
        super().__init__()
        self.source_name, self.root = source, root
        self.batch_size, self.val_batch_size, self.num_workers = batch_size, val_batch_size, num_workers
        self.seed, self.subset = seed or 0, subset
        self._check()
        whole = TrainView(crop=None) if source == "synthetic" else _PAPER_VIEW
        self.train_view, self.test_view = train or whole, test or TestView()
        if source == "synthetic":
            self.source: LabelSource = SyntheticLabels(synthetic or StreetLabels())
        else:
            assert root is not None
            self.source = _on_disk(source, root, classes_file, val_fraction, split_seed, voc_train)
        self.classes: ClassSet = self.source.classes
        if groups is not None:
            self.classes = replace(self.classes, groups=read_groups(Path(groups), self.classes.names))
        self._resumed_order: dict[str, int] | None = None
        self._numbers: dict[Split, list[int]] = {}

    # ---- what there is
    def setup(self, stage: str | None = None) -> None:
        """List the images.

        Raises:
            UserError: the layout is not there, a split is empty, or images and masks do not match.
        """
        for split in ("train", "val") if stage in ("fit", None) else ("val",):
            self.numbers(split)

    def numbers(self, split: Split) -> list[int]:
        """Places in the split that are used: all, or of ``train`` the subset.

        Raises:
            UserError: the layout is not there, a split is empty, or images and masks do not match.
        """
        if split not in self._numbers:
            total = len(self.source.names(split))
            if problems := self.source.problems(split):
                raise UserError(f"{split}: {problems[0]}; check-data lists what is wrong")
            numbers = list(range(total))
            if split == "train" and self.subset < 1:
                drawn = permutation(key_of(self.seed, "subset").reshape(1), total)[0]
                numbers = sorted(drawn[: max(1, round(self.subset * total))].tolist())
            self._numbers[split] = numbers
        return self._numbers[split]

    def count(self, split: Split) -> int:
        """Images that are used of a split."""
        return len(self.numbers(split))

    def item(self, split: Split, number: int) -> LabelledBatch:
        """One image as a test sees it.

        Args:
            split: ``train`` or ``val``.
            number: place in the split (``LabelledBatch.index``).
        """
        order = Order(1, 1, 1, shuffle=False)
        data = LabelledDataset(self.source, split, [number], order, self.test_view, self.seed)
        return collate([data[HELD_OUT_EPOCH, 0]])

    def sample(self, split: Split, count: int, size: tuple[int, int], seed: int = 0) -> tuple[Tensor, Tensor]:
        """Some images of one size: resized to cover it, cut in the middle.

        Args:
            split: ``train`` (the subset) or ``val``.
            count: how many, none twice.
            size: height and width, px.
            seed: chooses them.

        Returns:
            images ``(N, 3, H, W)`` uint8 RGB, shrunk by averaging, and labels ``(N, H, W)`` uint8, nearest.

        Raises:
            UserError: there are fewer images than ``count``.
        """
        numbers = self.numbers(split)
        if not 1 <= count <= len(numbers):
            raise UserError(
                f"{self._place}: {count} images of the split {split} are wanted, it has {len(numbers)}"
            )
        chosen = permutation(key_of(seed, "sample").reshape(1), len(numbers))[0, :count].tolist()
        pairs = [
            covering(*self.source.read(split, numbers[place]), (int(size[0]), int(size[1])))
            for place in chosen
        ]
        images = np.stack([np.ascontiguousarray(image.transpose(2, 0, 1)) for image, _ in pairs])
        return torch.from_numpy(images), torch.from_numpy(np.stack([labels for _, labels in pairs]))

    def survey(self, split: Split, every_mask: bool = True) -> Survey:
        """What is in a split and what is wrong with it; see ``data.label_checks``."""
        return survey(self.source, split, every_mask, self.num_workers)

    def check(self, split: Split, every_mask: bool = True) -> list[Finding]:
        """What is wrong with a split; ``str`` of a finding is one line.

        Args:
            split: ``train`` or ``val``.
            every_mask: read all images and masks; else only the list of files and the headers.
        """
        return self.survey(split, every_mask).findings

    # ---- loaders
    def train_dataloader(self) -> ClipLoader:
        """Random views in batches of ``batch_size``; starts where training stands."""
        numbers = self.numbers("train")
        order = whole_batches(len(numbers), self.batch_size, self._world, self.seed)
        data = LabelledDataset(self.source, "train", numbers, order, self.train_view, self.seed)
        requests = RequestSampler(order, self._rank)
        return self._loader(data, requests, self.batch_size, consumed=self._consumed)

    def val_dataloader(self) -> ClipLoader:
        """Every held-out image exactly once over all devices, as a test sees it."""
        return self._whole("val")

    def memory_dataloader(self) -> ClipLoader:
        """Every training image (of the subset) exactly once over all devices, as a test sees it."""
        return self._whole("train")

    def _whole(self, split: Split) -> ClipLoader:
        numbers = self.numbers(split)
        what = f"{self._place}: {len(numbers)} images of the split {split}"
        order = each_once(len(numbers), self._world, what)
        data = LabelledDataset(self.source, split, numbers, order, self.test_view, self.seed)
        return self._loader(data, RequestSampler(order, self._rank, HELD_OUT_EPOCH), self.val_batch_size)

    def _loader(
        self, data: LabelledDataset, requests: RequestSampler, batch_size: int, **kwargs: Any
    ) -> ClipLoader:
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
        return {"order": self._order_facts()} if "train" in self._numbers else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Remembers the order for a check when the epoch goes on."""
        self._resumed_order = state_dict.get("order")

    def _order_facts(self) -> dict[str, int]:
        return {
            "images": len(self._numbers["train"]),
            "images per step": self.batch_size * self._world,
            "seed": self.seed,
        }

    def _consumed(self) -> int:
        if self.trainer is None or not self.trainer.training:
            return 0
        before, self._resumed_order = self._resumed_order, None
        return batches_used(self.trainer, before, self._order_facts())

    # ---- settings
    @property
    def _place(self) -> str:
        return self.root or self.source_name

    def _check(self) -> None:
        if self.source_name != "synthetic" and self.root is None:
            raise UserError(f"source {self.source_name} needs a folder: give --data.root")
        if min(self.batch_size, self.val_batch_size) < 1 or self.num_workers < 0:
            raise UserError(
                f"batch_size {self.batch_size} and val_batch_size {self.val_batch_size} must be at least 1,"
                f" num_workers {self.num_workers} at least 0"
            )
        if not 0 < self.subset <= 1:
            raise UserError(f"subset {self.subset}: give a share of the training images, above 0 up to 1")


def _on_disk(
    name: LabelledName, root: str, classes: str | None, val_fraction: float, seed: int, voc_train: str
) -> LabelSource:
    if name == "folder":
        return FolderLabels(root, classes, val_fraction, seed)
    if name == "voc":
        return VocSource(root, voc_train)
    if name == "coco":
        return CocoSource(root)
    return LayoutSource(name, root)

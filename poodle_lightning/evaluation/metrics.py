"""Segmentation metrics: one confusion matrix over the whole data set, and every number as a view of it.

Two mIoU views are in use and differ when a class is missing (numbers of different papers are only comparable
within one view):

* ``miou`` (mmsegmentation): a class absent from ground truth *and* prediction is dropped; a class absent from
  the ground truth but predicted counts 0.
* ``miou_present`` (BDD100K's own evaluator, detectron2): only classes present in the ground truth count.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from poodle_lightning.types import IGNORE


def group_means(values: Mapping[str, float], groups: Mapping[str, Iterable[str]]) -> dict[str, float]:
    """Unweighted mean of per-class values over each group (PooDLe Table 3 from Table 9); NaN is dropped."""
    means = {}
    for group, members in groups.items():
        means[group] = float(torch.tensor([values[name] for name in members], dtype=torch.float64).nanmean())
    return means


class Confusion:
    """Counts of (ground truth, prediction) over all labelled pixels of a data set.

    Args:
        classes: number of classes C.
        ignore: label value that takes no part.

    Attributes:
        matrix: ``(C, C)`` int64, rows ground truth, columns prediction, on the host.
        images: images counted.
        ignored: pixels that took no part.
    """

    def __init__(self, classes: int, ignore: int = IGNORE) -> None:
        self.classes = classes
        self.ignore = ignore
        self.matrix = torch.zeros(classes, classes, dtype=torch.int64)
        self.images = 0
        self.ignored = 0

    def update(self, prediction: Tensor, labels: Tensor) -> None:
        """Count images.

        Args:
            prediction: ``(N, H, W)`` integer classes.
            labels: ``(N, H, W)`` integer classes or ``ignore``.

        Raises:
            ValueError: shapes differ, or a value is no class.
        """
        if prediction.shape != labels.shape:
            shapes = f"{tuple(prediction.shape)} and {tuple(labels.shape)}"
            raise ValueError(f"prediction and labels differ in shape: {shapes}")
        truth = labels.flatten().long()
        counted = truth != self.ignore
        truth, guess = truth[counted], prediction.flatten().long()[counted]
        for name, values in (("label", truth), ("predicted class", guess)):
            if len(values) and not 0 <= int(values.min()) <= int(values.max()) < self.classes:
                raise ValueError(
                    f"{name} values run from {int(values.min())} to {int(values.max())}, but there are "
                    f"{self.classes} classes (and {self.ignore} = ignore)"
                )
        counts = torch.bincount(truth * self.classes + guess, minlength=self.classes**2)
        self.matrix += counts.reshape(self.classes, self.classes).cpu()
        self.images += len(labels)
        self.ignored += int((~counted).sum())

    @property
    def truth(self) -> Tensor:
        """Labelled pixels per class, ``(C,)`` int64."""
        return self.matrix.sum(dim=1)

    @property
    def correct(self) -> Tensor:
        """Correct pixels per class, ``(C,)`` int64."""
        return self.matrix.diag()

    def iou(self) -> Tensor:
        """Intersection over union per class, ``(C,)`` float64; NaN where truth and prediction lack it."""
        union = self.truth + self.matrix.sum(dim=0) - self.correct
        return self.correct.double() / union

    def class_accuracy(self) -> Tensor:
        """Recall per class, ``(C,)`` float64; NaN where the ground truth lacks the class."""
        return self.correct.double() / self.truth

    def miou(self) -> float:
        """Mean IoU in the view of mmsegmentation (see the module)."""
        return float(self.iou().nanmean())

    def miou_present(self) -> float:
        """Mean IoU over the classes present in the ground truth."""
        return float(self.iou()[self.truth > 0].mean())

    def pixel_accuracy(self) -> float:
        """Correct pixels among labelled pixels (aAcc)."""
        return float(self.correct.sum().double() / self.matrix.sum())

    def mean_class_accuracy(self) -> float:
        """Mean recall over the classes present in the ground truth (mAcc)."""
        return float(self.class_accuracy().nanmean())

    def fwiou(self) -> float:
        """IoU weighted by the share of each class in the ground truth."""
        share = self.truth.double() / self.truth.sum()
        return float((share * self.iou()).nansum() if self.truth.sum() else torch.nan)

    def group_iou(self, members: list[int]) -> float:
        """Unweighted mean IoU of some classes, in the view of mmsegmentation."""
        return float(self.iou()[members].nanmean())

    def group_accuracy(self, members: list[int]) -> float:
        """Correct pixels among the labelled pixels of some classes (pixel-weighted; PooDLe appendix F)."""
        return float(self.correct[members].sum().double() / self.truth[members].sum())

    def summary(self, groups: Mapping[str, list[int]] | None = None) -> dict[str, float]:
        """Every scalar view, as fractions.

        Args:
            groups: group name → label values; adds ``miou_<group>`` and ``accuracy_<group>``.
        """
        numbers = {
            "miou": self.miou(),
            "miou_present": self.miou_present(),
            "pixel_accuracy": self.pixel_accuracy(),
            "mean_class_accuracy": self.mean_class_accuracy(),
            "fwiou": self.fwiou(),
        }
        for group, members in (groups or {}).items():
            numbers[f"miou_{group}"] = self.group_iou(members)
            numbers[f"accuracy_{group}"] = self.group_accuracy(members)
        return numbers

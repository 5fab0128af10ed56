"""Segmentation metrics: one confusion matrix over the whole data set, and every number as a view of it.

Two mIoU views are in use and differ when a class is missing (numbers of different papers are only comparable
within one view):

* ``miou`` (mmsegmentation): a class absent from ground truth *and* prediction is dropped; a class absent from
  the ground truth but predicted counts 0.
* ``miou_present`` (BDD100K's own evaluator, detectron2): only classes present in the ground truth count.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Self

import torch
import torch.distributed as dist
from torch import Tensor

from poodle_lightning.types import IGNORE, UserError


def group_means(values: Mapping[str, float], groups: Mapping[str, Iterable[str]]) -> dict[str, float]:
    """Unweighted mean of per-class values over each group (PooDLe Table 3 from Table 9); NaN is dropped."""
    means = {}
    for group, members in groups.items():
        means[group] = float(torch.tensor([values[name] for name in members], dtype=torch.float64).nanmean())
    return means


class Confusion:
    """Counts of (ground truth, prediction) over all labelled pixels of a data set.

    They stay on the device of the first update; reading a view brings them to the host.

    Args:
        classes: number of classes C.
        ignore: label value that takes no part.

    Attributes:
        images: images counted.
    """

    def __init__(self, classes: int, ignore: int = IGNORE) -> None:
        self.classes = classes
        self.ignore = ignore
        self.images = 0
        # (truth, prediction) pairs, then pixels that are ignored, then pixels with a value that is no class
        self._tally = torch.zeros(classes**2 + 2, dtype=torch.int64)

    def update(self, prediction: Tensor, labels: Tensor) -> None:
        """Count images.

        On the host a value that is no class is refused at once. On another device nothing waits for it: it is
        counted, and refused when a view is read.

        Args:
            prediction: ``(N, H, W)`` integer classes.
            labels: ``(N, H, W)`` integer classes or ``ignore``; moved to the prediction's device.

        Raises:
            ValueError: shapes differ, or a value is no class.
        """
        if prediction.shape != labels.shape:
            shapes = f"{tuple(prediction.shape)} and {tuple(labels.shape)}"
            raise ValueError(f"prediction and labels differ in shape: {shapes}")
        guess = prediction.flatten().long()
        truth = labels.flatten().to(guess.device, non_blocking=True).long()
        counted, last = truth != self.ignore, self.classes - 1
        if on_host(guess):
            truth, guess = truth[counted], guess[counted]
            self._refuse_strange(truth, guess)
            cells = truth * self.classes + guess
            tally = torch.bincount(cells, minlength=self.classes**2 + 2)
            tally[-2] = counted.numel() - len(truth)
        else:
            strange = (truth < 0) | (truth > last) | (guess < 0) | (guess > last)
            cells = torch.where(strange, self.classes**2 + 1, truth * self.classes + guess)
            # bincount would make the host wait for the largest value
            tally = _histogram(torch.where(counted, cells, self.classes**2), self.classes**2 + 2)
        self._tally = self._tally.to(tally.device) + tally
        self.images += len(labels)

    def _refuse_strange(self, truth: Tensor, guess: Tensor) -> None:
        for name, values in (("label", truth), ("predicted class", guess)):
            if len(values) and not 0 <= int(values.min()) <= int(values.max()) < self.classes:
                raise ValueError(
                    f"{name} values run from {int(values.min())} to {int(values.max())}, but there are "
                    f"{self.classes} classes (and {self.ignore} = ignore)"
                )

    def merge(self, other: Confusion) -> Confusion:
        """Add the counts of other images, in place.

        Raises:
            ValueError: the other counts other classes.
        """
        if (other.classes, other.ignore) != (self.classes, self.ignore):
            raise ValueError(
                f"counts of {other.classes} classes do not fit those of {self.classes}: "
                f"ignore {other.ignore} and {self.ignore}"
            )
        self._tally = self._tally + other._tally.to(self._tally.device)
        self.images += other.images
        return self

    def all_reduce(self) -> Confusion:
        """Add the counts of all processes, in place: call it once, when all is counted, on every process.

        Integers are added, so the result does not depend on how many processes there are or who counted what.
        Without ``torch.distributed`` nothing happens.
        """
        total = sum_over_processes(torch.cat([self._tally.cpu(), torch.tensor([self.images])]))
        self._tally, self.images = total[:-1], int(total[-1])
        return self

    def state_dict(self) -> dict[str, Any]:
        """All counts as plain data."""
        return {
            "classes": self.classes,
            "ignore": self.ignore,
            "images": self.images,
            "ignored": self.ignored,
            "matrix": self.matrix.tolist(),
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Self:
        """The inverse of :meth:`state_dict`."""
        made = cls(state["classes"], state["ignore"])
        matrix = torch.tensor(state["matrix"], dtype=torch.int64).reshape(made.classes, made.classes)
        made._tally = torch.cat([matrix.flatten(), torch.tensor([state["ignored"], 0])])
        made.images = state["images"]
        return made

    # ---- what was counted
    @property
    def matrix(self) -> Tensor:
        """``(C, C)`` int64, rows ground truth, columns prediction, on the host.

        Raises:
            ValueError: a value counted on a device was no class.
        """
        tally = self._tally.cpu()
        if strange := int(tally[-1]):
            raise ValueError(
                f"{strange} pixels have a label or a predicted class outside the {self.classes} classes "
                f"(and {self.ignore} = ignore)"
            )
        return tally[:-2].reshape(self.classes, self.classes)

    @property
    def ignored(self) -> int:
        """Pixels that took no part."""
        return int(self._tally[-2])

    @property
    def truth(self) -> Tensor:
        """Labelled pixels per class, ``(C,)`` int64."""
        return self.matrix.sum(dim=1)

    @property
    def predicted(self) -> Tensor:
        """Predicted pixels per class among the labelled ones, ``(C,)`` int64."""
        return self.matrix.sum(dim=0)

    @property
    def correct(self) -> Tensor:
        """Correct pixels per class, ``(C,)`` int64."""
        return self.matrix.diag()

    @property
    def classes_absent(self) -> list[int]:
        """Label values of the classes without a pixel in the ground truth."""
        return [label for label, pixels in enumerate(self.truth.tolist()) if not pixels]

    def counts(self) -> dict[str, int]:
        """Images, labelled pixels, ignored pixels, and classes that the ground truth lacks."""
        return {
            "images": self.images,
            "labelled_pixels": int(self.truth.sum()),
            "ignored_pixels": self.ignored,
            "classes_absent": len(self.classes_absent),
        }

    # ---- views
    def iou(self) -> Tensor:
        """Intersection over union per class, ``(C,)`` float64; NaN where truth and prediction lack it."""
        union = self.truth + self.predicted - self.correct
        return self.correct.double() / union

    def class_accuracy(self) -> Tensor:
        """Recall per class, ``(C,)`` float64; NaN where the ground truth lacks the class."""
        return self.correct.double() / self.truth

    def precision(self) -> Tensor:
        """Share of each predicted class that is right, ``(C,)`` float64; NaN where it is never predicted.

        This is what BDD100K's own evaluator prints as accuracy per class (``bdd100k/eval/seg.py``).
        """
        return self.correct.double() / self.predicted

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
        """Every scalar view, as fractions; what has no pixel to measure is NaN.

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


class Accuracy:
    """Top-1 and top-5 accuracy of images with one class each, and top-1 per class.

    Of equal scores the lower class counts as the higher.

    Args:
        classes: how many.
    """

    def __init__(self, classes: int) -> None:
        self._counts = torch.zeros(3, classes, dtype=torch.int64)  # images, first, among the first five

    def update(self, scores: Tensor, labels: Tensor) -> None:
        """Count images: scores ``(B, C)``, the higher the likelier, and labels ``(B,)``.

        Raises:
            UserError: a score is NaN; nothing is above or below it.
        """
        if bool(scores.isnan().any()):
            raise UserError("the scores of images are not numbers (NaN): lower the learning rate")
        labels = labels.to(scores.device)
        own = scores.gather(1, labels[:, None])
        lower = torch.arange(scores.shape[1], device=scores.device) < labels[:, None]
        rank = ((scores > own) | ((scores == own) & lower)).sum(dim=1)
        hits = torch.stack([torch.ones_like(labels), (rank < 1).long(), (rank < 5).long()])
        self._counts.index_add_(1, labels.cpu(), hits.cpu())

    def all_reduce(self) -> Accuracy:
        """Add the counts of all processes, in place; see ``Confusion.all_reduce``."""
        self._counts = sum_over_processes(self._counts)
        return self

    @property
    def images(self) -> int:
        """Images counted."""
        return int(self._counts[0].sum())

    def top1(self) -> float:
        """Share of images whose class has the highest score."""
        return self._share(1)

    def top5(self) -> float:
        """Share of images whose class is among the five highest."""
        return self._share(2)

    def per_class(self) -> Tensor:
        """Top-1 of the images of each class, ``(C,)`` float64; NaN without images."""
        return self._counts[1].double() / self._counts[0]

    def _share(self, row: int) -> float:
        return float(self._counts[row].sum().double() / self._counts[0].sum())


def sum_over_processes(counts: Tensor) -> Tensor:
    """Counts ``int64`` on the host, added over all processes; without ``torch.distributed`` as they are."""
    if not (dist.is_available() and dist.is_initialized()):
        return counts
    # NCCL adds on GPUs only, Gloo on the host
    device = torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else "cpu"
    total = counts.to(device, copy=True)
    dist.all_reduce(total)
    return total.cpu()


def on_host(values: Tensor) -> bool:
    """Whether a look at the values costs nothing: nobody has to wait for a device."""
    return values.device.type == "cpu"


def _histogram(cells: Tensor, size: int) -> Tensor:
    """How often each of ``0 … size−1`` is there, ``(size,)`` int64, without waiting for the device."""
    return torch.zeros(size, dtype=torch.int64, device=cells.device).scatter_add_(
        0, cells, torch.ones_like(cells)
    )

"""What trained classifiers of whole images share: counting, the best epoch, the scores."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor

from poodle_lightning.data.image_classes import ImageBatch
from poodle_lightning.evaluation.base import Evaluation, Scores
from poodle_lightning.evaluation.metrics import Accuracy
from poodle_lightning.evaluation.vectors import image_data
from poodle_lightning.nn.observed import observed
from poodle_lightning.types import ClassSet, UserError


class Classifier(Evaluation):
    """Base of readouts that are trained to name an image's class; subclasses write ``forward``.

    ``forward`` takes images ``(B, 3, H, W)`` from 0 to 255 on the module's device and gives logits
    ``(B, classes)`` float32. The data module is ``ImageClassDataModule``.

    The largest accuracy over the epochs, which DINO and iBOT report, is chosen on the images that are scored:
    ``top1`` is that of the last epoch, ``top1_best`` the largest.

    Attributes:
        protocol: name in tables.
        watch_every: epochs between two scores of the held-out images while training.
        accuracy: of the last validation.
        best: of all epochs so far, by measure.
    """

    trains: ClassVar[bool] = True
    protocol: str = "classification"
    watch_every: int = 1
    accuracy: Accuracy | None = None
    best: dict[str, float]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.best = {}

    def setup(self, stage: str) -> None:
        """See ``Evaluation``.

        Raises:
            UserError: the data are no images with one class each.
        """
        super().setup(stage)
        image_data(self)

    def epochs(self) -> int:
        """Epochs of the training.

        Raises:
            UserError: their number is not given.
        """
        epochs = self.trainer.max_epochs
        if epochs is None or epochs < 1:
            raise UserError(
                f"{self.protocol}: the learning rate falls over the epochs: give --trainer.max_epochs"
            )
        return epochs

    def global_batch(self) -> int:
        """Images per optimiser step, over all devices and accumulated batches."""
        per_device = getattr(getattr(self.trainer, "datamodule", None), "batch_size", 256)
        return int(per_device) * self.trainer.world_size * self.trainer.accumulate_grad_batches

    # ---- scoring
    def on_train_epoch_end(self) -> None:
        """Scores the held-out images where the trainer does not: the best epoch is to be known."""
        if self.trainer.limit_val_batches or (self.current_epoch + 1) % self.watch_every:
            return
        self._start_counting()
        with observed(self), self.trainer.precision_plugin.val_step_context():
            for number, batch in enumerate(image_data(self).val_dataloader()):
                self.validation_step(batch.to(self.device), number)
        self.log("val/top1", torch.tensor(self._finish_counting(), device=self.device), sync_dist=True)

    def on_validation_epoch_start(self) -> None:
        """Counts from zero."""
        self._start_counting()

    def validation_step(self, batch: ImageBatch, batch_idx: int) -> None:
        """Counts what is right."""
        assert self.accuracy is not None
        with torch.no_grad():
            self.accuracy.update(self(batch.images), batch.labels)

    def on_validation_epoch_end(self) -> None:
        """Adds up the devices; logs ``val/top1``."""
        found = self._finish_counting()
        self.log("val/top1", torch.tensor(found, device=self.device), sync_dist=True)

    def _start_counting(self) -> None:
        self.accuracy = Accuracy(len(self.the_classes()))

    def _finish_counting(self) -> float:
        assert self.accuracy is not None
        self.accuracy.all_reduce()
        found = {"top1": self.accuracy.top1(), "top5": self.accuracy.top5()}
        if not self.trainer.sanity_checking:
            self.best = {name: max(value, self.best.get(name, -math.inf)) for name, value in found.items()}
        return found["top1"]

    def scores(self) -> Scores:
        """Top-1 and top-5 of the last validation, and the largest of all epochs (chosen on these images).

        Raises:
            UserError: there was no validation yet.
        """
        if self.accuracy is None or not self.best:
            raise UserError(f"{self.protocol} has no result yet: fit and validate it first")
        return Scores(
            protocol=self.protocol,
            headline="top1",
            scores={
                "top1": self.accuracy.top1(),
                "top5": self.accuracy.top5(),
                "top1_best": self.best["top1"],
                "top5_best": self.best["top5"],
            },
            per_class=per_class(self.accuracy, self.the_classes()),
            counts={"images": self.accuracy.images},
            details=self.details(),
        )

    def details(self) -> dict[str, Any]:
        """What else there is to say of the result, as plain data."""
        return {}

    # ---- what is kept
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """See ``Evaluation``; the best accuracy so far too."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["poodle_lightning"]["best"] = dict(self.best)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """See ``Evaluation``; takes up the best accuracy of the run that is resumed."""
        super().on_load_checkpoint(checkpoint)
        self.best = dict(checkpoint.get("poodle_lightning", {}).get("best", {}))


def per_class(accuracy: Accuracy, classes: ClassSet) -> dict[str, dict[str, float]]:
    """Top-1 of the images of every class."""
    return {"top1": dict(zip(classes.names, accuracy.per_class().tolist(), strict=True))}


def unit(images: Tensor) -> Tensor:
    """Images from 0 to 255, of any kind, as float32 from 0 to 1."""
    return images.float() / 255.0

"""Dense nearest-neighbour segmentation: labels of an image from the most similar patches of labelled images.

In-context scene understanding (Balažević et al. 2023, "Towards in-context scene understanding", Hummingbird),
as evaluated by vpariza/open-hummingbird-eval (``hbird/hbird_eval.py``):

1. A memory of the patches of the training images: features of length 1, and the share of each class among the
   pixels of the patch.
2. A patch of a test image takes the mean of the labels of its k = 30 nearest, weighted by the softmax of
   cosine / 0.02.
3. The label maps are upsampled bilinearly, and the largest share is the prediction.

Deviations, each on purpose: the search is exact, and its queries have length 1 (the public code searches with
un-normalised ones). Patches without any labelled pixel are left out, and ignored pixels do not count in the
others (the public code calls those class 0, as ``ignored: first_class`` does). Shares and scores
are those of the mask at its own size. Training images are seen once, without augmentation.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from poodle_lightning.configured import spec
from poodle_lightning.evaluation.base import Evaluation, Scores
from poodle_lightning.evaluation.memory import Memory, embed, filled, labelled_data
from poodle_lightning.evaluation.memory import RetrievalRecipe as RetrievalRecipe
from poodle_lightning.evaluation.metrics import Confusion
from poodle_lightning.evaluation.worst import WorstImages
from poodle_lightning.nn.encoder import Encoder
from poodle_lightning.nn.observed import observed
from poodle_lightning.ops.geometry import Size
from poodle_lightning.types import IGNORE, ClassSet, LabelledBatch, UserError

Labelled = tuple[Tensor, Tensor]
_BATCH = 16


@dataclass(frozen=True)
class Retrieval:
    """What a dense search found.

    Args:
        confusion: over all test pixels.
        classes: names and groups.
        vectors: patches in the memory.
        seconds: wall-clock time in all.
    """

    confusion: Confusion
    classes: ClassSet
    vectors: int
    seconds: float

    def per_class(self) -> dict[str, float]:
        """IoU per class; NaN where truth and prediction lack it."""
        return dict(zip(self.classes.names, self.confusion.iou().tolist(), strict=True))

    def summary(self) -> dict[str, float]:
        """All scalar views, groups included (see ``Confusion.summary``)."""
        return self.confusion.summary(self.classes.numbered())


def dense_retrieval(
    encoder: Encoder,
    train: Labelled,
    test: Labelled,
    classes: ClassSet,
    recipe: RetrievalRecipe | None = None,
    layer: str | None = None,
) -> Retrieval:
    """Segment test images by the labels of their patches' nearest neighbours, and score that.

    This process alone does it: no other is asked, whether there are some or not.

    Args:
        encoder: left as it was found, modes included.
        train: images ``(N, 3, H, W)`` uint8 and labels ``(N, H, W)`` uint8, 255 = ignore.
        test: the same, of other images.
        classes: names and groups of the label values.
        recipe: neighbours, temperature, memory, seed.
        layer: name of the map that is read; None reads the last.

    Raises:
        UserError: the encoder has no such layer, or there are too few labelled patches.
        ValueError: label values do not fit.
    """
    recipe = recipe or RetrievalRecipe()
    strange = train[1][(train[1] >= len(classes)) & (train[1] != IGNORE)]
    if len(strange):
        raise ValueError(f"label value {int(strange[0])} is no class: there are {len(classes)}")
    started = time.perf_counter()
    device = next(encoder.parameters()).device
    memory = Memory(len(classes), recipe, len(train[0]))
    confusion = Confusion(len(classes))
    with observed(encoder):
        for rows in torch.arange(len(train[0])).split(_BATCH):
            _remember(memory, encoder, train[0][rows].to(device), train[1][rows].to(device), rows, layer)
        memory.finish(together=False).to(device)
        for images, labels in zip(test[0].split(_BATCH), test[1].split(_BATCH), strict=True):
            guess = _predict(memory, encoder, images.to(device), (labels.shape[-2], labels.shape[-1]), layer)
            confusion.update(guess.cpu(), labels)
    seconds = time.perf_counter() - started
    return Retrieval(confusion, classes, len(memory.vectors), seconds)


def _remember(
    memory: Memory, encoder: Encoder, images: Tensor, labels: Tensor, index: Tensor, layer: str | None
) -> None:
    maps, covered = embed(encoder, images, layer, (labels.shape[-2], labels.shape[-1]))
    memory.add(maps, filled(memory.taken(labels), covered), index)


def _predict(memory: Memory, encoder: Encoder, images: Tensor, size: Size, layer: str | None) -> Tensor:
    """Classes ``(B, *size)`` on the device."""
    maps, covered = embed(encoder, images, layer, size)
    return memory.predict(maps, covered)[..., : size[0], : size[1]]


class DenseRetrieval(Evaluation):
    """Dense nearest-neighbour segmentation of a labelled data set (see the module).

    The memory is made from ``memory_dataloader()`` of the data module when validation starts. ``data.subset``
    takes a share of the training images, drawn by the data module's seed; the memory's draws follow it too.

    Args:
        encoder: see ``Evaluation``.
        recipe: neighbours, temperature, memory.
        layer: name of the map that is read; None reads the last.
        output_stride: see ``Evaluation``.
        decoder: see ``Evaluation``.
        classes: see ``Evaluation``.
    """

    def __init__(
        self,
        encoder: str | Encoder | None = None,
        *,
        recipe: RetrievalRecipe | None = None,
        layer: str | None = None,
        output_stride: int | None = None,
        decoder: Literal["keep", "drop"] = "keep",
        classes: int | Sequence[str] | None = None,
    ) -> None:
        super().__init__(encoder, output_stride=output_stride, decoder=decoder, classes=classes)
        self.recipe, self.layer = recipe or RetrievalRecipe(), layer
        self.memory: Memory | None = None
        self.confusion, self._worst = Confusion(0), WorstImages(0)

    def on_validation_start(self) -> None:
        """Makes the memory.

        Raises:
            UserError: the data module gives no training images, or too few patches are labelled.
        """
        data = labelled_data(self)
        memory = Memory(len(self.the_classes()), self.recipe, data.count("train"), data.seed)
        with observed(self.the_encoder()), self.trainer.precision_plugin.val_step_context():
            for batch in data.memory_dataloader():
                on = batch.to(self.device)
                _remember(memory, self.the_encoder(), on.images, on.labels, on.index, self.layer)
        self.memory = memory.finish(together=True).to(self.device)
        self.confusion = Confusion(len(self.the_classes()))
        self._worst = WorstImages(len(self.the_classes()))

    def validation_step(self, batch: LabelledBatch, batch_idx: int) -> None:
        """Counts what is right."""
        for place, guess in enumerate(self._predict(batch)):
            image = Confusion(len(self.the_classes()))
            image.update(guess[None], batch.labels[place : place + 1])
            self._worst.update(image, int(batch.index[place]))
            self.confusion.merge(image)

    def on_validation_epoch_end(self) -> None:
        """Adds up the devices; logs ``val/miou``."""
        self.confusion.all_reduce()
        self._worst.all_reduce()
        self.log("val/miou", torch.tensor(self.confusion.miou(), device=self.device), sync_dist=True)

    def predict_labels(self, batch: LabelledBatch) -> Tensor:
        """Predicted classes ``(B, h, w)`` int64 on the host, at the size of the labels.

        Raises:
            UserError: there is no memory yet.
        """
        with observed(self.the_encoder()):
            return self._predict(batch).cpu()

    def scores(self) -> Scores:
        """All views of the confusion matrix, and the size of the memory.

        Raises:
            UserError: there was no validation yet.
        """
        memory, counted = self._filled(), self.confusion
        classes = self.the_classes()
        per_class = {"iou": counted.iou(), "accuracy": counted.class_accuracy()}
        return Scores(
            protocol=f"dense {self.recipe.k}-NN",
            headline="miou",
            scores=counted.summary(classes.numbered()),
            per_class={
                measure: dict(zip(classes.names, values.tolist(), strict=True))
                for measure, values in per_class.items()
            },
            counts=counted.counts() | {"memory_vectors": len(memory.vectors)},
            details={"recipe": spec(self.recipe), "layer": self.layer},
            worst=self._worst.choose(counted.iou(), classes.names),
        )

    def _predict(self, batch: LabelledBatch) -> Tensor:
        size = (batch.labels.shape[-2], batch.labels.shape[-1])
        images = batch.images.to(self.device)
        return _predict(self._filled(), self.the_encoder(), images, size, self.layer)

    def _filled(self) -> Memory:
        if self.memory is None:
            raise UserError("dense retrieval has no memory yet: validate it first")
        return self.memory

"""Classification with a frozen encoder: nearest neighbours, and a linear layer. DINO's protocols.

**k-NN** (``eval_knn.py`` of facebookresearch/dino): vectors of length 1 of all training images; the k nearest
of a test image vote for their classes with the weight exp(cosine / 0.07). The public code cuts the test set
into 100 parts and fails with fewer images; here nothing depends on parts.

**Linear probe** (``eval_linear.py``): one linear layer, SGD with momentum 0.9 and no decay, learning rate
times global batch / 256, half a cosine to 0 over all epochs, random crops and mirror images. DINO reports the
largest accuracy over the epochs, which is chosen on the images that are scored: ``top1`` is that of the last
epoch, ``top1_best`` is DINO's.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

from poodle_lightning.configured import spec
from poodle_lightning.data.image_classes import ImageBatch, ImageClassDataModule
from poodle_lightning.evaluation.base import Evaluation, Scores
from poodle_lightning.evaluation.classifier import Classifier, per_class, unit
from poodle_lightning.evaluation.memory import gathered
from poodle_lightning.evaluation.metrics import Accuracy
from poodle_lightning.evaluation.vectors import image_data, knn_votes, read_vectors
from poodle_lightning.nn.encoder import Encoder
from poodle_lightning.nn.observed import observed
from poodle_lightning.ops.knn import BUDGET, nearest
from poodle_lightning.ops.random import key_of, normal
from poodle_lightning.ops.schedules import warmup_cosine
from poodle_lightning.types import ClassSet, UserError


@dataclass(frozen=True)
class KNNRecipe:
    """How neighbours vote.

    Args:
        k: numbers of neighbours, each of which is scored.
        headline: the one that stands for the result (DoRA: 20).
        temperature: of the weights.
        blocks: see ``evaluation.vectors.read_vectors``.
        budget: bytes of working memory of the search; changes the speed only.
    """

    k: tuple[int, ...] = (10, 20, 100, 200)
    headline: int = 20
    temperature: float = 0.07
    blocks: int = 1
    budget: int = BUDGET

    def __post_init__(self) -> None:
        object.__setattr__(self, "k", tuple(self.k))
        if self.headline not in self.k or min(self.k) < 1 or self.temperature <= 0 or self.budget < 1:
            raise UserError("KNNRecipe: headline must be one of k, and all numbers above 0")


class KNN(Evaluation):
    """k-NN classification (see the module); the data module is ``ImageClassDataModule``.

    Args:
        encoder: see ``Evaluation``.
        recipe: neighbours and their weights.
        output_stride: see ``Evaluation``.
        decoder: see ``Evaluation``; a vector is always the bare encoder's.
        classes: see ``Evaluation``.
    """

    def __init__(
        self,
        encoder: str | Encoder | None = None,
        *,
        recipe: KNNRecipe | None = None,
        output_stride: int | None = None,
        decoder: Literal["keep", "drop"] = "keep",
        classes: int | Sequence[str] | None = None,
    ) -> None:
        super().__init__(encoder, output_stride=output_stride, decoder=decoder, classes=classes)
        self.recipe = recipe or KNNRecipe()
        self.vectors = self.labels = torch.empty(0)
        self.accuracies: dict[int, Accuracy] = {}

    def setup(self, stage: str) -> None:
        """See ``Evaluation``.

        Raises:
            UserError: the data are no images with one class each.
        """
        super().setup(stage)
        image_data(self)

    def on_validation_start(self) -> None:
        """Vectors and labels of all training images.

        Raises:
            UserError: there are no training images, or fewer than neighbours.
        """
        data = image_data(self)
        if data.count("train") < max(self.recipe.k):
            raise UserError(
                f"{max(self.recipe.k)} neighbours wanted of {data.count('train')} training images: "
                "give more images, or smaller recipe.k"
            )
        found = self._remembered(data)
        index, vectors, labels = gathered(found)
        order = index.argsort()
        self.vectors, self.labels = vectors[order].to(self.device), labels[order].to(self.device)
        self.accuracies = {k: Accuracy(len(self.the_classes())) for k in self.recipe.k}

    def _remembered(self, data: ImageClassDataModule) -> tuple[Tensor, ...]:
        """Numbers, vectors and labels of this device's share of the training images, on the host."""
        with observed(self.the_encoder()), self.trainer.precision_plugin.val_step_context():
            found = [(b.index, self._vectors(b).cpu(), b.labels) for b in data.memory_dataloader()]
        return tuple(torch.cat(part) for part in zip(*found, strict=True))

    def validation_step(self, batch: ImageBatch, batch_idx: int) -> None:
        """Counts what is right."""
        recipe = self.recipe
        cosines, places = nearest(self._vectors(batch), self.vectors, max(recipe.k), recipe.budget)
        labels = self.labels[places]
        for k, accuracy in self.accuracies.items():
            votes = knn_votes(cosines[:, :k], labels[:, :k], len(self.the_classes()), recipe.temperature)
            accuracy.update(votes, batch.labels)

    def on_validation_epoch_end(self) -> None:
        """Adds up the devices; logs ``val/top1``."""
        for accuracy in self.accuracies.values():
            accuracy.all_reduce()
        top1 = self.accuracies[self.recipe.headline].top1()
        self.log("val/top1", torch.tensor(top1, device=self.device), sync_dist=True)

    def scores(self) -> Scores:
        """Top-1 and top-5 for every k.

        Raises:
            UserError: there was no validation yet.
        """
        if not self.accuracies:
            raise UserError("k-NN has no result yet: validate it first")
        chosen = self.accuracies[self.recipe.headline]
        each = {f"top1_k{k}": accuracy.top1() for k, accuracy in self.accuracies.items()}
        each |= {f"top5_k{k}": accuracy.top5() for k, accuracy in self.accuracies.items()}
        return Scores(
            protocol=f"{self.recipe.headline}-NN classification",
            headline="top1",
            scores={"top1": chosen.top1(), "top5": chosen.top5(), **each},
            per_class=per_class(chosen, self.the_classes()),
            counts={"images": chosen.images, "training_images": len(self.vectors)},
            details={"recipe": spec(self.recipe)},
        )

    def _vectors(self, batch: ImageBatch) -> Tensor:
        images = unit(batch.images.to(self.device))
        vectors = read_vectors(self.the_encoder(), images, self.recipe.blocks)
        if not bool(vectors.isfinite().all()):
            raise UserError(
                "the encoder gives vectors that are not finite: nothing can be compared with them"
            )
        return F.normalize(vectors, dim=1)


@dataclass(frozen=True)
class ProbeRecipe:
    """How the linear layer is trained.

    Args:
        lr: for a global batch of 256; DINO's 0.001, DoRA's command 0.01.
        momentum: of SGD.
        weight_decay: 0.
        blocks: see ``evaluation.vectors.read_vectors``.
        watch_every: epochs between two scores of the held-out images while training.
        seed: of the layer's start, normal with deviation 0.01.
    """

    lr: float = 1e-3
    momentum: float = 0.9
    weight_decay: float = 0.0
    blocks: int = 1
    watch_every: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        if min(self.lr, self.blocks, self.watch_every) <= 0:
            raise UserError("ProbeRecipe: lr, blocks and watch_every must be above 0")


class LinearProbe(Classifier):
    """A linear layer on a frozen encoder (see the module); the data module is ``ImageClassDataModule``.

    Args:
        encoder: see ``Evaluation``; an encoder object is copied and stays as it is.
        recipe: how the layer is trained.
        output_stride: see ``Evaluation``.
        decoder: see ``Evaluation``; a vector is always the bare encoder's.
        classes: see ``Evaluation``.
    """

    protocol = "linear classification"

    def __init__(
        self,
        encoder: str | Encoder | None = None,
        *,
        recipe: ProbeRecipe | None = None,
        output_stride: int | None = None,
        decoder: Literal["keep", "drop"] = "keep",
        classes: int | Sequence[str] | None = None,
    ) -> None:
        given = copy.deepcopy(encoder) if isinstance(encoder, Encoder) else encoder
        super().__init__(given, output_stride=output_stride, decoder=decoder, classes=classes)
        self.recipe = recipe or ProbeRecipe()
        self.watch_every = self.recipe.watch_every
        if self.encoder is not None:
            self.encoder.requires_grad_(False)
        self.head: nn.Linear | None = None
        self._build()

    # ---- parts
    def setup(self, stage: str) -> None:
        """See ``Classifier``; before a training it reads one image: does the encoder have such vectors?

        Raises:
            UserError: the encoder has no vector, or not so many blocks.
        """
        super().setup(stage)
        if stage != "fit":
            return
        encoder, size = self.the_encoder(), image_data(self).views.size
        with observed(encoder):
            image = torch.zeros(1, 3, size, size, device=encoder.mean.device)
            read_vectors(encoder, image, self.recipe.blocks)

    def _build(self) -> None:
        """Makes the layer as soon as encoder and classes are known."""
        if self.head is not None or self.encoder is None or self.class_set is None:
            return
        width, classes = self.recipe.blocks * self.encoder.vector_dim, len(self.class_set)
        key = key_of(self.recipe.seed, "linear probe")
        self.head = nn.Linear(width, classes, device=self.encoder.mean.device)
        start = 0.01 * normal(key.reshape(1), width * classes).reshape(classes, width)
        with torch.no_grad():
            self.head.weight.copy_(start)
            self.head.bias.zero_()

    def take_classes(self, classes: ClassSet) -> None:
        """See ``Evaluation``; makes the layer."""
        super().take_classes(classes)
        self._build()

    def train(self, mode: bool = True) -> Self:
        """The encoder stays in eval mode."""
        super().train(mode)
        if self.encoder is not None:
            self.encoder.eval()
        return self

    def forward(self, images: Tensor) -> Tensor:
        """Logits ``(B, classes)`` float32 of images ``(B, 3, H, W)`` uint8 on the module's device."""
        assert self.head is not None
        with torch.no_grad():
            vectors = read_vectors(self.the_encoder(), unit(images), self.recipe.blocks)
        logits: Tensor = self.head(vectors)
        return logits.float()

    # ---- training
    def training_step(self, batch: ImageBatch, batch_idx: int) -> Tensor:
        """Cross-entropy."""
        loss = F.cross_entropy(self(batch.images), batch.labels)
        self.log("train/loss", loss.detach(), batch_size=len(batch))
        return loss

    def configure_optimizers(self) -> Optimizer:
        """SGD over the layer; its rate is set at every epoch."""
        assert self.head is not None
        recipe = self.recipe
        return SGD(
            self.head.parameters(),
            lr=self._base_lr(),
            momentum=recipe.momentum,
            weight_decay=recipe.weight_decay,
        )

    def on_train_epoch_start(self) -> None:
        """The rate of this epoch: half a cosine to 0 over all epochs.

        Raises:
            UserError: the number of epochs is not given.
        """
        rate = warmup_cosine(self.current_epoch, self._base_lr(), 0.0, 0.0, self.epochs())
        for optimizer in self.trainer.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate

    def _base_lr(self) -> float:
        return self.recipe.lr * self.global_batch() / 256

    def details(self) -> dict[str, Any]:
        """See ``Classifier``."""
        return {"recipe": spec(self.recipe)}

"""Action recognition with a finetuned image encoder: VITO's Table 3, UCF101.

Frames are encoded one by one and their vectors averaged; a linear layer behind dropout names the action. The
recipe is that of Wu & Wang (2021), which VITO follows, in the code of Morgado et al. (2021):
facebookresearch/AVID-CMA ``eval-action-recg.py``, happywu/AVID-CMA-CycleContrast
``configs/benchmark/ucf/32at16-fold1-r50-4gpu-drop09.yaml``.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal
from zlib import crc32

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import Adam, Optimizer

from poodle_lightning.configured import spec
from poodle_lightning.data.actions import ActionBatch, ActionDataModule
from poodle_lightning.evaluation.base import Evaluation, Scores
from poodle_lightning.evaluation.classifier import per_class, unit
from poodle_lightning.evaluation.metrics import Accuracy, sum_over_processes
from poodle_lightning.evaluation.segmentation import seeded
from poodle_lightning.evaluation.vectors import read_vectors
from poodle_lightning.nn.encoder import DecodedEncoder, Encoder
from poodle_lightning.ops.random import fold, key_of
from poodle_lightning.types import ClassSet, UserError


@dataclass(frozen=True)
class ActionRecipe:
    """Adam at a rate that falls by steps, after epochs in which only the layer learns.

    Args:
        lr: of encoder and layer.
        gamma: factor at each milestone.
        milestones: epochs after the warm-up.
        warmup_epochs: epochs in which the encoder's weights rest (AVID-CMA: 5); they come before the 16.
        weight_decay: of Adam.

    Raises:
        UserError: numbers out of range.
    """

    lr: float = 1e-4
    gamma: float = 0.3
    milestones: tuple[int, ...] = (6, 10, 14)
    warmup_epochs: int = 5
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "milestones", tuple(self.milestones))  # plain data brings lists
        if self.lr <= 0 or self.gamma <= 0 or self.warmup_epochs < 0 or self.weight_decay < 0:
            raise UserError("recipe: lr and gamma must be above 0, warmup_epochs and weight_decay not below")

    def rate(self, epoch: int) -> float:
        """The learning rate of an epoch, counted from the beginning of the warm-up."""
        passed = sum(epoch - self.warmup_epochs >= milestone for milestone in self.milestones)
        return self.lr * self.gamma**passed


class ActionFineTune(Evaluation):
    """An encoder and a linear layer on the mean of a clip's frames, trained together (see the module).

    In a test the probabilities of a video's clips are averaged. A video that cannot be read counts as wrong.

    Args:
        encoder: see ``Evaluation``; an encoder object is copied and stays as it is.
        recipe: optimiser and rate.
        dropout: share of the mean vector's values left out in training.
        frames_at_once: frames that go through the encoder at once in a test.
        output_stride: see ``Evaluation``.
        decoder: see ``Evaluation``; a vector is always the bare encoder's, and only that is trained.
        classes: see ``Evaluation``.
        protocol: its name in tables.

    Raises:
        UserError: a setting is out of range.
    """

    trains: ClassVar[bool] = True

    def __init__(
        self,
        encoder: str | Encoder | None = None,
        *,
        recipe: ActionRecipe | None = None,
        dropout: float = 0.9,
        frames_at_once: int = 320,
        output_stride: int | None = None,
        decoder: Literal["keep", "drop"] = "drop",
        classes: int | Sequence[str] | ClassSet | None = None,
        protocol: str = "action recognition, finetuned",
    ) -> None:
        if not 0 <= dropout < 1 or frames_at_once < 1:
            raise UserError(f"dropout {dropout}: from 0 to below 1; frames_at_once {frames_at_once}: from 1")
        given = copy.deepcopy(encoder) if isinstance(encoder, Encoder) else encoder
        super().__init__(given, output_stride=output_stride, decoder=decoder, classes=classes)
        self.recipe, self.dropout, self.protocol = recipe or ActionRecipe(), dropout, protocol
        self.frames_at_once = frames_at_once
        self.head: nn.Linear | None = None
        self.accuracy: Accuracy | None = None
        self._counts = torch.zeros(2, dtype=torch.int64)  # not read in the test, replaced in training
        self._replaced = 0
        if self.encoder is not None:
            bare = self.encoder.encoder if isinstance(self.encoder, DecodedEncoder) else self.encoder
            self.encoder = bare.requires_grad_(True)
            for name, parameter in bare.named_parameters():
                if name.rpartition(".")[2] == "mask_token":  # nothing is masked: DDP waits for its gradient
                    parameter.requires_grad_(False)
            self.train()
        self._build()

    def _build(self) -> None:
        """Makes the layer as soon as encoder and classes are known."""
        if self.head is not None or self.encoder is None or self.class_set is None:
            return
        with seeded(torch.initial_seed() ^ crc32(b"action layer")):  # from the seed alone
            self.head = nn.Linear(self.encoder.vector_dim, len(self.class_set)).to(self.encoder.mean.device)

    def take_classes(self, classes: ClassSet) -> None:
        """See ``Evaluation``; makes the layer."""
        super().take_classes(classes)
        self._build()

    def setup(self, stage: str) -> None:
        """See ``Evaluation``.

        Raises:
            UserError: the data are no clips with a class each.
        """
        self._data()
        super().setup(stage)

    def _data(self) -> ActionDataModule:
        data = getattr(self.trainer, "datamodule", None)
        if not isinstance(data, ActionDataModule):
            raise UserError(f"{type(self).__name__} needs clips with a class: give data: ActionDataModule")
        return data

    def forward(self, clips: Tensor) -> Tensor:
        """Logits ``(N, classes)`` float32 of clips ``(N, T, 3, H, W)`` from 0 to 255."""
        assert self.head is not None
        logits: Tensor = self.head(functional.dropout(self.clip_vectors(clips), self.dropout, self.training))
        return logits.float()

    def clip_vectors(self, clips: Tensor) -> Tensor:
        """Mean of the frames' vectors, ``(N, D)`` float32."""
        frames = clips.flatten(0, 1)
        if self.training:
            found = read_vectors(self.the_encoder(), unit(frames))
        else:
            parts = frames.split(self.frames_at_once)
            found = torch.cat([read_vectors(self.the_encoder(), unit(part)) for part in parts])
        return found.unflatten(0, clips.shape[:2]).mean(dim=1)

    # ---- training
    @property
    def warming(self) -> bool:
        """Whether only the layer learns in this epoch."""
        return self.current_epoch < self.recipe.warmup_epochs

    def training_step(self, batch: ActionBatch, batch_idx: int) -> Tensor:
        """Cross-entropy."""
        if batch_idx == 0 and self.current_epoch == self.recipe.warmup_epochs:
            optimizers = self.optimizers(use_pl_optimizer=False)
            assert isinstance(optimizers, Optimizer)
            optimizers.state.clear()  # behind the warm-up another optimiser begins
        self._replaced += batch.replaced
        key = key_of(self._data().seed, "action", self.global_step, batch_idx, self.global_rank)
        with seeded(int(fold(key.reshape(1), "dropout")[0])):
            logits = self(batch.frames[:, 0])
        loss = functional.cross_entropy(logits, batch.labels)
        self.log("train/loss", loss.detach(), batch_size=len(batch))
        return loss

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """In the warm-up, the encoder's gradients are dropped: Adam leaves alone what has none."""
        if self.warming:
            for parameter in self.the_encoder().parameters():
                parameter.grad = None

    def configure_optimizers(self) -> Optimizer:
        """Adam over encoder and layer; its rate is set at every step.

        Raises:
            UserError: the training ends in the warm-up.
        """
        assert self.head is not None
        epochs = self.trainer.max_epochs
        if epochs is not None and 0 <= epochs <= self.recipe.warmup_epochs:
            raise UserError(
                f"max_epochs {epochs}: the first {self.recipe.warmup_epochs} epochs train the layer alone: "
                "give more, or lower model.recipe.warmup_epochs"
            )
        parts = [*self.the_encoder().parameters(), *self.head.parameters()]
        trained = [parameter for parameter in parts if parameter.requires_grad]
        return Adam(trained, lr=self.recipe.lr, weight_decay=self.recipe.weight_decay)

    def rate(self) -> float:
        """The rate of the epoch."""
        return self.recipe.rate(self.current_epoch)

    # ---- scoring
    def on_validation_epoch_start(self) -> None:
        """Counts from zero."""
        self.accuracy = Accuracy(len(self.the_classes()))
        self._counts = torch.zeros(2, dtype=torch.int64)

    @torch.no_grad()
    def validation_step(self, batch: ActionBatch, batch_idx: int) -> None:
        """Counts videos by the mean of their clips' probabilities."""
        assert self.accuracy is not None
        clips = batch.frames.shape[1]
        probabilities = self(batch.frames.flatten(0, 1)).softmax(dim=1).unflatten(0, (-1, clips)).mean(dim=1)
        self.accuracy.update(unread_last(probabilities, batch.readable), batch.labels)
        self._counts[0] += (~batch.readable).sum()

    def on_validation_epoch_end(self) -> None:
        """Adds up the devices; logs ``val/top1``."""
        assert self.accuracy is not None
        self.accuracy.all_reduce()
        self._counts[1] = self._replaced
        self._counts = sum_over_processes(self._counts)
        self.log("val/top1", torch.tensor(self.accuracy.top1(), device=self.device), sync_dist=True)

    def scores(self) -> Scores:
        """Top-1 and top-5 over all videos of the test, those that could not be read counted as wrong.

        Raises:
            UserError: there was no validation yet.
        """
        if self.accuracy is None or not self.accuracy.images:
            raise UserError(f"{self.protocol} has no result yet: fit and validate it first")
        unread, replaced = self._counts.tolist()
        return Scores(
            protocol=self.protocol,
            headline="top1",
            scores={"top1": self.accuracy.top1(), "top5": self.accuracy.top5()},
            per_class=per_class(self.accuracy, self.the_classes()),
            counts={
                "videos": self.accuracy.images,
                "unreadable_videos_counted_as_wrong": unread,
                "unreadable_videos_replaced_in_training": replaced,
            },
            details={"recipe": spec(self.recipe), "dropout": self.dropout},
        )


def unread_last(probabilities: Tensor, readable: Tensor) -> Tensor:
    """Scores ``(B, C + 5)`` in which no class of an unreadable video is among the first five.

    Args:
        probabilities: ``(B, C)``.
        readable: ``(B,)`` bool on the host.
    """
    readable = readable.to(probabilities.device)[:, None]
    others = torch.where(readable, -1.0, 1.0).expand(-1, 5)
    return torch.cat([torch.where(readable, probabilities, 0.0), others.to(probabilities.dtype)], dim=1)

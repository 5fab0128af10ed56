"""Classification with a finetuned encoder: a linear layer on [CLS], and the whole network is trained.

iBOT's protocols (bytedance/ibot), which DoRA's Table 11 follows. ImageNet: BEiT's recipe
(``evaluation/classification_layer_decay``), AdamW with layer decay. The small data sets: DeiT's
(``evaluation/eval_cls.py``), without layer decay, with repeated augmentation. Both: RandAugment, mixup and
CutMix, smoothed classes, random erasing, stochastic depth.

Deviations from the public code:

* Cars: it counts the classes by another field (a coordinate of the box) and labels from 1. Here there are 196
  classes, of the field of that name, labelled from 0.
* It prints the largest accuracy over the epochs, ``top1_best`` here; ``top1`` is that of the last epoch.
* It keeps a moving average of the weights that is never scored. Here there is none.
* DeiT's loop sets the rate behind each epoch, so that each has that of the one before. Here it has its own.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Sequence
from typing import Any, Literal
from zlib import crc32

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import Optimizer

from poodle_lightning.configured import spec
from poodle_lightning.data.image_classes import ImageBatch
from poodle_lightning.evaluation.classifier import Classifier, unit
from poodle_lightning.evaluation.mixing import Mixing
from poodle_lightning.evaluation.segmentation import seeded, with_drop_path
from poodle_lightning.evaluation.vectors import image_data, read_vectors
from poodle_lightning.nn.encoder import DecodedEncoder, Encoder
from poodle_lightning.nn.layer_decay import FineTuneRecipe, Rates, finetune_groups, finetune_optimizer
from poodle_lightning.ops.random import fold, key_of
from poodle_lightning.types import ClassSet


class FineTune(Classifier):
    """A linear layer and its encoder, trained together (see the module); the data: ``ImageClassDataModule``.

    What is drawn for an image (crop, RandAugment, erasing) is a function of the data's seed, the epoch and
    the image; what is drawn for a batch (mixing, stochastic depth) of the seed, the step, the batch in it and
    the device.

    Args:
        encoder: see ``Evaluation``; an encoder object is copied and stays as it is.
        recipe: optimiser and rate.
        mixing: mixup, CutMix and smoothing.
        drop_path: stochastic depth; 0.1, and 0 for an encoder that has none.
        head_scale: the layer's first weights, normal with deviation 0.02, are multiplied by this; BEiT:
            0.001. (The public code cuts them at ±2, a hundred deviations.)
        watch_every: epochs between two scores of the held-out images while training.
        output_stride: see ``Evaluation``.
        decoder: see ``Evaluation``; a vector is always the bare encoder's, and only that is trained.
        classes: see ``Evaluation``.
        protocol: its name in tables.

    Raises:
        UserError: parts that do not fit each other.
    """

    def __init__(
        self,
        encoder: str | Encoder | None = None,
        *,
        recipe: FineTuneRecipe | None = None,
        mixing: Mixing | None = None,
        drop_path: float = 0.1,
        head_scale: float = 1.0,
        watch_every: int = 1,
        output_stride: int | None = None,
        decoder: Literal["keep", "drop"] = "drop",
        classes: int | Sequence[str] | None = None,
        protocol: str = "finetuned classification",
    ) -> None:
        given = copy.deepcopy(encoder) if isinstance(encoder, Encoder) else encoder
        super().__init__(given, output_stride=output_stride, decoder=decoder, classes=classes)
        self.recipe, self.mixing = recipe or FineTuneRecipe(), mixing or Mixing()
        self.head_scale, self.watch_every, self.protocol = head_scale, watch_every, protocol
        self.rates: Rates | None = None
        self.head: nn.Linear | None = None
        if self.encoder is not None:
            bare = self.encoder.encoder if isinstance(self.encoder, DecodedEncoder) else self.encoder
            self.encoder = with_drop_path(bare, drop_path) if drop_path else bare
            self.encoder.requires_grad_(True)
            for name, parameter in self.encoder.named_parameters():
                if name.rpartition(".")[2] == "mask_token":  # nothing is masked: DDP waits for its gradient
                    parameter.requires_grad_(False)
            self.train()
        self._build()

    # ---- parts
    def _build(self) -> None:
        """Makes the layer as soon as encoder and classes are known."""
        if self.head is not None or self.encoder is None or self.class_set is None:
            return
        # from the seed alone, whatever was drawn before
        with seeded(torch.initial_seed() ^ crc32(b"finetuned layer")):
            head = nn.Linear(self.encoder.vector_dim, len(self.class_set))
            nn.init.trunc_normal_(head.weight, std=0.02, a=-2.0, b=2.0)
        with torch.no_grad():
            head.weight.mul_(self.head_scale)
            head.bias.zero_()
        self.head = head.to(self.encoder.mean.device)

    def take_classes(self, classes: ClassSet) -> None:
        """See ``Evaluation``; makes the layer."""
        super().take_classes(classes)
        self._build()

    def forward(self, images: Tensor) -> Tensor:
        """Logits ``(B, classes)`` float32 of images ``(B, 3, H, W)`` from 0 to 255."""
        return self.logits(unit(images))

    def logits(self, images: Tensor) -> Tensor:
        """Logits ``(B, classes)`` float32 of images ``(B, 3, H, W)`` from 0 to 1."""
        assert self.head is not None
        found: Tensor = self.head(read_vectors(self.the_encoder(), images))
        return found.float()

    def setup(self, stage: str) -> None:
        """See ``Classifier``.

        Raises:
            UserError: there is nothing to train, or ``layer_decay`` for an encoder without blocks.
        """
        super().setup(stage)
        if stage == "fit":  # before anything is trained
            assert self.head is not None
            finetune_groups(self.recipe, self.the_encoder(), self.head)

    # ---- training
    def training_step(self, batch: ImageBatch, batch_idx: int) -> Tensor:
        """Cross-entropy with mixed and smoothed classes."""
        seed = image_data(self).seed
        key = key_of(seed, "finetuning", self.global_step, batch_idx, self.global_rank).reshape(1)
        classes = len(self.the_classes())
        images, targets = self.mixing(unit(batch.images), batch.labels, classes, fold(key, "mixing"))
        with seeded(int(fold(key, "depth"))):
            logits = self.logits(images)
        loss = functional.cross_entropy(logits, targets)
        self.log("train/loss", loss.detach(), batch_size=len(batch))
        return loss

    def configure_optimizers(self) -> Optimizer:
        """AdamW over encoder and layer; its rates are set at every step."""
        assert self.head is not None
        epochs = self.epochs()
        steps = int(self.trainer.estimated_stepping_batches) // epochs
        planned = self.recipe.rates(epochs, max(steps, 1), self.global_batch())
        if self.rates not in (None, planned):
            warnings.warn(f"going on along the checkpoint's {self.rates}, not {planned}", stacklevel=2)
        self.rates = self.rates or planned
        return finetune_optimizer(self.recipe, self.the_encoder(), self.head)

    def rate(self) -> float:
        """The rate of the epoch or step."""
        assert self.rates is not None
        return self.rates.at(self.current_epoch, self.global_step)

    # ---- what is kept
    def details(self) -> dict[str, Any]:
        """See ``Classifier``."""
        return {
            "recipe": spec(self.recipe),
            "mixing": spec(self.mixing),
            # the network's own, which a checkpoint gives back
            "drop_path": self.the_encoder().init_args.get("drop_path", 0.0),
            "head_scale": self.head_scale,
        }

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """See ``Classifier``; the course of the rate too."""
        super().on_save_checkpoint(checkpoint)
        kept = checkpoint["poodle_lightning"]
        kept["method"]["init_args"] |= {"drop_path": 0.0}  # the encoder in hand has it
        kept["rates"] = None if self.rates is None else self.rates.state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """See ``Classifier``; takes the course of the run, whose horizon was fixed when it began."""
        super().on_load_checkpoint(checkpoint)
        rates = checkpoint.get("poodle_lightning", {}).get("rates")
        if rates is not None:
            self.rates = Rates.from_state(rates)

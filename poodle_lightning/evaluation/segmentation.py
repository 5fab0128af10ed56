"""Semantic segmentation by a head on an encoder, frozen or finetuned: the readouts of the papers."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, Self
from zlib import crc32

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import Optimizer

from poodle_lightning.configured import build, spec, untrained
from poodle_lightning.evaluation.base import Scheduled, Scores
from poodle_lightning.evaluation.inference import Inference, WholeImage, padded
from poodle_lightning.evaluation.metrics import Confusion
from poodle_lightning.evaluation.worst import WorstImages
from poodle_lightning.nn.encoder import Encoder
from poodle_lightning.nn.head_optim import HeadRecipe, build_head_optimizer
from poodle_lightning.nn.patches import multiple_of
from poodle_lightning.nn.seg_heads import LinearHead, SegHead, resize
from poodle_lightning.ops.random import fold
from poodle_lightning.types import IGNORE, ClassSet, Features, LabelledBatch, UserError


class Segmentation(Scheduled):
    """Trains a head on labelled images and scores it on held-out ones.

    The loss is cross-entropy, in float32, of the logits upsampled bilinearly to the size of the labels. A
    batch without a labelled pixel has the loss 0. In a test, logits are brought to the size of the image,
    then to that of the labels' file, then the highest wins; images are taken one by one, so no prediction
    depends on how they are batched.

    Args:
        encoder: see :class:`Evaluation`; an encoder object is copied and stays as it is.
        head: reads the features; None is :class:`LinearHead`.
        output_stride: see :class:`Evaluation`.
        decoder: see :class:`Evaluation`; UPerNet drops PooDLe's, linear readouts keep it.
        classes: see :class:`Evaluation`.
        frozen: the encoder is in eval mode, without gradient, and never changes; False finetunes it.
        recipe: how it is optimised; None is FlowE's on BDD100K.
        inference: how a test image is seen; None: whole.
        auxiliary: a second head that only training has.
        auxiliary_weight: of its loss; MMSegmentation's 0.4.
        mean_over: the loss is the mean over the ``labelled`` pixels of the batch on all devices
            (detectron2's), or over ``all`` pixels, with 0 for ignored ones (MMSegmentation's default,
            ``avg_non_ignore=False``).
        drop_path: stochastic depth of a finetuned ViT; iBOT's 0.1.
        protocol: its name in tables; None makes one up.

    Raises:
        UserError: parts that do not fit each other.
    """

    def __init__(
        self,
        encoder: str | Encoder | None = None,
        head: SegHead | None = None,
        *,
        output_stride: int | None = None,
        decoder: Literal["keep", "drop"] = "keep",
        classes: int | Sequence[str] | ClassSet | None = None,
        frozen: bool = True,
        recipe: HeadRecipe | None = None,
        inference: Inference | None = None,
        auxiliary: SegHead | None = None,
        auxiliary_weight: float = 0.4,
        mean_over: Literal["labelled", "all"] = "labelled",
        drop_path: float = 0.0,
        protocol: str | None = None,
    ) -> None:
        given = copy.deepcopy(encoder) if isinstance(encoder, Encoder) else encoder
        super().__init__(given, output_stride=output_stride, decoder=decoder, classes=classes)
        self.head = copy.deepcopy(head) if head is not None else LinearHead()
        self.auxiliary = copy.deepcopy(auxiliary)
        self.frozen, self.recipe = frozen, recipe or HeadRecipe()
        self.inference = inference or WholeImage()
        self.auxiliary_weight, self.mean_over = auxiliary_weight, mean_over
        mode = "frozen" if frozen else "finetuned"
        self.protocol = protocol or f"{type(self.head).__name__}, {mode}"
        if frozen and (self.recipe.layer_decay != 1.0 or drop_path):
            raise UserError("recipe.layer_decay and drop_path are for finetuning: set frozen false")
        if self.encoder is not None:
            if drop_path:
                self.encoder = with_drop_path(self.encoder, drop_path)
            self.encoder.requires_grad_(not frozen)
            self.train()
        self._made = False
        self._build()
        self._start_counting()

    # ---- parts
    def _build(self) -> None:
        """Makes the heads' layers as soon as encoder and classes are known."""
        if self._made or self.encoder is None or self.class_set is None:
            return
        # From the seed alone, so that the weights they start with do not depend on what was drawn before
        # (processes of several devices seed themselves again, a single one does not).
        with seeded(torch.initial_seed() ^ crc32(b"heads")):
            for head in self._heads():
                head.build(self.encoder.channels, self.encoder.strides, len(self.class_set))
        self._made = True

    def _heads(self) -> list[SegHead]:
        return [self.head] if self.auxiliary is None else [self.head, self.auxiliary]

    def take_classes(self, classes: ClassSet) -> None:
        """See :class:`Evaluation`; makes the heads' layers."""
        super().take_classes(classes)
        self._build()

    def setup(self, stage: str) -> None:
        """Classes of the data, layers of the heads, channels last; before DDP wraps."""
        super().setup(stage)
        self._build()
        self.to(memory_format=torch.channels_last)

    def train(self, mode: bool = True) -> Self:
        """A frozen encoder stays in eval mode."""
        super().train(mode)
        if self.frozen and self.encoder is not None:
            self.encoder.eval()
        return self

    # ---- networks
    def features(self, images: Tensor) -> Features:
        """The encoder's, of ``(B, 3, H, W)`` in [0, 1], filled up to what it needs; no graph if frozen."""
        encoder = self.the_encoder()
        images = padded(images, multiple_of(encoder), encoder.mean)
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            found: Features = encoder(images)
        return found

    def forward(self, images: Tensor) -> Tensor:
        """Logits ``(B, classes, H, W)`` float32 of images ``(B, 3, H, W)`` in [0, 1]."""
        return self._logits(self.head, self.features(images), images)

    def _logits(self, head: SegHead, features: Features, images: Tensor) -> Tensor:
        height, width = images.shape[-2:]
        rows, columns = multiple_of(self.the_encoder())
        whole = (height + -height % rows, width + -width % columns)
        logits: Tensor = head(features)
        return resize(logits.float(), whole)[..., :height, :width]

    # ---- training
    def training_step(self, batch: LabelledBatch, batch_idx: int) -> Tensor:
        """The loss; logs ``train/loss`` and, with an auxiliary head, both parts."""
        images = batch.unit()
        truth = batch.labels.long()
        with seeded(int(fold(batch.key, "dropout")[0])):
            features = self.features(images)
            logits = [self._logits(head, features, images) for head in self._heads()]
        terms = {"head": self._cross_entropy(logits[0], truth)}
        if self.auxiliary is not None:
            terms["auxiliary"] = self.auxiliary_weight * self._cross_entropy(logits[1], truth)
        total = torch.stack(list(terms.values())).sum()
        logs = {"train/loss": total.detach()}
        if len(terms) > 1:
            logs |= {f"train/loss_{name}": value.detach() for name, value in terms.items()}
        self.log_dict(logs, batch_size=len(batch))
        return total

    def _cross_entropy(self, logits: Tensor, truth: Tensor) -> Tensor:
        total = functional.cross_entropy(logits, truth, ignore_index=IGNORE, reduction="sum")
        if self.mean_over == "all":
            return total / truth.numel()
        # gradients are averaged over devices, so the mean count there makes it the mean over all pixels
        count = (truth != IGNORE).sum().float()
        return total / self.over_devices(count, "mean").clamp(min=1e-6)

    def configure_optimizers(self) -> Optimizer:
        """The recipe's optimiser over the head, and over the encoder unless it is frozen."""
        self.plan()
        parts: dict[str, nn.Module] = {} if self.frozen else {"encoder": self.the_encoder()}
        parts["head"] = self.head
        if self.auxiliary is not None:
            parts["auxiliary"] = self.auxiliary
        return build_head_optimizer(self.recipe, parts)

    # ---- scoring
    @torch.no_grad()
    def _test_logits(self, batch: LabelledBatch, place: int) -> Tensor:
        """Logits of one image at the size of its labels, ``(1, C, h, w)`` on the device."""
        image = batch.images[place : place + 1].to(self.device).float() / 255.0
        labels = batch.labels
        return resize(self.inference(self, image), (labels.shape[-2], labels.shape[-1]))

    def predict_labels(self, batch: LabelledBatch) -> Tensor:
        """Predicted classes ``(B, h, w)`` int64 on the host, at the size of the labels."""
        training = self.training
        self.eval()
        guesses = [self._test_logits(batch, place).argmax(dim=1).cpu() for place in range(len(batch))]
        self.train(training)
        return torch.cat(guesses)

    def on_validation_epoch_start(self) -> None:
        """Counts from zero."""
        self._start_counting()

    def _start_counting(self) -> None:
        self._scores: Scores | None = None
        count = 0 if self.class_set is None else len(self.class_set)
        self.confusion = Confusion(count)
        self._worst = WorstImages(count)
        self._loss = torch.zeros((), dtype=torch.float64)

    def validation_step(self, batch: LabelledBatch, batch_idx: int) -> None:
        """Counts predictions against labels, image by image."""
        for place in range(len(batch)):
            logits = self._test_logits(batch, place)
            labels = batch.labels[place : place + 1].to(logits.device)
            image = Confusion(len(self.the_classes()))
            image.update(logits.argmax(dim=1), labels)
            total = functional.cross_entropy(logits, labels.long(), ignore_index=IGNORE, reduction="sum")
            self._loss += total.double().cpu()
            self._worst.update(image, int(batch.index[place]))
            self.confusion.merge(image)

    def on_validation_epoch_end(self) -> None:
        """Adds up over all devices and logs; every device ends with the same numbers."""
        self.confusion.all_reduce()
        self._worst.all_reduce()
        loss = self.over_devices(self._loss.float().to(self.device), "sum")
        pixels = int(self.confusion.truth.sum())
        if not bool(loss.isfinite()):
            raise UserError(
                "the logits of held-out images are not finite: lower model.recipe.lr, or look at the encoder"
            )
        self._scores = self._summary(float(loss) / max(pixels, 1))
        shown = ("loss", "miou", "miou_present", "pixel_accuracy")
        groups = [f"miou_{group}" for group in self.the_classes().groups]
        found = self._scores.scores | {"loss": self._scores.details["loss"]}
        logs = {f"val/{name}": torch.tensor(found[name], device=self.device) for name in (*shown, *groups)}
        self.log_dict(logs, sync_dist=True)

    def _summary(self, loss: float) -> Scores:
        classes, iou = self.the_classes(), self.confusion.iou()
        measures = {"iou": iou, "accuracy": self.confusion.class_accuracy()}
        return Scores(
            protocol=self.protocol,
            headline="miou",
            scores=self.confusion.summary(classes.numbered()),
            per_class={
                measure: dict(zip(classes.names, values.tolist(), strict=True))
                for measure, values in measures.items()
            },
            counts=self.confusion.counts(),
            details={
                "loss": loss,
                "frozen": self.frozen,
                "head": spec(self.head),
                "inference": spec(self.inference),
                "strides": dict(self.the_encoder().strides),
            },
            worst=self._worst.choose(iou, classes.names),
        )

    def scores(self) -> Scores:
        """See :class:`Evaluation`."""
        if self._scores is None:
            raise UserError("there are no scores yet: run validate first")
        return self._scores

    # ---- what is kept
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """See :class:`Scheduled`."""
        super().on_save_checkpoint(checkpoint)
        given = checkpoint["poodle_lightning"]["method"]["init_args"]
        given["drop_path"] = 0.0  # the encoder in hand has it


def with_drop_path(encoder: Encoder, rate: float) -> Encoder:
    """The same weights in a network with stochastic depth.

    Raises:
        UserError: the encoder has no argument ``drop_path`` (``ViT`` has).
    """
    if "drop_path" not in encoder.init_args:
        raise UserError(f"drop_path {rate}: {type(encoder).__name__} does not have it: set drop_path 0")
    plain = untrained(spec(encoder))
    plain["init_args"]["drop_path"] = rate
    made: Encoder = build(plain, [type(encoder).__module__.partition(".")[0]])
    made.load_state_dict(encoder.state_dict())
    return made


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """What PyTorch draws inside (first weights, dropout, stochastic depth) as a function of a number alone.

    The global state is as before afterwards.
    """
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed & (2**63 - 1))
        yield

"""Depth read linearly from frozen features: PiCo's Table 3, NYUv2 (appendix A.2.4)."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional

from poodle_lightning.configured import spec
from poodle_lightning.data.depth import DepthBatch, DepthDataModule
from poodle_lightning.evaluation.base import Scores
from poodle_lightning.evaluation.depth_metrics import DepthErrors
from poodle_lightning.evaluation.inference import Inference
from poodle_lightning.evaluation.segmentation import Segmentation, seeded
from poodle_lightning.nn.encoder import Encoder
from poodle_lightning.nn.head_optim import HeadRecipe
from poodle_lightning.nn.seg_heads import SegHead, resize
from poodle_lightning.ops.random import fold, key_of
from poodle_lightning.types import ClassSet, UserError


class DepthReadout(Segmentation):
    """Trains a head with one output, the depth in metres, and scores it on held-out images.

    The head is that of ``Segmentation`` with one output and no softmax (PiCo, section 4.2), upsampled
    bilinearly to the size of the depths; the loss is over the measured pixels of the batch on all devices, in
    float32. Which loss, and all sizes and numbers of steps, are lost in the text of the paper that we have.

    Args:
        encoder: see ``Evaluation``.
        head: reads the features; None is ``LinearHead``.
        loss: of ``p − t`` in metres: ``l1``, ``l2`` (squared) or ``huber`` (smooth at 1 m). Ours: ``l1``.
        crop: ``eigen`` scores the middle of the images only; None all of them.
        output_stride: see ``Evaluation``.
        decoder: see ``Evaluation``.
        frozen: see ``Segmentation``.
        recipe: see ``Segmentation``.
        inference: see ``Segmentation``.
        protocol: its name in tables.

    Raises:
        UserError: parts that do not fit each other.
    """

    def __init__(
        self,
        encoder: str | Encoder | None = None,
        head: SegHead | None = None,
        *,
        loss: Literal["l1", "l2", "huber"] = "l1",
        crop: Literal["eigen"] | None = None,
        output_stride: int | None = None,
        decoder: Literal["keep", "drop"] = "keep",
        frozen: bool = True,
        recipe: HeadRecipe | None = None,
        inference: Inference | None = None,
        protocol: str = "depth, linear",
    ) -> None:
        self.loss, self.crop = loss, crop
        super().__init__(
            encoder,
            head,
            output_stride=output_stride,
            decoder=decoder,
            classes=ClassSet(("depth",)),
            frozen=frozen,
            recipe=recipe,
            inference=inference,
            protocol=protocol,
        )

    def setup(self, stage: str) -> None:
        """See ``Segmentation``.

        Raises:
            UserError: the data have no depth.
        """
        self._data()
        super().setup(stage)

    def _data(self) -> DepthDataModule:
        data = getattr(self.trainer, "datamodule", None)
        if not isinstance(data, DepthDataModule):
            raise UserError(f"{type(self).__name__} needs images with depth: give data: DepthDataModule")
        return data

    def training_step(self, batch: DepthBatch, batch_idx: int) -> Tensor:  # type: ignore[override]
        """The mean loss over the measured pixels; 0 for a batch without one."""
        key = key_of(self._data().seed, "depth", self.global_step, batch_idx, self.global_rank)
        with seeded(int(fold(key.reshape(1), "dropout")[0])):
            depth = self(batch.unit())[:, 0]
        valid = batch.depth > 0
        total = torch.where(valid, pixel_loss(depth.float(), batch.depth, self.loss), 0.0).sum()
        # gradients are averaged over devices, so the mean count there makes it the mean over all pixels
        loss = total / self.over_devices(valid.sum().float(), "mean").clamp(min=1e-6)
        self.log("train/loss", loss.detach(), batch_size=len(batch))
        return loss

    # ---- scoring
    @torch.no_grad()
    def predict_depth(self, batch: DepthBatch, place: int) -> Tensor:
        """Depth of one image at the size of its truth, ``(1, h, w)`` float32 m on the device."""
        image = batch.images[place : place + 1].to(self.device).float() / 255.0
        found = resize(self.inference(self, image), (batch.depth.shape[-2], batch.depth.shape[-1]))
        return found[:, 0].float()

    def _start_counting(self) -> None:
        self._scores: Scores | None = None
        self.errors = DepthErrors(self.crop)

    def validation_step(self, batch: DepthBatch, batch_idx: int) -> None:  # type: ignore[override]
        """Compares image by image, so that nothing depends on how they are batched."""
        for place in range(len(batch)):
            depth = self.predict_depth(batch, place)
            self.errors.update(depth, batch.depth[place : place + 1].to(depth.device))

    def on_validation_epoch_end(self) -> None:
        """Adds up over all devices and logs; every device ends with the same numbers.

        Raises:
            UserError: what was predicted is not finite, or no pixel was compared.
        """
        self.errors.all_reduce()
        if self.errors.pixels == 0:
            raise UserError("no held-out pixel has a measured depth inside the crop: set model.crop null")
        found = self.errors.summary()
        if found["rmse"] != found["rmse"] or found["rmse"] == float("inf"):
            raise UserError("the predicted depths are not finite: lower model.recipe.lr")
        self._scores = Scores(
            protocol=self.protocol,
            headline="rmse",
            scores=found,
            counts={"images": self.errors.images, "pixels": self.errors.pixels},
            details={
                "loss": self.loss,
                "crop": self.crop,
                "frozen": self.frozen,
                "head": spec(self.head),
                "strides": dict(self.the_encoder().strides),
                "lower_is_better": True,
                "units": "m",
            },
        )
        shown = ("rmse", "abs_rel", "delta1")
        logs = {f"val/{name}": torch.tensor(found[name], device=self.device) for name in shown}
        self.log_dict(logs, sync_dist=True)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """See ``Segmentation``; the one output is no choice."""
        super().on_save_checkpoint(checkpoint)
        given = checkpoint["poodle_lightning"]["method"]["init_args"]
        for name in ("classes", "drop_path"):
            given.pop(name, None)


def pixel_loss(depth: Tensor, truth: Tensor, kind: Literal["l1", "l2", "huber"]) -> Tensor:
    """The loss of every pixel, without a mean.

    Args:
        depth: predicted, m.
        truth: same shape, m.
        kind: ``l1`` |d|, ``l2`` d², ``huber`` d²/2 up to 1 m and |d| − 1/2 beyond.
    """
    if kind == "l1":
        return (depth - truth).abs()
    if kind == "l2":
        return (depth - truth).square()
    return functional.huber_loss(depth, truth, reduction="none", delta=1.0)

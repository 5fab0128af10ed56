"""What every method shares: logging, the optimiser and its schedule, the EMA step, a plain checkpoint.

A method is one file. It builds an ``online`` container (what its target copies), optional predictors beside
it, and says how a clip becomes losses. It never touches files, and no callback is needed for it to be right.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import lightning as L
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

import poodle_lightning
from poodle_lightning.nn.configured import Configured, build, spec, untrained
from poodle_lightning.nn.ema import EMA
from poodle_lightning.nn.encoder import DecodedEncoder, Decoder, Encoder
from poodle_lightning.nn.optim import Recipe, Schedule, build_optimizer
from poodle_lightning.ops.geometry import Affine, Flow
from poodle_lightning.types import Clip, Losses, UserError, View

CHECKPOINT_FORMAT = 1


@dataclass(frozen=True)
class Look:
    """What there is to see of one batch; everything a method does not have is None.

    Args:
        frames: ``(N, 2, 3, H, W)`` clean crops in [0, 1].
        flow: 2N rows, first → second frame, then back.
        visible: ``(2N, H, W)`` bool.
        views: the online view of the 2N frames and the target view of their partners.
        boxes: online and target subcrop boxes, 2N·K rows (row ``i·K + k``).
        crops: the crops themselves, ``(2N·K, 3, h, w)`` each.
        same: ``(2N·K,)`` bool, pairs whose two boxes lie in the same frame.
    """

    frames: Tensor
    flow: Flow | None = None
    visible: Tensor | None = None
    views: tuple[View, View] | None = None
    boxes: tuple[Affine, Affine] | None = None
    crops: tuple[Tensor, Tensor] | None = None
    same: Tensor | None = None


class Online(nn.Module):
    """The container of everything that the target copies; predictors stay outside."""

    def __init__(self, encoder: Encoder, decoder: Decoder | None = None) -> None:
        super().__init__()
        self.encoder = encoder
        self.decoder = decoder


class Method(L.LightningModule, Configured):
    """Base of all methods.

    Subclasses set ``online`` (with ``.encoder``, perhaps ``.decoder``) and ``target``, and write ``losses``.

    Args:
        recipe: optimiser, schedules, EMA momentum.
    """

    online: Online
    target: EMA[Any] | None

    def __init__(self, recipe: Recipe | None = None) -> None:
        super().__init__()
        self.recipe = recipe or Recipe()
        self.target = None
        self.schedule: Schedule | None = None

    def losses(self, clip: Clip) -> Losses:
        """The weighted terms of the loss, under the paper's names."""
        raise UserError(f"{type(self).__name__} has no losses(): subclass a method or write it")

    def look(self, clip: Clip) -> Look:
        """What the method sees of a batch, for pictures; draws are those of training."""
        return Look(clip.unit())

    # ---- steps
    def training_step(self, clip: Clip, batch_idx: int) -> Tensor:
        """Sum of the terms; logs ``train/loss`` and each ``train/loss_<term>``."""
        return self._total("train", clip)

    def validation_step(self, clip: Clip, batch_idx: int) -> Tensor:
        """The same loss on held-out clips, with draws that never change."""
        return self._total("val", clip)

    def _total(self, stage: str, clip: Clip) -> Tensor:
        terms = self.losses(clip)
        total = torch.stack(list(terms.values())).sum()
        logs = {f"{stage}/loss": total.detach()}
        logs |= {f"{stage}/loss_{name}": value.detach() for name, value in terms.items()}
        training = stage == "train"
        self.log_dict(
            logs, batch_size=len(clip), on_step=training, on_epoch=not training, sync_dist=not training
        )
        return total

    # ---- optimisation
    def setup(self, stage: str) -> None:
        """Channels last: convolutions run up to twice as fast (``benchmarks/step.py``). Before DDP wraps."""
        self.to(memory_format=torch.channels_last)

    def configure_optimizers(self) -> Optimizer:
        """The recipe's optimiser over everything trainable; its learning rate is set at every step."""
        if self.schedule is None:
            self.schedule = Schedule.from_recipe(self.recipe, self._steps_per_epoch(), self.global_batch)
        return build_optimizer(self.recipe, self, self.global_batch)

    @property
    def global_batch(self) -> int:
        """Clips per optimiser step: devices × clips per device × accumulation."""
        per_device = getattr(getattr(self.trainer, "datamodule", None), "batch_size", None)
        per_device = self.recipe.reference_batch if per_device is None else int(per_device)
        return per_device * self.trainer.world_size * self.trainer.accumulate_grad_batches

    def _steps_per_epoch(self) -> int:
        """Optimiser steps of one pass over the training data; 1 where the recipe counts in steps only."""
        if self.recipe.horizon_steps is not None and self.recipe.warmup_steps is not None:
            return 1
        self.trainer.fit_loop.setup_data()
        batches = self.trainer.num_training_batches
        if isinstance(batches, float):
            raise UserError(
                "the training data has no length: set recipe.horizon_steps and recipe.warmup_steps"
            )
        return max(1, -(-batches // self.trainer.accumulate_grad_batches))

    def optimizer_step(
        self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None
    ) -> None:
        """One step at the schedule's rate, then the EMA, once per optimiser step under accumulation."""
        assert self.schedule is not None
        step = self.global_step
        for group in optimizer.param_groups:
            group["lr"] = self.schedule.lr(step) * group.get("lr_scale", 1.0)
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        if self.target is not None:
            self.target.update(self.online, self.schedule.momentum(step))

    # ---- what is kept
    def backbone(self) -> Encoder:
        """The online encoder that is exported, with its decoder where there is one."""
        encoder, decoder = self.online.encoder, self.online.decoder
        return encoder if decoder is None else DecodedEncoder(encoder, decoder)

    @torch.no_grad()
    def embed(self, images: Tensor) -> dict[str, Tensor]:
        """Rows ``(M, D)`` by which health is judged, of images ``(N, 3, H, W)`` in [0, 1]."""
        return {"encoder": self.online.encoder(images).vector.float()}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds what rebuilds the method and its encoder, as plain data (loads with ``weights_only=True``)."""
        prefixes = {"encoder": "online.encoder."}
        if self.online.decoder is not None:
            prefixes["decoder"] = "online.decoder."
        checkpoint["poodle_lightning"] = {
            "format": CHECKPOINT_FORMAT,
            "version": poodle_lightning.__version__,
            "method": spec(self),
            "backbone": spec(self.backbone()),
            "prefixes": prefixes,
            "schedule": None if self.schedule is None else self.schedule.state_dict(),
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Takes the schedule of the run that is resumed: its horizon was fixed when it began."""
        schedule = checkpoint.get("poodle_lightning", {}).get("schedule")
        if schedule is not None:
            self.schedule = Schedule.from_state(schedule)

    @classmethod
    def load_from_checkpoint(  # type: ignore[override]
        cls, checkpoint_path: str | Path, map_location: Any = "cpu", **_: Any
    ) -> Self:
        """The method of a checkpoint, with its weights. Only tensors and plain data are read."""
        path = Path(checkpoint_path)
        if not path.is_file():
            raise UserError(f"{path}: no such checkpoint")
        checkpoint = torch.load(path, map_location=map_location, weights_only=True)
        if "poodle_lightning" not in checkpoint:
            raise UserError(f"{path}: not a poodle-lightning checkpoint (its keys: {sorted(checkpoint)[:5]})")
        method = build(untrained(checkpoint["poodle_lightning"]["method"]))
        if not isinstance(method, cls):
            raise UserError(f"{path} holds a {type(method).__name__}, not a {cls.__name__}")
        method.load_state_dict(checkpoint["state_dict"])
        return method

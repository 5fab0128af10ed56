"""What every method shares: logging, the optimiser and its schedule, the EMA step, a plain checkpoint.

A method is one file. It builds an ``online`` container (what its target copies), optional predictors beside
it, and says how a clip becomes losses. It never touches files, and no callback is needed for it to be right.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any, Self

import lightning as L
import torch
from torch import Tensor
from torch.optim import Optimizer

from poodle_lightning.configured import Configured
from poodle_lightning.hub import describe, rebuild
from poodle_lightning.methods.run_length import global_batch, steps_per_epoch
from poodle_lightning.nn.ema import EMA
from poodle_lightning.nn.encoder import Encoder
from poodle_lightning.nn.online import Online
from poodle_lightning.nn.optim import Recipe, Schedule, build_optimizer, clip_each
from poodle_lightning.ops.random import drawn_from, fold
from poodle_lightning.types import Clip, Look, Losses, UserError


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
        with drawn_from(fold(clip.key[:1], "drop path"), clip.device):  # what torch draws by itself
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
        """Channels last: convolutions run faster so (``benchmarks/step.py``). Before DDP wraps."""
        self.to(memory_format=torch.channels_last)

    def configure_optimizers(self) -> Optimizer:
        """The recipe's optimiser over everything trainable; its learning rate is set at every step."""
        planned = Schedule.from_recipe(
            self.recipe, steps_per_epoch(self.trainer, self.recipe), self.global_batch
        )
        if self.schedule not in (None, planned):
            warnings.warn(f"going on along the checkpoint's {self.schedule}, not {planned}", stacklevel=2)
        self.schedule = self.schedule or planned
        return build_optimizer(self.recipe, self, self.global_batch)

    @property
    def global_batch(self) -> int:
        """Clips per optimiser step: devices × clips per device × accumulation."""
        return global_batch(self.trainer, self.recipe)

    def optimizer_step(
        self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None
    ) -> None:
        """One step at the schedule's rate, then the EMA, once per optimiser step under accumulation."""
        assert self.schedule is not None
        step = self.global_step
        self.schedule.drive(optimizer, step)
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        if self.target is not None:
            self.target.update(self.online, self.schedule.momentum(step))
        self.after_step()

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Clips each gradient by itself where the recipe says so: they are complete and unscaled here."""
        if self.recipe.clip_each is not None:
            clip_each(self.parameters(), self.recipe.clip_each)

    def after_step(self) -> None:
        """For what moves once per optimiser step, as a running centre does; the target has moved already."""

    # ---- what is kept
    def exported(self) -> tuple[Online, str]:
        """The container whose encoder is exported, and the beginning of its names in the state dict."""
        return self.online, "online."

    def backbone(self) -> Encoder:
        """The encoder that is exported, with its decoder where there is one."""
        return self.exported()[0].backbone()

    @torch.no_grad()
    def embed(self, images: Tensor) -> dict[str, Tensor]:
        """Rows ``(M, D)`` by which health is judged, of images ``(N, 3, H, W)`` in [0, 1]."""
        return {"encoder": self.online.encoder(images).vector.float()}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds what rebuilds the method and its encoder, as plain data (loads with ``weights_only=True``)."""
        schedule = None if self.schedule is None else self.schedule.state_dict()
        checkpoint["poodle_lightning"] = describe(self, *self.exported()) | {"schedule": schedule}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Takes the schedule of the run that is resumed: its horizon was fixed when it began."""
        schedule = checkpoint.get("poodle_lightning", {}).get("schedule")
        if schedule is not None:
            self.schedule = Schedule.from_state(schedule)

    @classmethod
    def load_from_checkpoint(  # type: ignore[override]
        cls, checkpoint_path: str | Path, **_: Any
    ) -> Self:
        """The method of a checkpoint, with its weights, on the CPU. Only tensors and plain data are read."""
        method, weights = rebuild(checkpoint_path)
        if not isinstance(method, cls):
            raise UserError(f"{checkpoint_path} holds a {type(method).__name__}, not a {cls.__name__}")
        method.load_state_dict(weights)
        return method

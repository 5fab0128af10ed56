"""Watches whether the features collapse. An observer: it never changes what is trained.

Three numbers, because each of them misses a kind of collapse that another sees: the spread of the features
(blind to all of them lying on one line), their effective rank (blind to a small cloud of noise around one
point) and their mean cosine (blind to two opposite points).
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor

from poodle_lightning.methods.base import Method
from poodle_lightning.nn.observed import observed
from poodle_lightning.nn.patches import whole_patches
from poodle_lightning.types import Clip

_CHUNK = 8


@dataclass(frozen=True)
class Vitals:
    """How alive a set of features is; NaN where the features are not finite.

    Args:
        std: standard deviation per dimension of the L2-normalised rows, averaged, times √d: 1 when spread
            over the sphere, 0 when all are equal.
        rankme: exponential of the entropy of the singular values of the normalised rows (Garrido et al.,
            2023, "RankMe", Eq. 1): the number of directions in use.
        cosine: mean cosine between different rows.
        full_rank: what ``rankme`` can be at most.
    """

    std: float
    rankme: float
    cosine: float
    full_rank: int


def vitals(rows: Tensor) -> Vitals:
    """The vitals of features ``(M, D)``, M ≥ 2, in float64; rows of zeros stay zeros."""
    count, dims = rows.shape
    unit = F.normalize(rows.double(), dim=1)
    if not bool(unit.isfinite().all()):
        return Vitals(math.nan, math.nan, math.nan, min(count, dims))
    std = float(unit.std(dim=0).mean()) * math.sqrt(dims)
    total = unit.sum(dim=0)
    cosine = float((total @ total - unit.square().sum()) / (count * (count - 1)))
    gram = unit @ unit.T if count < dims else unit.T @ unit
    singular = torch.linalg.eigvalsh(gram).clamp(min=0).sqrt()
    share = singular / singular.sum().clamp(min=1e-300)
    return Vitals(std, float(torch.special.entr(share).sum().exp()), cosine, min(count, dims))


class Health(L.Callback):
    """Logs ``health/<name>/std``, ``/rankme``, ``/cosine`` of ``method.embed``; warns of collapse.

    Nothing is drawn at random, modes and buffers stay as they are: with or without it, training is bit-equal.

    Args:
        every_n_steps: optimiser steps between two looks.
        max_images: images embedded per look, from the batch just trained on.
        max_rows: features looked at, evenly spaced over all rows.
        patience: optimiser steps during which every look must be bad before the alarm is raised.
        min_std: alarm below this.
        min_rank: alarm below this share of the largest possible rank.
        max_cosine: alarm above this.
    """

    def __init__(
        self,
        every_n_steps: int = 25,
        max_images: int = 64,
        max_rows: int = 1024,
        patience: int = 100,
        min_std: float = 0.2,
        min_rank: float = 0.05,
        max_cosine: float = 0.95,
    ) -> None:
        super().__init__()
        if every_n_steps < 1 or max_images < 1 or max_rows < 2:
            raise ValueError("Health needs every_n_steps >= 1, max_images >= 1 and max_rows >= 2")
        self.every_n_steps = every_n_steps
        self.max_images = max_images
        self.max_rows = max_rows
        self.patience = patience
        self.min_std = min_std
        self.min_rank = min_rank
        self.max_cosine = max_cosine
        self.sick_since: dict[str, int] = {}
        self.warned = False
        self._last_step = -1

    def complaints(self, seen: Vitals) -> list[str]:
        """What is wrong, in words; empty when healthy."""
        found = []
        if math.isnan(seen.std):
            found.append("features are not finite")
        if seen.std < self.min_std:
            found.append(f"std·√d {seen.std:.3f} < {self.min_std}")
        if seen.rankme < self.min_rank * seen.full_rank:
            found.append(f"RankMe {seen.rankme:.1f} < {self.min_rank:.0%} of {seen.full_rank}")
        if seen.cosine > self.max_cosine:
            found.append(f"mean cosine {seen.cosine:.3f} > {self.max_cosine}")
        return found

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Looks at the features of the batch, once every n optimiser steps."""
        step = trainer.global_step
        # under accumulation the step stands still for several batches
        due = step > 0 and step % self.every_n_steps == 0 and step != self._last_step
        if not due or not isinstance(pl_module, Method) or not isinstance(batch, Clip):
            return
        self._last_step = step
        numbers = self.look(pl_module, batch, step)
        for logger in trainer.loggers:
            # Lightning counts from 0 where it logs the loss of the same batch
            logger.log_metrics(numbers, step=step - 1)
        trainer.callback_metrics.update({name: torch.tensor(value) for name, value in numbers.items()})

    def on_validation_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """On the verb ``validate``: looks at the features of the first held-out batch."""
        alone = trainer.state.fn == "validate" and batch_idx == dataloader_idx == 0
        if alone and isinstance(pl_module, Method) and isinstance(batch, Clip):
            pl_module.log_dict(self.look(pl_module, batch, trainer.global_step), batch_size=len(batch))

    def look(self, method: Method, clip: Clip, step: int) -> dict[str, float]:
        """The numbers of one batch under their log keys; keeps count of bad looks and warns once."""
        numbers: dict[str, float] = {}
        collapsed = []
        for name, rows in self._rows(method, clip).items():
            found = vitals(rows)
            numbers |= {
                f"health/{name}/std": found.std,
                f"health/{name}/rankme": found.rankme,
                f"health/{name}/cosine": found.cosine,
            }
            wrong = self.complaints(found)
            if not wrong:
                self.sick_since.pop(name, None)
            elif step - self.sick_since.setdefault(name, step) >= self.patience:
                collapsed.append(f"{name}: {', '.join(wrong)}")
        numbers["health/collapsed"] = float(bool(collapsed))
        if collapsed and not self.warned:
            self.warned = True
            warnings.warn(
                f"step {step}: the features have been collapsed for {self.patience} steps "
                f"({'; '.join(collapsed)}). What is trained from here on is probably useless: lower the "
                "learning rate or look at the data",
                stacklevel=2,
            )
        return numbers

    def _rows(self, method: Method, clip: Clip) -> dict[str, Tensor]:
        """At most ``max_rows`` features per name, embedded a few images at a time to bound the memory."""
        found: dict[str, list[Tensor]] = {}
        with observed(method):
            # the method cuts its own crops of a clip, whose size need not fit the patches of a transformer
            images = whole_patches(clip.unit().flatten(0, 1)[: self.max_images], method.online.encoder)
            parts = images.split(_CHUNK)
            for part in parts:
                for name, rows in method.embed(part).items():
                    found.setdefault(name, []).append(evenly(rows, max(1, self.max_rows // len(parts))))
        joined = {name: torch.cat(rows) for name, rows in found.items()}
        return {name: rows for name, rows in joined.items() if len(rows) > 1}

    def state_dict(self) -> dict[str, Any]:
        """Since when features are bad, and whether that was said: a resumed run goes on counting."""
        return {"sick_since": dict(self.sick_since), "warned": self.warned}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes up the count of the run that is resumed."""
        self.sick_since = dict(state_dict["sick_since"])
        self.warned = bool(state_dict["warned"])


def evenly(rows: Tensor, most: int) -> Tensor:
    """At most ``most`` rows, evenly spaced, the first included."""
    if len(rows) <= most:
        return rows
    return rows[torch.arange(most, device=rows.device) * len(rows) // most]

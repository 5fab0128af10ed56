"""A model and data so small that a whole run takes a blink; and ways for them to fail."""

from __future__ import annotations

import os
import signal
from dataclasses import dataclass

import lightning as L
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from poodle_lightning.types import UserError


@dataclass
class Rule:
    """Settings in a dataclass, as recipes are.

    Args:
        rate: of the optimiser.
        name: of nothing.
    """

    rate: float = 0.05
    name: str = "plain"


class Trunk(nn.Module):
    """A part that a configuration swaps.

    Args:
        width: of its layer.
    """

    def __init__(self, width: int = 3) -> None:
        super().__init__()
        self.layer = nn.Linear(4, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


class DeepTrunk(Trunk):
    """Another such part."""


class Toy(L.LightningModule):
    """Least squares, with a choice of accidents at a step.

    Args:
        trunk: the part with weights.
        rule: settings.
        fail_at: step at which it happens; -1 never.
        how: nan, nan_on_rank_1, raise, raise_on_rank_0, SIGTERM, SIGINT or SIGUSR1.
    """

    def __init__(
        self, trunk: Trunk | None = None, rule: Rule | None = None, fail_at: int = -1, how: str = "nan"
    ) -> None:
        super().__init__()
        self.trunk = trunk or Trunk()
        self.rule = rule or Rule()
        self.fail_at, self.how, self.failed = fail_at, how, False
        self.losses: list[float] = []

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss = self.trunk(batch).square().mean()
        if self.global_step == self.fail_at and not self.failed:
            self.failed = True  # once, though accumulated batches share a step
            loss = self.accident(loss)
        self.log("train/loss", loss.detach())
        return loss

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log("val/loss", self.trunk(batch).square().mean())

    def accident(self, loss: Tensor) -> Tensor:
        if self.how == "nan":
            return loss * float("nan")
        if self.how == "nan_on_rank_1":
            return loss * float("nan") if self.global_rank == 1 else loss
        if self.how == "raise":
            raise ValueError("an accident")
        if self.how == "raise_on_rank_0":
            if self.global_rank == 0:
                raise UserError("an accident")
            return loss
        os.kill(os.getpid(), getattr(signal, self.how))
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=self.rule.rate)


class Numbers(Dataset):
    """Item i of 24 is a function of i."""

    def __len__(self) -> int:
        return 24

    def __getitem__(self, index: int) -> Tensor:
        return torch.cos(torch.arange(4.0) * (index + 1))


class ToyData(L.LightningDataModule):
    """Numbers in order.

    Args:
        root: a folder, unused.
        num_workers: of the loader.
        batch_size: items per step.
        seed: unused.
    """

    def __init__(
        self, root: str | None = None, num_workers: int = 0, batch_size: int = 4, seed: int | None = None
    ) -> None:
        super().__init__()
        self.root, self.num_workers, self.batch_size, self.seed = root, num_workers, batch_size, seed or 0

    def train_dataloader(self) -> DataLoader[Tensor]:
        return DataLoader(Numbers(), batch_size=self.batch_size, num_workers=self.num_workers)

    def val_dataloader(self) -> DataLoader[Tensor]:
        return DataLoader(Numbers(), batch_size=self.batch_size, num_workers=self.num_workers)

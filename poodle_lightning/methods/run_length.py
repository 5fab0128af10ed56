"""What a run's steps are made of, as its trainer knows it: clips per step, steps per epoch."""

from __future__ import annotations

import lightning as L

from poodle_lightning.nn.optim import Recipe
from poodle_lightning.types import UserError


def global_batch(trainer: L.Trainer, recipe: Recipe) -> int:
    """Clips per optimiser step: devices × clips per device × accumulation.

    Args:
        trainer: its data module says how many clips a device takes.
        recipe: of data without a ``batch_size`` its ``reference_batch`` is taken.
    """
    per_device = getattr(getattr(trainer, "datamodule", None), "batch_size", None)
    per_device = recipe.reference_batch if per_device is None else int(per_device)
    return per_device * trainer.world_size * trainer.accumulate_grad_batches


def steps_per_epoch(trainer: L.Trainer, recipe: Recipe) -> int:
    """Optimiser steps of one pass over the training data; 1 where the recipe counts in steps only.

    Raises:
        UserError: the recipe counts in epochs and the data has no length.
    """
    if recipe.horizon_steps is not None and recipe.warmup_steps is not None:
        return 1
    trainer.fit_loop.setup_data()
    batches = trainer.num_training_batches
    if isinstance(batches, float):
        raise UserError("the training data has no length: set recipe.horizon_steps and recipe.warmup_steps")
    return max(1, -(-batches // trainer.accumulate_grad_batches))

"""What a run's steps are made of, as its trainer knows it: clips per step, steps and keys per epoch."""

from __future__ import annotations

from typing import Any

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


def frames_per_clip(trainer: L.Trainer) -> int:
    """Frames of a training clip, as the data module's sampler says; 1 of data that has none.

    Args:
        trainer: its data module's ``sampler`` has ``frames``, or draws pairs.
    """
    sampler = getattr(getattr(trainer, "datamodule", None), "sampler", None)
    return 1 if sampler is None else int(getattr(sampler, "frames", 2))


def check_queue(trainer: L.Trainer, size: int, keys_per_clip: int, name: str = "queue") -> None:
    """Checks, as a fit begins, that an epoch brings a queue as many keys as it holds.

    A longer one would hold keys of the very images that look for a match: their own keys of the epoch before,
    as negatives. Endless data, batches of an unknown size and ``fast_dev_run`` are let through; so is a run
    that is cut short (``limit_train_batches``), whose data is what counts.

    Args:
        trainer: its loader says how many batches an epoch has on this device, its data module (or the loader)
            how many clips a batch has.
        size: keys that the queue holds.
        keys_per_clip: keys that a clip brings to it.
        name: the argument of the method that sets ``size``.

    Raises:
        UserError: an epoch has fewer keys.
    """
    if trainer.fast_dev_run:  # type: ignore[attr-defined]
        return
    trainer.fit_loop.setup_data()
    loader: Any = trainer.train_dataloader
    per_batch = getattr(getattr(trainer, "datamodule", None), "batch_size", None)
    per_batch = getattr(loader, "batch_size", None) if per_batch is None else per_batch
    if per_batch is None or isinstance(trainer.num_training_batches, float):
        return
    clips = len(loader) * int(per_batch) * trainer.world_size
    keys = clips * keys_per_clip
    if keys < size:
        raise UserError(
            f"fewer clips than the queue needs: model.{name}={size} keys, but an epoch of {clips} clips "
            f"brings {keys}; set model.{name} to {keys} or less, or raise data.repeats"
        )

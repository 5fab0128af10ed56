from types import SimpleNamespace

import lightning as L
import pytest
import torch
from lightning.pytorch.demos.boring_classes import BoringModel
from torch.utils.data import DataLoader, IterableDataset

from poodle_lightning.methods.run_length import (
    check_queue,
    frames_per_clip,
    global_batch,
    steps_per_epoch,
)
from poodle_lightning.nn.optim import Recipe
from poodle_lightning.types import UserError


def trainer(batches=10, accumulate=1, devices=1, data=None):
    return SimpleNamespace(
        num_training_batches=batches,
        accumulate_grad_batches=accumulate,
        world_size=devices,
        datamodule=data,
        fit_loop=SimpleNamespace(setup_data=lambda: None),
    )


def test_a_step_takes_the_batches_of_all_devices_and_all_that_are_accumulated():
    data = SimpleNamespace(batch_size=3)
    assert global_batch(trainer(accumulate=4, devices=2, data=data), Recipe()) == 24
    assert global_batch(trainer(accumulate=4, devices=2), Recipe(reference_batch=5)) == 40


@pytest.mark.parametrize(("batches", "accumulate", "steps"), [(10, 1, 10), (10, 3, 4), (9, 3, 3), (2, 4, 1)])
def test_the_last_step_of_an_epoch_may_be_a_short_one(batches, accumulate, steps):
    assert steps_per_epoch(trainer(batches, accumulate), Recipe()) == steps


def test_data_without_a_length_needs_steps():
    endless = trainer(batches=float("inf"))
    with pytest.raises(UserError, match=r"no length: set recipe\.horizon_steps and recipe\.warmup_steps"):
        steps_per_epoch(endless, Recipe())
    assert steps_per_epoch(endless, Recipe(warmup_steps=0, horizon_steps=5)) == 1


@pytest.mark.parametrize(
    ("sampler", "frames"), [(SimpleNamespace(frames=8), 8), (SimpleNamespace(gap=(0.5, 1.0)), 2), (None, 1)]
)
def test_frames_of_a_clip_are_those_of_its_sampler(sampler, frames):
    assert frames_per_clip(trainer(data=SimpleNamespace(sampler=sampler))) == frames
    assert frames_per_clip(trainer()) == 1


class Queued(BoringModel):
    """Needs ``size`` keys, three from each sample."""

    def __init__(self, size):
        super().__init__()
        self.size = size

    def on_fit_start(self):
        check_queue(self.trainer, self.size, 3, "negatives")


class Endless(IterableDataset):
    def __iter__(self):
        while True:
            yield torch.randn(32)


def fit(size, data, **kwargs):
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "accelerator": "cpu",
        "limit_val_batches": 0,
        "max_steps": 1,
    }
    L.Trainer(**{**quiet, **kwargs}).fit(Queued(size), data)


@pytest.mark.filterwarnings("ignore")
def test_a_queue_takes_at_most_the_keys_of_an_epoch():
    """Five batches of two samples, the last of which is dropped where it is short: 10 samples, 30 keys."""
    data = DataLoader(torch.randn(11, 32), batch_size=2, drop_last=True)
    fit(30, data)
    fit(30, data, limit_train_batches=1)
    with pytest.raises(UserError) as error:
        fit(31, data)
    assert str(error.value) == (
        "fewer clips than the queue needs: model.negatives=31 keys, but an epoch of 10 clips brings 30; "
        "set model.negatives to 30 or less, or raise data.repeats"
    )
    fit(31, data, fast_dev_run=True)
    fit(10**9, DataLoader(Endless(), batch_size=2))


def test_batches_of_all_devices_count_and_batches_of_unknown_size_do_not():
    given = trainer(batches=4, devices=3, data=SimpleNamespace(batch_size=5))
    given.fast_dev_run, given.train_dataloader = False, range(4)
    check_queue(given, 60, 1)
    with pytest.raises(UserError, match="an epoch of 60 clips brings 60"):
        check_queue(given, 61, 1)
    given.datamodule = None
    check_queue(given, 61, 1)

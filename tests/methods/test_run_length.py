from types import SimpleNamespace

import pytest

from poodle_lightning.methods.run_length import global_batch, steps_per_epoch
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

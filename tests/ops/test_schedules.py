import math

import numpy as np
import pytest
import torch

from poodle_lightning.ops.schedules import cosine_momentum, poly, steps, warmup_cosine, warmup_factor

EPOCHS, STEPS = 300, 7


def test_momentum_equals_the_papers_formula_at_every_step():
    steps = np.arange(EPOCHS * STEPS + 1)
    expected = 1 - (1 - 0.996) * (np.cos(np.pi * (steps / STEPS) / 300) + 1) / 2
    found = [cosine_momentum(int(s), 0.996, 1.0, EPOCHS * STEPS) for s in steps]
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-15)
    assert found[0] == pytest.approx(0.996, abs=1e-15)
    assert found[-1] == 1.0
    assert all(np.diff(found) >= 0)


def test_learning_rate_equals_the_closed_form_at_every_step():
    warmup, horizon, base, end = 2 * STEPS, EPOCHS * STEPS, 5e-4, 1e-5
    steps = np.arange(horizon + 1)
    ramp = base * steps / warmup
    fall = end + (base - end) * 0.5 * (1 + np.cos(np.pi * (steps - warmup) / (horizon - warmup)))
    expected = np.where(steps < warmup, ramp, fall)
    found = [warmup_cosine(int(s), base, end, warmup, horizon) for s in steps]
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-18)
    assert found[0] == 0.0
    assert found[warmup] == base
    assert found[-1] == end


@pytest.mark.parametrize("warmup", [1, 2, 10])
def test_a_closed_warm_up_is_numpys_line_with_both_its_ends(warmup):
    found = [warmup_cosine(step, 0.3, 0.01, warmup, 50, closed=True) for step in range(51)]
    np.testing.assert_allclose(found[:warmup], np.linspace(0.0, 0.3, warmup), rtol=1e-14)
    behind = [warmup_cosine(step, 0.3, 0.01, warmup, 50) for step in range(warmup, 51)]
    assert found[warmup:] == behind
    between = [warmup_cosine(warmup - 1 + part / 4, 0.3, 0.01, warmup, 50, closed=True) for part in range(4)]
    assert max(between) <= 0.3  # a step is a number on a line: it does not overshoot


def test_cosine_part_equals_torchs_scheduler():
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=0.3)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=50, eta_min=0.01)
    for step in range(51):
        assert warmup_cosine(step, 0.3, 0.01, 0, 50) == pytest.approx(scheduler.get_last_lr()[0], rel=1e-9)
        optimizer.step()
        scheduler.step()


@pytest.mark.parametrize("after", [0, 1, 10**6])
def test_constant_after_the_horizon(after):
    assert warmup_cosine(100 + after, 1.0, 0.25, 10, 100) == 0.25
    assert cosine_momentum(100 + after, 0.9, 0.99, 100) == 0.99


def test_momentum_with_another_end():
    assert cosine_momentum(50, 0.9, 0.98, 100) == pytest.approx(0.94)
    assert cosine_momentum(25, 0.9, 0.98, 100) == pytest.approx(0.98 - 0.08 * (math.sqrt(0.5) + 1) / 2)


def test_poly_equals_its_closed_form():
    found = [poly(step, 0.02, 1e-4, 0.9, 100) for step in range(150)]
    expected = (0.02 - 1e-4) * (1 - np.minimum(np.arange(150), 100) / 100) ** 0.9 + 1e-4
    np.testing.assert_allclose(found, expected, rtol=1e-12)
    assert (found[0], found[100], found[149]) == (pytest.approx(0.02), 1e-4, 1e-4)


def test_steps_fall_at_their_milestones():
    found = [steps(step, 0.02, (3, 5), 0.1) for step in range(7)]
    np.testing.assert_allclose(found, [0.02] * 3 + [0.002] * 2 + [0.0002] * 2, rtol=1e-12)


def test_warm_up_is_a_line_from_its_ratio_to_one():
    np.testing.assert_allclose(
        [warmup_factor(step, 4, 0.2) for step in range(6)], [0.2, 0.4, 0.6, 0.8, 1.0, 1.0], rtol=1e-12
    )
    assert warmup_factor(0, 0, 0.5) == 1.0

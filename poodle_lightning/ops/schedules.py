"""Values that follow training: pure functions of the step, so that a restart cannot shift them."""

from __future__ import annotations

import math
from collections.abc import Sequence


def _half_cosine(progress: float) -> float:
    """From 1 at 0 to 0 at 1 along half a period."""
    return 0.5 * (1.0 + math.cos(math.pi * progress))


def warmup_cosine(
    step: float, base: float, end: float, warmup: float, horizon: float, closed: bool = False
) -> float:
    """Linear from 0 to ``base`` during the warm-up, half a cosine to ``end`` at the horizon, then ``end``.

    Args:
        step: optimiser steps done so far; 0 at the first.
        base: value at the end of the warm-up.
        end: value at the horizon and after it.
        warmup: steps of the warm-up; 0 for none.
        horizon: steps at which ``end`` is reached, the warm-up included.
        closed: the last step of the warm-up has ``base`` already, and so has the first behind it: the line is
            NumPy's ``linspace(0, base, warmup)``, both ends included (facebookresearch/dino ``utils.py``,
            ``cosine_scheduler``). Otherwise the line reaches ``base`` one step later.

    Source: PooDLe's recipe (warm-up 2 epochs, half cosine over 300); Loshchilov & Hutter, ICLR 2017.
    """
    if step < warmup:
        last = max(warmup - 1, 1) if closed else warmup
        return base * min(max(step, 0.0) / last, 1.0)
    if step >= horizon:
        return end
    return end + (base - end) * _half_cosine((step - warmup) / (horizon - warmup))


def cosine_momentum(step: float, start: float, end: float, horizon: float) -> float:
    """Momentum of a moving average: ``end - (end - start) (cos(pi step / horizon) + 1) / 2``, then ``end``.

    With ``end`` = 1 it is BYOL's ``1 - (1 - start) (cos(pi step / horizon) + 1) / 2`` (Grill et al., 2020,
    section 3.2), which PooDLe takes over with ``start`` = 0.996 and a horizon of 300 epochs.

    Args:
        step: optimiser steps done so far; 0 at the first.
        start: value at step 0.
        end: value at the horizon and after it.
        horizon: steps at which ``end`` is reached.
    """
    if step >= horizon:
        return end
    return end - (end - start) * _half_cosine(step / horizon)


def poly(step: float, base: float, end: float, power: float, horizon: float) -> float:
    """``(base - end) (1 - step / horizon) ** power + end``, then ``end``.

    Args:
        step: optimiser steps done so far; 0 at the first.
        base: value at step 0.
        end: value at the horizon and after it.
        power: 1 is a straight line; DeepLab's 0.9.
        horizon: steps at which ``end`` is reached.

    Source: mmcv ``PolyLrUpdaterHook``; Chen et al., DeepLab (2018), section 4.1.2, with ``end`` = 0.
    """
    return (base - end) * (1.0 - min(step / horizon, 1.0)) ** power + end


def steps(step: float, base: float, milestones: Sequence[float], gamma: float) -> float:
    """``base``, multiplied by ``gamma`` at every milestone that is reached (detectron2 ``SOLVER.STEPS``)."""
    return base * gamma ** sum(step >= milestone for milestone in milestones)


def warmup_factor(step: float, warmup: float, ratio: float) -> float:
    """Linear from ``ratio`` at step 0 to 1 at the end of the warm-up, then 1.

    It multiplies the value that the schedule has at the same step (mmcv ``warmup='linear'``, detectron2
    ``WarmupParamScheduler``).
    """
    return 1.0 if step >= warmup else ratio + (1.0 - ratio) * step / warmup

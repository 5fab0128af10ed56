"""Optimiser, parameter groups and schedule, shared by methods and readouts."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any, Literal, Self

import torch
from torch import nn, optim

from poodle_lightning.ops.schedules import cosine_momentum, poly, steps, warmup_cosine, warmup_factor
from poodle_lightning.types import UserError

Decay = Literal["cosine", "poly", "step", "constant"]


@dataclass(frozen=True)
class Recipe:
    """How a method is optimised; the defaults are PooDLe's on BDD100K.

    Args:
        optimizer: ``adamw``, ``lars`` (You et al., 2017) or ``sgd``.
        lr: learning rate after the warm-up, before ``scale_lr``.
        min_lr: learning rate at the horizon; never scaled.
        weight_decay: for everything but biases and one-dimensional parameters.
        weight_decay_end: the weight decay goes there along half a cosine, from ``weight_decay`` at step 0 to
            the horizon (DINO's 0.04 → 0.4). None: it stays.
        clip_each: largest norm of the gradient of each single parameter; larger ones are scaled to it
            (:func:`clip_each`, DINO's 3.0). None: nothing is clipped. Lightning's ``gradient_clip_val`` is
            another thing: the norm of all gradients together.
        betas: AdamW's.
        eps: AdamW's.
        sgd_momentum: of ``sgd`` and ``lars``.
        warmup_epochs: linear from 0.
        warmup_closed: the last step of the warm-up has the full rate already, as in DINO's schedule; without,
            the step after it has.
        horizon_epochs: epochs at which learning rate and momentum reach their ends; independent of how long
            the run really is (PooDLe stops its 300 at 100).
        warmup_steps: optimiser steps; replaces ``warmup_epochs``.
        horizon_steps: optimiser steps; replaces ``horizon_epochs``.
        scale_lr: ``linear`` or ``sqrt`` in global batch / ``reference_batch``, or ``none``.
        reference_batch: the global batch for which ``lr`` is meant.
        ema_start: momentum of the target network at step 0.
        ema_end: momentum at the horizon.
    """

    optimizer: Literal["adamw", "lars", "sgd"] = "adamw"
    lr: float = 5e-4
    min_lr: float = 0.0
    weight_decay: float = 1e-2
    weight_decay_end: float | None = None
    clip_each: float | None = None
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-6
    sgd_momentum: float = 0.9
    warmup_epochs: float = 2.0
    warmup_closed: bool = False
    horizon_epochs: float | None = 300.0
    warmup_steps: int | None = None
    horizon_steps: int | None = None
    scale_lr: Literal["none", "linear", "sqrt"] = "none"
    reference_batch: int = 128
    ema_start: float = 0.996
    ema_end: float = 1.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "betas", tuple(self.betas))  # plain data brings a list

    def scaled_lr(self, global_batch: int) -> float:
        """The learning rate after the warm-up for a global batch (all devices, all accumulated batches)."""
        ratio = global_batch / self.reference_batch
        return self.lr * {"none": 1.0, "linear": ratio, "sqrt": math.sqrt(ratio)}[self.scale_lr]


def parameter_groups(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two groups for an optimiser: what decays, and what does not (biases and everything of one dimension).

    This is timm's rule; it leaves out the scales and shifts of normalisation layers. Parameters that need no
    gradient are in neither group. An empty group is left out.

    Args:
        module: whose parameters are grouped; shared parameters are taken once.
        weight_decay: of the first group; the second has 0. Which is which also stands under ``"decays"``, for
            :meth:`Schedule.drive`.
    """
    decayed, exempt = _split(module)
    groups = [
        {"params": decayed, "weight_decay": weight_decay, "decays": True},
        {"params": exempt, "weight_decay": 0.0, "decays": False},
    ]
    return [group for group in groups if group["params"]]


def _split(module: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Trainable parameters that decay, and those that do not."""
    decayed: list[nn.Parameter] = []
    exempt: list[nn.Parameter] = []
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            alone = parameter.ndim <= 1 or name.rpartition(".")[2] == "bias"
            (exempt if alone else decayed).append(parameter)
    return decayed, exempt


def build_optimizer(recipe: Recipe, module: nn.Module, global_batch: int) -> optim.Optimizer:
    """The recipe's optimiser over the trainable parameters of a module.

    LARS adapts its rate only for parameters that decay: biases and normalisation layers are moved by plain
    SGD, as BYOL has it.

    Args:
        recipe: kind and numbers.
        module: the online networks; a frozen or averaged copy in it has no trainable parameters.
        global_batch: samples per optimiser step, for ``scale_lr``.

    Raises:
        UserError: nothing to train, a limit of gradients that is not positive, or an unknown optimiser.
    """
    if recipe.clip_each is not None and recipe.clip_each <= 0:
        raise UserError(f"recipe.clip_each={recipe.clip_each} leaves no gradient: set it above 0, or to null")
    groups = parameter_groups(module, recipe.weight_decay)
    if not groups:
        raise UserError(f"{type(module).__name__} has no trainable parameters: unfreeze some")
    lr = recipe.scaled_lr(global_batch)
    match recipe.optimizer:
        case "adamw":
            return optim.AdamW(groups, lr=lr, betas=recipe.betas, eps=recipe.eps)
        case "sgd":
            return optim.SGD(groups, lr=lr, momentum=recipe.sgd_momentum)
        case "lars":
            from timm.optim import Lars

            # By itself timm's LARS takes "does not decay" for "do not adapt", which fails for a decay of 0.
            adapted = set(_split(module)[0])
            for group in groups:
                group["always_adapt"] = adapted.issuperset(group["params"])
            lars: optim.Optimizer = Lars(groups, lr=lr, momentum=recipe.sgd_momentum)
            return lars
    raise UserError(f"optimizer {recipe.optimizer!r} does not exist: choose adamw, lars or sgd")


@torch.no_grad()
def clip_each(parameters: Iterable[nn.Parameter], limit: float) -> None:
    """Scales every gradient whose own norm is above a limit to it, in place; nothing is read back.

    A gradient g becomes ``g · min(1, limit / (‖g‖ + 1e-6))``: one parameter at a time, not all together
    (facebookresearch/dino ``utils.py``, ``clip_gradients``).

    Args:
        parameters: those without a gradient are passed over.
        limit: the largest norm.
    """
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if gradients:
        norms = torch.stack(torch._foreach_norm(gradients))
        torch._foreach_mul_(gradients, list((limit / (norms + 1e-6)).clamp(max=1.0).unbind()))


@dataclass(frozen=True)
class Schedule:
    """Learning rate, weight decay and momentum as pure functions of the step, epochs converted once.

    It is plain numbers, so a checkpoint keeps it (:meth:`state_dict`) and a resumed run with other loader
    lengths goes on along the same curve.

    Args:
        base_lr: learning rate after the warm-up.
        min_lr: learning rate at the horizon.
        warmup: steps.
        horizon: steps.
        ema_start: momentum at step 0.
        ema_end: momentum at the horizon.
        decay: how the learning rate falls. ``cosine`` is that of the methods, whose warm-up is a part of it;
            with the others the warm-up is a factor (``warmup_factor``).
        power: of ``poly``.
        milestones: steps at which ``step`` multiplies the rate by ``gamma``.
        gamma: of ``step``.
        warmup_ratio: the factor at step 0.
        warmup_closed: of ``cosine``, see ``warmup_cosine``.
        weight_decay: at step 0 and at the horizon. None: the optimiser's own is left as it is.
    """

    base_lr: float
    min_lr: float
    warmup: int
    horizon: int
    ema_start: float = 1.0
    ema_end: float = 1.0
    decay: Decay = "cosine"
    power: float = 1.0
    milestones: tuple[int, ...] = ()
    gamma: float = 0.1
    warmup_ratio: float = 0.0
    warmup_closed: bool = False
    weight_decay: tuple[float, float] | None = None

    @classmethod
    def from_recipe(cls, recipe: Recipe, steps_per_epoch: int, global_batch: int | None = None) -> Self:
        """The schedule of a recipe.

        Args:
            recipe: epochs or steps, learning rates, momenta.
            steps_per_epoch: optimiser steps of one pass over the data.
            global_batch: samples per optimiser step; needed only where the recipe scales its rate by it.

        Raises:
            UserError: no horizon is given, it is not beyond the warm-up, or the global batch is needed.
        """
        warmup, horizon = recipe.warmup_steps, recipe.horizon_steps
        if warmup is None:
            warmup = round(recipe.warmup_epochs * steps_per_epoch)
        if horizon is None:
            if recipe.horizon_epochs is None:
                raise UserError(
                    "the recipe has no horizon: set model.recipe.horizon_epochs or model.recipe.horizon_steps"
                )
            horizon = round(recipe.horizon_epochs * steps_per_epoch)
        if not 0 <= warmup < horizon:
            raise UserError(
                f"the warm-up of {warmup} steps does not end before the horizon of {horizon} steps: "
                "set model.recipe.warmup_steps or model.recipe.horizon_steps"
            )
        if global_batch is None and recipe.scale_lr != "none":
            raise UserError(
                f"recipe.scale_lr={recipe.scale_lr} needs the global batch, which is not known here"
            )
        lr = recipe.lr if global_batch is None else recipe.scaled_lr(global_batch)
        decay_end = recipe.weight_decay_end
        return cls(
            lr,
            recipe.min_lr,
            warmup,
            horizon,
            recipe.ema_start,
            recipe.ema_end,
            warmup_closed=recipe.warmup_closed,
            weight_decay=None if decay_end is None else (recipe.weight_decay, decay_end),
        )

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> Self:
        """The schedule that :meth:`state_dict` described; what an older one lacks has its default."""
        return cls(**state)

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers for a checkpoint."""
        return asdict(self)

    def lr(self, step: int) -> float:
        """Learning rate of optimiser step ``step``, counted from 0."""
        if self.decay == "cosine":
            return warmup_cosine(
                step, self.base_lr, self.min_lr, self.warmup, self.horizon, self.warmup_closed
            )
        rate = self.base_lr
        if self.decay == "poly":
            rate = poly(step, self.base_lr, self.min_lr, self.power, self.horizon)
        elif self.decay == "step":
            rate = steps(step, self.base_lr, self.milestones, self.gamma)
        return rate * warmup_factor(step, self.warmup, self.warmup_ratio)

    def drive(self, optimizer: optim.Optimizer, step: int) -> None:
        """Sets what the optimiser works with at a step, counted from 0.

        The learning rate of every group, times the group's ``"lr_scale"`` if it has one; and, where it is
        scheduled, the weight decay of the groups that decay (``"decays"``, see :func:`parameter_groups`).
        """
        for group in optimizer.param_groups:
            group["lr"] = self.lr(step) * group.get("lr_scale", 1.0)
            if self.weight_decay is not None and group.get("decays", False):
                # the same half cosine that the momentum has
                group["weight_decay"] = cosine_momentum(step, *self.weight_decay, self.horizon)

    def momentum(self, step: int) -> float:
        """Momentum of the target network at optimiser step ``step``, counted from 0."""
        return cosine_momentum(step, self.ema_start, self.ema_end, self.horizon)

"""How a finetuned classifier is optimised: AdamW, layer decay, and the two published courses of its rate."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal, Self

from torch import nn, optim

from poodle_lightning.nn.head_optim import layer_scales
from poodle_lightning.ops.schedules import warmup_cosine
from poodle_lightning.types import UserError

Course = Literal["epochs", "steps"]
_TOKENS = ("cls_token", "pos_embed")


@dataclass(frozen=True)
class FineTuneRecipe:
    """How an encoder and its linear layer are finetuned; the defaults are iBOT's on CIFAR and Flowers.

    Two recipes are published (bytedance/ibot). The small data sets have DeiT's (``evaluation/eval_cls.py``,
    ``run.sh``): ``course`` epochs, no layer decay. ImageNet has BEiT's
    (``evaluation/classification_layer_decay``): ``course`` steps, layer decay, tokens that do not decay, and
    rates that are not scaled by the batch (``reference_batch`` None).

    Args:
        lr: for a global batch of ``reference_batch``; for any batch where that is None.
        reference_batch: the rate is ``lr · batch / reference_batch``; DeiT's 512.
        min_lr: at the end, never scaled. DeiT's 1e-5 is not far below the 1.1e-5 that 7.5e-6 becomes for 768
            images.
        warmup_lr: at the beginning, of ``epochs``; never scaled.
        warmup_epochs: linear from ``warmup_lr`` (``epochs``) or 0 (``steps``).
        course: ``epochs``: the rate stands still within an epoch, and half a cosine runs over all epochs, of
            which the warm-up covers the first (timm's ``CosineLRScheduler``). ``steps``: it moves at every
            optimiser step, and the cosine begins behind the warm-up.
        weight_decay: of everything but one-dimensional parameters, which biases are.
        decay_tokens: also of ``cls_token`` and ``pos_embed``, as iBOT's ViT has it in the first recipe.
        betas: AdamW's.
        eps: AdamW's.
        layer_decay: see :func:`finetune_groups`; 1 for none.

    Raises:
        UserError: numbers that make no sense.
    """

    lr: float = 7.5e-6
    reference_batch: int | None = 512
    min_lr: float = 1e-5
    warmup_lr: float = 1e-6
    warmup_epochs: float = 5
    course: Course = "epochs"
    weight_decay: float = 0.05
    decay_tokens: bool = True
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    layer_decay: float = 1.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "betas", tuple(self.betas))  # plain data brings a list
        if self.lr <= 0 or min(self.min_lr, self.warmup_lr, self.warmup_epochs, self.weight_decay) < 0:
            raise UserError(f"recipe: lr {self.lr} must be above 0, and nothing below 0")
        if not 0 < self.layer_decay <= 1:
            raise UserError(f"recipe: layer_decay {self.layer_decay} must be above 0, up to 1 for none")
        if self.reference_batch is not None and self.reference_batch < 1:
            raise UserError("recipe: reference_batch must be at least 1, or null for a rate of any batch")

    def rates(self, epochs: int, steps_per_epoch: int, batch: int) -> Rates:
        """The course of the rate.

        Args:
            epochs: of the training.
            steps_per_epoch: optimiser steps.
            batch: images per optimiser step.

        Raises:
            UserError: the warm-up does not end before the training.
        """
        if self.warmup_epochs >= epochs:
            raise UserError(
                f"the warm-up of {self.warmup_epochs} epochs does not end before the {epochs} of the "
                "training: set recipe.warmup_epochs or --trainer.max_epochs"
            )
        lr = self.lr if self.reference_batch is None else self.lr * batch / self.reference_batch
        length = 1 if self.course == "epochs" else steps_per_epoch
        warmup = round(self.warmup_epochs * length)
        return Rates(self.course, lr, self.min_lr, self.warmup_lr, warmup, epochs * length)


@dataclass(frozen=True)
class Rates:
    """The learning rate as a function of epochs or optimiser steps; plain numbers, which a checkpoint keeps.

    Args:
        course: what is counted.
        lr: after the warm-up.
        min_lr: at the horizon.
        warmup_lr: at 0, of ``epochs``.
        warmup: epochs or steps.
        horizon: epochs or steps.
    """

    course: Course
    lr: float
    min_lr: float
    warmup_lr: float
    warmup: int
    horizon: int

    def at(self, epoch: int, step: int) -> float:
        """The rate, before layer decay.

        ``epochs``: timm's, ``warmup_lr + epoch (lr - warmup_lr) / warmup``, then
        ``min_lr + (lr - min_lr) (1 + cos(pi epoch / horizon)) / 2``. The public loop sets it behind each
        epoch, so that every epoch has the rate of the one before; here it has its own.

        ``steps``: NumPy's ``linspace(0, lr, warmup)``, then half a cosine over the steps that are left
        (BEiT ``utils.py``, ``cosine_scheduler``).

        Args:
            epoch: counted from 0.
            step: optimiser steps done so far.
        """
        if self.course == "steps":
            return warmup_cosine(step, self.lr, self.min_lr, self.warmup, self.horizon, closed=True)
        if epoch < self.warmup:
            return self.warmup_lr + epoch * (self.lr - self.warmup_lr) / self.warmup
        if epoch >= self.horizon:
            return self.min_lr
        return self.min_lr + 0.5 * (self.lr - self.min_lr) * (1 + math.cos(math.pi * epoch / self.horizon))

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers for a checkpoint."""
        return asdict(self)

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> Self:
        """The course that :meth:`state_dict` described."""
        return cls(**state)


def finetune_groups(recipe: FineTuneRecipe, encoder: nn.Module, head: nn.Module) -> list[dict[str, Any]]:
    """Parameter groups with ``weight_decay`` and ``lr_scale``, what the rate of a step is multiplied by.

    With n blocks, the embeddings have ``layer_decay ** (n + 1)``, block i counted from 0
    ``layer_decay ** (n - i)``, the final norm and the head 1 (BEiT, ``optim_factory.py``; timm counts the
    final norm to the last block).

    Args:
        recipe: decays.
        encoder: a vision transformer where ``layer_decay`` is not 1.
        head: what reads its vector.

    Raises:
        UserError: ``layer_decay`` for an encoder without blocks, or there is nothing to train.
    """
    scales = layer_scales(encoder, recipe.layer_decay)
    named = [(name, parameter, scales.get(name, 1.0)) for name, parameter in encoder.named_parameters()]
    named += [(name, parameter, 1.0) for name, parameter in head.named_parameters()]
    groups: dict[tuple[float, float], dict[str, Any]] = {}
    for name, parameter, scale in named:
        if not parameter.requires_grad:
            continue
        last = name.rpartition(".")[2]
        alone = parameter.ndim <= 1 or (last in _TOKENS and not recipe.decay_tokens)
        decay = 0.0 if alone else recipe.weight_decay
        made = groups.setdefault((scale, decay), {"params": [], "weight_decay": decay, "lr_scale": scale})
        made["params"].append(parameter)
    if not groups:
        raise UserError("there is nothing to finetune: no parameter of encoder and head takes a gradient")
    return list(groups.values())


def finetune_optimizer(recipe: FineTuneRecipe, encoder: nn.Module, head: nn.Module) -> optim.AdamW:
    """AdamW over :func:`finetune_groups`; the rate of each group is set at every step."""
    return optim.AdamW(
        finetune_groups(recipe, encoder, head), lr=recipe.lr, betas=recipe.betas, eps=recipe.eps
    )

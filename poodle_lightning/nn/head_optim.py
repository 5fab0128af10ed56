"""How a readout is optimised: its recipe, its parameter groups, layer decay for vision transformers."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn, optim

from poodle_lightning.nn.optim import Decay, Schedule
from poodle_lightning.types import UserError

_TOKENS = ("cls_token", "pos_embed", "mask_token", "reg_token", "dist_token", "register_tokens")
_BLOCK = re.compile(r"(?:^|\.)blocks\.(\d+)\.")
_FIRST = re.compile(rf"(?:^|\.)(?:patch_embed\..*|{'|'.join(_TOKENS)})$")


@dataclass(frozen=True)
class HeadRecipe:
    """How a readout is optimised; the defaults are FlowE's on BDD100K, where it says them.

    FlowE (section 4.3): SGD, rate 0.02, "poly". Momentum 0.9, weight decay 5e-4, power 0.9 and the last rate
    1e-4 are MMSegmentation's defaults, with which PooDLe was evaluated; the papers do not print them.

    Args:
        optimizer: ``sgd`` or ``adamw``.
        lr: learning rate after the warm-up.
        min_lr: at the horizon, of ``poly`` and ``cosine``.
        weight_decay: of what decays.
        decay_all: weight decay for biases, norms and position embeddings as well (MMSegmentation's plain
            configurations); False leaves out everything of one dimension, ``pos_embed`` and ``cls_token``
            (iBOT's, and detectron2's for norms).
        momentum: of ``sgd``.
        betas: of ``adamw``.
        eps: of ``adamw``.
        decay: ``poly``, ``cosine``, ``step`` (detectron2) or ``constant``.
        power: of ``poly``.
        milestones: optimiser steps, of ``step``.
        gamma: factor at each milestone.
        warmup_steps: optimiser steps of the warm-up.
        warmup_ratio: the warm-up goes linearly from this share of the rate to all of it.
        horizon_steps: optimiser steps at which ``min_lr`` is reached; None is where training ends
            (``trainer.max_steps``).
        layer_decay: for a finetuned ViT: the rate of block i is multiplied by ``layer_decay ** (n - i)`` with
            n blocks counted from 0, that of the embeddings by ``layer_decay ** (n + 1)``, everything else
            keeps its rate (iBOT ``mmcv_custom/layer_decay_optimizer_constructor.py``: 0.9).
        encoder_lr: factor of the rate of a finetuned encoder.

    Raises:
        UserError: numbers that make no sense.
    """

    optimizer: Literal["sgd", "adamw"] = "sgd"
    lr: float = 0.02
    min_lr: float = 1e-4
    weight_decay: float = 5e-4
    decay_all: bool = True
    momentum: float = 0.9
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    decay: Decay = "poly"
    power: float = 0.9
    milestones: tuple[int, ...] = ()
    gamma: float = 0.1
    warmup_steps: int = 0
    warmup_ratio: float = 1e-6
    horizon_steps: int | None = None
    layer_decay: float = 1.0
    encoder_lr: float = 1.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "betas", tuple(self.betas))  # plain data brings lists
        object.__setattr__(self, "milestones", tuple(self.milestones))
        if self.lr <= 0 or self.min_lr < 0 or not 0 < self.layer_decay <= 1:
            raise UserError(
                f"recipe: lr {self.lr} must be above 0, min_lr {self.min_lr} not below 0, layer_decay "
                f"{self.layer_decay} above 0 up to 1"
            )
        if (self.decay == "step") != bool(self.milestones):
            raise UserError("recipe: decay step and milestones belong together: give both or neither")

    def schedule(self, max_steps: int) -> Schedule:
        """The learning rate of every step.

        Args:
            max_steps: optimiser steps of the run; -1 for no end.

        Raises:
            UserError: there is no horizon, or the warm-up does not end before it.
        """
        horizon = max_steps if self.horizon_steps is None else self.horizon_steps
        if horizon < 1:
            raise UserError("there is no horizon: give --trainer.max_steps or model.recipe.horizon_steps")
        if not 0 <= self.warmup_steps < horizon:
            raise UserError(
                f"the warm-up of {self.warmup_steps} steps does not end before the horizon of {horizon} "
                "steps: set model.recipe.warmup_steps, model.recipe.horizon_steps or --trainer.max_steps"
            )
        return Schedule(
            base_lr=self.lr,
            min_lr=self.min_lr,
            warmup=self.warmup_steps,
            horizon=horizon,
            decay=self.decay,
            power=self.power,
            milestones=self.milestones,
            gamma=self.gamma,
            warmup_ratio=self.warmup_ratio,
        )


def head_groups(recipe: HeadRecipe, parts: Mapping[str, nn.Module]) -> list[dict[str, Any]]:
    """Parameter groups with ``weight_decay`` and ``lr_scale``, what the rate of a step is multiplied by.

    Args:
        recipe: decays.
        parts: trainable networks; the one under ``encoder`` gets ``layer_decay`` and ``encoder_lr``.

    Raises:
        UserError: ``layer_decay`` for an encoder without blocks.
    """
    groups: dict[tuple[float, float], dict[str, Any]] = {}
    for part, module in parts.items():
        scales = layer_scales(module, recipe.layer_decay) if part == "encoder" else {}
        factor = recipe.encoder_lr if part == "encoder" else 1.0
        for name, parameter in module.named_parameters():
            if not parameter.requires_grad:
                continue
            alone = parameter.ndim <= 1 or name.endswith(".bias") or name.rpartition(".")[2] in _TOKENS
            decay = 0.0 if alone and not recipe.decay_all else recipe.weight_decay
            scale = scales.get(name, 1.0) * factor
            made = groups.setdefault((scale, decay), {"params": [], "weight_decay": decay, "lr_scale": scale})
            made["params"].append(parameter)
    return list(groups.values())


def layer_scales(encoder: nn.Module, decay: float) -> dict[str, float]:
    """The factor of every parameter's rate under layer decay, by name; {} for a decay of 1.

    Raises:
        UserError: the encoder is no vision transformer.
    """
    if decay == 1.0:
        return {}
    names = [name for name, _ in encoder.named_parameters()]
    numbers = {name: int(found[1]) for name in names if (found := _BLOCK.search(name))}
    if not numbers:
        raise UserError(
            f"recipe.layer_decay {decay}: {type(encoder).__name__} has no blocks of a vision transformer: "
            "set it to 1"
        )
    last = max(numbers.values()) + 2  # the layer of norm and head; embeddings are layer 0, block i is i + 1
    layers = {name: number + 1 for name, number in numbers.items()}
    layers |= {name: 0 for name in names if name not in numbers and _FIRST.search(name)}
    return {name: decay ** (last - layers.get(name, last)) for name in names}


def build_head_optimizer(recipe: HeadRecipe, parts: Mapping[str, nn.Module]) -> optim.Optimizer:
    """The recipe's optimiser over the trainable parameters of ``parts``; see :func:`head_groups`.

    Raises:
        UserError: there is nothing to train.
    """
    groups = head_groups(recipe, parts)
    if not groups:
        raise UserError("the readout has no trainable parameters: give a head, or set frozen false")
    if recipe.optimizer == "adamw":
        return optim.AdamW(groups, lr=recipe.lr, betas=recipe.betas, eps=recipe.eps)
    return optim.SGD(groups, lr=recipe.lr, momentum=recipe.momentum)

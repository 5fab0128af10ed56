"""What is read from a trained or untrained network, and how its features may go wrong."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.street import training
from benchmarks.street.settings import Setting
from benchmarks.street.streets import Labelled
from poodle_lightning.data.label_sets import BDD100K
from poodle_lightning.evaluation.linear_readout import (
    Readout,
    ReadoutRecipe,
    feature_map,
    linear_readout,
    position_prior,
    same_architecture_random,
)
from poodle_lightning.evaluation.metrics import Confusion
from poodle_lightning.nn.encoder import DecodedEncoder, Encoder
from poodle_lightning.nn.observed import observed

GROUPS = ("all", "small", "large", "rare", "common", "pixels")
"""Columns: mIoU over all classes and over four groups, and pixel accuracy."""


def readable(method: nn.Module, setting: Setting) -> Encoder:
    """The network that is read: all end in a map of the same stride and as many channels.

    A decoder is kept. An encoder without one is dilated; its weights are those that were trained.
    """
    backbone: Encoder = method.backbone()  # type: ignore[operator]
    if isinstance(backbone, DecodedEncoder):
        return backbone
    return dilated(backbone, setting)


def dilated(encoder: Encoder, setting: Setting) -> Encoder:
    """The encoder with stages 3 and 4 dilated instead of strided, for reading without its decoder."""
    found = training.encoder(setting, dilated=True)
    found.load_state_dict(encoder.state_dict())
    return found.to(next(encoder.parameters()).device).eval()


def scores(encoder: Encoder, fit: Labelled, test: Labelled, setting: Setting) -> dict[str, Any]:
    """A linear readout's mIoU per group, pixel accuracy and IoU per class, in percent."""
    recipe = ReadoutRecipe(steps=setting.readout_steps)
    found = linear_readout(encoder, fit, test, BDD100K, recipe)
    return _plain(found.confusion) | {"readout_seconds": round(found.seconds, 1)}


def fitted(encoder: Encoder, fit: Labelled, test: Labelled, setting: Setting) -> Readout:
    """The readout itself, for pictures."""
    return linear_readout(encoder, fit, test, BDD100K, ReadoutRecipe(steps=setting.readout_steps))


def untrained(encoder: Encoder, seed: int) -> Encoder:
    """The same network as the training of that seed starts from."""
    return same_architecture_random(encoder, seed)


def place_alone(fit: Labelled, test: Labelled) -> dict[str, Any]:
    """The score of the most frequent class at every place."""
    return _plain(position_prior(fit[1], test[1], len(BDD100K)))


def _plain(confusion: Confusion) -> dict[str, Any]:
    summary = confusion.summary(BDD100K.numbered())
    found: dict[str, Any] = {"all": summary["miou"], "pixels": summary["pixel_accuracy"]}
    found |= {group: summary[f"miou_{group}"] for group in BDD100K.groups}
    scored = {name: round(100 * found[name], 2) for name in GROUPS}
    each = zip(BDD100K.names, confusion.iou().tolist(), strict=True)
    return scored | {"classes": {name: None if math.isnan(v) else round(100 * v, 2) for name, v in each}}


@torch.no_grad()
def signs(encoder: Encoder, images: Tensor) -> dict[str, float]:
    """Shares of a map's variance: means per place (position), means per image; and spread of directions.

    A spread of 1 is that of independent directions, 0 a collapse.
    """
    with observed(encoder):
        maps = torch.cat([feature_map(encoder, part).cpu() for part in images.split(16)])
    total = maps.var(dim=(0, 2, 3)).sum()
    by_place, by_image = maps.mean(dim=0).var(dim=(1, 2)).sum(), maps.mean(dim=(2, 3)).var(dim=0).sum()
    rows = F.normalize(maps, dim=1).movedim(1, -1).flatten(0, 2)
    return {
        "variance_by_place": round(float(by_place / total), 3),
        "variance_by_image": round(float(by_image / total), 3),
        "spread": round(float(rows.std(dim=0).mean() * math.sqrt(rows.shape[1])), 3),
    }

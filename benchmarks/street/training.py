"""Networks, methods and the one loop in which all of them are trained on the same pairs."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.street.settings import Setting
from benchmarks.street.streets import Pairs, batches
from poodle_lightning.analysis.flops import multiply_adds
from poodle_lightning.augment.geometric import AffineFlip
from poodle_lightning.augment.photometric import Colour, recolour
from poodle_lightning.flow.given import Given
from poodle_lightning.methods.flowe import FlowE
from poodle_lightning.methods.poodle import PooDLe
from poodle_lightning.nn.ema import EMA
from poodle_lightning.nn.encoder import DecodedEncoder, Encoder
from poodle_lightning.nn.optim import Recipe, Schedule, parameter_groups
from poodle_lightning.nn.resnet import ResNet
from poodle_lightning.nn.sdm import SDM
from poodle_lightning.ops.crops import SubcropRecipe
from poodle_lightning.ops.random import bernoulli, fold
from poodle_lightning.types import IGNORE, Clip, Losses

CLASSES = 19


class Learner(Protocol):
    """What the loop needs of a method."""

    target: Any

    def losses(self, clip: Clip) -> Losses: ...  # noqa: D102
    def backbone(self) -> Encoder: ...  # noqa: D102


@dataclass(frozen=True)
class Trained:
    """A trained method and what it took.

    Args:
        method: with its weights, on the device.
        wall: seconds.
        cpu: seconds of the process.
        curve: ``(step, loss)`` at about twenty steps, means since the one before.
    """

    method: nn.Module
    wall: float
    cpu: float
    curve: list[tuple[int, float]]


class Supervised(nn.Module):
    """The network of PooDLe with a 1×1 convolution, trained on the labels of both frames of each pair."""

    target = None

    def __init__(self, encoder: Encoder, decoder: SDM, colour: Colour) -> None:
        super().__init__()
        self.network = DecodedEncoder(encoder, decoder)
        self.head = nn.Conv2d(decoder.dims, CLASSES, 1)
        self.colour = colour

    def losses(self, clip: Clip) -> Losses:
        """Cross-entropy of logits upsampled to the crop; crops are mirrored at random."""
        images, labels = recolour(self.colour, clip.unit(), clip.key), clip.unit_labels()
        assert labels is not None
        flip = bernoulli(fold(clip.key, "flip"), 0.5)[:, 0].to(images.device)
        images = torch.where(flip[:, None, None, None, None], images.flip(-1), images).flatten(0, 1)
        labels = torch.where(flip[:, None, None, None], labels.flip(-1), labels).flatten(0, 1)
        logits = self.head(self.network(images).last).float()
        logits = F.interpolate(logits, size=labels.shape[-2:], mode="bilinear", align_corners=False)
        return {"labels": F.cross_entropy(logits, labels.long(), ignore_index=IGNORE)}

    def backbone(self) -> Encoder:
        """Encoder and decoder without the head."""
        return self.network


def encoder(setting: Setting, dilated: bool) -> ResNet:
    """The ResNet, strided or dilated to the stride of the SDM's map."""
    depth: Any = setting.depth
    return ResNet(depth, output_stride=8 if dilated else 32, width=setting.width, stem_pool=setting.stem_pool)


def method(name: str, setting: Setting, seed: int) -> nn.Module:
    """An untrained method; the seed decides its weights, those of ``same_architecture_random``."""
    s = setting
    outside: Any = s.outside
    colour = Colour(
        *(s.brightness, s.brightness, s.saturation, s.hue),
        blur=0.5 if s.blur > 0 else 0.0,
        sigma=(0.1, max(s.blur, 0.2)),
    )
    view = AffineFlip(s.degrees, (s.scale_low, s.scale_high), s.flip, shift=s.shift, outside=outside)
    shared: dict[str, Any] = {
        "flow": Given(),
        "hidden": s.hidden,
        "out": s.out,
        "colour": colour,
        "view": view,
        "loss_stride": s.loss_stride,
    }
    size = (s.subcrop, s.subcrop)
    subcrops = SubcropRecipe(count=s.subcrops, size=size, area=(s.subcrop_low, s.subcrop_high))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = encoder(s, dilated=name == "flowe")
        if name == "flowe":
            return FlowE(net, **shared)
        if name == "pooled_only":
            return PooDLe(net, None, dense_weight=0.0, pooled_weight=1.0, subcrops=subcrops, **shared)
        decoder = SDM(net.channels, s.dims, s.sdm_hidden)
        if name == "supervised":
            return Supervised(net, decoder, colour)
        pooled = {"poodle": s.pooled_share, "sdm_only": 0.0}[name]
        weights: dict[str, Any] = {"dense_weight": 1.0 - pooled, "pooled_weight": pooled}
        return PooDLe(net, decoder, subcrops=subcrops, **weights, **shared)


def train(learner: nn.Module, data: Pairs, setting: Setting, seed: int, device: torch.device) -> Trained:
    """Train in place on ``setting.steps`` batches."""
    learner.to(device).train().to(memory_format=torch.channels_last)
    recipe = Recipe(
        lr=setting.lr,
        weight_decay=setting.weight_decay,
        warmup_steps=setting.warmup,
        horizon_steps=setting.steps,
        ema_start=setting.ema,
    )
    schedule = Schedule.from_recipe(recipe, 1)
    groups = _groups(learner, setting)
    optimizer = torch.optim.AdamW(groups, lr=recipe.lr, betas=recipe.betas, eps=recipe.eps)
    clips = batches(data, setting, seed, device)
    curve: list[tuple[int, float]] = []
    recent: list[Tensor] = []
    wall, cpu = time.perf_counter(), time.process_time()
    for step in range(setting.steps):
        with torch.autocast(device.type, torch.bfloat16, enabled=fast(device)):
            loss = torch.stack(list(learner.losses(next(clips)).values())).sum()  # type: ignore[operator]
        optimizer.zero_grad()
        loss.backward()
        for group in optimizer.param_groups:
            group["lr"] = schedule.lr(step) * group["lr_scale"]
        optimizer.step()
        if isinstance(learner.target, EMA):
            learner.target.update(learner.online, schedule.momentum(step))  # type: ignore[arg-type]
        recent.append(loss.detach())
        if (step + 1) % max(1, setting.steps // 20) == 0:
            curve.append((step + 1, round(float(torch.stack(recent).mean()), 4)))
            recent = []
    return Trained(learner.eval(), time.perf_counter() - wall, time.process_time() - cpu, curve)


def _groups(learner: nn.Module, setting: Setting) -> list[dict[str, Any]]:
    """Groups of the optimiser; what is outside online network and target is a predictor."""
    predictors = nn.ModuleList(part for name, part in learner.named_children() if "predictor" in name)
    fast_ones = {id(parameter) for parameter in predictors.parameters()}
    groups = []
    for group in parameter_groups(learner, setting.weight_decay):
        for rate, wanted in ((1.0, False), (setting.predictor_rate, True)):
            chosen = [p for p in group["params"] if (id(p) in fast_ones) is wanted]
            if chosen:
                groups.append({**group, "params": chosen, "lr_scale": rate})
    return groups


def fast(device: torch.device) -> bool:
    """Whether the device multiplies bfloat16 natively; elsewhere it would be slower."""
    if device.type == "cuda":
        return True
    return bool(hasattr(torch.cpu, "_is_avx512_bf16_supported") and torch.cpu._is_avx512_bf16_supported())


class _Call(nn.Module):
    """One function of a network as its forward, for counting."""

    def __init__(self, network: nn.Module, name: str) -> None:
        super().__init__()
        self.network, self.name = network, name

    def forward(self, images: Tensor) -> Tensor:
        found: Tensor = getattr(self.network, self.name)(images)
        return found


def costs(learner: nn.Module, setting: Setting) -> dict[str, float]:
    """Giga multiply-adds per pair: all forward passes, and with the backward ones (counted as two forward).

    Encoder, decoder and projectors; predictors, losses, views and optimiser do not count.
    """
    crop, small = setting.crop_size, (setting.subcrop, setting.subcrop)
    once = {"online": 0.0, "target": 0.0}
    for name, size, count in _passes(learner, setting, crop, small):
        one = multiply_adds(_Call(learner.online, name), count, 3, *size)  # type: ignore[arg-type]
        once["online"] += one
        once["target"] += one
    if isinstance(learner, Supervised):
        once["online"] = multiply_adds(_Logits(learner), 2, 3, *crop)
    return {
        "forward_gmac_per_pair": sum(once.values()) / 1e9,
        "training_gmac_per_pair": (3 * once["online"] + once["target"]) / 1e9,
    }


class _Logits(nn.Module):
    def __init__(self, learner: Supervised) -> None:
        super().__init__()
        self.learner = learner

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.learner.head(self.learner.network(images).last)
        return logits


def _passes(
    learner: nn.Module, setting: Setting, crop: tuple[int, int], small: tuple[int, int]
) -> Iterator[tuple[str, tuple[int, int], int]]:
    """Function of the online network, size of its images, images per pair."""
    if isinstance(learner, FlowE) or (isinstance(learner, PooDLe) and learner.dense_weight > 0):
        yield "dense", crop, 2
    if isinstance(learner, PooDLe) and learner.pooled_weight > 0:
        yield "pooled", small, 2 * setting.subcrops

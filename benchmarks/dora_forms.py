"""What ``dora_step`` compares: the package's step of DoRA, and the published loops, on the same weights.

Three forms: the package, which calls each network once per resolution; *loops*, which calls it for one frame
and mask at a time, as the public code does; and *published*, the loops with attention written out in every
block, as there.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.published import dora as published
from benchmarks.step import Stopwatch
from poodle_lightning.augment.geometric import ResizedCrop
from poodle_lightning.augment.multicrop import Crops, MultiCrop
from poodle_lightning.augment.photometric import Colour
from poodle_lightning.methods import dora
from poodle_lightning.methods.distillation import HeadSizes
from poodle_lightning.methods.dora import DoRA
from poodle_lightning.nn.optim import Recipe, Schedule, build_optimizer
from poodle_lightning.nn.vit import ViT
from poodle_lightning.ops.geometry import Affine
from poodle_lightning.ops.random import key_of
from poodle_lightning.types import Clip

FORMS = ("package", "loops", "published")
PARTS = ("teacher", "tracking", "student", "loss", "backward", "clip + EMA", "AdamW")
LOOP_PARTS = {"teach": "teacher", "mask": "tracking", "study": "student", "loss": "loss"}


@dataclass(frozen=True)
class Size:
    """Encoder, crops in pixels, batch of B clips of T frames, head."""

    dim: int
    depth: int
    heads: int
    patch: int = 16
    large: int = 224
    small: int = 112
    frames: int = 8
    batch: int = 1
    hidden: int = 2048
    out: int = 65536
    objects: int = 3
    locals: int = 6


def make_method(size: Size) -> DoRA:
    """The method with the public code's settings, without stochastic depth: the forms would draw another."""
    torch.manual_seed(0)
    colours = [Colour(0.4, 0.4, 0.2, 0.1, blur=blur) for blur in (0.1, 0.5)]
    crops = MultiCrop(
        ResizedCrop((size.large, size.large), (0.4, 1.0), fit="redraw"),
        ResizedCrop((size.small, size.small), (0.05, 0.4), flip=0.0, fit="redraw"),
        *(1, size.locals, (colours[0],), colours[1]),
    )
    encoder = ViT(size.patch, size.dim, size.depth, size.heads, (size.large, size.large), pos_interp="dino")
    head = HeadSizes(size.hidden, out=size.out, norm_last=False)
    recipe = Recipe(weight_decay=0.04, eps=1e-8, clip_each=3.0, warmup_steps=0, horizon_steps=100)
    return DoRA(encoder, head, crops, size.objects, freeze_last_epochs=0, recipe=recipe).train()


def make_clip(size: Size) -> Clip:
    """Smooth textures, a third wider than the crops; what they show does not matter to the time."""
    side = size.large * 4 // 3 + 2
    draw = torch.Generator().manual_seed(0)
    knots = torch.rand(size.batch * size.frames, 3, max(2, side // 8), max(2, side // 8), generator=draw)
    frames = (255 * F.interpolate(knots, (side, side), mode="bilinear")).byte()
    inner = 2 / side * torch.tensor([1.0, 1.0, -1.0, -1.0])
    return Clip(
        frames=frames.unflatten(0, (size.batch, size.frames)),
        window=Affine.box((torch.tensor([-1.0, -1.0, 1.0, 1.0]) + inner).expand(size.batch, 4)),
        size=(side - 2, side - 2),
        times=torch.arange(size.frames, dtype=torch.float64).expand(size.batch, size.frames),
        index=torch.arange(size.batch),
        key=torch.stack([key_of(0, 0, i) for i in range(size.batch)]),
    )


# ---- one step
class Step:
    """Optimiser steps of a form.

    Args:
        form: one of ``FORMS``.
        method: trained; another copy for every form.
        clip: its batch, on the method's device.
        crops: of that batch.
    """

    def __init__(self, form: str, method: DoRA, clip: Clip, crops: Crops) -> None:
        self.form, self.method, self.clip, self.crops = form, method, clip, crops
        self.loop = published.LoopForm(method)
        self.optimizer = build_optimizer(method.recipe, method, len(clip))
        self.schedule = Schedule.from_recipe(method.recipe, 1)
        self.done = 0
        for encoder in (method.student.encoder, method.teacher.encoder):
            assert isinstance(encoder, ViT)
            for block in encoder.blocks:
                block.attn.fused_attn = form != "published"

    @property
    def on_device(self) -> list[Tensor]:
        """What training has on the device."""
        assert self.crops.small is not None
        return [*self.method.parameters(), *self.method.buffers(), self.crops.large, self.crops.small]

    def loss(self) -> Tensor:
        """The sum of both terms."""
        if self.form == "package":
            with patch.object(MultiCrop, "__call__", lambda *_: self.crops):
                return torch.stack(list(self.method.losses(self.clip).values())).sum()
        assert self.crops.small is not None
        batch, frames = self.clip.times.shape
        heads = self.method.chosen().tolist()
        return self.loop(self.crops.large[0], self.crops.small, (batch, frames), heads)

    def backward(self) -> Tensor:
        """The loss, with gradients; the published loop looks at the loss before it goes on."""
        self.optimizer.zero_grad()
        loss = self.loss()
        if self.form != "package" and not math.isfinite(loss.item()):
            raise SystemExit("the loss is not finite")
        loss.backward()
        return loss.detach()

    def clip_gradients(self) -> None:
        """Each parameter's own norm."""
        if self.form == "package":
            self.method.on_before_optimizer_step(self.optimizer)
        else:
            published.clip_gradients(self.method.online.parameters(), self.method.recipe.clip_each or 0.0)

    def follow(self) -> None:
        """Teacher and centre."""
        momentum = self.schedule.momentum(self.done)
        if self.form == "package":
            self.method.target.update(self.method.online, momentum)
        else:
            published.follow(self.method.teacher, self.method.student, momentum)
        self.method.after_step()

    def __call__(self, watch: Stopwatch) -> Tensor:
        """One step, told to a watch part by part."""
        with watch.stage("backward"), self.watched(watch):
            loss = self.backward()
        with watch.stage("clip + EMA"):
            self.clip_gradients()
        with watch.stage("AdamW"):
            self.schedule.drive(self.optimizer, self.done)
            self.optimizer.step()
        with watch.stage("clip + EMA"):
            self.follow()
        self.done += 1
        return loss

    @contextmanager
    def watched(self, watch: Stopwatch) -> Iterator[None]:
        """Wraps what the loss calls; what is left of its time is the backward pass."""
        method, student = self.method, self.method.student
        places: list[tuple[Any, str, str]] = [
            *((self.loop, name, part) for name, part in LOOP_PARTS.items()),
            *((method, name, "tracking") for name in ("masks_of", "masked")),
            (method, "observe", "teacher"),
            (method.teacher.head, "forward", "teacher"),
            (student.encoder, "features", "student"),
            (student, "logits", "student"),
            (student.head, "forward", "student"),
            (method, "teach", "loss"),
            (dora, "view_losses", "loss"),
        ]
        with ExitStack() as stack:
            for owner, name, part in places:
                timed = watch.around(part, getattr(owner, name))
                stack.enter_context(patch.object(owner, name, timed))
            yield


def steps(size: Size, forms: tuple[str, ...] = FORMS, device: str = "cpu") -> dict[str, Step]:
    """The forms, with the same weights and crops."""
    method, clip = make_method(size).to(device), make_clip(size).to(device)
    crops = method.crops(clip)
    return {form: Step(form, copy.deepcopy(method), clip, crops) for form in forms}

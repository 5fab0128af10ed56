"""Mixup and CutMix: an image is mixed with the one that mirrors its place in the batch, and so are classes.

Zhang et al., ICLR 2018 (mixup); Yun et al., ICCV 2019 (CutMix); both at once as in DeiT and timm's ``Mixup``
(mode ``batch``): one draw for all images of a batch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from scipy.special import betaincinv
from torch import Tensor

from poodle_lightning.ops.random import bernoulli, fold, randint, uniform
from poodle_lightning.types import UserError


@dataclass(frozen=True)
class Mix:
    """What is drawn for a batch.

    Args:
        share: of an image itself in its target; 1: nothing is mixed.
        box: first row, end of rows, first column, end of columns: what CutMix takes from the other image;
            None: mixup.
    """

    share: float
    box: tuple[int, int, int, int] | None = None


@dataclass(frozen=True)
class Mixing:
    """How images and classes of a batch are mixed; the defaults are DeiT's.

    Args:
        mixup: α of mixup, whose share is Beta(α, α); 0: never.
        cutmix: α of CutMix, whose share is Beta(α, α); 0: never.
        probability: that a batch is mixed at all.
        switch: probability of CutMix where both are possible.
        smoothing: of the targets: ``1 - smoothing + smoothing / classes`` for the class,
            ``smoothing / classes`` for each other one, before they are mixed.

    Raises:
        UserError: numbers out of range.
    """

    mixup: float = 0.8
    cutmix: float = 1.0
    probability: float = 1.0
    switch: float = 0.5
    smoothing: float = 0.1

    def __post_init__(self) -> None:
        shares = (self.probability, self.switch, self.smoothing)
        if min(self.mixup, self.cutmix) < 0 or not all(0 <= share <= 1 for share in shares):
            raise UserError("mixing: mixup and cutmix must not be below 0, all others from 0 to 1")

    def __call__(self, images: Tensor, labels: Tensor, classes: int, key: Tensor) -> tuple[Tensor, Tensor]:
        """Mixed images and their targets.

        Args:
            images: ``(B, 3, H, W)`` float.
            labels: ``(B,)`` int64 on the same device.
            classes: how many there are.
            key: ``(1,)`` int64 on the host; all that is drawn is a function of it.

        Returns:
            ``(B, 3, H, W)`` and ``(B, classes)`` float32, whose rows sum to 1.
        """
        mix = self.draw(key, (images.shape[-2], images.shape[-1]))
        return mixed(images, mix), self.targets(labels, classes, mix)

    def targets(self, labels: Tensor, classes: int, mix: Mix) -> Tensor:
        """Smoothed and mixed, ``(B, classes)`` float32."""
        rest = self.smoothing / classes
        own = torch.full((len(labels), classes), rest, device=labels.device)
        own.scatter_(1, labels[:, None], 1 - self.smoothing + rest)
        return own if mix.share == 1.0 else own * mix.share + own.flip(0) * (1 - mix.share)

    def draw(self, key: Tensor, size: tuple[int, int]) -> Mix:
        """What is done to a batch of images of a size; CutMix's share is that of the box that is inside."""
        possible = self.mixup > 0 or self.cutmix > 0
        if not possible or not bool(bernoulli(fold(key, "whether"), self.probability)):
            return Mix(1.0)
        cut = self.cutmix > 0 and (self.mixup == 0 or bool(bernoulli(fold(key, "which"), self.switch)))
        alpha = self.cutmix if cut else self.mixup
        share = float(betaincinv(alpha, alpha, float(uniform(fold(key, "share"), dtype=torch.float64))))
        if not cut:
            return Mix(share)
        ends: list[int] = []
        for side, word in zip(size, ("row", "column"), strict=True):
            length, centre = int(side * math.sqrt(1 - share)), int(randint(fold(key, word), side))
            ends += [max(centre - length // 2, 0), min(centre + (length + 1) // 2, side)]
        top, bottom, left, right = ends
        return Mix(1 - (bottom - top) * (right - left) / (size[0] * size[1]), (top, bottom, left, right))


def mixed(images: Tensor, mix: Mix) -> Tensor:
    """Images ``(B, 3, H, W)``, each mixed with the one that mirrors its place in the batch; a new tensor."""
    if mix.share == 1.0:
        return images
    if mix.box is None:
        return images * mix.share + images.flip(0) * (1 - mix.share)
    top, bottom, left, right = mix.box
    made = images.clone()
    made[:, :, top:bottom, left:right] = images.flip(0)[:, :, top:bottom, left:right]
    return made

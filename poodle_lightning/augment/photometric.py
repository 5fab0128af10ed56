"""Colour recipes: jitter, greyscale, blur, solarisation, drawn per image from its key.

Each operation has torchvision's semantics (Kornia's ``*_with_mean_subtraction`` and
``*_with_gray_subtraction`` forms; its plain ones differ and cost accuracy). The four jitter operations come
in an order of their own for every image, as in torchvision's ``ColorJitter`` on single images.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import kornia.enhance as enhance
import torch
from kornia.color import rgb_to_grayscale
from kornia.filters import gaussian_blur2d
from torch import Tensor

from poodle_lightning.configured import Configured
from poodle_lightning.ops.geometry import island
from poodle_lightning.ops.random import bernoulli, fold, permutation, uniform

# A Gaussian cut at 4 sigma differs from the untruncated one by less than 1e-5 of the value range.
_CUT_SIGMA = 4.0


class Colour(Configured):
    """A SimCLR-like colour recipe. Defaults: the PooDLe authors' (SimCLR at strength 1).

    Args:
        brightness: factor drawn from [1 − b, 1 + b].
        contrast: factor drawn from [1 − c, 1 + c].
        saturation: factor drawn from [1 − s, 1 + s].
        hue: shift drawn from [−h, h], in turns of the colour circle; at most 0.5.
        jitter: probability of the four above.
        gray: probability of greyscale.
        blur: probability of a Gaussian blur.
        sigma: range of the blur's standard deviation in pixels.
        solarize: probability of inverting values of 0.5 and above.
    """

    def __init__(
        self,
        brightness: float = 0.8,
        contrast: float = 0.8,
        saturation: float = 0.8,
        hue: float = 0.2,
        jitter: float = 0.8,
        gray: float = 0.2,
        blur: float = 0.5,
        sigma: tuple[float, float] = (0.1, 2.0),
        solarize: float = 0.0,
    ) -> None:
        if not 0 <= hue <= 0.5:
            raise ValueError(f"Colour: hue must lie in [0, 0.5], not {hue}")
        self.factors = (brightness, contrast, saturation, hue)
        self.jitter = jitter
        self.gray = gray
        self.blur = blur
        self.sigma = sigma
        self.solarize = solarize

    @torch.no_grad()
    def __call__(self, images: Tensor, keys: Tensor) -> Tensor:
        """Recoloured copies.

        Args:
            images: ``(B, 3, H, W)`` in [0, 1].
            keys: ``(B,)`` on the host.

        Returns:
            ``(B, 3, H, W)`` float32 in [0, 1].
        """
        with island(images.device.type):
            out = images.float().clone()
            self._jitter(out, fold(keys, "jitter"))
            _where(out, bernoulli(fold(keys, "gray"), self.gray)[:, 0], _grayscale)
            self._blur(out, fold(keys, "blur"))
            _where(out, bernoulli(fold(keys, "solarize"), self.solarize)[:, 0], enhance.solarize)
            return out

    def _jitter(self, out: Tensor, keys: Tensor) -> None:
        chosen = bernoulli(keys, self.jitter)[:, 0]
        order = permutation(fold(keys, "order"), 4)
        factors = uniform(fold(keys, "factors"), 4, -1.0, 1.0) * torch.tensor(self.factors)
        factors[:, :3] += 1.0
        factors[:, :3].clamp_(min=0.0)
        for slot in range(4):
            for number, operation in enumerate(_JITTER):
                if self.factors[number] > 0:
                    rows = chosen & (order[:, slot] == number)
                    _where(out, rows, operation, factors[rows, number].to(out.device, non_blocking=True))

    def _blur(self, out: Tensor, keys: Tensor) -> None:
        rows = bernoulli(keys, self.blur)[:, 0]
        # on the host: Kornia looks at the values and then moves them by itself
        sigma = uniform(fold(keys, "sigma"), 1, *self.sigma)[rows].expand(-1, 2)
        # reflection needs a border narrower than the image
        reach = min(math.ceil(_CUT_SIGMA * self.sigma[1]), min(out.shape[-2:]) - 1)
        side = 2 * reach + 1
        _where(out, rows, lambda x, s: gaussian_blur2d(x, (side, side), s), sigma)


def recolour(colour: Colour, frames: Tensor, key: Tensor) -> Tensor:
    """Every frame of ``(N, T, 3, H, W)`` in colours of its own, drawn from the clips' keys ``(N,)``."""
    keys = torch.stack([fold(key, "colour", number) for number in range(frames.shape[1])], dim=1)
    return colour(frames.flatten(0, 1), keys.flatten()).unflatten(0, frames.shape[:2])


def _adjust_hue(images: Tensor, turns: Tensor) -> Tensor:
    return enhance.adjust_hue(images, turns * (2 * math.pi))


def _grayscale(images: Tensor) -> Tensor:
    return rgb_to_grayscale(images).expand(-1, 3, -1, -1)


_JITTER: tuple[Callable[[Tensor, Tensor], Tensor], ...] = (
    enhance.adjust_brightness_accumulative,
    enhance.adjust_contrast_with_mean_subtraction,
    enhance.adjust_saturation_with_gray_subtraction,
    _adjust_hue,
)


def _where(out: Tensor, rows: Tensor, operation: Callable[..., Tensor], values: Tensor | None = None) -> None:
    """Apply an operation in place to the chosen rows; which rows is known on the host."""
    index = rows.nonzero()[:, 0]
    if len(index) == 0:
        return
    index = index.to(out.device, non_blocking=True)
    chosen = out.index_select(0, index)
    out.index_copy_(0, index, operation(chosen) if values is None else operation(chosen, values))

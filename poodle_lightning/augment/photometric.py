"""Colour recipes: jitter, greyscale, blur, solarisation, drawn per image from its key.

Each operation has torchvision's and Kornia's semantics. The four jitter operations come in an order of their
own for every image, as in torchvision's ``ColorJitter`` on single images. What is drawn is known on the host.

* On a CPU every image goes through its own operations in place, in blocks of pixels that stay in the cache:
  the image crosses the memory once, or twice where a contrast needs the mean of what came before it.
* On other devices images that have the same operation at the same place go together, so that the number of
  launches does not depend on the batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from poodle_lightning.augment import operations
from poodle_lightning.configured import Configured
from poodle_lightning.ops.geometry import island
from poodle_lightning.ops.random import bernoulli, fold, permutation, uniform

# The operations by number; the first four are the jitter's, in the order of the recipe's factors.
_BRIGHTNESS, _CONTRAST, _SATURATION, _HUE, _GRAY = range(5)
# Pixels of one image worked on at a time on a CPU: with all temporaries about 2 MB.
_BLOCK = 32_768

Step = tuple[int, float]
"""One operation on one image: its number and its factor."""


@dataclass(frozen=True)
class Drawn:
    """What a recipe does to each of B images; numpy, on the host.

    Args:
        steps: of each image, in its order: the operations that it gets (greyscale last) and their factors.
        blur: ``(B,)`` bool.
        sigma: ``(B,)`` float32 standard deviations of the blur in pixels.
        solarize: ``(B,)`` bool.
    """

    steps: list[list[Step]]
    blur: np.ndarray
    sigma: np.ndarray
    solarize: np.ndarray


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
        form: "exact", or the approximation "matrix": the jitter and the greyscale of an image folded into one
            3×4 matrix, with the same draws. It clamps once, at the end, takes the contrast's mean without
            clamps, and turns the hue by a rotation of the YIQ plane, not in HSV. With the defaults, on
            generated streets, it is on average 0.02 of the value range away from the exact form, which itself
            is 0.15 away from the image (``benchmarks/augment.py``).
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
        form: Literal["exact", "matrix"] = "exact",
    ) -> None:
        if not 0 <= hue <= 0.5:
            raise ValueError(f"Colour: hue must lie in [0, 0.5], not {hue}")
        if form not in ("exact", "matrix"):
            raise ValueError(f'Colour: form must be "exact" or "matrix", not {form!r}')
        self.factors = (brightness, contrast, saturation, hue)
        self.jitter = jitter
        self.gray = gray
        self.blur = blur
        self.sigma = sigma
        self.solarize = solarize
        self.form = form

    @torch.no_grad()
    def __call__(self, images: Tensor, keys: Tensor) -> Tensor:
        """Recoloured copies.

        Args:
            images: ``(B, 3, H, W)`` in [0, 1].
            keys: ``(B,)`` on the host.

        Returns:
            ``(B, 3, H, W)`` float32 in [0, 1], to rounding.
        """
        drawn = self.draw(keys)
        on_host = one_by_one(images.device)
        with island(images.device.type):
            if self.form == "matrix":
                out = _by_matrix(images.float(), drawn.steps)
            else:
                out = images.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
                (_image_by_image if on_host else _by_operation)(out, drawn.steps)
            _blur(out, drawn, self.sigma[1], on_host)
            _solarize(out, drawn, on_host)
            return out

    def draw(self, keys: Tensor) -> Drawn:
        """What happens to one image per key ``(B,)``."""
        jitter, blur = fold(keys, "jitter"), fold(keys, "blur")
        chosen = bernoulli(jitter, self.jitter)[:, 0].numpy()
        order = permutation(fold(jitter, "order"), 4).numpy()
        factors = uniform(fold(jitter, "factors"), 4, -1.0, 1.0).numpy() * np.array(
            self.factors, dtype=np.float32
        )
        factors[:, :_HUE] = np.maximum(factors[:, :_HUE] + np.float32(1.0), 0.0)
        grays = bernoulli(fold(keys, "gray"), self.gray)[:, 0].numpy()
        steps: list[list[Step]] = []
        for mine, numbers, values, gray in zip(chosen, order, factors, grays, strict=True):
            slots = [(int(n), float(values[n])) for n in numbers if self.factors[n] > 0] if mine else []
            steps.append([*slots, (_GRAY, 0.0)] if gray else slots)
        return Drawn(
            steps,
            blur=bernoulli(blur, self.blur)[:, 0].numpy(),
            sigma=uniform(fold(blur, "sigma"), 1, *self.sigma)[:, 0].numpy(),
            solarize=bernoulli(fold(keys, "solarize"), self.solarize)[:, 0].numpy(),
        )


def one_by_one(device: torch.device) -> bool:
    """Whether images are worked on one after the other, in place: on a CPU. Elsewhere they go in groups."""
    return device.type == "cpu"


def recolour(colour: Colour, frames: Tensor, key: Tensor) -> Tensor:
    """Every frame of ``(N, T, 3, H, W)`` in colours of its own, drawn from the clips' keys ``(N,)``."""
    keys = torch.stack([fold(key, "colour", number) for number in range(frames.shape[1])], dim=1)
    return colour(frames.flatten(0, 1), keys.flatten()).unflatten(0, frames.shape[:2])


def _apply(x: Tensor, number: int, factor: float | Tensor, mean: Tensor | None) -> None:
    """One operation in place on ``(…, 3, n)``; only a contrast asks for the mean grey."""
    if number == _BRIGHTNESS:
        operations.brightness_(x, factor)
    elif number == _CONTRAST:
        assert mean is not None
        operations.contrast_(x, factor, mean)
    elif number == _SATURATION:
        operations.saturation_(x, factor)
    elif number == _HUE:
        operations.hue_(x, factor)
    else:
        operations.gray_(x)


# ---- on a CPU
def _image_by_image(out: Tensor, steps: list[list[Step]]) -> None:
    for pixels, mine in zip(out.flatten(2), steps, strict=True):
        before = next((n for n, (number, _) in enumerate(mine) if number == _CONTRAST), None)
        if before is None:
            _sweep(pixels, mine)
        else:
            mean = _sweep(pixels, mine[:before], grays=True)
            _sweep(pixels, mine[before:], mean)


def _sweep(pixels: Tensor, steps: list[Step], mean: Tensor | None = None, grays: bool = False) -> Tensor:
    """Steps on the pixels ``(3, n)`` of one image, block by block; returns the mean grey if asked for."""
    total = pixels.new_zeros(())
    for block in pixels.split(_BLOCK, dim=-1) if steps or grays else ():
        for number, factor in steps:
            _apply(block, number, factor, mean)
        if grays:
            total += operations.gray(block).sum()
    return total / pixels.shape[-1]


# ---- elsewhere
def _by_operation(out: Tensor, steps: list[list[Step]]) -> None:
    for number, rows, factors in _groups(out, steps):
        x = out.index_select(0, rows).flatten(2)
        mean = operations.gray(x).mean(dim=-1, keepdim=True) if number == _CONTRAST else None
        _apply(x, number, factors[:, None, None], mean)
        out.index_copy_(0, rows, x.view(-1, *out.shape[1:]))


def _groups(out: Tensor, steps: list[list[Step]]) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Images with the same operation at the same place: its number, rows and factors on the device.

    Greyscale comes after every image's jitter. Two copies take all rows and all factors there.
    """
    found: dict[tuple[int, int], list[tuple[int, float]]] = {}
    for row, mine in enumerate(steps):
        for place, (number, factor) in enumerate(mine):
            found.setdefault((4 if number == _GRAY else place, number), []).append((row, factor))
    groups = sorted(found.items())
    sizes = [len(members) for _, members in groups]
    rows = torch.tensor([row for _, members in groups for row, _ in members], dtype=torch.int64)
    factors = torch.tensor([factor for _, members in groups for _, factor in members])
    moved = (x.to(out.device, non_blocking=True).split(sizes) for x in (rows, factors))
    yield from ((number, *tensors) for ((_, number), _), *tensors in zip(groups, *moved, strict=True))


# ---- blur and solarisation: the chosen images only
def _blur(out: Tensor, drawn: Drawn, widest: float, on_host: bool) -> None:
    """One by one on a CPU; together elsewhere, cut at the reach of the recipe's largest sigma."""
    rows = drawn.blur.nonzero()[0]
    if on_host:
        for row in rows.tolist():
            operations.blur_(out[row], float(drawn.sigma[row]))
    elif len(rows):
        sigma = torch.from_numpy(drawn.sigma[rows]).to(out.device, non_blocking=True)
        _together(out, rows, lambda x: operations.blurred(x, sigma, widest))


def _solarize(out: Tensor, drawn: Drawn, on_host: bool) -> None:
    rows = drawn.solarize.nonzero()[0]
    if on_host:
        for row in rows.tolist():
            out[row] = operations.solarized(out[row])
    elif len(rows):
        _together(out, rows, operations.solarized)


def _together(out: Tensor, rows: np.ndarray, operation: Callable[[Tensor], Tensor]) -> None:
    index = torch.from_numpy(rows).to(out.device, non_blocking=True)
    out.index_copy_(0, index, operation(out.index_select(0, index)))


# ---- the approximation
_TO_YIQ = np.array([operations.GRAY, (0.595716, -0.274453, -0.321263), (0.211456, -0.522591, 0.311135)])


def _by_matrix(images: Tensor, steps: list[list[Step]]) -> Tensor:
    """``M x + N μ`` with an image's mean colour μ, clamped; M and N are folded on the host."""
    folded = np.array([_fold_matrix(mine) for mine in steps], dtype=np.float32).reshape(-1, 2, 3, 3)
    both = torch.from_numpy(folded).to(images.device, non_blocking=True)
    x = images.flatten(2)
    offset = torch.bmm(both[:, 1], x.mean(dim=-1, keepdim=True))
    return torch.baddbmm(offset, both[:, 0], x).clamp_(0.0, 1.0).view(images.shape)


def _fold_matrix(steps: list[Step]) -> tuple[np.ndarray, np.ndarray]:
    """M and N of the steps of one image, ``(3, 3)`` float64 each."""
    m, n = np.eye(3), np.zeros((3, 3))
    to_gray = np.tile(operations.GRAY, (3, 1))
    for number, factor in steps:
        if number == _CONTRAST:
            m, n = factor * m, factor * n + (1 - factor) * to_gray @ (m + n)
            continue
        if number == _HUE:
            step = _hue_matrix(factor)
        elif number == _BRIGHTNESS:
            step = factor * np.eye(3)
        else:
            saturation = 0.0 if number == _GRAY else factor
            step = saturation * np.eye(3) + (1 - saturation) * to_gray
        m, n = step @ m, step @ n
    return m, n


def _hue_matrix(turns: float) -> np.ndarray:
    """A rotation of the plane of I and Q, which runs from red over blue to green: against the hue."""
    angle = -2 * math.pi * turns
    turn = np.eye(3)
    turn[1:, 1:] = [[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]]
    turned: np.ndarray = np.linalg.inv(_TO_YIQ) @ turn @ _TO_YIQ
    return turned

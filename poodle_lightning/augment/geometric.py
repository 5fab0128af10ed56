"""Geometric views: each returns the image together with its own map back to the clean crop."""

from __future__ import annotations

import math
from typing import Literal

import torch
from kornia.geometry.transform import get_affine_matrix2d
from torch import Tensor

from poodle_lightning.configured import Configured
from poodle_lightning.ops.geometry import Affine, Size, island, pull
from poodle_lightning.ops.random import bernoulli, fold, uniform
from poodle_lightning.types import View

_TRIES = 10  # of torchvision's RandomResizedCrop


class AffineFlip(Configured):
    """A rotation and scaling about the centre, a shift, then a horizontal flip. Defaults: PooDLe's.

    Args:
        degrees: rotation drawn from [−d, d].
        scale: range of the magnification.
        flip: probability of the flip.
        shift: largest shift of the centre along each axis, as a share of the image's width and height. With
            0, the papers' value, the centre of every view stays in its place, so that a position in the view
            tells the position in the crop.
        outside: what is shown beyond the crop: "black", as in the authors' code, or the "border" pixels
            repeated. A black frame gives the view's geometry away.
    """

    def __init__(
        self,
        degrees: float = 10.0,
        scale: tuple[float, float] = (0.9, 1.1),
        flip: float = 0.5,
        shift: float = 0.0,
        outside: Literal["black", "border"] = "black",
    ) -> None:
        if not 0 < scale[0] <= scale[1]:
            raise ValueError(f"AffineFlip: scale must be 0 < low <= high, not {scale}")
        if not 0 <= shift < 1:
            raise ValueError(f"AffineFlip: shift must lie in [0, 1), not {shift}")
        if outside not in ("black", "border"):
            raise ValueError(f'AffineFlip: outside must be "black" or "border", not {outside!r}')
        self.degrees = degrees
        self.scale = scale
        self.flip = flip
        self.shift = shift
        self.outside = outside

    def draw(self, keys: Tensor, size: Size) -> Affine:
        """``to_clean`` of one view per key, on the host."""
        height, width = size
        batch = len(keys)
        angle = uniform(fold(keys, "angle"), 1, -self.degrees, self.degrees)[:, 0]
        scale = uniform(fold(keys, "scale"), 1, *self.scale).expand(-1, 2)
        centre = torch.tensor([[(width - 1) / 2, (height - 1) / 2]]).expand(batch, 2)
        moved = uniform(fold(keys, "shift"), 2, -self.shift, self.shift) * torch.tensor([width, height])
        with island("cpu"):
            matrix = get_affine_matrix2d(moved, centre, scale, angle).double()
        flipped = torch.eye(3, dtype=torch.float64).repeat(batch, 1, 1)
        rows = bernoulli(fold(keys, "flip"), self.flip)[:, 0]
        flipped[rows, 0, 0], flipped[rows, 0, 2] = -1.0, float(width - 1)
        return Affine.from_kornia(flipped @ matrix, clean=size, view=size)

    @torch.no_grad()
    def __call__(self, images: Tensor, keys: Tensor) -> View:
        """A view of ``images (B, 3, H, W)``, of the same size."""
        size = (images.shape[-2], images.shape[-1])
        to_clean = self.draw(keys, size).to(images.device)
        image, seen = pull(images, to_clean, size)
        return View(image if self.outside == "border" else image.mul_(seen[:, None]), to_clean)


def draw_views(view: AffineFlip | None, u: Tensor, v: Tensor, keys: Tensor) -> tuple[View, View]:
    """Views of the online frames and of the target frames, drawn separately; without a recipe, the frames."""
    if view is None:
        identity = Affine.identity(len(u), u.device)
        return View(u, identity), View(v, identity)
    return view(u, fold(keys, "online view")), view(v, fold(keys, "target view"))


class ResizedCrop(Configured):
    """A random resized crop with a horizontal flip (Inception crop). Defaults: BYOL's.

    Args:
        size: height and width of the view in pixels.
        area: range of the crop's share of the image.
        ratio: range of the crop's width over height, log-uniform.
        flip: probability of the flip.
        fit: what becomes of a crop that is wider or higher than the image. "cut": it is cut to it. "redraw":
            area and ratio are drawn again, ten times at most; after that the largest crop in the middle of
            the image whose ratio is allowed. That is torchvision's ``RandomResizedCrop``, which DINO's family
            uses, but for its rounding to whole pixels.
    """

    def __init__(
        self,
        size: tuple[int, int] = (224, 224),
        area: tuple[float, float] = (0.08, 1.0),
        ratio: tuple[float, float] = (3 / 4, 4 / 3),
        flip: float = 0.5,
        fit: Literal["cut", "redraw"] = "cut",
    ) -> None:
        if not 0 < area[0] <= area[1] <= 1:
            raise ValueError(f"ResizedCrop: area must be 0 < low <= high <= 1, not {area}")
        if fit not in ("cut", "redraw"):
            raise ValueError(f'ResizedCrop: fit must be "cut" or "redraw", not {fit!r}')
        self.size = (size[0], size[1])
        self.area = area
        self.ratio = ratio
        self.flip = flip
        self.fit = fit

    def draw(self, keys: Tensor, size: Size, aspect: Tensor | None = None) -> Affine:
        """``to_clean`` of one crop per key, on the host.

        Args:
            keys: ``(B,)`` on the host.
            size: height and width of the image in pixels.
            aspect: ``(B,)`` on the host, true width over height of what the image shows, where it was
                squeezed to ``size``: area and ratio are then those of the crop before that. None: the shape
                is that of ``size``.
        """
        height: float | Tensor = size[0]
        width: float | Tensor = size[1]
        if aspect is not None:
            width, height = aspect.float()[:, None], torch.ones(len(aspect), 1)
        tries = _TRIES if self.fit == "redraw" else 1
        pixels = uniform(fold(keys, "area"), tries, *self.area) * (height * width)
        low, high = self.ratio
        ratio = uniform(fold(keys, "ratio"), tries, math.log(low), math.log(high)).exp()
        half_x, half_y = (pixels * ratio).sqrt() / width, (pixels / ratio).sqrt() / height
        where = uniform(fold(keys, "centre"), 2, -1.0, 1.0)
        if self.fit == "redraw":
            half_x, half_y, found = _first_that_fits(half_x, half_y, width / height, self.ratio)
            where = where * found  # what is left when nothing fits is in the middle
        half_x, half_y = half_x[:, 0].clamp(max=1.0), half_y[:, 0].clamp(max=1.0)
        x, y = where[:, 0] * (1 - half_x), where[:, 1] * (1 - half_y)
        boxes = torch.stack([x - half_x, y - half_y, x + half_x, y + half_y], dim=-1)
        flipped = bernoulli(fold(keys, "flip"), self.flip)[:, 0]
        swapped = boxes[:, [2, 1, 0, 3]]  # right edge first: mirrored
        return Affine.box(torch.where(flipped[:, None], swapped, boxes))

    @torch.no_grad()
    def __call__(self, images: Tensor, keys: Tensor, aspect: Tensor | None = None) -> View:
        """A view of ``images (B, 3, H, W)``, plain bilinear; ``aspect`` as :meth:`draw` takes it."""
        to_clean = self.draw(keys, (images.shape[-2], images.shape[-1]), aspect).to(images.device)
        image, _ = pull(images, to_clean, self.size)
        return View(image, to_clean)


def _first_that_fits(
    half_x: Tensor, half_y: Tensor, aspect: float | Tensor, ratio: tuple[float, float]
) -> tuple[Tensor, Tensor, Tensor]:
    """Of several tries ``(B, tries)`` the first inside the image ``(B, 1)``, and whether there is one."""
    fits = (half_x <= 1.0) & (half_y <= 1.0)
    found, first = fits.any(dim=1, keepdim=True), fits.int().argmax(dim=1, keepdim=True)
    widest, highest = (torch.as_tensor(x) for x in (ratio[1] / aspect, aspect / ratio[0]))
    return (
        torch.where(found, half_x.gather(1, first), widest.clamp(max=1.0)),
        torch.where(found, half_y.gather(1, first), highest.clamp(max=1.0)),
        found,
    )

"""Flow-informed pairs of subcrops (PooDLe, §3 and App. A), drawn for all images, crops and tries at once.

Everything random is drawn on the host from the images' keys; everything that depends on the flow stays on
its device, so that nothing is read back: no synchronisation, whatever the number of crops.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from poodle_lightning.ops.geometry import Affine, Flow, Size, extent_to_pixels, inside, pixels_to_extent
from poodle_lightning.ops.random import fold, permutation, uniform

Centres = Literal["grid", "uniform"]


@dataclass(frozen=True)
class SubcropRecipe:
    """How subcrops are drawn. Defaults: the authors' configuration.

    Args:
        count: K, subcrops per image.
        size: height and width in pixels to which a subcrop is resized.
        area: range of the subcrop's share of the image.
        ratio: range of width over height.
        jitter: largest shift of the partner's centre, as a share of the image's height and width.
        tries: draws of a centre before the pair is taken from one frame.
        centres: one subcrop in each of K different cells of a grid, or anywhere.
    """

    count: int = 6
    size: tuple[int, int] = (192, 192)
    area: tuple[float, float] = (0.05, 0.3)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    jitter: float = 0.10
    tries: int = 5
    centres: Centres = "grid"

    def __post_init__(self) -> None:
        low, high = self.area
        if not 0 < low <= high <= 1:
            raise ValueError(f"subcrops.area must be 0 < low <= high <= 1, not {self.area}")
        if self.count < 1 or self.tries < 1:
            raise ValueError(
                f"subcrops.count and tries must be at least 1, not {self.count} and {self.tries}"
            )
        if not 0 < self.ratio[0] <= self.ratio[1]:
            raise ValueError(f"subcrops.ratio must be 0 < low <= high, not {self.ratio}")


@dataclass(frozen=True)
class SubcropPairs:
    """Boxes of K pairs for each of B directed images; row ``i·K + k`` is crop k of image i.

    Args:
        online: from a point of the subcrop to the point of the image.
        target: the same in the partner's frame (or in the same frame, where ``same``).
        same: ``(B·K,)`` bool: no try led into the other frame, so the pair is from one frame.
    """

    online: Affine
    target: Affine
    same: Tensor


def flow_guided_subcrops(flow: Flow, keys: Tensor, recipe: SubcropRecipe) -> SubcropPairs:
    """Draw pairs of subcrops that show the same content in two frames.

    The online box has its centre c in a cell of its own; the partner's centre is c + F(c) + jitter. Up to
    ``tries`` centres are drawn until the partner lies inside the frame. The partner's area is at least the
    online box's. Online boxes keep clear of the top and left border and may leave the image at the bottom
    and right; partner boxes are cut at the border.

    Args:
        flow: from each directed image to its partner, B rows.
        keys: ``(B,)`` random keys on the host.
        recipe: sizes and ranges.

    Returns:
        B·K pairs on the flow's device.
    """
    size, count, tries = flow.size, recipe.count, recipe.tries
    area, boxes = _draw_sizes(fold(keys, "online size"), recipe, size)
    _, partners = _draw_sizes(fold(keys, "target size"), recipe, size, at_least=area)
    centres = _draw_centres(keys, recipe, size)  # (B, K, tries + 1, 2) pixels
    centres = torch.maximum(centres, boxes[:, :, None] / 2 - 0.5)
    jitter = uniform(fold(keys, "jitter"), count * tries * 2, -recipe.jitter, recipe.jitter)
    jitter = jitter.reshape(len(keys), count, tries, 2) * 2.0  # the extent is 2 wide
    halves = torch.stack([boxes, partners], dim=2) / torch.tensor([size[1], size[0]])

    # all that was drawn goes over in one copy: tries + 1 points, tries shifts, 2 half sides
    drawn = torch.cat([pixels_to_extent(centres, size), jitter, halves], dim=2)
    drawn = drawn.to(flow.displacement.device, non_blocking=True)
    points, jitter, halves = drawn.split([tries + 1, tries, 2], dim=2)
    tried, last = points.split([tries, 1], dim=2)
    flat = tried.flatten(1, 2)  # (B, K·tries, 2)
    moved = flat + flow.at(flat[:, None].to(flow.displacement.dtype))[:, 0].to(flat)
    moved = moved.unflatten(1, (count, tries)) + jitter
    valid = inside(moved)  # (B, K, tries)
    first = valid.to(torch.uint8).argmax(dim=2, keepdim=True)[..., None]  # 0 where none is valid
    same = ~valid.any(dim=2)

    # (B, K, tries, 2 frames, 2): the centre and its partner; then those of the first valid try
    ends = torch.stack([tried, moved], dim=3)
    ends = ends.gather(2, first[..., None].expand(-1, -1, -1, 2, 2))[:, :, 0]
    ends = torch.where(same[..., None, None], last, ends)
    low, high = ends - halves, ends + halves
    online, target = torch.cat([low, high], dim=-1).flatten(0, 1).unbind(1)
    return SubcropPairs(Affine.box(online), Affine.box(target.clamp(-1.0, 1.0)), same.flatten())


def grid_cell(recipe: SubcropRecipe, size: Size) -> int:
    """Side of a grid cell in pixels: that of a square subcrop of mean area, on the shorter side."""
    return max(1, round(math.sqrt(sum(recipe.area) / 2) * min(size)))


def _draw_sizes(
    keys: Tensor, recipe: SubcropRecipe, size: Size, at_least: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Areas ``(B, K)`` and (width, height) in pixels ``(B, K, 2)``, log-uniform in the ratio."""
    low, high = recipe.area
    start = torch.full((len(keys), recipe.count), low) if at_least is None else at_least
    area = start + (high - start) * uniform(fold(keys, "area"), recipe.count)
    logs = math.log(recipe.ratio[0]), math.log(recipe.ratio[1])
    ratio = uniform(fold(keys, "ratio"), recipe.count, *logs).exp()
    pixels = area * (size[0] * size[1])
    width = (pixels * ratio).sqrt().clamp(max=float(size[1]))
    height = (pixels / ratio).sqrt().clamp(max=float(size[0]))
    return area, torch.stack([width, height], dim=-1)


def _draw_centres(keys: Tensor, recipe: SubcropRecipe, size: Size) -> Tensor:
    """Centres in pixels ``(B, K, tries + 1, 2)``; the last is for pairs from one frame."""
    height, width = size
    draws = recipe.tries + 1
    unit = uniform(fold(keys, "centre"), recipe.count * draws * 2).reshape(len(keys), recipe.count, draws, 2)
    if recipe.centres == "uniform":
        return unit * torch.tensor([width, height]) - 0.5
    cell = grid_cell(recipe, size)
    rows, columns = -(-height // cell), -(-width // cell)  # border cells are partial
    order = permutation(fold(keys, "cells"), rows * columns)
    chosen = order[:, torch.arange(recipe.count) % order.shape[1]]
    corner = torch.stack([chosen % columns, chosen // columns], dim=-1)[:, :, None] * float(cell)
    side = torch.minimum(torch.full_like(corner, float(cell)), torch.tensor([width, height]) - corner)
    return corner + unit * side - 0.5


def box_pixels(boxes: Affine, size: Size) -> Tensor:
    """Corners (x0, y0, x1, y1) of boxes in pixels of an image of ``size``, ``(B, 4)``; for drawing."""
    corners = boxes.matrix.new_tensor([[-1.0, -1.0], [1.0, 1.0]]).expand(len(boxes), 2, 2)
    return extent_to_pixels(boxes(corners), size).flatten(1)

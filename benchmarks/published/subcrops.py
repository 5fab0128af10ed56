"""Flow-guided pairs of subcrops drawn and cut as the published code does: a loop per image, crop and try.

Every number is drawn by itself, as a tensor, and read; the flow is read at every centre. On a GPU each such
read waits for everything that was launched before. Boxes are whole pixels; online boxes that reach beyond
the bottom or right are filled with zeros, partner boxes are cut at the border.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from poodle_lightning.ops.crops import SubcropRecipe, grid_cell

Box = tuple[int, int, int, int]
"""Top, left, height and width in pixels."""


@dataclass(frozen=True)
class Pair:
    """One pair: from which image, the two boxes, and whether both are from one frame."""

    image: int
    online: Box
    target: Box
    same: bool


def draw(flow: Tensor, recipe: SubcropRecipe) -> list[Pair]:
    """Pairs for all images, from torch's global generator.

    Args:
        flow: ``(B, 2, H, W)`` px, from each directed image to its partner.
        recipe: sizes and ranges; centres are drawn in different cells of a grid.
    """
    height, width = flow.shape[-2:]
    cell = grid_cell(recipe, (height, width))
    cells = torch.cartesian_prod(torch.arange(-(-height // cell)), torch.arange(-(-width // cell)))
    pairs = []
    for image in range(len(flow)):
        for row, column in cells[torch.multinomial(torch.ones(len(cells)), recipe.count)]:
            pairs.append(_draw_pair(flow[image], image, int(row) * cell, int(column) * cell, cell, recipe))
    return pairs


def _draw_pair(flow: Tensor, image: int, top: int, left: int, cell: int, recipe: SubcropRecipe) -> Pair:
    size = flow.shape[-2:]
    area = _between(*recipe.area)
    shape = _shape(area, recipe, size)
    partner_shape = _shape(_between(area, recipe.area[1]), recipe, size)
    extent = torch.tensor(size)
    for _ in range(recipe.tries):
        centre = _centre(top, left, cell, shape, size)
        shift = (2 * torch.rand(2, device=flow.device) - 1) * recipe.jitter * extent.to(flow.device)
        moved = torch.round(centre.to(flow.device) + flow[:, centre[0], centre[1]].flip(0) + shift)
        if (moved[0] >= 0) and (moved[0] < size[0]) and (moved[1] >= 0) and (moved[1] < size[1]):
            return Pair(image, _box(centre, shape), _cut(_box(moved, partner_shape), size), same=False)
    centre = _centre(top, left, cell, shape, size)
    return Pair(image, _box(centre, shape), _cut(_box(centre, partner_shape), size), same=True)


def _between(low: float, high: float) -> float:
    return low + (high - low) * float(torch.rand(1))


def _shape(area: float, recipe: SubcropRecipe, size: torch.Size) -> tuple[int, int]:
    ratio = math.exp(_between(math.log(recipe.ratio[0]), math.log(recipe.ratio[1])))
    pixels = area * size[0] * size[1]
    height, width = round(math.sqrt(pixels / ratio)), round(math.sqrt(pixels * ratio))
    return min(height, size[0]), min(width, size[1])


def _centre(top: int, left: int, cell: int, shape: tuple[int, int], size: torch.Size) -> Tensor:
    y = torch.randint(top, min(top + cell, size[0]), (1,))[0]
    x = torch.randint(left, min(left + cell, size[1]), (1,))[0]
    return torch.stack([torch.clamp(y, min=shape[0] // 2), torch.clamp(x, min=shape[1] // 2)])


def _box(centre: Tensor, shape: tuple[int, int]) -> Box:
    return int(centre[0]) - shape[0] // 2, int(centre[1]) - shape[1] // 2, *shape


def _cut(box: Box, size: torch.Size) -> Box:
    top, left = max(box[0], 0), max(box[1], 0)
    bottom, right = min(box[0] + box[2], size[0]), min(box[1] + box[3], size[1])
    return top, left, max(bottom - top, 1), max(right - left, 1)


def cut(u: Tensor, v: Tensor, pairs: list[Pair], size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """The crops, resized one by one: ``(B·K, 3, *size)`` each.

    Args:
        u: ``(B, 3, H, W)``.
        v: ``(B, 3, H, W)``, the partner of each image.
        pairs: what to cut.
        size: height and width of the crops.
    """
    online = [_resized(u[pair.image], pair.online, size) for pair in pairs]
    target = [_resized((u if pair.same else v)[pair.image], pair.target, size) for pair in pairs]
    return torch.stack(online), torch.stack(target)


def _resized(image: Tensor, box: Box, size: tuple[int, int]) -> Tensor:
    top, left, height, width = box
    part = image[:, top : top + height, left : left + width]
    part = F.pad(part, (0, width - part.shape[2], 0, height - part.shape[1]))
    return F.interpolate(part[None], size, mode="bilinear", align_corners=False)[0]

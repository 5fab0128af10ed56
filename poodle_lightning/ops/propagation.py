"""Labels carried from frames to the next one by the likeness of features within a window.

Each cell of the new frame takes the labels of the cells that are most like it, in the frames before it and
near its own place (Wang et al., CVPR 2019; Jabri et al., NeurIPS 2020). The public forms build all
h·w × h·w products of every pair of frames and hide those outside the window. Here the new frame is cut into
square tiles, and a tile is compared with the cells that its windows can reach: at 60×104 cells and radius 12
that is a fifth to a third of the products, and never more memory than ``budget``. The result does not depend
on the tiles beyond rounding.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from poodle_lightning.ops.knn import full_precision

Window = Literal["square", "circle"]
Ties = Literal["keep", "drop"]

BUDGET = 1 << 26
"""Default bytes of working memory: small tiles waste fewer products, and fit a processor's cache."""

_PAIR = 16  # bytes per product: itself twice, and what choosing takes


def propagate(
    queries: Tensor,
    keys: Tensor,
    labels: Tensor,
    *,
    topk: int,
    temperature: float,
    radius: int | None = None,
    window: Window = "square",
    ties: Ties = "keep",
    budget: int = BUDGET,
) -> Tensor:
    """Labels of a frame from those of other frames.

    Args:
        queries: ``(h, w, D)`` features of the frame, of length 1 for cosines.
        keys: ``(m, h, w, D)`` features of the m frames that are known.
        labels: ``(m, h, w, K)`` their labels, any weights.
        topk: cells that give their labels, of all m frames together; with fewer in the window, those.
        temperature: weights are proportional to exp(product / temperature) and sum to 1.
        radius: cells beyond it give nothing; None compares with all.
        window: ``square``: at most ``radius`` rows and columns away (DINO). ``circle``: nearer than
            ``radius`` (VFS, whose ``neighbor_range`` is 2 · ``radius``).
        ties: what is as good as the last of the ``topk`` is taken too (``keep``, DINO), or some of it is
            (``drop``, VFS; which ones is up to the device).
        budget: bytes of working memory; changes the speed only.

    Returns:
        ``(h, w, K)`` float32, means of labels.

    Raises:
        ValueError: shapes do not agree, or a number is out of range.
    """
    height, width, dims = queries.shape
    if keys.shape[1:] != queries.shape or labels.shape[:3] != keys.shape[:3]:
        shapes = f"{tuple(queries.shape)}, {tuple(keys.shape)}, {tuple(labels.shape)}"
        raise ValueError(f"queries, keys, labels must be (h, w, D), (m, h, w, D), (m, h, w, K), not {shapes}")
    if topk < 1 or temperature <= 0 or (radius is not None and radius < 1):
        raise ValueError(f"topk {topk}, temperature {temperature}, radius {radius} must be above 0")
    side = _tile((height, width), len(keys), dims, radius, budget)
    reach = max(height, width) if radius is None else radius
    found = torch.empty(height, width, labels.shape[-1], device=queries.device)
    with torch.no_grad(), full_precision(queries.device):
        for top in range(0, height, side):
            rows = _seen(top, side, reach, height)
            for left in range(0, width, side):
                columns = _seen(left, side, reach, width)
                tile = queries[top : top + side, left : left + side].float()
                flat = tile.flatten(0, 1)
                # frame by frame: the part of all of them that a tile sees can be larger than all products
                products = [flat @ frame[rows, columns].flatten(0, 1).float().T for frame in keys]
                likeness = torch.cat(products, dim=1)
                if radius is not None:
                    near = _near((top, left), (tile.shape[0], tile.shape[1]), rows, columns, radius, window)
                    split = likeness.unflatten(1, (len(keys), -1))  # a view
                    split.masked_fill_(~near.to(queries.device)[:, None], -torch.inf)
                known = labels[:, rows, columns].flatten(0, 2).float()
                mixed = _mixed(likeness, known, min(topk, len(known)), temperature, ties)
                found[top : top + side, left : left + side] = mixed.unflatten(0, tile.shape[:2])
    return found


def _mixed(likeness: Tensor, labels: Tensor, topk: int, temperature: float, ties: Ties) -> Tensor:
    """Mean labels ``(q, K)`` of the best of ``(q, n)`` products, which are overwritten; labels ``(n, K)``."""
    best, places = likeness.topk(topk, dim=1)
    if ties == "drop":
        return ((best / temperature).softmax(dim=1)[..., None] * labels[places]).sum(dim=1)
    likeness.masked_fill_(likeness < best[:, -1:], -torch.inf)
    weights = likeness.sub_(best[:, :1]).div_(temperature).exp_()
    return (weights @ labels) / weights.sum(dim=1, keepdim=True)


def _near(
    first: tuple[int, int], tile: tuple[int, int], rows: slice, columns: slice, radius: int, window: Window
) -> Tensor:
    """Which of the cells in ``rows`` and ``columns`` lie in the window of each cell of a tile, ``(q, n)``."""
    down, right = (
        (start + torch.arange(count))[:, None] - torch.arange(seen.start, seen.stop)
        for start, count, seen in zip(first, tile, (rows, columns), strict=True)
    )
    down, right = down[:, None, :, None], right[None, :, None, :]
    if window == "square":
        near = (down.abs() <= radius) & (right.abs() <= radius)
    else:
        near = down.square() + right.square() < radius**2
    return near.flatten(2).flatten(0, 1)


def _seen(first: int, side: int, reach: int, length: int) -> slice:
    """Rows (or columns) that the windows of a tile reach."""
    return slice(max(0, first - reach), min(length, first + side + reach))


def _tile(grid: tuple[int, int], frames: int, dims: int, radius: int | None, budget: int) -> int:
    """Side of the largest square tile that fits the budget, at least one cell."""
    reach = max(grid) if radius is None else radius

    def fits(side: int) -> bool:
        cells = min(side + 2 * reach, grid[0]) * min(side + 2 * reach, grid[1])
        queries = min(side, grid[0]) * min(side, grid[1])
        return cells * (_PAIR * frames * queries + 4 * dims) <= budget

    side = 1
    while side < max(grid) and fits(side + 1):
        side += 1
    return side

"""k-means: Lloyd's iterations from k-means++ starts, exact, in blocks that fit into a budget of memory.

Starts follow Arthur and Vassilvitskii 2007 ("k-means++: the advantages of careful seeding"), drawn with keys.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from poodle_lightning.ops.knn import BUDGET, full_precision
from poodle_lightning.ops.random import fold, uniform


@dataclass(frozen=True)
class Clusters:
    """Result of k-means.

    Args:
        centres: ``(K, D)`` float32.
        labels: ``(N,)`` int64, the nearest centre of every point.
        inertia: sum of squared distances to it.
    """

    centres: Tensor
    labels: Tensor
    inertia: float


def kmeans(
    points: Tensor, k: int, key: Tensor, iterations: int = 50, restarts: int = 5, budget: int = BUDGET
) -> Clusters:
    """The best of several runs of Lloyd's algorithm; each ends when nothing moves.

    Args:
        points: ``(N, D)`` float32.
        k: clusters.
        key: ``()`` of all draws.
        iterations: at most so many per run.
        restarts: runs; the one with the smallest inertia is returned, of equal ones the first.
        budget: bytes of working memory for distances.

    Raises:
        ValueError: there are fewer points than clusters.
    """
    if not 1 <= k <= len(points):
        raise ValueError(f"{k} clusters wanted of {len(points)} points")
    best: Clusters | None = None
    with torch.no_grad(), full_precision(points.device):
        for number in range(max(1, restarts)):
            found = _lloyd(points, _starts(points, k, fold(key, "restart", number)), iterations, budget)
            if best is None or found.inertia < best.inertia:
                best = found
    assert best is not None
    return best


def _starts(points: Tensor, k: int, key: Tensor) -> Tensor:
    """k-means++: each centre is a point, drawn with its squared distance from the nearest one so far."""
    draws = uniform(key.reshape(1), k, dtype=torch.float64)[0].tolist()
    chosen = [min(len(points) - 1, int(draws[0] * len(points)))]
    away = points.new_full((len(points),), torch.inf)
    for draw in draws[1:]:
        away = torch.minimum(away, (points - points[chosen[-1]]).square().sum(dim=1))
        total = away.double().cumsum(dim=0)
        # where all points are centres already, any point will do
        place = int(torch.searchsorted(total, draw * total[-1], right=True))
        chosen.append(min(place, len(points) - 1))
    return points[chosen].clone()


def _lloyd(points: Tensor, centres: Tensor, iterations: int, budget: int) -> Clusters:
    labels, away = _assign(points, centres, budget)
    for _ in range(iterations):
        centres = _means(points, labels, away, len(centres))
        moved, away = _assign(points, centres, budget)
        same = bool((moved == labels).all())
        labels = moved
        if same:
            break
    return Clusters(centres, labels, float(away.sum()))


def _assign(points: Tensor, centres: Tensor, budget: int) -> tuple[Tensor, Tensor]:
    """Nearest centre ``(N,)``, and the squared distance to it in float64."""
    norms = centres.square().sum(dim=1)
    rows = max(1, budget // (8 * len(centres)))
    labels = torch.cat([(norms - 2 * part @ centres.T).argmin(dim=1) for part in points.split(rows)])
    rows = max(1, budget // (16 * points.shape[1]))
    pairs = zip(points.split(rows), labels.split(rows), strict=True)
    away = [(part.double() - centres[near].double()).square().sum(dim=1) for part, near in pairs]
    return labels, torch.cat(away)


def _means(points: Tensor, labels: Tensor, away: Tensor, k: int) -> Tensor:
    """Mean of every cluster; a cluster without points moves to a point that is farthest from its centre."""
    sums = torch.zeros(k, points.shape[1], dtype=torch.float64, device=points.device)
    sums.index_add_(0, labels, points.double())
    counts = torch.bincount(labels, minlength=k)
    centres = (sums / counts.clamp(min=1)[:, None]).to(points.dtype)
    empty = (counts == 0).nonzero()[:, 0]
    if len(empty):
        centres[empty] = points[away.argsort(descending=True, stable=True)[: len(empty)]]
    return centres

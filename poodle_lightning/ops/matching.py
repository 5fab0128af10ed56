"""Clusters to classes: one to one (Hungarian), or each cluster to the class it shows most (greedy).

Both take a table of counts, rows ground truth, columns clusters, and give the class of every cluster. A
cluster without a class is −1. Where several answers are equally good, the lower class is taken (greedy), or
what SciPy's solver finds, which is always the same (Hungarian).
"""

from __future__ import annotations

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor


def hungarian(counts: Tensor) -> Tensor:
    """The one-to-one assignment with the largest sum of IoU.

    Args:
        counts: ``(classes, clusters)`` int64, pixels.

    Returns:
        ``(clusters,)`` int64 classes; with more clusters than classes, some are −1.
    """
    wide = counts.double()
    union = wide.sum(dim=0) + wide.sum(dim=1, keepdim=True) - wide
    iou = torch.where(union > 0, wide / union, torch.zeros_like(wide))
    classes, clusters = linear_sum_assignment(iou.cpu().numpy(), maximize=True)
    found = torch.full((counts.shape[1],), -1, dtype=torch.int64)
    found[torch.from_numpy(clusters)] = torch.from_numpy(classes)
    return found


def greedy(counts: Tensor) -> Tensor:
    """Every cluster to the class that most of its pixels have (highest precision); many to one.

    Args:
        counts: ``(classes, clusters)`` int64, pixels.

    Returns:
        ``(clusters,)`` int64 classes; a cluster without pixels is −1.
    """
    counts = counts.cpu()
    best = counts.max(dim=0).values
    classes = torch.arange(counts.shape[0])[:, None].expand_as(counts)
    # not argmax: which of several largest it takes is not promised
    first = torch.where(counts == best, classes, counts.shape[0]).min(dim=0).values
    return torch.where(best > 0, first, -1)


def merged(counts: Tensor, assignment: Tensor, rest: int = 0) -> Tensor:
    """Counts of (ground truth, predicted class) after clusters have become classes.

    Args:
        counts: ``(classes, clusters)`` int64.
        assignment: ``(clusters,)``, −1 = none.
        rest: the class that clusters without one become; the public protocols take the background, 0.

    Returns:
        ``(classes, classes)`` int64.
    """
    total = torch.zeros(counts.shape[0], counts.shape[0], dtype=torch.int64)
    return total.index_add_(1, torch.where(assignment < 0, rest, assignment), counts.cpu())

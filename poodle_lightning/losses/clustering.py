"""SwAV's loss: a view predicts which prototypes another view was assigned to (Caron et al., NeurIPS 2020)."""

from __future__ import annotations

import torch
from torch import Tensor

from poodle_lightning.losses.distillation import view_losses


def swapped_prediction(scores: Tensor, assignments: Tensor, temperature: float = 0.1) -> Tensor:
    """Cross-entropy of every view with the assignment of every other view that has one.

    Source: Eq. 1 and section 3.2 (multi-crop); facebookresearch/swav ``main_swav.py``: for each assigned view
    the mean over all V − 1 others, then the mean over the assigned ones.

    Args:
        scores: ``(V, B, K)`` similarity of samples and prototypes, not divided by a temperature; small views
            behind the large ones.
        assignments: ``(U, B, K)`` of the first U views; every row sums to 1, as
            :func:`poodle_lightning.ops.sinkhorn.assign` makes them. Without gradient.
        temperature: by which the scores are divided; 0.1 in SwAV.

    Returns:
        Scalar, float32 (float64 stays float64).

    Raises:
        ValueError: there is one view, or there are more assignments than views.
    """
    assigned, views = len(assignments), len(scores)
    if views < 2 or assigned > views:
        raise ValueError(
            f"swapped_prediction needs 2 views or more, and no more assignments: {views}, {assigned}"
        )
    pairs = view_losses(scores, assignments, temperature)
    others = ~torch.eye(assigned, views, dtype=torch.bool, device=pairs.device)
    return (pairs * others).sum() / (assigned * (views - 1))

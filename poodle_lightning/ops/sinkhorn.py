"""Entropic optimal transport between a few prototypes and many patches (Cuturi, NeurIPS 2013)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from poodle_lightning.ops.distributed import gather
from poodle_lightning.ops.geometry import island


def transport(scores: Tensor, epsilon: float = 0.05, iterations: int = 30) -> Tensor:
    """Plan that moves mass 1 from k prototypes to n patches, both with uniform marginals.

    It starts from ``exp(scores / epsilon)`` and divides rows, then columns, by their sums, ``iterations``
    times (DoRA, Eq. 4; shashankvkt/DoRA_ICLR24 ``sinkhorn_knopp.py``). Here on logarithms: a division by the
    sum is then one ``log_softmax``, and a row whose exponentials all underflow, which the code's form divides
    by zero, is as good as any other. What a row is scaled to does not matter, as the columns come after it.

    Args:
        scores: ``(…, k, n)`` similarity of prototypes and patches, minus the cost.
        epsilon: weight of the entropy; small is sharp.
        iterations: rounds of rows and columns; at least 1.

    Returns:
        ``(…, k, n)`` float32 (float64 stays float64). Every column sums to 1 / n; rows come near 1 / k as the
        rounds go on.

    Raises:
        ValueError: ``epsilon`` is not positive, or ``iterations`` is below 1.
    """
    if not epsilon > 0 or iterations < 1:
        raise ValueError(f"transport needs epsilon > 0 and iterations >= 1, not {epsilon} and {iterations}")
    with island(scores.device.type):
        logs = scores.to(torch.promote_types(scores.dtype, torch.float32)) / epsilon
        for _ in range(iterations):
            logs = logs.log_softmax(dim=-1).log_softmax(dim=-2)
        return (logs - math.log(scores.shape[-1])).exp()


@torch.no_grad()
def assign(scores: Tensor, epsilon: float = 0.05, iterations: int = 3) -> Tensor:
    """SwAV's targets: every sample shares itself out among prototypes, all prototypes getting as much.

    The plan between all samples of all processes and the prototypes (Caron et al., NeurIPS 2020, Eq. 3-5;
    facebookresearch/swav ``distributed_sinkhorn``): prototypes' sums are made equal, then samples' sums,
    ``iterations`` times, without gradient. On logarithms as in :func:`transport`; one gather of the
    prototypes' sums per round, the same order of addition in every process.

    Args:
        scores: ``(…, B, K)`` similarity of this process' samples and the prototypes, not divided by a
            temperature. Leading dimensions are separate plans, such as the views of a batch. All processes
            must call it, with the same leading dimensions and K.
        epsilon: weight of the entropy; small is sharp. 0.05 in SwAV.
        iterations: rounds; 3 in SwAV, at least 1.

    Returns:
        ``(…, B, K)`` float32 (float64 stays float64); every row sums to 1.

    Raises:
        ValueError: ``epsilon`` is not positive, or ``iterations`` is below 1.
    """
    if not epsilon > 0 or iterations < 1:
        raise ValueError(f"assign needs epsilon > 0 and iterations >= 1, not {epsilon} and {iterations}")
    with island(scores.device.type):
        logs = scores.to(torch.promote_types(scores.dtype, torch.float32)) / epsilon
        for _ in range(iterations):
            sums = gather(logs.logsumexp(dim=-2)[None]).logsumexp(dim=0)
            logs = (logs - sums.unsqueeze(-2)).log_softmax(dim=-1)
        return logs.exp()

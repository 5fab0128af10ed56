"""Contrast of a vector with its positive and with negatives: MoCo, PiCo, MoCLR, VITO, SimCLR, DenseCL.

Everywhere rows are brought to length 1 in here, so that a score is a cosine over the temperature whatever is
handed in; unit rows stay as they are. (MoCLR and VITO speak of rows of length 1 / √temperature: the same
scores.) A loss is a process' own share: its mean over processes, as ``DistributedDataParallel`` takes it of
the gradients, is the loss of the global batch.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import normalize, softplus

from poodle_lightning.ops.dense import full_float32
from poodle_lightning.ops.distributed import gather, mean_across, rank
from poodle_lightning.ops.geometry import island

# Scores of so many pairs at a time: 256 queries with MoCo's 65,536 keys are one block of 64 MiB, and as many
# queries as keys (PiCo) never become a matrix of 16 GiB.
BLOCK_SCORES = 1 << 24


def _unit(x: Tensor, dim: int = -1) -> Tensor:
    return normalize(x.to(torch.promote_types(x.dtype, torch.float32)), dim=dim)


def info_nce(
    queries: Tensor,
    positives: Tensor,
    negatives: Tensor,
    temperature: float = 0.2,
    weight: Tensor | None = None,
) -> Tensor:
    """InfoNCE with one positive per row and negatives shared by all rows (MoCo, Eq. 1; PiCo, section 3.1).

    ``−log [ e^{q·p/τ} / (e^{q·p/τ} + Σ_n e^{q·n/τ}) ]``, averaged over the rows. In blocks of queries: the
    scores are not kept for the backward pass, a mean key per row is.

    Args:
        queries: ``(B, D)``.
        positives: ``(B, D)``, the positive of each row; with gradient where it asks for one.
        negatives: ``(K, D)``, as :attr:`poodle_lightning.nn.queue.Queue.rows`; without gradient, and free to
            change before the backward pass.
        temperature: 0.2 in MoCo-v2 and here for PiCo.
        weight: ``(B,)`` numbers or bool, of rows that count more, less or not at all (points outside a view).
            The mean is over the weights of all processes, which then must all call it.

    Returns:
        Scalar, float32 (float64 stays float64); 0 where no row counts.
    """
    with island(queries.device.type), full_float32():
        q, p = _unit(queries), _unit(positives)
        against: Tensor = _LogSumExp.apply(q, _unit(negatives.detach()), temperature)
        losses = softplus(against - (q * p).sum(dim=1) / temperature)
        if weight is None:
            return losses.mean()
        weight = weight.to(losses.dtype)
        total = mean_across(weight.sum())
        return (losses * weight).sum() / total.clamp(min=torch.finfo(losses.dtype).tiny)


class _LogSumExp(torch.autograd.Function):
    """``log Σ_k e^{q·k/τ}`` per query, whose gradient is the mean key under the softmax, over τ."""

    @staticmethod
    def forward(ctx: Any, queries: Tensor, keys: Tensor, temperature: float) -> Tensor:
        found = queries.new_empty(len(queries))
        means = torch.empty_like(queries) if ctx.needs_input_grad[0] else None
        step = max(1, BLOCK_SCORES // max(1, len(keys)))
        for start in range(0, len(queries), step):
            rows = slice(start, start + step)
            scores = (queries[rows] / temperature) @ keys.t()
            torch.logsumexp(scores, dim=1, out=found[rows])
            if means is not None:
                torch.matmul(scores.sub_(found[rows, None]).exp_(), keys, out=means[rows])
        ctx.temperature = temperature
        ctx.save_for_backward(means)
        return found

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (means,) = ctx.saved_tensors
        return means * (gradient / ctx.temperature)[:, None], None, None


def across_views(
    online: Tensor,
    target: Tensor,
    start: int = 0,
    temperature: float = 0.1,
    negatives: Literal["all", "partner"] = "all",
) -> Tensor:
    """MoCLR's and VITO's loss: each view's projection finds the target of each other view (VITO, section 3).

    ``Σ_{i≠j} −log [ e^{z_i·t_j/τ} / (e^{z_i·t_j/τ} + Σ_n e^{z_i·t_n/τ}) ]``, averaged over the clips. One
    matrix of scores serves all pairs of views.

    Args:
        online: ``(V, B, D)`` projections of this process' clips, V ≥ 2.
        target: ``(V, N, D)`` of all processes' clips, as ``gather(t, dim=1)``. Gradient flows into it where
            it asks for one; a target network's asks for none.
        start: row of ``target`` that is this process' first clip: ``rank() · B``.
        temperature: 0.1 in VITO.
        negatives: the t_n, always of other clips: *all* of their views, as SimCLR has it, or only the view j
            in which the *partner* is. The paper says "negative features from other images in the batch".

    Returns:
        Scalar, float32 (float64 stays float64): the sum over the V·(V−1) ordered pairs.

    Raises:
        ValueError: there is one view, or ``target`` has not the rows ``start … start + B``.
    """
    (views, clips), many = online.shape[:2], target.shape[1]
    if views < 2 or len(target) != views or not 0 <= start <= many - clips:
        raise ValueError(
            f"across_views needs 2 views or more and targets of clips {start} to {start + clips}, "
            f"not {tuple(online.shape)} and {tuple(target.shape)}"
        )
    with island(online.device.type), full_float32():
        flat = (_unit(online).flatten(0, 1) / temperature) @ _unit(target).flatten(0, 1).t()
        scores = flat.view(views, clips, views, many)
        positive = scores[..., start : start + clips].diagonal(dim1=1, dim2=3)  # (i, j, b)
        if negatives == "partner":  # the clip's own column is the positive itself
            losses = scores.logsumexp(dim=3).transpose(1, 2) - positive
        else:
            columns = torch.arange(many, device=flat.device) - start
            own = columns == torch.arange(clips, device=flat.device)[:, None]
            others = scores.masked_fill(own[:, None], float("-inf")).flatten(2)
            losses = softplus(others.logsumexp(dim=2)[:, None] - positive)
        pairs = ~torch.eye(views, dtype=torch.bool, device=flat.device)
        return (losses * pairs[..., None]).sum() / clips


def nt_xent(first: Tensor, second: Tensor, temperature: float = 0.1) -> Tensor:
    """SimCLR's NT-Xent (Chen et al., ICML 2020, Eq. 1): each of two views finds the other among all.

    Negatives are both views of all other images of all processes, with gradient
    (:func:`poodle_lightning.ops.distributed.gather`); every process must call it with the same shapes.

    Args:
        first: ``(B, D)`` projections of one view.
        second: ``(B, D)`` of the other.
        temperature: 0.1 in SimCLR's best setting.

    Returns:
        Scalar, float32 (float64 stays float64): the mean over this process' 2·B rows.
    """
    both = torch.stack([first, second])
    return across_views(both, gather(both, dim=1), rank() * len(first), temperature) / 2


@torch.no_grad()
def densest_match(features_a: Tensor, features_b: Tensor) -> Tensor:
    """For each cell of a the cell of b with the largest cosine (DenseCL, Eq. 3: the backbone's features).

    Args:
        features_a: ``(B, D, h, w)``.
        features_b: ``(B, D, h', w')`` of the other view.

    Returns:
        ``(B, h·w)`` int64, places in b's map counted row by row; of equal ones any.
    """
    with island(features_a.device.type), full_float32():
        a = features_a.to(torch.promote_types(features_a.dtype, torch.float32)).flatten(2)
        # a's own length moves no maximum
        return (a.transpose(1, 2) @ _unit(features_b, dim=1).flatten(2)).argmax(dim=2)

"""Cross-entropy of a student with a teacher: DINO's and iBOT's (Caron et al., 2021; Zhou et al., 2022).

With the teacher's probabilities q, which sum to 1, and the student's logits s, ``−Σ q log softmax(s / τ)``
is ``logsumexp(s / τ) − ⟨q, s⟩ / τ``. The first term belongs to the student alone, the second is a matrix
product: no view's log-softmax and no product of a pair of views is written down.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from poodle_lightning.ops.dense import full_float32
from poodle_lightning.ops.geometry import island


def _exact(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def view_losses(student: Tensor, teacher: Tensor, temperature: float = 0.1) -> Tensor:
    """Cross-entropy of every teacher view with every student view, averaged over the images.

    Args:
        student: ``(V, B, K)`` logits.
        teacher: ``(U, B, K)`` probabilities; every row sums to 1.
        temperature: the student's, by which the logits are divided.

    Returns:
        ``(U, V)`` float32 (float64 stays float64), differentiable once and by the student only. Which pairs
        count is the caller's choice: DINO leaves out those in which both saw the same view.
    """
    with island(student.device.type), full_float32():
        losses: Tensor = _ViewLosses.apply(_exact(student), _exact(teacher).detach(), temperature)
        return losses


class _ViewLosses(torch.autograd.Function):
    """Keeps the logits, which are there anyway, and makes the gradient ``(p − q) / τ`` in one piece."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, temperature: float) -> Tensor:
        own = (logits / temperature).logsumexp(dim=2)
        # one small product per image, so that there is enough to do at once
        shared = (logits.transpose(0, 1) @ targets.permute(1, 2, 0)).mean(dim=0).t()
        ctx.save_for_backward(logits, targets, own)
        ctx.temperature = temperature
        return own.mean(dim=1) - shared / temperature

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        logits, targets, own = ctx.saved_tensors
        scale = 1.0 / (logits.shape[1] * ctx.temperature)
        with island(logits.device.type), full_float32():
            moved = (logits / ctx.temperature).contiguous()
            moved.sub_(own[:, :, None]).exp_()  # the student's probabilities
            moved.mul_((gradient.sum(dim=0) * scale)[:, None, None])
            moved.view(len(moved), -1).addmm_(gradient.t(), targets.flatten(1), alpha=-scale)
        return moved, None, None


def paired_losses(student: Tensor, teacher: Tensor, temperature: float = 0.1) -> Tensor:
    """Cross-entropy row by row, as iBOT's of masked patches with the same patches of the teacher.

    Args:
        student: ``(…, K)`` logits.
        teacher: ``(…, K)`` probabilities, the same shape; every row sums to 1.
        temperature: the student's.

    Returns:
        ``(…)`` float32 (float64 stays float64).
    """
    with island(student.device.type), full_float32():
        logits, targets = _exact(student), _exact(teacher)
        shared = torch.einsum("...k,...k->...", targets, logits)
        return (logits / temperature).logsumexp(dim=-1) - shared / temperature


@torch.no_grad()
def teacher_probabilities(logits: Tensor, centre: Tensor, temperature: float) -> Tensor:
    """Centred and sharpened targets ``softmax((logits − centre) / temperature)``, without gradient.

    Args:
        logits: ``(…, K)``.
        centre: ``(K,)``, see :class:`poodle_lightning.nn.centering.Centre`.
        temperature: the teacher's.

    Returns:
        The same shape, float32 (float64 stays float64).
    """
    with island(logits.device.type):
        return (logits - _exact(centre)).div_(temperature).softmax(dim=-1)

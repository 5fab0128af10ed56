"""DoRA's training step in the published form: one frame, one mask and one pair of views at a time.

Both networks take one frame of all clips after the other, and the student one mask after the other; each of
these calls ends in the head, whose normalised last layer is made anew. The teacher returns the last block's
whole attention of every frame. Objects are followed, and masks made, frame by frame and object by object,
Sinkhorn-Knopp works on exponentials, and the loss goes through masks, frames and pairs of views, with the
teacher's softmax and the terms of the local crops again for every mask. Gradients are clipped and the teacher
moved parameter by parameter.

Written from the formulas (DoRA, Eq. 1 to 10) and from what the public code loops over
(shashankvkt/DoRA_ICLR24 ``main.py``, ``utils.py``). Networks and crops are the package's, and where it leaves
that code (see ``poodle_lightning/methods/dora.py``), so do the loops: both give the same numbers.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from poodle_lightning.methods.dora import DoRA
from poodle_lightning.nn.vit import ViT
from poodle_lightning.types import Features


@dataclass(frozen=True)
class Outputs:
    """Logits frame by frame.

    Args:
        teacher: T of ``(B, K)``.
        masked: k times T of ``(B, K)``, the student's of masked frames.
        small: T of ``(L·B, K)``, the student's of local crops.
    """

    teacher: list[Tensor]
    masked: list[list[Tensor]]
    small: list[Tensor]


class LoopForm:
    """The loss of a DoRA with the code's settings, in loops.

    Args:
        method: the networks, centre, temperatures and weights are its own.

    Raises:
        ValueError: the method is set to another variant than the public code's.
    """

    def __init__(self, method: DoRA) -> None:
        found = (method.crops.views, method.masks, method.mass, method.patches, method.tracking)
        if found != (1, "hard", "patch", "normalised", True) or not method.sinkhorn:
            raise ValueError("the published form is that of DoRA's default settings")
        self.method = method

    def __call__(self, large: Tensor, small: Tensor, shape: tuple[int, int], heads: Sequence[int]) -> Tensor:
        """The weighted sum of both terms.

        Args:
            large: ``(B·T, 3, h, w)`` global crops in [0, 1].
            small: ``(L, B·T, 3, h', w')`` local ones.
            shape: B and T.
            heads: the k heads drawn.
        """
        clips, crops = large.unflatten(0, shape), small.unflatten(1, shape)
        seen, logits = self.teach(clips)
        images = self.mask(clips, seen, list(heads))
        masked, local = self.study(images, crops)
        return self.loss(Outputs(logits, masked, local))

    @torch.no_grad()
    def teach(self, clips: Tensor) -> tuple[list[Features], list[Tensor]]:
        """What the teacher makes of the frames of ``(B, T, 3, h, w)``."""
        teacher = self.method.teacher
        assert isinstance(teacher.encoder, ViT)
        seen, logits = [], []
        for t in range(clips.shape[1]):
            seen.append(teacher.encoder.look(clips[:, t]))
            logits.append(teacher.head(seen[t].vector))
        return seen, logits

    @torch.no_grad()
    def mask(self, clips: Tensor, seen: list[Features], heads: list[int]) -> Tensor:
        """Normalised images with all but one object set to 0, ``(k, B, T, 3, h, w)``."""
        first, encoder = seen[0], self.method.student.encoder
        assert first.attention is not None
        rows = torch.stack([first.attention[:, head, 0, 1:] for head in heads], dim=1)
        found = torch.einsum("bkn,bnd->bkd", rows, side_by_side(first.queries))
        tokens = first.last.flatten(2).transpose(1, 2)
        tokens = tokens / tokens.norm(dim=-1, keepdim=True)
        plan = sinkhorn(tokens @ found.transpose(1, 2), self.method.epsilon, self.method.iterations)
        found = plan.transpose(1, 2) @ tokens
        images = clips.new_zeros((len(heads), *clips.shape), dtype=tokens.dtype)
        for t, here in enumerate(seen):
            frame, keys = (clips[:, t] - encoder.mean) / encoder.std, side_by_side(here.keys)
            for o in range(len(heads)):
                scores = found[:, o, None] @ keys.transpose(1, 2) * keys.shape[-1] ** -0.5
                track = scores.softmax(dim=-1)[:, 0]
                track = track / track.norm(dim=-1, keepdim=True)
                kept = (track > track.mean()).to(frame.dtype).unflatten(1, here.last.shape[-2:])
                large = F.interpolate(kept[:, None], size=frame.shape[-2:], mode="nearest")
                images[o, :, t] = frame * torch.cat([large, large, large], dim=1)
        return images

    def study(self, images: Tensor, crops: Tensor) -> tuple[list[list[Tensor]], list[Tensor]]:
        """The student's logits of masked frames, and of crops ``(L, B, T, 3, h', w')``."""
        student, frames = self.method.student, images.shape[2]
        assert isinstance(student.encoder, ViT)
        masked = []
        for one in images:
            features = [student.encoder.features(one[:, t]) for t in range(frames)]
            masked.append([student.head(each.vector) for each in features])
        return masked, [student.logits(crops[:, :, t].flatten(0, 1)) for t in range(frames)]

    def loss(self, outputs: Outputs) -> Tensor:
        """Cross-entropies over masks, frames and pairs; the centre takes the teacher's logits down."""
        method, frames = self.method, len(outputs.teacher)
        total = outputs.teacher[0].new_zeros(())
        for masked in outputs.masked:
            clip = outputs.teacher[0].new_zeros(())
            for t in range(frames):
                centred = (outputs.teacher[t] - method.centre.value) / method.temperature
                q = [centred.softmax(dim=-1)]
                small = outputs.small[t].split(len(q[0]))
                on_object = mean_of_pairs([masked[t]], q, method.student_temperature)
                on_crops = mean_of_pairs(small, q, method.student_temperature)
                clip = clip + method.object_weight * on_object + method.local_weight * on_crops
            total = total + clip / frames
        rows = torch.cat(outputs.teacher)
        method.centre.observe(rows.mean(dim=0), len(rows))
        return total / len(outputs.masked)


def side_by_side(heads: Tensor | None) -> Tensor:
    """Patches of ``(B, heads, 1 + n, d)`` with all heads' channels in a row, ``(B, n, heads · d)``."""
    assert heads is not None
    return torch.cat(list(heads[:, :, 1:].unbind(1)), dim=-1)


def sinkhorn(scores: Tensor, epsilon: float, iterations: int) -> Tensor:
    """The assignment ``(B, n, k)`` of patches to objects, each patch's sums to 1 (Eq. 4, times n)."""
    patches, objects = scores.shape[1:]
    scores = scores / epsilon
    plan = (scores - scores.amax(dim=(1, 2), keepdim=True)).exp()
    plan = plan / plan.sum(dim=(1, 2), keepdim=True)
    for _ in range(iterations):
        plan = plan / plan.sum(dim=1, keepdim=True) / objects
        plan = plan / plan.sum(dim=2, keepdim=True) / patches
    return plan * patches


def mean_of_pairs(
    student: Sequence[Tensor], teacher: Sequence[Tensor], temperature: float, others: bool = False
) -> Tensor:
    """Mean cross-entropy over the pairs of a teacher's and a student's view, one after the other.

    Args:
        student: V of ``(B, K)`` logits.
        teacher: U of ``(B, K)`` probabilities.
        temperature: the student's.
        others: leaves out the pairs of equal numbers, which saw the same view. (DINO)
    """
    total, pairs = student[0].new_zeros(()), 0
    for u, q in enumerate(teacher):
        for v, logits in enumerate(student):
            if others and u == v:
                continue
            total = total + (-q * F.log_softmax(logits / temperature, dim=-1)).sum(dim=-1).mean()
            pairs += 1
    return total / pairs


@torch.no_grad()
def clip_gradients(parameters: Iterable[nn.Parameter], limit: float) -> None:
    """Every gradient to a norm of at most ``limit``, one after the other; the host decides for each."""
    for parameter in parameters:
        if parameter.grad is not None:
            scale = limit / (parameter.grad.norm() + 1e-6)
            if scale < 1:
                parameter.grad.mul_(scale)


@torch.no_grad()
def follow(teacher: nn.Module, student: nn.Module, momentum: float) -> None:
    """The teacher's step, parameter by parameter."""
    for slow, fast in zip(teacher.parameters(), student.parameters(), strict=True):
        slow.mul_(momentum).add_((1 - momentum) * fast)

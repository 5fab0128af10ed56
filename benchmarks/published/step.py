"""One training step of PooDLe in the published formulation, on any device, with the flow given.

What differs from the package's step: the dense loss at the image's resolution, the projector behind the last
upsampling, subcrops drawn and cut in a loop, the moving average by an expression per parameter. Networks,
views, occlusion and optimiser are the package's, so that the two steps can be compared on the same weights.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from benchmarks.published.dense import published_loss
from benchmarks.published.subcrops import cut, draw
from poodle_lightning.augment.geometric import draw_views
from poodle_lightning.losses.regression import cosine_distance
from poodle_lightning.methods.poodle import PooDLe
from poodle_lightning.nn.optim import Schedule, build_optimizer
from poodle_lightning.ops.geometry import Affine, Flow, Size
from poodle_lightning.ops.occlusion import visible_ddflow
from poodle_lightning.ops.pairs import both_directions, direction_keys


class PublishedStep:
    """Steps of a method with ``commute=False``.

    Args:
        method: trained; must not commute its projector.
        batch: pairs per step, for the schedule.
        precision: of autocast; None is float32, as published.
    """

    def __init__(self, method: PooDLe, batch: int, precision: torch.dtype | None = None) -> None:
        if method.online.commute:
            raise ValueError("the published step needs PooDLe(commute=False)")
        self.method = method.train()
        self.precision = precision
        self.optimizer = build_optimizer(method.recipe, method, batch)
        self.schedule = Schedule.from_recipe(method.recipe, 1, batch)
        self.step = 0

    def __call__(self, frames: Tensor, flow: Tensor, key: Tensor) -> Tensor:
        """One optimiser step; the loss.

        Args:
            frames: ``(N, 2, 3, H, W)`` recoloured, in [0, 1].
            flow: ``(2N, 2, H, W)`` px, there then back.
            key: ``(N,)`` of the clips, on the host.
        """
        method = self.method
        kind = frames.device.type
        autocast: Any = (
            nullcontext() if self.precision is None else torch.autocast(kind, dtype=self.precision)
        )
        self.optimizer.zero_grad()
        with autocast:
            loss = self.loss(frames, flow, key)
        loss.backward()
        for group in self.optimizer.param_groups:
            group["lr"] = self.schedule.lr(self.step)
        self.optimizer.step()
        momentum = self.schedule.momentum(self.step)
        with torch.no_grad():
            for mine, theirs in zip(
                method.target.module.parameters(), method.online.parameters(), strict=True
            ):
                mine.data = mine.data * momentum + theirs.data * (1.0 - momentum)
        self.step += 1
        return loss.detach()

    def loss(self, frames: Tensor, flow: Tensor, key: Tensor) -> Tensor:
        """Dense and pooled loss with the method's weights."""
        method = self.method
        size: Size = (flow.shape[-2], flow.shape[-1])
        u, v = both_directions(frames)
        visible = visible_ddflow(Flow.from_pixels(flow), method.alpha1, method.alpha2)
        a, b = draw_views(method.view, u, v, direction_keys(key))
        assert method.dense_predictor is not None
        assert method.pooled_predictor is not None
        p = method.dense_predictor(method.online.dense(a.image))
        with torch.no_grad():
            z = method.target.module.dense(b.image)
        views = [_pixels(view.to_clean.inverse(), size) for view in (a, b)]
        dense = published_loss(p.float(), z.float(), views[0], views[1], flow, visible)
        crops = cut(u, v, draw(flow, method.subcrops), method.subcrops.size)
        q = method.pooled_predictor(method.online.pooled(crops[0]))
        with torch.no_grad():
            t = method.target.module.pooled(crops[1])
        return method.dense_weight * dense + method.pooled_weight * cosine_distance(q, t).mean()


def _pixels(where: Affine, size: Size) -> Tensor:
    """Clean image → view as ``(B, 2, 3)`` matrices of pixel coordinates."""
    height, width = size
    to_extent = torch.tensor(
        [[2.0 / width, 0, 1.0 / width - 1], [0, 2.0 / height, 1.0 / height - 1], [0, 0, 1]],
        dtype=torch.float64,
    ).to(where.matrix.device)
    back = torch.tensor(
        [[width / 2, 0, (width - 1) / 2], [0, height / 2, (height - 1) / 2], [0, 0, 1]], dtype=torch.float64
    ).to(where.matrix.device)
    return (back @ where.matrix.double() @ to_extent)[:, :2].float()

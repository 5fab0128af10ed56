"""DenseCL: Dense contrastive learning for self-supervised visual pre-training (Wang et al., CVPR 2021).

MoCo-v2 twice: once for whole images, once for the cells of the last feature map. The positive of a cell is
the key's cell whose backbone feature looks most like its own.

=====================  ==============================================================
in the paper           here
=====================  ==============================================================
L_q, L_r (Eqs. 1, 2)   ``losses``: "global", "dense"
F1, F2                 ``features``: the encoder's deepest maps
Θ1, Θ2                 ``grid``: behind ``dense_projector``
c_i (Eq. 3)            ``densest_match`` of F1 and F2
t_-                    ``self.dense_queue``: of each image the mean of its Θ
λ (Eq. 4)              ``loss_weight``
=====================  ==============================================================

Deviations: those of :class:`MoCo`. The code's optional start with λ = 0 for some iterations, which its
configurations do not use, is not here.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from poodle_lightning.augment.multicrop import MultiCrop
from poodle_lightning.losses.contrastive import densest_match, info_nce
from poodle_lightning.methods.moco import MoCo, MoCoNet
from poodle_lightning.nn.encoder import Encoder
from poodle_lightning.nn.optim import Recipe
from poodle_lightning.nn.queue import Queue
from poodle_lightning.types import Clip, Losses


class Projected(NamedTuple):
    """Of N images: ``vector (N, out)``, ``grid (N, out, h·w)``, ``features (N, channels, h, w)``."""

    vector: Tensor
    grid: Tensor
    features: Tensor


class DenseCLNet(MoCoNet):
    """Encoder, projector of the pooled vector, projector of the deepest map; no BatchNorm in either."""

    def __init__(self, encoder: Encoder, hidden: int, out: int) -> None:
        super().__init__(encoder, hidden, out)
        deepest = list(encoder.channels.values())[-1]
        self.dense_projector = nn.Sequential(
            nn.Conv2d(deepest, hidden, 1), nn.ReLU(inplace=True), nn.Conv2d(hidden, out, 1)
        )

    def forward(self, images: Tensor) -> Projected:
        """Both projections, and the features that are matched, of images ``(N, 3, h, w)``."""
        found = self.encoder(images)
        features = list(found.maps.values())[-1]
        grid = self.dense_projector(features).flatten(2)
        return Projected(self.projector(found.vector), grid, features)


class DenseCL(MoCo):
    """DenseCL.

    Args:
        encoder: default ResNet-50.
        hidden: width of the hidden layer of both projectors. (Paper: 2048)
        out: length of queries and keys. (Paper: 128)
        queue: how many keys wait in each of the two queues. (Paper: 65,536)
        temperature: τ of both losses. (Paper: 0.2)
        crops: the two views; MoCo-v2's.
        frames: see :class:`MoCo`.
        shuffle: see :class:`MoCo`.
        loss_weight: λ, of the dense loss; the global one has 1 − λ. (Paper: 0.5)
        recipe: optimiser and schedules; None: MoCo-v2's, which the paper has on ImageNet.

    Raises:
        UserError: see :class:`MoCo`.
    """

    online: DenseCLNet

    def __init__(
        self,
        encoder: Encoder | None = None,
        hidden: int = 2048,
        out: int = 128,
        queue: int = 65_536,
        temperature: float = 0.2,
        crops: MultiCrop | None = None,
        frames: Literal["frame", "pair"] = "frame",
        shuffle: bool = True,
        loss_weight: float = 0.5,
        recipe: Recipe | None = None,
    ) -> None:
        super().__init__(encoder, hidden, out, queue, temperature, crops, frames, shuffle, recipe)
        self.dense_queue = Queue(out, queue, seed=1)
        self.loss_weight = loss_weight

    def network(self, encoder: Encoder, hidden: int, out: int) -> DenseCLNet:
        """What is trained."""
        return DenseCLNet(encoder, hidden, out)

    def losses(self, clip: Clip) -> Losses:
        """Both contrasts (Eq. 4); the keys, and of each image the mean of its cells, then join the queues."""
        x_q, x_k = self.views(clip)
        q = self.online(x_q)
        k = Projected(*self.observe(self.target.module, x_k))
        terms = {
            "global": (1 - self.loss_weight)
            * info_nce(q.vector, k.vector, self.queue.rows, self.temperature),
            "dense": self.loss_weight * self.contrast_cells(q, k),
        }
        self.queue.enqueue(k.vector)
        exact = torch.promote_types(k.grid.dtype, torch.float32)
        self.dense_queue.enqueue(k.grid.mean(dim=2, dtype=exact))
        return terms

    def contrast_cells(self, q: Projected, k: Projected) -> Tensor:
        """The contrast of each cell with the key's cell that looks most like it (Eqs. 2 and 3)."""
        matches = densest_match(q.features, k.features)  # c_i: (N, h·w)
        positives = k.grid.gather(2, matches[:, None].expand_as(q.grid))
        queries, positives = (x.transpose(1, 2).flatten(0, 1) for x in (q.grid, positives))
        return info_nce(queries, positives, self.dense_queue.rows, self.temperature)

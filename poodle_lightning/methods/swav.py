"""SwAV: Unsupervised learning by contrasting cluster assignments (Caron et al., NeurIPS 2020).

Two large crops of an image and several small ones are compared with trained prototypes. Each large crop is
assigned to prototypes so that all of them get as many samples of the batch; every other crop is to predict
that assignment. On video every frame is an image.

=====================  ==============================================================
in the paper           here
=====================  ==============================================================
x_nt; V                ``crops.large``, ``crops.small``
f_θ; z                 ``self.online.encoder``, ``.projector``; ``z``
C                      ``self.online.prototypes``
q (Eqs. 3-5), ε        ``self.assign``, ``epsilon``
ℓ(z, q) (Eq. 2), τ     ``swapped_prediction``, ``temperature``
=====================  ==============================================================

Deviations: none in the loss. The queue is filled from the epoch before ``queue_epoch``, so that it is full of
embeddings when that begins (the code starts to fill it then, and uses it once full). LARS leaves biases and
normalisation layers alone (the code's LARC adapts and decays them too). Crops are plain bilinear, of the
training crop that the data brings. In evaluation mode the queue takes nothing.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize
from torch.optim import Optimizer

from poodle_lightning.augment.geometric import ResizedCrop
from poodle_lightning.augment.multicrop import Crops, MultiCrop, first_frames
from poodle_lightning.augment.photometric import Colour
from poodle_lightning.losses.clustering import swapped_prediction
from poodle_lightning.methods.base import Method
from poodle_lightning.methods.run_length import check_queue, frames_per_clip
from poodle_lightning.nn.encoder import Encoder
from poodle_lightning.nn.heads import MLP
from poodle_lightning.nn.online import Online
from poodle_lightning.nn.optim import Recipe
from poodle_lightning.nn.prototypes import Prototypes
from poodle_lightning.nn.queue import Queue
from poodle_lightning.nn.resnet import ResNet
from poodle_lightning.nn.vit import ViT
from poodle_lightning.ops.distributed import rank, world_size
from poodle_lightning.ops.geometry import island
from poodle_lightning.ops.sinkhorn import assign
from poodle_lightning.types import Clip, Look, Losses, UserError

RECIPE = Recipe(
    optimizer="lars",
    lr=0.6,
    min_lr=6e-4,
    weight_decay=1e-6,
    warmup_epochs=0.0,
    horizon_epochs=200.0,
    reference_batch=256,
)
"""The code's for batches of 256 and 200 epochs (facebookresearch/swav ``swav_200ep_bs256_pretrain.sh``)."""


class SwAVNet(Online):
    """Encoder, projector (linear, BatchNorm, ReLU, linear) and prototypes."""

    def __init__(self, encoder: Encoder, hidden: int, out: int, prototypes: int) -> None:
        super().__init__(encoder)
        self.projector = MLP(encoder.vector_dim, hidden, out)
        self.prototypes = Prototypes(out, prototypes)


class SwAV(Method):
    """SwAV.

    Args:
        encoder: default ResNet-50.
        hidden: width of the projector's hidden layer. (Paper: 2048)
        out: length of an embedding. (Paper: 128)
        prototypes: K. (Paper: 3000)
        temperature: τ of the predictions. (Paper: 0.1)
        epsilon: weight of the assignments' entropy. (Paper: 0.05)
        iterations: of Sinkhorn-Knopp. (Paper: 3)
        queue: earlier embeddings of each large crop that are assigned along with the batch's, for batches
            that are small beside K; 0: none. (Code: 3,840 for batches of 256, none for 4096)
        queue_epoch: epoch from which on they are. (Code: 15)
        freeze_steps: optimiser steps for which the prototypes stay as they are. (Code: 5,005, an epoch of
            ImageNet in batches of 256)
        crops: (Paper: 2 of 224 px, area 0.14–1, and 6 of 96 px, 0.05–0.14; SimCLR's colours)
        recipe: optimiser and schedules; None: the code's for batches of 256.

    Raises:
        UserError: there is only one crop, or a crop's side is no multiple of the encoder's patch, or a
            number is too small, or the queue would be of use before anything is in it; at the start of a
            fit: it holds more embeddings than an epoch brings.
    """

    online: SwAVNet
    target: None

    def __init__(
        self,
        encoder: Encoder | None = None,
        hidden: int = 2048,
        out: int = 128,
        prototypes: int = 3000,
        temperature: float = 0.1,
        epsilon: float = 0.05,
        iterations: int = 3,
        queue: int = 3840,
        queue_epoch: int = 15,
        freeze_steps: int = 5005,
        crops: MultiCrop | None = None,
        recipe: Recipe | None = None,
    ) -> None:
        super().__init__(recipe or RECIPE)
        if not (temperature > 0 and epsilon > 0) or min(prototypes, iterations) < 1 or queue < 0:
            raise UserError(
                f"SwAV: set temperature={temperature} and epsilon={epsilon} above 0, prototypes={prototypes} "
                f"and iterations={iterations} to at least 1, queue={queue} to 0 or more"
            )
        encoder = encoder or ResNet(50)
        self.online = SwAVNet(encoder, hidden, out, prototypes)
        self.temperature, self.epsilon, self.iterations = temperature, epsilon, iterations
        self.crops = crops or swav_crops()
        if self.crops.views + self.crops.locals < 2:
            raise UserError("SwAV compares crops of an image: raise crops.views or crops.locals")
        if isinstance(encoder, ViT):
            self.crops.check_patch(encoder.patch)
        if queue and queue_epoch < 1:
            raise UserError(
                "SwAV's queue is filled in the epoch before model.queue_epoch: set it to 1 or more"
            )
        sizes = [queue] * self.crops.views if queue else []
        self.queues = nn.ModuleList(Queue(out, size, seed) for seed, size in enumerate(sizes))
        self.queue_epoch = queue_epoch
        self.freeze_steps = freeze_steps

    def losses(self, clip: Clip) -> Losses:
        """The swapped prediction (Eq. 1, section 3.2), of all crops; embeddings then join the queues."""
        crops = self.crops(clip)
        z = self.embeddings(crops)  # (V + L, N, D)
        scores = self.online.prototypes(z)  # (V + L, N, K)
        views = len(crops.large)
        q = self.assign(scores[:views].detach())  # (V, N, K)
        if self.current_epoch >= self.queue_epoch - 1:
            for queue, rows in zip(self.waiting(), z.detach(), strict=False):
                queue.enqueue(rows)
        return {"swap": swapped_prediction(scores, q, self.temperature)}

    def embeddings(self, crops: Crops) -> Tensor:
        """Of all crops, length 1, large before small: one pass per resolution, the projector once."""
        views = [crops.large] if crops.small is None else [crops.large, crops.small]
        vectors = torch.cat([self.online.encoder(view.flatten(0, 1)).vector for view in views])
        z: Tensor = self.online.projector(vectors).unflatten(0, (-1, crops.large.shape[1]))
        with island(z.device.type):
            return normalize(z.to(torch.promote_types(z.dtype, torch.float32)), dim=-1)

    @torch.no_grad()
    def assign(self, scores: Tensor) -> Tensor:
        """The targets ``(V, N, K)`` of the large crops, of all processes' samples and the queues'.

        Queues are equal in all processes, so each puts in a share of their rows.

        Args:
            scores: ``(V, N, K)``.
        """
        count = scores.shape[1]
        if len(self.queues) and self.current_epoch >= self.queue_epoch:
            shares = [queue.rows[rank() :: world_size()] for queue in self.waiting()]
            earlier: Tensor = self.online.prototypes(torch.stack(shares))
            scores = torch.cat([earlier, scores], dim=1)
        return assign(scores, self.epsilon, self.iterations)[:, -count:]

    def waiting(self) -> list[Queue]:
        """The queues, one per large crop; none where there are none."""
        return [queue for queue in self.queues if isinstance(queue, Queue)]

    # ---- hooks
    def on_fit_start(self) -> None:
        """Compares the queues with what an epoch brings."""
        for queue in self.waiting()[:1]:
            check_queue(self.trainer, len(queue.rows), frames_per_clip(self.trainer))

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Takes the prototypes' gradients away while they are frozen, so that they do not decay either."""
        super().on_before_optimizer_step(optimizer)
        if self.global_step < self.freeze_steps:
            self.online.prototypes.weight.grad = None

    def after_step(self) -> None:
        """Brings the prototypes back to length 1."""
        self.online.prototypes.renormalise()

    @torch.no_grad()
    def look(self, clip: Clip) -> Look:
        """The crops of each clip's first frame, as training draws them."""
        crops, count = self.crops(clip), clip.times.shape[1]
        small = None if crops.small is None else first_frames(crops.small, count)
        return Look(clip.unit(), large=first_frames(crops.large, count), small=small)


def swav_crops() -> MultiCrop:
    """SwAV's crops (facebookresearch/swav ``multicropdataset.py`` and scripts)."""
    large = ResizedCrop((224, 224), (0.14, 1.0), fit="redraw")
    small = ResizedCrop((96, 96), (0.05, 0.14), fit="redraw")
    return MultiCrop(large, small, locals=6, colours=(Colour(),), local_colour=Colour(), clip_wide=False)

"""MoCLR: the contrastive baseline of VITO (Tian et al., ICCV 2021; Parthasarathy et al., 2022, section 3.1).

Each view's projection is to find, among the targets of all clips of the batch, that of every other view of
its own clip. Targets come from a slowly moving copy, as in BYOL; there is no predictor and no queue. The
views of a clip come from one frame, or each from a frame of its own.

=====================  ==============================================================
in the paper           here
=====================  ==============================================================
v^1 … v^V, A_1, A_2    ``self.views``; ``crop`` with ``colour_a``, ``colour_b``
f_θ, g_θ; f_ξ, g_ξ     ``self.online``; ``self.target``: encoder and projector
z_θ; z_ξ               ``z``; ``t``, of all processes
L = Σ_{i≠j} L^ij, τ    ``across_views``, ``temperature``
{z^n}                  ``negatives``
=====================  ==============================================================

Deviations: crops are plain bilinear (the original resizes bicubically); colours and heads are those of
:mod:`poodle_lightning.methods.byol`, with its deviations. Not told in the paper and so ours: as in BYOL's
code, what does not fit of a crop is cut, and residual blocks begin as their shortcuts; the sizes of the
projector and the target's momentum are BYOL's, whose optimisation the paper adopts; negatives are all views
of the other clips; which frame becomes which view is drawn for every clip, because the frames of a clip come
in the order of time. Each view is a batch of its own to BatchNorm, as in BYOL.
"""

from __future__ import annotations

from typing import Literal

import torch
from timm.layers import DropPath
from torch import Tensor

from poodle_lightning.augment.geometric import ResizedCrop
from poodle_lightning.augment.photometric import Colour
from poodle_lightning.losses.contrastive import across_views
from poodle_lightning.methods.base import Method
from poodle_lightning.nn.ema import EMA
from poodle_lightning.nn.encoder import Encoder
from poodle_lightning.nn.heads import MLP
from poodle_lightning.nn.online import Online
from poodle_lightning.nn.optim import Recipe
from poodle_lightning.nn.resnet import ResNet
from poodle_lightning.ops.distributed import gather, rank, world_size
from poodle_lightning.ops.geometry import Affine, pull_boxes
from poodle_lightning.ops.random import fold, permutation
from poodle_lightning.types import Clip, Look, Losses, UserError

RECIPE = Recipe(
    optimizer="lars",
    lr=0.3,
    weight_decay=1e-6,
    warmup_epochs=10.0,
    horizon_epochs=300.0,
    scale_lr="linear",
    reference_batch=256,
    ema_start=0.99,
)
"""The paper's for 300 epochs at batches of 4096 (appendix A.2); warm-up and momentum are BYOL's."""


class MoCLRNet(Online):
    """Everything the target copies: encoder and projector."""

    def __init__(self, encoder: Encoder, hidden: int, out: int) -> None:
        super().__init__(encoder)
        self.projector = MLP(encoder.vector_dim, hidden, out)

    def pooled(self, images: Tensor) -> Tensor:
        """Projected vector ``(N, out)`` of images ``(N, 3, h, w)``."""
        projected: Tensor = self.projector(self.encoder(images).vector)
        return projected


class MoCLR(Method):
    """MoCLR.

    Args:
        encoder: default ResNet-50 with ``zero_init_residual``.
        views: of each clip. Clips have one frame, of which all views are made, or a frame for each view.
            (Paper: 2 or 3)
        hidden: width of the projector's hidden layer. (BYOL: 4096)
        out: length of the projection. (BYOL: 256)
        temperature: τ. (Paper: 0.1)
        negatives: "all" views of the other clips, or only that view of theirs in which the "partner" is.
        crop: of every view. (Paper: 224 px, area 0.4–1 for video, 0.08–1 for ImageNet; BYOL's code cuts a
            crop to the frame. If it were drawn again, none would have more than 0.75 of a 16:9 frame, and
            with areas from 0.6 on half of all would be the one crop in the middle.)
        colour_a: recipe of the first and the third view. (Paper A_1: jitter .4 .4 .2 .1, blur always)
        colour_b: recipe of the second view. (Paper A_2: blur 0.1, solarise 0.2)
        recipe: optimiser and schedules; None: the paper's for 300 epochs.

    Raises:
        UserError: there are fewer than two views.
    """

    online: MoCLRNet
    target: EMA[MoCLRNet]

    def __init__(
        self,
        encoder: Encoder | None = None,
        views: int = 2,
        hidden: int = 4096,
        out: int = 256,
        temperature: float = 0.1,
        negatives: Literal["all", "partner"] = "all",
        crop: ResizedCrop | None = None,
        colour_a: Colour | None = None,
        colour_b: Colour | None = None,
        recipe: Recipe | None = None,
    ) -> None:
        if views < 2:
            raise UserError(
                f"{type(self).__name__} compares views of a clip: set model.views=2 or 3, not {views}"
            )
        super().__init__(recipe or RECIPE)
        self._build(MoCLRNet(encoder or ResNet(50, zero_init_residual=True), hidden, out))
        self.count = views
        self.temperature = temperature
        self.negatives: Literal["all", "partner"] = negatives
        self.crop = crop or ResizedCrop((224, 224), (0.4, 1.0))
        self.colour_a = colour_a or Colour(0.4, 0.4, 0.2, 0.1, blur=1.0)
        self.colour_b = colour_b or Colour(0.4, 0.4, 0.2, 0.1, blur=0.1, solarize=0.2)

    def _build(self, online: MoCLRNet) -> None:
        """The network and its copy, which drops no path: a target is to be steady."""
        self.online = online
        self.target = EMA(online)
        for layer in self.target.modules():
            if isinstance(layer, DropPath):
                layer.drop_prob = 0.0

    def losses(self, clip: Clip) -> Losses:
        """The contrast of every view with every other (paper Eq. 1), summed over ordered pairs.

        Raises:
            UserError: a training batch has one clip in all processes; or see :meth:`views`.
        """
        if self.training and len(clip) * world_size() < 2:
            raise UserError(
                f"{type(self).__name__} compares a clip with the others of its batch: set data.batch_size to "
                "2 or more"
            )
        views = self.views(clip)
        z = torch.stack([self.online.pooled(view) for view in views])
        with torch.no_grad():
            t = gather(torch.stack([self.target.module.pooled(view) for view in views]), dim=1)
        start = rank() * len(clip)
        return {"contrast": across_views(z, t, start, self.temperature, self.negatives)}

    @torch.no_grad()
    def views(self, clip: Clip) -> Tensor:
        """The views ``(V, B, 3, h, w)``, each of a frame drawn for it.

        Raises:
            UserError: the clips have neither one frame nor one for each view.
        """
        batch, frames = clip.times.shape
        if frames not in (1, self.count):
            raise UserError(
                f"{type(self).__name__} makes {self.count} views of clips of 1 or {self.count} frames, not "
                f"{frames}: set model.views={frames}, or data.sampler.frames={self.count}"
            )
        clean = clip.unit().flatten(0, 1)
        keys = torch.stack([fold(clip.key, "view", v) for v in range(self.count)], dim=1)
        place = permutation(fold(clip.key, "order"), self.count)  # (B, V) where each view is cut
        rows = torch.arange(batch)[:, None]
        aspect = None if clip.aspect is None else clip.aspect.repeat_interleave(self.count)
        size = (clean.shape[-2], clean.shape[-1])
        boxes = self.crop.draw(fold(keys, "crop").flatten(), size, aspect).matrix.unflatten(0, (batch, -1))
        cut = Affine(boxes[rows, place.argsort(dim=1)].flatten(0, 1)).to(clean.device)
        pixels = pull_boxes(clean, cut, self.crop.size)[0].unflatten(0, (batch, self.count))
        order = place.to(clean.device, non_blocking=True)
        views = pixels[rows.to(clean.device, non_blocking=True), order].transpose(0, 1).contiguous()
        for first, colour in ((0, self.colour_a), (1, self.colour_b)):
            part, drawn = views[first::2], fold(keys, "colour")[:, first::2].t().flatten()
            views[first::2] = colour(part.flatten(0, 1), drawn).view_as(part)
        return views

    @torch.no_grad()
    def look(self, clip: Clip) -> Look:
        """The views of each clip, as training draws them."""
        return Look(clip.unit(), large=self.views(clip).transpose(0, 1))

"""BYOL: Bootstrap your own latent (Grill et al., NeurIPS 2020), on single frames or on a pair's two frames.

An online network predicts, from one view, what a slowly moving copy of itself makes of another view.
There are no negatives. On video the second view can come from the pair's other frame.

=====================  ==============================================================
in the paper           here
=====================  ==============================================================
v, v'                  ``self.crop`` and ``self.colour_a``, ``self.colour_b``
f_θ, g_θ; f_ξ, g_ξ     ``self.online``, ``self.target``
q_θ                    ``self.predictor``
L + L̃                  both frames (or views) take both parts
=====================  ==============================================================

Deviations: none in the loss. Crops are plain bilinear (the original resizes bicubically); what does not fit
of them is cut, as in google-deepmind/deepmind-research ``byol/utils/dataset.py``. Colours are jittered as
torchvision does: brightness is a factor (the original adds an offset), contrast turns about the mean grey
(about each channel's mean), saturation about a pixel's grey (in HSV). The last layer of a head has a bias
(none in the original).
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from poodle_lightning.augment.geometric import ResizedCrop
from poodle_lightning.augment.photometric import Colour
from poodle_lightning.losses.regression import cosine_distance
from poodle_lightning.methods.base import Method
from poodle_lightning.nn.ema import EMA
from poodle_lightning.nn.encoder import Encoder
from poodle_lightning.nn.heads import MLP
from poodle_lightning.nn.online import Online
from poodle_lightning.nn.optim import Recipe
from poodle_lightning.nn.resnet import ResNet
from poodle_lightning.ops.pairs import both_directions
from poodle_lightning.ops.random import fold
from poodle_lightning.types import Clip, Look, Losses, View


class BYOLNet(Online):
    """Everything the target copies: encoder and projector."""

    def __init__(self, encoder: Encoder, hidden: int, out: int) -> None:
        super().__init__(encoder)
        self.projector = MLP(encoder.vector_dim, hidden, out)

    def pooled(self, images: Tensor) -> Tensor:
        """Projected vector ``(B, out)`` of images ``(B, 3, h, w)``."""
        projected: Tensor = self.projector(self.encoder(images).vector)
        return projected


class BYOL(Method):
    """BYOL.

    Args:
        encoder: default ResNet-50 with ``zero_init_residual``. (Original: Haiku's ``BlockV1``, which starts
            so where it is a bottleneck)
        frames: "pair" takes the two views from the two frames; "frame" both from each single frame.
        hidden: width of the projector's and predictor's hidden layer. (Paper: 4096)
        out: width of the projection. (Paper: 256)
        crop: random resized crop of both views. (Paper: 224 px, area 0.08–1, flip 0.5)
        colour_a: recipe of the first view. (Paper T: jitter .4 .4 .2 .1, blur always)
        colour_b: recipe of the second view. (Paper T': blur 0.1, solarise 0.2)
        recipe: optimiser and schedules. (Paper: LARS; ``configs/method/byol_r50.yaml``)
    """

    online: BYOLNet
    target: EMA[BYOLNet]

    def __init__(
        self,
        encoder: Encoder | None = None,
        frames: Literal["pair", "frame"] = "pair",
        hidden: int = 4096,
        out: int = 256,
        crop: ResizedCrop | None = None,
        colour_a: Colour | None = None,
        colour_b: Colour | None = None,
        recipe: Recipe | None = None,
    ) -> None:
        super().__init__(recipe)
        self.online = BYOLNet(encoder or ResNet(50, zero_init_residual=True), hidden, out)
        self.target = EMA(self.online)
        self.predictor = MLP(out, hidden, out)
        self.frames = frames
        self.crop = crop or ResizedCrop()
        self.colour_a = colour_a or Colour(0.4, 0.4, 0.2, 0.1, blur=1.0)
        self.colour_b = colour_b or Colour(0.4, 0.4, 0.2, 0.1, blur=0.1, solarize=0.2)

    def losses(self, clip: Clip) -> Losses:
        """The regression loss, both ways (paper Eq. 2)."""
        a, b = self.views(clip)
        return {"pooled": self.regress(a.image, b.image) + self.regress(b.image, a.image)}

    def regress(self, one: Tensor, other: Tensor) -> Tensor:
        """From the online view of each image, the target's projection of its other view."""
        q = self.predictor(self.online.pooled(one))
        with torch.no_grad():
            t = self.target.module.pooled(other)
        return cosine_distance(q, t).mean()

    @torch.no_grad()
    def views(self, clip: Clip) -> tuple[View, View]:
        """The two views: N rows for pairs, 2N for single frames."""
        clean = clip.unit()
        u, v = (clean[:, 0], clean[:, 1]) if self.frames == "pair" else (both_directions(clean)[0],) * 2
        first, second = fold(clip.key, "frame", 0), fold(clip.key, "frame", 1)
        keys = first if self.frames == "pair" else torch.cat([first, second])
        a = self.crop(u, fold(keys, "first crop"))
        b = self.crop(v, fold(keys, "second crop"))
        return (
            View(self.colour_a(a.image, fold(keys, "first colour")), a.to_clean),
            View(self.colour_b(b.image, fold(keys, "second colour")), b.to_clean),
        )

    @torch.no_grad()
    def look(self, clip: Clip) -> Look:
        """The two views of a batch, as training draws them."""
        return Look(clip.unit(), views=self.views(clip))

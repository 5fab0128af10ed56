"""FlowE: self-supervised representation learning from flow equivariance (Xiong et al., ICCV 2021).

One dense loss: the features of a frame, moved along the optical flow, are the features of the next frame.
The encoder is dilated to stride 8, so that its map is dense without a decoder. PooDLe's baseline.

=====================  ==============================================================
in the paper           here
=====================  ==============================================================
I_1, I_2               ``clean`` (N, 2, 3, H, W)
M_1→2                  ``flow``, both directions, 2N rows
A_1, A_2               ``self.view`` → ``View.to_clean``
p̃_1                    ``predictor(online.dense(A_1 u))``, read through ``A_1⁻¹``
p̃_2, T = A_1⁻¹∘M∘A_2   ``target.dense(A_2 v)``, read through ``to_clean⁻¹ @ flow``
=====================  ==============================================================

Deviations, each with its switch:

* Defaults are the settings of PooDLe's re-implementation (its authors' code); the original paper's are in
  ``configs/experiment/flowe_bdd100k_paper.yaml``.
* The original's occlusion threshold is not given; the default is the re-implementation's end-point error of
  10/√8 = 3.54 px (``threshold``).
* Maps are un-augmented, then warped, and each is read once; ``warp_order="code"`` is the public code's order.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from poodle_lightning.augment.geometric import AffineFlip, draw_views
from poodle_lightning.augment.photometric import Colour, recolour
from poodle_lightning.flow.dis import DIS
from poodle_lightning.losses.regression import warped_distance
from poodle_lightning.methods.base import Method
from poodle_lightning.nn.ema import EMA
from poodle_lightning.nn.encoder import Encoder
from poodle_lightning.nn.heads import ConvMLP
from poodle_lightning.nn.online import Online
from poodle_lightning.nn.optim import Recipe
from poodle_lightning.nn.resnet import ResNet
from poodle_lightning.ops.geometry import WarpOrder, on_loss_grid, warp_into_view
from poodle_lightning.ops.occlusion import visible_endpoint
from poodle_lightning.ops.pairs import both_directions, direction_keys
from poodle_lightning.types import Clip, FlowEstimator, Look, Losses


class FlowENet(Online):
    """Everything the target copies: encoder and projector."""

    def __init__(self, encoder: Encoder, hidden: int, out: int, recompute: bool = False) -> None:
        super().__init__(encoder)
        self.projector = ConvMLP(encoder.vector_dim, hidden, out, bias=False, recompute=recompute)

    def dense(self, images: Tensor) -> Tensor:
        """Projected map ``(B, out, h, w)`` of images ``(B, 3, H, W)``."""
        projected: Tensor = self.projector(self.encoder(images).last)
        return projected


class FlowE(Method):
    """FlowE.

    Args:
        encoder: default ResNet-50 dilated to stride 8.
        flow: estimator of the motion between the two frames.
        hidden: width of the projector's and predictor's hidden layer. (Paper: BYOL's 4096)
        out: width of the projection. (Paper: 256)
        colour: colour recipe, drawn once per frame. (Paper: SimCLR's)
        view: affine and flip, drawn per image and branch. (Paper: ±30°, 0.5–2.0; re-implementation: PooDLe's)
        threshold: largest forward-backward error of a visible point, px of the crop's resolution.
        loss_stride: the loss is taken on every n-th pixel; 1 is the paper's grid.
        warp_order: "paper" un-augments, then warps; "code" is the public code's order.
        recompute: the heads' hidden layers are computed again in the backward pass, not kept, and so are the
            blocks of the default encoder; another has a switch of its own.
        recipe: optimiser and schedules.
    """

    online: FlowENet
    target: EMA[FlowENet]

    def __init__(
        self,
        encoder: Encoder | None = None,
        flow: FlowEstimator | None = None,
        hidden: int = 4096,
        out: int = 256,
        colour: Colour | None = None,
        view: AffineFlip | Literal["default"] | None = "default",
        threshold: float = 3.54,
        loss_stride: int = 1,
        warp_order: WarpOrder = "paper",
        recompute: bool = False,
        recipe: Recipe | None = None,
    ) -> None:
        super().__init__(recipe)
        encoder = encoder or ResNet(50, output_stride=8, recompute=recompute)
        self.online = FlowENet(encoder, hidden, out, recompute)
        self.target = EMA(self.online)
        self.predictor = ConvMLP(out, hidden, out, bias=False, recompute=recompute)
        self.flow = flow or DIS()
        self.colour = colour or Colour()
        self.view = AffineFlip() if view == "default" else view
        self.threshold = threshold
        self.loss_stride = loss_stride
        self.warp_order = warp_order

    def losses(self, clip: Clip) -> Losses:
        """The dense term, symmetric in the two frames (paper Eq. 3)."""
        clean = clip.unit()
        flow = self.flow(clip, clean)
        u, v = both_directions(recolour(self.colour, clean, clip.key))
        a, b = draw_views(self.view, u, v, direction_keys(clip.key))
        p = self.predictor(self.online.dense(a.image))
        with torch.no_grad():
            z = self.target.module.dense(b.image)
        size, motion, visible = on_loss_grid(flow, visible_endpoint(flow, self.threshold), self.loss_stride)
        to_z = warp_into_view(b.to_clean, motion, self.warp_order)
        return {"dense": warped_distance(p, a.to_clean.inverse(), z, to_z, size, visible)}

    @torch.no_grad()
    def look(self, clip: Clip) -> Look:
        """Flow, visibility and views of a batch, as training draws them."""
        clean = clip.unit()
        flow = self.flow(clip, clean)
        u, v = both_directions(recolour(self.colour, clean, clip.key))
        views = draw_views(self.view, u, v, direction_keys(clip.key))
        return Look(clean, flow, visible_endpoint(flow, self.threshold), views)

    @torch.no_grad()
    def embed(self, images: Tensor) -> dict[str, Tensor]:
        """Encoder vectors, and projections at every cell of the map."""
        projected = self.online.dense(images).float().permute(0, 2, 3, 1).flatten(0, 2)
        return super().embed(images) | {"dense": projected}

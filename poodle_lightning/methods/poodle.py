"""PooDLe: Pooled and dense self-supervised learning from naturalistic videos (Wang et al., ICLR 2025).

Two frames of a video, a fraction of a second apart, and the optical flow between them. A dense loss asks
that features move with the flow; a pooled loss asks that flow-matched subcrops, small enough to show about
one thing, agree as a whole. A spatial decoder (SDM) joins them: the pooled loss trains the encoder's top,
the dense loss the decoder's high-resolution output.

=====================  ==============================================================
in the paper           here
=====================  ==============================================================
I_t, I_t+Δt            ``clean`` (N, 2, 3, H, W)
F: t → t+Δt            ``flow``, both directions, 2N rows
A_1, A_2               ``self.view`` → ``View.to_clean``
f_θ, f_ξ               ``self.online``, ``self.target``
g, q (dense)           ``online.dense_projector``, ``dense_predictor``
g, q (pooled)          ``online.pooled_projector``, ``pooled_predictor``
M                      ``seen_a & seen_b & visible``
K subcrops             ``flow_guided_subcrops``
=====================  ==============================================================

Deviations, each with its switch:

* Features are un-augmented, then warped, as the paper's App. A says; the authors' code composes the other
  way round (``warp_order="code"``).
* Both feature maps are read once, through one composed map, in place of upsampling and then warping.
* The projector's first convolution runs before the decoder's last upsampling: the same values for a quarter
  of the network's multiply-adds less (``commute=False`` takes the order of the text).
* The flow net's BatchNorm stays in evaluation mode; the authors' ``train()`` puts it in training mode.
* The target moves after the optimiser's step, once per step, not at the start of each forward pass.
* Subcrop boxes are not rounded to whole pixels.
* Dense views are black outside the crop, before normalisation; that part is outside the loss
  (``AffineFlip(outside="border")`` repeats the border instead).

Both directions are one batch, all subcrops another: to merge the two would change BatchNorm's statistics.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from poodle_lightning.augment.geometric import AffineFlip, draw_views
from poodle_lightning.augment.photometric import Colour, recolour
from poodle_lightning.flow.dis import DIS
from poodle_lightning.losses.regression import cosine_distance, warped_distance
from poodle_lightning.methods.base import Method
from poodle_lightning.nn.ema import EMA
from poodle_lightning.nn.encoder import Encoder
from poodle_lightning.nn.heads import MLP, ConvMLP
from poodle_lightning.nn.online import Online
from poodle_lightning.nn.optim import Recipe
from poodle_lightning.nn.resnet import ResNet
from poodle_lightning.nn.sdm import SDM
from poodle_lightning.ops.crops import SubcropPairs, SubcropRecipe, flow_guided_subcrops
from poodle_lightning.ops.geometry import Flow, Size, WarpOrder, on_loss_grid, pull_boxes, warp_into_view
from poodle_lightning.ops.occlusion import visible_ddflow
from poodle_lightning.ops.pairs import both_directions, direction_keys
from poodle_lightning.ops.random import fold
from poodle_lightning.types import Clip, FlowEstimator, Look, Losses


class PooDLeNet(Online):
    """Everything the target copies: encoder, decoder, both projectors (None: the method has none)."""

    def __init__(
        self,
        encoder: Encoder,
        decoder: SDM | None,
        dense_projector: ConvMLP | None,
        pooled_projector: MLP | None,
        commute: bool = True,
    ) -> None:
        super().__init__(encoder, decoder)
        self.dense_projector = dense_projector
        self.pooled_projector = pooled_projector
        self.commute = commute

    def dense(self, images: Tensor) -> Tensor:
        """Projected map ``(B, out, h, w)`` of images ``(B, 3, H, W)``."""
        features, decoder, projector = self.encoder(images), self.decoder, self.dense_projector
        assert projector is not None
        if self.commute and type(decoder) is SDM and isinstance(projector, ConvMLP):
            return decoder(features, projector).last
        return projector(features.last if decoder is None else decoder(features).last)

    def pooled(self, images: Tensor) -> Tensor:
        """Projected vector ``(B, out)`` of images ``(B, 3, h, w)``."""
        assert self.pooled_projector is not None
        return self.pooled_projector(self.encoder(images).vector)


class PooDLe(Method):
    """PooDLe, with a switch for every row of its ablation table (Table 4).

    Args:
        encoder: default ResNet-50 of stride 32; a dilated one for the rows without a decoder.
        decoder: the SDM (``top_down`` and ``lateral`` are its switches); None for the rows without.
        flow: estimator of the motion between the two frames.
        dense_weight: of the dense loss; 0 leaves it and its heads out.
        pooled_weight: of the pooled loss; 0 leaves it and its heads out. (Paper: equal weight; code: 0.5.)
        hidden: width of the projectors' and predictors' hidden layer. (Code: 4096)
        out: width of the projection. (Code: 256)
        colour: colour recipe, drawn once per frame. (Code: SimCLR; paper: "following BYOL")
        view: affine and flip of the dense branch, drawn per image and branch. None for the ablation recipe.
        subcrops: number, area, size, jitter, grid or uniform centres. (Code: K = 6, 192 px, 5–30 %, 10 %)
        alpha1: relative occlusion threshold. (Code: 0.1; the paper's number is lost)
        alpha2: absolute occlusion threshold, px² of the crop's resolution. (Code: 0.5)
        loss_stride: the dense loss is taken on every n-th pixel; 1 is the paper's grid.
        warp_order: "paper" un-augments, then warps; "code" is the authors' order.
        commute: the dense projector's first convolution runs before the SDM's last upsampling. Exact; what is
            exported and evaluated is the SDM's own map either way.
        recompute: the dense heads' hidden layers are computed again in the backward pass, not kept, and so
            are the blocks of the default encoder and decoder; others have switches of their own.
        recipe: optimiser and schedules.
    """

    online: PooDLeNet
    target: EMA[PooDLeNet]

    def __init__(
        self,
        encoder: Encoder | None = None,
        decoder: SDM | Literal["default"] | None = "default",
        flow: FlowEstimator | None = None,
        dense_weight: float = 0.5,
        pooled_weight: float = 0.5,
        hidden: int = 4096,
        out: int = 256,
        colour: Colour | None = None,
        view: AffineFlip | Literal["default"] | None = "default",
        subcrops: SubcropRecipe | None = None,
        alpha1: float = 0.1,
        alpha2: float = 0.5,
        loss_stride: int = 1,
        warp_order: WarpOrder = "paper",
        commute: bool = True,
        recompute: bool = False,
        recipe: Recipe | None = None,
    ) -> None:
        super().__init__(recipe)
        if dense_weight <= 0 and pooled_weight <= 0:
            raise ValueError("PooDLe needs dense_weight or pooled_weight above 0")
        dense, pooled = dense_weight > 0, pooled_weight > 0
        encoder = encoder or ResNet(50, recompute=recompute)
        if not dense and isinstance(decoder, SDM):
            raise ValueError("PooDLe: without a dense loss nothing trains the decoder; set decoder to null")
        if decoder == "default":
            decoder = SDM(encoder.channels, recompute=recompute) if dense else None
        top = encoder.vector_dim
        width = top if decoder is None else decoder.dims
        projector = ConvMLP(width, hidden, out, recompute=recompute) if dense else None
        self.online = PooDLeNet(
            encoder, decoder, projector, MLP(top, hidden, out) if pooled else None, commute
        )
        self.target = EMA(self.online)
        self.dense_predictor = ConvMLP(out, hidden, out, recompute=recompute) if dense else None
        self.pooled_predictor = MLP(out, hidden, out) if pooled else None
        self.flow = flow or DIS()
        self.dense_weight, self.pooled_weight = dense_weight, pooled_weight
        self.colour = colour or Colour()
        self.view = AffineFlip() if view == "default" else view
        self.subcrops = subcrops or SubcropRecipe()
        self.alpha1, self.alpha2 = alpha1, alpha2
        self.loss_stride = loss_stride
        self.warp_order = warp_order

    def losses(self, clip: Clip) -> Losses:
        """The dense and the pooled term, both symmetric in the two frames (paper §3)."""
        clean = clip.unit()  # I_t, I_t+Δt in [0, 1]          (N, 2, 3, H, W)
        flow = self.flow(clip, clean)  # x → y, then y → x, frozen, float32        (2N)
        u, v = both_directions(recolour(self.colour, clean, clip.key))  # one draw per frame, used twice
        terms = {}
        if self.dense_weight > 0:
            terms["dense"] = self.dense_weight * self.dense(u, v, flow, clip.key)
        if self.pooled_weight > 0:
            terms["pooled"] = self.pooled_weight * self.pooled(u, v, flow, clip.key)
        return terms

    def dense(self, u: Tensor, v: Tensor, flow: Flow, key: Tensor) -> Tensor:
        """Features at x in one frame against features at x + F(x) in the other, where both are visible."""
        a, b = draw_views(self.view, u, v, direction_keys(key))
        assert self.dense_predictor is not None
        p = self.dense_predictor(self.online.dense(a.image))
        with torch.no_grad():
            z = self.target.module.dense(b.image)
        visible = visible_ddflow(flow, self.alpha1, self.alpha2)
        size, motion, visible = on_loss_grid(flow, visible, self.loss_stride)
        to_z = warp_into_view(b.to_clean, motion, self.warp_order)
        return warped_distance(p, a.to_clean.inverse(), z, to_z, size, visible)

    def pooled(self, u: Tensor, v: Tensor, flow: Flow, key: Tensor) -> Tensor:
        """BYOL on flow-matched subcrops: each predicts its partner in the other frame."""
        crop_u, crop_v = self.cut(u, v, self.pairs(flow, key))
        assert self.pooled_predictor is not None
        q = self.pooled_predictor(self.online.pooled(crop_u))
        with torch.no_grad():
            t = self.target.module.pooled(crop_v)
        return cosine_distance(q, t).mean()

    # ---- the pieces
    def pairs(self, flow: Flow, key: Tensor) -> SubcropPairs:
        """K flow-informed subcrop pairs per directed image."""
        return flow_guided_subcrops(flow, fold(direction_keys(key), "subcrops"), self.subcrops)

    @torch.no_grad()
    def cut(self, u: Tensor, v: Tensor, pairs: SubcropPairs) -> tuple[Tensor, Tensor]:
        """The crops, ``(2N·K, 3, h, w)`` each, resized bilinearly; the encoder's mean outside the frame."""
        size: Size = self.subcrops.size
        online, seen = pull_boxes(u, pairs.online, size)
        here, _ = pull_boxes(u, pairs.target, size)
        there, _ = pull_boxes(v, pairs.target, size)
        # what lies outside is 0 to the network: the encoder takes this mean away
        online = torch.where(seen[:, None], online, self.online.encoder.mean.to(online))
        return online, torch.where(pairs.same[:, None, None, None], here, there)

    @torch.no_grad()
    def look(self, clip: Clip) -> Look:
        """Flow, visibility, views and subcrops of a batch, as training draws them."""
        clean = clip.unit()
        flow = self.flow(clip, clean)
        u, v = both_directions(recolour(self.colour, clean, clip.key))
        pairs = self.pairs(flow, clip.key)
        return Look(
            frames=clean,
            flow=flow,
            visible=visible_ddflow(flow, self.alpha1, self.alpha2),
            views=draw_views(self.view, u, v, direction_keys(clip.key)),
            boxes=(pairs.online, pairs.target),
            crops=self.cut(u, v, pairs),
            same=pairs.same,
        )

    @torch.no_grad()
    def embed(self, images: Tensor) -> dict[str, Tensor]:
        """Encoder vectors, and dense projections at every cell of the map."""
        rows = super().embed(images)
        if self.dense_weight > 0:
            rows["dense"] = self.online.dense(images).float().permute(0, 2, 3, 1).flatten(0, 2)
        return rows

"""DoRA: Is ImageNet worth 1 video? (Venkataramanan et al., ICLR 2024): discovering and tracking objects.

A clip of T frames, a second apart. Some attention heads of the teacher find objects in the first frame; by
cross-attention these are followed through the others. The student sees each frame with all but one object
masked, and small crops of it, and is to say of them what the teacher says of the whole frame (DINO's loss).

=====================  ==============================================================
in the paper           here
=====================  ==============================================================
X_t^a, X_t^b           ``crops.large`` (V, N, 3, h, w): one geometry for a clip; N = B·T
X_t^l, m               ``crops.small`` (L, N, 3, h', w'), of every frame on its own
g_θ, g_θ'; f_θ, f_θ'   ``self.student``, ``self.teacher``: encoder; encoder and head
A^I, Q (Eq. 1, 2)      attention of [CLS], queries of the teacher's last block, first frame
P = A^I Q̃ (Eq. 2)      ``prototypes``
M*, P' (Eq. 4, 5)      ``refine``: Sinkhorn-Knopp with ε, in ``iterations`` rounds
T_t, T'_t (Eq. 3, 6)   ``track``, keys K_t of frame t
X^o = X ⊙ T (Eq. 7)    ``self.masked``
L^O, L^LC (Eq. 8–10)   terms "object", "local"
=====================  ==============================================================

Deviations. Paper and public code differ; the defaults are the code's, with which the released weights were
trained (also its crops and colours, without solarisation). The paper's variant of each point is a switch:

* two global views, the teacher sees one, the student the other, masked: ``views=2`` (and ``crops.views=2``);
* the image is multiplied with T' itself: ``masks="soft"``, its peak at 1 (``soft_scale="none"``: Eq. 7 to the
  letter, which leaves an image as good as black);
* the transport plan has mass 1 in all: ``mass="total"``;
* Z̃ is not brought to length 1 in Eq. 4 and 5: ``patches="raw"``;
* losses are summed over masks, crops and views: ``reduce="sum"``, both weights 1. (LARS is in ``recipe``.)

From the code depart: all local crops count (there not the first); all masks weigh the same (there a sum over
frames goes on into the next mask: earlier ones weigh more); the threshold of hard masks is the mean over all
devices; centre and teacher move once per optimiser step; stochastic depth is a batch's, by its first key.

Without tracking (``tracking=False``, and in clips of one frame) it is DoRA* of appendix D: every image has
its own objects. ``masks="random"`` hides blocks as iBOT does (Table 2c); Sinkhorn has no say then.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor

from poodle_lightning.augment.geometric import ResizedCrop
from poodle_lightning.augment.multicrop import Crops, MultiCrop, crop_keys
from poodle_lightning.augment.photometric import Colour
from poodle_lightning.losses.distillation import view_losses
from poodle_lightning.methods.distillation import RECIPE, HeadSizes, SelfDistillation
from poodle_lightning.nn.encoder import Encoder
from poodle_lightning.nn.vit import ViT
from poodle_lightning.ops.masking import block_masks, mask_ratios, ratios_fit
from poodle_lightning.ops.objects import enlarge, hard_masks, prototypes, refine, soft_masks, track
from poodle_lightning.ops.random import key_of, permutation
from poodle_lightning.types import Clip, Features, Look, Losses, Objects, UserError


class DoRA(SelfDistillation):
    """DoRA, with a switch for every line in which paper and code differ, and for every row of its Table 2.

    Args:
        encoder: a vision transformer; default ViT-S/16 with a drop path of 0.1.
        head: sizes of the head. (Code: out 65,536, last layer's gain trained)
        crops: global views, of one geometry for a clip, and local ones. (Code: 224 px, area 0.4–1, flip 0.5;
            6 of 112 px, area 0.05–0.4)
        objects: k, the number of heads drawn; at most those of the last block (``encoder.last_heads``).
        sinkhorn: prototypes are refined (Eq. 4, 5); else Eq. 3.
        epsilon: ε of Eq. 4.
        iterations: rounds of Sinkhorn-Knopp. (Code: 30)
        masks: "hard" (code), "soft" (paper), or "random" blocks.
        soft_scale: soft masks with "peak" 1, or "none".
        mass: "patch" (code) or "total" (paper).
        patches: "normalised" (code) or "raw" (paper).
        views: 1 (code) or 2 (paper).
        reduce: "mean" (code) or "sum" (paper) over masks, crops and pairs of views.
        object_weight: of the loss on masked views. (Code: 0.5; paper: 1)
        local_weight: of the loss on local crops. (Code: 0.5; paper: 1)
        tracking: objects of the first frame are followed; False: every frame has its own (DoRA*).
        block_ratio: of "random" masks, the hidden share and the most it varies by.
        **kwargs: temperatures, centre and recipe, see :class:`SelfDistillation`.

    Raises:
        UserError: the encoder is no vision transformer or has fewer heads than objects, a crop's side is no
            multiple of its patch, crops do not have as many views as the method, or a number is out of range.
    """

    published = replace(RECIPE, min_lr=1e-5)

    def __init__(
        self,
        encoder: Encoder | None = None,
        head: HeadSizes | None = None,
        crops: MultiCrop | None = None,
        objects: int = 3,
        sinkhorn: bool = True,
        epsilon: float = 0.05,
        iterations: int = 30,
        masks: Literal["hard", "soft", "random"] = "hard",
        soft_scale: Literal["peak", "none"] = "peak",
        mass: Literal["patch", "total"] = "patch",
        patches: Literal["normalised", "raw"] = "normalised",
        views: Literal[1, 2] = 1,
        reduce: Literal["mean", "sum"] = "mean",
        object_weight: float = 0.5,
        local_weight: float = 0.5,
        tracking: bool = True,
        block_ratio: tuple[float, float] = (0.3, 0.2),
        **kwargs: Any,
    ) -> None:
        super().__init__(encoder, head or HeadSizes(norm_last=False), crops or _crops(views), **kwargs)
        self.objects, self.heads = objects, self._heads(objects)
        if self.crops.views != views or views > 2:
            raise UserError(f"DoRA has views={views} and crops.views={self.crops.views}: set both to 1 or 2")
        self.sinkhorn, self.epsilon, self.iterations = sinkhorn, epsilon, iterations
        self.masks, self.soft_scale, self.block_ratio = masks, soft_scale, [(one,) for one in block_ratio]
        if not ratios_fit(*self.block_ratio):
            raise UserError(f"DoRA: block_ratio={list(block_ratio)}: choose a share ± spread inside 0 to 1")
        if iterations < 1 or epsilon <= 0:
            raise UserError(f"DoRA: set iterations={iterations} to at least 1, epsilon={epsilon} above 0")
        self.mass, self.patches, self.tracking = mass, patches, tracking
        self.object_weight, self.local_weight = object_weight, local_weight
        self.reduced = torch.mean if reduce == "mean" else torch.sum  # over masks, crops and pairs of views
        self.moment = (0, 0, 0)  # seed, optimiser step, micro-batch

    def losses(self, clip: Clip) -> Losses:
        """The loss on masked views and that on local crops (paper Eq. 8–10)."""
        crops = self.crops(clip)  # X^a, (X^b); X^l                                 (V, N, 3, h, w)
        q, masks = self.target_of(clip, crops.large)  # f_θ'(X_t); T'_t      (V, N, K); (k, V·N, 1, h/p, w/p)
        masked, local = self.answer(crops, masks)  # f_θ(X^o); f_θ(X^l)            (k·V, N, K); (L, N, K)
        pairs = view_losses(masked, q, self.student_temperature).unflatten(1, (-1, len(q)))  # (U, k, V)
        terms = {"object": self.object_weight * self.reduced(pairs.flip(0).diagonal(dim1=0, dim2=2))}  # u ≠ v
        if len(local):
            terms["local"] = self.local_weight * self.reduced(view_losses(local, q, self.student_temperature))
        return terms

    @torch.no_grad()
    def target_of(self, clip: Clip, large: Tensor) -> tuple[Tensor, Tensor]:
        """The teacher's probabilities of all views, and the masks of the objects that it finds."""
        seen = self.observe(large)  # g_θ'(X_t), A, Q, K of all frames at once           (V·N)
        q = self.teach(self.teacher.head(seen.vector).unflatten(0, large.shape[:2]))
        return q, self.masks_of(clip, seen)

    def answer(self, crops: Crops, masks: Tensor) -> tuple[Tensor, ...]:
        """The student's logits of masked views and local crops: one pass per resolution, the head once."""
        masked = self.masked(crops.large.flatten(0, 1), masks)  # X^o                (k, V·N, 3, h, w)
        views = [masked] if crops.small is None else [masked, crops.small]
        cls = torch.cat([self.student.encoder(view.flatten(0, 1)).vector for view in views])
        logits: Tensor = self.student.head(cls).unflatten(0, (-1, crops.large.shape[1]))
        return logits.tensor_split([len(masks) * len(crops.large)])

    # ---- objects
    @torch.no_grad()
    def observe(self, large: Tensor) -> Features:
        """The teacher's features of all frames; of attention only the row of [CLS]."""
        encoder = self.teacher.encoder
        assert isinstance(encoder, ViT)
        return encoder.look(large.flatten(0, 1), rows=1)

    @torch.no_grad()
    def discover(self, seen: Features, frames: int, sinkhorn: bool) -> Tensor:
        """Eq. 2–6: a clip's objects in its frames ``(V·B, T, k, n)``; not tracking, ``(V·B·T, 1, k, n)``."""
        frames = frames if self.tracking else 1
        assert seen.attention is not None
        chosen = self.chosen().to(seen.last.device, non_blocking=True)
        a = seen.attention[::frames, :, 0, 1:].index_select(1, chosen)  # A^I                (V·B, k, n)
        q, k = (_side_by_side(part) for part in (seen.queries, seen.keys))  # (V·N, n, d)
        p = prototypes(a, q[::frames])  # P = A^I Q̃                              (V·B, k, d)
        if sinkhorn:
            z = seen.last[::frames].flatten(2).transpose(1, 2)  # Z̃                   (V·B, n, d)
            p = refine(p, z, self.epsilon, self.iterations, self.mass, self.patches == "normalised")
        return track(p, k.unflatten(0, (-1, frames)))

    @torch.no_grad()
    def masks_of(self, clip: Clip, seen: Features) -> Tensor:
        """What images are multiplied with, on the grid of patches, ``(k, V·N, 1, h, w)``."""
        grid = seen.last.shape[-2:]
        if self.masks == "random":
            keys = crop_keys(clip, "mask", self.objects * self.crops.views).flatten()
            hidden = block_masks(keys, mask_ratios(keys, *self.block_ratio), (grid[0], grid[1]))
            return (~hidden).unflatten(0, (self.objects, -1))[:, :, None].to(clip.device, non_blocking=True)
        tracks = self.discover(seen, clip.times.shape[1], self.sinkhorn)
        masks = hard_masks(tracks) if self.masks == "hard" else soft_masks(tracks, self.soft_scale)
        return masks.flatten(0, 1).unflatten(2, grid).transpose(0, 1)[:, :, None]

    def masked(self, images: Tensor, masks: Tensor) -> Tensor:
        """Eq. 7, ``(k, V·N, 3, h, w)``: what is masked has the mean colour, which the encoder makes 0."""
        large = enlarge(masks, self.crops.large.size, "bilinear" if self.masks == "soft" else "nearest")
        return (images - (mean := self.student.encoder.mean)) * large + mean

    def chosen(self) -> Tensor:
        """The k heads, drawn for the whole batch and alike on all devices; always the same in eval mode."""
        key = key_of(*(self.moment if self.training else (0, 0, 0)), "heads")
        return permutation(key[None], self.heads)[0, : self.objects]

    def training_step(self, clip: Clip, batch_idx: int) -> Tensor:
        """See :class:`Method`; heads follow from the seed, the step and the number of the micro-batch."""
        seed = getattr(getattr(self.trainer, "datamodule", None), "seed", 0)
        self.moment = (seed, self.global_step, batch_idx % self.trainer.accumulate_grad_batches)
        return super().training_step(clip, batch_idx)

    @torch.no_grad()
    def look(self, clip: Clip) -> Look:
        """Crops, heads, tracks and masks of a batch (of the first view, where there are two)."""
        crops, shape = self.crops(clip), tuple(clip.times.shape)
        seen = self.observe(crops.large)
        assert seen.attention is not None
        grid = seen.last.shape[-2:]
        first = slice(0, shape[0] * shape[1])  # the rows of the first view
        raw, tracks = (
            self.discover(seen, shape[1], refined).flatten(0, 1)[first].unflatten(0, shape).unflatten(3, grid)
            for refined in (False, self.sinkhorn)
        )
        found = Objects(
            frames=crops.large[0].unflatten(0, shape),
            heads=seen.attention[first, :, 0, 1:].unflatten(0, shape)[:, 0].unflatten(2, grid),
            chosen=tuple(self.chosen().tolist()),
            raw=raw,
            tracks=tracks,
            masks=self.masks_of(clip, seen)[:, first, 0].transpose(0, 1).unflatten(0, shape).float(),
        )
        return replace(self.show(clip, crops), objects=found)

    def _heads(self, objects: int) -> int:
        """Heads of the last block."""
        encoder = self.online.encoder
        if not isinstance(encoder, ViT) or encoder.cls_token is None:
            raise UserError(f"DoRA needs a ViT with [CLS] to find objects, not {type(encoder).__name__}")
        heads = int(encoder.blocks[-1].attn.num_heads)
        if not 1 <= objects <= heads:
            raise UserError(
                f"DoRA: objects={objects}, but the encoder's last block has {heads} heads: choose 1 to "
                f"{heads}, or set encoder.last_heads to a larger divisor of encoder.dim"
            )
        return heads


def _side_by_side(heads: Tensor | None) -> Tensor:
    """Patches of ``(B, heads, 1 + n, d)`` with all heads' channels in a row, ``(B, n, heads · d)``."""
    assert heads is not None
    return heads[:, :, 1:].transpose(1, 2).flatten(2)


def _crops(views: int) -> MultiCrop:
    """The code's crops (shashankvkt/DoRA_ICLR24 ``main.py``, ``DataAugmentationDINO``)."""
    large = ResizedCrop((224, 224), (0.4, 1.0), fit="redraw")
    small = ResizedCrop((112, 112), (0.05, 0.4), flip=0.0, fit="redraw")
    colours = [Colour(0.4, 0.4, 0.2, 0.1, blur=blur) for blur in (0.1, 0.5)]
    return MultiCrop(large, small, views, 6, (colours[0],), colours[1])

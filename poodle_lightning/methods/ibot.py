"""iBOT: Image BERT pre-training with online tokenizer (Zhou et al., ICLR 2022), and AttMask.

DINO's loss on [CLS], and the same on patches: some patches of a large crop are hidden from the student, which
is to say of each what the teacher, who sees it, says. iBOT hides random blocks. AttMask (Kakogeorgiou et al.,
"What to hide from your students", ECCV 2022) hides the patches to which the teacher's [CLS] attends most. On
video every frame is an image.

=====================  ==============================================================
in the paper           here
=====================  ==============================================================
u, v; û, v̂             ``crops.large``; with ``hidden`` patches
f_s, h_s; f_t, h_t     ``self.student``, ``self.teacher``: encoder, head
L_[CLS]                ``self.cls``, all crops
L_MIM                  ``self.patch``, the hidden patches of the large crops
C, C'                  ``self.centre``, ``self.patch_centre``
λ_1, λ_2               ``cls_weight``, ``patch_weight``
r (AttMask: and p)     ``ratios``, ``spread``; an image of ratio 0 is left whole
A^[CLS], s (AttMask)   ``look(rows=1)``, the mean over heads; ``show``
=====================  ==============================================================

Deviations:

* Only hidden patches go through the last layer. The patch centre is still the mean over all of them: the
  layer is linear, so that mean is the layer's output for the mean row before it.
* AttMask draws the share of hidden patches for every image, its code once per batch and device: a split of
  the batch then changes nothing.
* With ``shared_head=False`` the teacher's patches take the average of the student's own layer; in the code
  they still take that of [CLS] (its default ``shared_head_teacher=True``).
* Those of DINO: centres and teacher move once per optimiser step, crops are bilinear, stochastic depth
  follows from a batch's first key.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from poodle_lightning.augment.geometric import ResizedCrop
from poodle_lightning.augment.multicrop import MultiCrop, crop_keys, first_frames
from poodle_lightning.losses.distillation import paired_losses, teacher_probabilities, view_losses
from poodle_lightning.methods.distillation import RECIPE, HeadSizes, SelfDistillation, other_views, warmed_up
from poodle_lightning.nn.centering import Centre
from poodle_lightning.nn.dino_head import NormedLinear
from poodle_lightning.nn.encoder import Encoder
from poodle_lightning.nn.vit import ViT
from poodle_lightning.ops import masking
from poodle_lightning.ops.geometry import island
from poodle_lightning.types import Clip, Features, Look, Losses, UserError


class IBOT(SelfDistillation):
    """iBOT; the defaults are those of ViT-S/16 (README of the public code).

    Args:
        encoder: a vision transformer with a mask token; default ViT-S/16 with a drop path of 0.1.
        head: sizes of the head. (Code: out 8192, last layer's gain trained)
        crops: global and local views. (Code: 2 of 224 px, area 0.25–1; 10 of 96 px, 0.05–0.25)
        shared_head: patches take the last layer of [CLS]; else one of their own, of the same size.
        ratios: one of them is drawn for every large crop: the share of its patches to hide. (Paper: 0 or 0.3)
        spread: and varied by at most so much, uniformly. (Paper: 0, or 0.2)
        cls_weight: λ_1, of the loss on [CLS].
        patch_weight: λ_2, of the loss on hidden patches.
        teacher_temperature: τ_t of [CLS], at first and after its warm-up.
        teacher_warmup_epochs: over which it rises.
        patch_temperature: τ_t of patches, likewise.
        patch_warmup_epochs: over which it rises.
        **kwargs: τ_s, centres' momentum, recipe, see :class:`SelfDistillation`.

    Raises:
        UserError: the encoder has no mask token, a crop's side is no multiple of its patch, or a ratio may
            leave [0, 1].
    """

    published = replace(RECIPE, horizon_epochs=800.0)
    masks_patches = True

    def __init__(
        self,
        encoder: Encoder | None = None,
        head: HeadSizes | None = None,
        crops: MultiCrop | None = None,
        shared_head: bool = True,
        ratios: tuple[float, ...] = (0.0, 0.3),
        spread: tuple[float, ...] = (0.0, 0.2),
        cls_weight: float = 1.0,
        patch_weight: float = 1.0,
        teacher_temperature: tuple[float, float] = (0.04, 0.07),
        teacher_warmup_epochs: int = 30,
        patch_temperature: tuple[float, float] = (0.04, 0.07),
        patch_warmup_epochs: int = 30,
        **kwargs: Any,
    ) -> None:
        encoder = encoder or ViT(drop_path=0.1, pos_interp="dino", mask_token=True)
        if not isinstance(encoder, ViT) or encoder.mask_token is None:
            name = type(encoder).__name__
            raise UserError(f"{type(self).__name__} hides patches: its {name} needs encoder.mask_token=true")
        if not masking.ratios_fit(ratios, spread):
            raise UserError(
                f"{type(self).__name__}: ratios={list(ratios)} with spread={list(spread)}: choose as many "
                "numbers of both, so that no ratio ± its spread leaves the interval from 0 to 1"
            )
        sizes = head or HeadSizes(out=8192, norm_last=False)
        super().__init__(encoder, sizes, crops or _crops(), **kwargs)
        self.teacher_temperature, self.teacher_warmup_epochs = teacher_temperature, teacher_warmup_epochs
        if not shared_head:
            self.online.patch_last_layer = NormedLinear(sizes.bottleneck, sizes.out, sizes.norm_last)
            self.start_teacher()
        self.patch_centre = Centre(sizes.out, self.centre.momentum)
        self.patch_ends, self.patch_warmup_epochs = patch_temperature, patch_warmup_epochs
        self.ratios, self.spread = ratios, spread
        self.cls_weight, self.patch_weight = cls_weight, patch_weight

    @property
    def patch_temperature(self) -> float:
        """τ_t of patches in the current epoch."""
        return warmed_up(self.current_epoch, self.patch_ends, self.patch_warmup_epochs)

    def losses(self, clip: Clip) -> Losses:
        """The loss on [CLS] and that on hidden patches (paper Eq. 2 and 3)."""
        crops = self.crops(clip)
        large = crops.large.flatten(0, 1)  # u, v                                 (V·N, 3, h, w)
        seen = self.observe(large)  # f_t(u), f_t(v)
        hidden, total = self.hide(clip, seen)  # m, so many in all                   (V·N, h, w)
        said = self.student.encoder(large, hidden)  # f_s(û), f_s(v̂)
        return {
            "cls": self.cls_weight * self.cls(seen, said, crops.small),
            "patch": self.patch_weight * self.patch(seen, said, hidden.flatten(1), total),
        }

    def cls(self, seen: Features, said: Features, small: Tensor | None) -> Tensor:
        """DINO's loss: [CLS] of every crop against the teacher's of the other large ones."""
        assert said.vector is not None
        with torch.no_grad():
            q = self.teach(self.teacher.head(seen.vector).unflatten(0, (self.crops.views, -1)))
        tokens = said.vector
        if small is not None:
            tokens = torch.cat([tokens, self.student.encoder(small.flatten(0, 1)).vector])
        s = self.student.head(tokens).unflatten(0, (-1, q.shape[1]))
        return other_views(view_losses(s, q, self.student_temperature))

    def patch(self, seen: Features, said: Features, hidden: Tensor, total: int) -> Tensor:
        """Every hidden patch against the teacher's same one: the mean of each crop, then of all crops."""
        index, weight = masking.masked_tokens(hidden, total)  # (total,) among the V·N·n patches
        with torch.no_grad():
            z = self.teacher.head.project(patch_rows(seen))  # (V·N·n, bottleneck)
            with island(z.device.type):
                self.patch_centre.observe(self.teacher.patch_logits(z.mean(dim=0)), len(z))
            logits = self.teacher.patch_logits(z.index_select(0, index))
            q = teacher_probabilities(logits, self.patch_centre.value, self.patch_temperature)
        s = self.student.patch_logits(self.student.head.project(patch_rows(said).index_select(0, index)))
        return (weight * paired_losses(s, q, self.student_temperature)).sum()

    @torch.no_grad()
    def observe(self, large: Tensor) -> Features:
        """What the teacher's encoder makes of the large crops, at its end."""
        return deepest(self.teacher.encoder(large))

    def hide(self, clip: Clip, seen: Features) -> tuple[Tensor, int]:
        """Which patches of the large crops are hidden ``(V·N, h, w)``, and how many in all."""
        keys = crop_keys(clip, "hidden", self.crops.views).flatten()
        ratios = masking.mask_ratios(keys, self.ratios, self.spread)
        masks = masking.block_masks(keys, ratios, (seen.last.shape[-2], seen.last.shape[-1]))
        return masks.to(clip.device, non_blocking=True), int(masks.sum())

    def after_step(self) -> None:
        """Moves both centres."""
        super().after_step()
        self.patch_centre.step()

    @torch.no_grad()
    def look(self, clip: Clip) -> Look:
        """The crops of the first frames and what is hidden of them, as training draws them."""
        crops = self.crops(clip)
        hidden, _ = self.hide(clip, self.observe(crops.large.flatten(0, 1)))
        masks = hidden.unflatten(0, crops.large.shape[:2])
        return replace(self.show(clip, crops), hidden=first_frames(masks, clip.times.shape[1]))


class AttMask(IBOT):
    """AttMask: What to hide from your students (Kakogeorgiou et al., ECCV 2022): iBOT, by attention.

    Args:
        encoder: as iBOT's.
        head: as iBOT's.
        crops: as iBOT's.
        strategy: "high" hides the most attended patches; "hint" shows a few of these again; "low" hides the
            least attended; "random" any patches. (Paper: high or hint)
        show: with "hint", the share of the most attended patches that hints are drawn from, and the share of
            the hidden number that is shown. (Code: ``show_max`` 0.1)
        **kwargs: iBOT's. ``ratios`` and ``spread`` are the paper's r and p: half of the crops are left whole,
            of the others 0.3 ± 0.2 is hidden.

    Raises:
        UserError: as iBOT, or the encoder has no [CLS].
    """

    published = RECIPE

    def __init__(
        self,
        encoder: Encoder | None = None,
        head: HeadSizes | None = None,
        crops: MultiCrop | None = None,
        strategy: masking.AttentionMode = "high",
        show: float = 0.1,
        **kwargs: Any,
    ) -> None:
        super().__init__(encoder, head, crops, **kwargs)
        if self.online.encoder.cls_token is None:
            raise UserError("AttMask hides by the attention of [CLS]: its ViT needs encoder.class_token=true")
        self.strategy, self.share_shown = strategy, show

    @torch.no_grad()
    def observe(self, large: Tensor) -> Features:
        """The teacher's features, with the last block's attention of [CLS]."""
        encoder = self.teacher.encoder
        assert isinstance(encoder, ViT)
        return deepest(encoder.look(large, rows=1))

    def hide(self, clip: Clip, seen: Features) -> tuple[Tensor, int]:
        """The patches of the large crops, in the order of the teacher's attention, up to a drawn number."""
        assert seen.attention is not None
        attention = seen.attention[:, :, 0, 1:].mean(dim=1)  # over heads
        keys = crop_keys(clip, "hidden", self.crops.views).flatten()
        counts = (masking.mask_ratios(keys, self.ratios, self.spread) * attention.shape[1]).long()
        shares = (self.share_shown, self.share_shown)
        masks = masking.attention_masks(attention, keys, counts, self.strategy, *shares)
        if self.strategy == "hint":
            counts -= masking.shown_again(counts, attention.shape[1], *shares)
        return masks.unflatten(1, seen.last.shape[-2:]), int(counts.sum())


def deepest(seen: Features) -> Features:
    """Features of which the last map, the vector and attention are left: nothing else is kept in memory."""
    *_, name = seen.maps
    return replace(seen, maps={name: seen.last}, strides={name: seen.strides[name]}, queries=None, keys=None)


def patch_rows(features: Features) -> Tensor:
    """The patches behind the last block and norm, ``(B·n, D)``, image by image, row by row."""
    return features.last.flatten(2).transpose(1, 2).flatten(0, 1)


def _crops() -> MultiCrop:
    """Views of iBOT (README of bytedance/ibot, ViT-S/16 with multi-crop)."""
    large = ResizedCrop((224, 224), (0.25, 1.0), fit="redraw")
    return MultiCrop(large, ResizedCrop((96, 96), (0.05, 0.25), fit="redraw"), locals=10)

"""DINO: Emerging properties in self-supervised vision transformers (Caron et al., ICCV 2021).

Two large crops of an image and several small ones. A student sees them all, a teacher, its moving average,
the large ones. The student's distribution over K outputs, for every crop, is to be the teacher's for another
crop of the same image. On video every frame is an image.

=====================  ==============================================================
in the paper           here
=====================  ==============================================================
g_θs, g_θt             ``self.student``, ``self.teacher``: encoder, [CLS], head
x_1^g, x_2^g; x'       ``crops.large``; ``crops.small``
P_s, P_t               softmax of ``s``; ``q``
C, m                   ``self.centre``
τ_s, τ_t               ``student_temperature``, ``self.temperature``
H(a, b) = −a log b     ``view_losses``, the mean over images of all pairs of views at once
=====================  ==============================================================

Deviations: none in the loss. The centre and the teacher move once per optimiser step, also where batches are
accumulated. Crops are plain bilinear (the original resizes bicubically), of the training crop that the data
brings. ``MultiCrop(clip_wide=True)`` gives the large crops of a clip's frames one geometry, which a loss on
single frames does not see. Stochastic depth follows from a batch's first key, so not where it is split
otherwise.
"""

from __future__ import annotations

import torch
from torch import Tensor

from poodle_lightning.augment.multicrop import Crops
from poodle_lightning.losses.distillation import view_losses
from poodle_lightning.methods.distillation import SelfDistillation, other_views
from poodle_lightning.types import Clip, Losses


class DINO(SelfDistillation):
    """DINO, with the arguments of :class:`SelfDistillation`; the defaults are ViT-S/16's for 100 epochs.

    Raises:
        UserError: there is only one view, so no other crop to predict.
    """

    def losses(self, clip: Clip) -> Losses:
        """The cross-entropy of every two different views (paper Eq. 3)."""
        crops = self.crops(clip)  # x^g (V, N, 3, h, w), x' (L, N, 3, h', w')
        q = self.observe(crops.large)  # P_t                     (V, N, K)
        s = self.answer(crops)  # logits behind P_s       (V + L, N, K)
        return {"cls": other_views(view_losses(s, q, self.student_temperature))}

    @torch.no_grad()
    def observe(self, large: Tensor) -> Tensor:
        """The teacher's probabilities of the large crops."""
        return self.teach(self.teacher.logits(large.flatten(0, 1)).unflatten(0, large.shape[:2]))

    def answer(self, crops: Crops) -> Tensor:
        """The student's logits of all crops: one pass per resolution, the head once."""
        views = [crops.large] if crops.small is None else [crops.large, crops.small]
        cls = torch.cat([self.student.encoder(view.flatten(0, 1)).vector for view in views])
        logits: Tensor = self.student.head(cls)
        return logits.unflatten(0, (-1, crops.large.shape[1]))

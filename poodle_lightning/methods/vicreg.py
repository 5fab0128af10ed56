"""VICReg: Variance-invariance-covariance regularization (Bardes, Ponce and LeCun, ICLR 2022).

Embeddings of an image's two views are to be equal, while every dimension varies over the batch and no two
dimensions say the same. There are no negatives and no second network. On video every frame is an image.

=====================  ==============================================================
in the paper           here
=====================  ==============================================================
x, x'                  ``self.crops(clip).large``
f_θ; h_φ               ``self.online.encoder``; ``self.online.projector`` (the expander)
λ s(Z, Z') (Eq. 5)     "invariance"
μ [v(Z) + v(Z')]       "variance" (Eqs. 1, 2)
ν [c(Z) + c(Z')]       "covariance" (Eqs. 3, 4)
=====================  ==============================================================

Deviations: the loss is the code's, which averages the variance terms of both branches where Eq. 6 adds them
(facebookresearch/vicreg ``main_vicreg.py``). Crops are plain bilinear, of the training crop that the data
brings.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from poodle_lightning.augment.geometric import ResizedCrop
from poodle_lightning.augment.multicrop import MultiCrop, first_frames
from poodle_lightning.augment.photometric import Colour
from poodle_lightning.losses.redundancy import vicreg
from poodle_lightning.methods.base import Method
from poodle_lightning.methods.moco import check_two_views
from poodle_lightning.nn.encoder import Encoder
from poodle_lightning.nn.online import Online
from poodle_lightning.nn.optim import Recipe
from poodle_lightning.nn.resnet import ResNet
from poodle_lightning.ops.distributed import world_size
from poodle_lightning.types import Clip, Look, Losses, UserError

RECIPE = Recipe(
    optimizer="lars",
    lr=0.3,
    min_lr=6e-4,
    weight_decay=1e-6,
    warmup_epochs=10.0,
    horizon_epochs=100.0,
    scale_lr="linear",
    reference_batch=256,
)
"""The code's for batches of 512 and 100 epochs (facebookresearch/vicreg README)."""


class VICRegNet(Online):
    """Encoder and expander: two times linear, BatchNorm, ReLU, then linear without bias."""

    def __init__(self, encoder: Encoder, hidden: int, out: int) -> None:
        super().__init__(encoder)
        self.projector = nn.Sequential(
            nn.Linear(encoder.vector_dim, hidden),
            nn.BatchNorm1d(hidden),
            nn.ReLU(inplace=True),
            nn.Linear(hidden, hidden),
            nn.BatchNorm1d(hidden),
            nn.ReLU(inplace=True),
            nn.Linear(hidden, out, bias=False),
        )

    def pooled(self, images: Tensor) -> Tensor:
        """Embedding ``(N, out)`` of images ``(N, 3, h, w)``."""
        projected: Tensor = self.projector(self.encoder(images).vector)
        return projected


class VICReg(Method):
    """VICReg.

    Args:
        encoder: default ResNet-50 with ``zero_init_residual``, as in the code.
        hidden: width of the expander's hidden layers. (Paper: 8192)
        out: length of the embedding. (Paper: 8192)
        invariance: λ. (Paper: 25)
        variance: μ. (Paper: 25)
        covariance: ν. (Paper: 1)
        crops: the two views. (Paper: 224 px, area 0.08–1, jitter .4 .4 .2 .1 at 0.8, greyscale 0.2; blurred
            always and at 0.1, solarised never and at 0.2)
        recipe: optimiser and schedules; None: the code's for 100 epochs.

    Raises:
        UserError: ``crops`` does not make two crops, or their side is no multiple of the encoder's patch; in
            training: all processes together have one image, which has no variance.
    """

    online: VICRegNet
    target: None

    def __init__(
        self,
        encoder: Encoder | None = None,
        hidden: int = 8192,
        out: int = 8192,
        invariance: float = 25.0,
        variance: float = 25.0,
        covariance: float = 1.0,
        crops: MultiCrop | None = None,
        recipe: Recipe | None = None,
    ) -> None:
        super().__init__(recipe or RECIPE)
        encoder = encoder or ResNet(50, zero_init_residual=True)
        self.online = VICRegNet(encoder, hidden, out)
        self.weights = (invariance, variance, covariance)
        self.crops = crops or byol_crops()
        check_two_views(self.crops, encoder, "VICReg")

    def losses(self, clip: Clip) -> Losses:
        """The three terms (paper Eq. 6); each view is a batch of its own to BatchNorm, as in the code."""
        if not _varies(clip):
            raise UserError("VICReg needs two images or more in a batch: raise data.batch_size")
        first, second = (self.online.pooled(view) for view in self.crops(clip).large)
        return vicreg(first, second, *self.weights)

    def validation_step(self, clip: Clip, batch_idx: int) -> Tensor:
        """The same loss on held-out clips; an image that is left over alone, at the end, is not counted."""
        return super().validation_step(clip, batch_idx) if _varies(clip) else torch.zeros(())

    @torch.no_grad()
    def look(self, clip: Clip) -> Look:
        """The two views of each clip's first frame, as training draws them."""
        return Look(clip.unit(), large=first_frames(self.crops(clip).large, clip.frames.shape[1]))


def _varies(clip: Clip) -> bool:
    """Whether all processes together have two images or more; they have equally many."""
    return clip.times.numel() * world_size() > 1


def byol_crops() -> MultiCrop:
    """BYOL's two views, which VICReg and PixPro have too: the first always blurred, the second solarised."""
    crop = ResizedCrop((224, 224), (0.08, 1.0), fit="redraw")
    first, second = Colour(0.4, 0.4, 0.2, 0.1, blur=1.0), Colour(0.4, 0.4, 0.2, 0.1, blur=0.1, solarize=0.2)
    return MultiCrop(crop, locals=0, colours=(first, second), clip_wide=False)

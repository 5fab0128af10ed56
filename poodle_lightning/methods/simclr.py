"""SimCLR: A simple framework for contrastive learning of visual representations (Chen et al., ICML 2020).

Each of an image's two views is to be found by the other among both views of all other images of the batch,
of all processes. There is one network. On video every frame is an image.

=====================  ==============================================================
in the paper           here
=====================  ==============================================================
x̃_i, x̃_j              ``self.crops(clip).large``
f; g                   ``self.online.encoder``; ``self.online.projector``
ℓ(i, j), L (Eq. 1)     ``nt_xent``
τ                      ``temperature``
=====================  ==============================================================

Deviations: the loss is the paper's, a mean over all rows (google-research/simclr ``objective.py`` adds the
means of both views, which is twice as much: with LARS only biases and norms move differently). The projector
ends in a BatchNorm, as in the code (``model_util.py``, ``projection_head``; there that layer has no bias, as
the linear layers have none before a BatchNorm here); ``last_norm=False`` is the paper's text. Crops are plain
bilinear, of the training crop that the data brings.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from poodle_lightning.augment.geometric import ResizedCrop
from poodle_lightning.augment.multicrop import MultiCrop, first_frames
from poodle_lightning.augment.photometric import Colour
from poodle_lightning.losses.contrastive import nt_xent
from poodle_lightning.methods.base import Method
from poodle_lightning.methods.moco import check_two_views
from poodle_lightning.nn.encoder import Encoder
from poodle_lightning.nn.online import Online
from poodle_lightning.nn.optim import Recipe
from poodle_lightning.nn.resnet import ResNet
from poodle_lightning.types import Clip, Look, Losses

RECIPE = Recipe(
    optimizer="lars",
    lr=0.3,
    weight_decay=1e-6,
    warmup_epochs=10.0,
    horizon_epochs=100.0,
    scale_lr="linear",
    reference_batch=256,
)
"""The paper's for batches of 4096 and 100 epochs (section 2.2)."""


class SimCLRNet(Online):
    """Encoder and projector: linear, BatchNorm, ReLU, linear, perhaps BatchNorm."""

    def __init__(self, encoder: Encoder, hidden: int, out: int, last_norm: bool) -> None:
        super().__init__(encoder)
        layers = [
            nn.Linear(encoder.vector_dim, hidden, bias=False),
            nn.BatchNorm1d(hidden),
            nn.ReLU(inplace=True),
            nn.Linear(hidden, out, bias=not last_norm),
        ]
        self.projector = nn.Sequential(*layers, *[nn.BatchNorm1d(out)] * last_norm)

    def pooled(self, images: Tensor) -> Tensor:
        """Projected vector ``(N, out)`` of images ``(N, 3, h, w)``."""
        projected: Tensor = self.projector(self.encoder(images).vector)
        return projected


class SimCLR(Method):
    """SimCLR.

    Args:
        encoder: default ResNet-50 with ``zero_init_residual``, as in the code.
        hidden: width of the projector's hidden layer. (Paper: 2048)
        out: length of the projection. (Paper: 128)
        temperature: τ. (Paper: 0.1)
        last_norm: a BatchNorm ends the projector.
        crops: the two views. (Paper: 224 px, area 0.08–1, jitter .8 .8 .8 .2 at 0.8, greyscale 0.2, blur 0.5)
        recipe: optimiser and schedules; None: the paper's for 100 epochs.

    Raises:
        UserError: ``crops`` does not make two crops, or their side is no multiple of the encoder's patch.
    """

    online: SimCLRNet
    target: None

    def __init__(
        self,
        encoder: Encoder | None = None,
        hidden: int = 2048,
        out: int = 128,
        temperature: float = 0.1,
        last_norm: bool = True,
        crops: MultiCrop | None = None,
        recipe: Recipe | None = None,
    ) -> None:
        super().__init__(recipe or RECIPE)
        encoder = encoder or ResNet(50, zero_init_residual=True)
        self.online = SimCLRNet(encoder, hidden, out, last_norm)
        self.temperature = temperature
        crop = ResizedCrop((224, 224), (0.08, 1.0), fit="redraw")
        self.crops = crops or MultiCrop(crop, locals=0, colours=(Colour(),), clip_wide=False)
        check_two_views(self.crops, encoder, "SimCLR")

    def losses(self, clip: Clip) -> Losses:
        """NT-Xent of all images (paper Eq. 1); both views go through the network as one batch."""
        x = self.crops(clip).large  # (2, N, 3, h, w)
        first, second = self.online.pooled(x.flatten(0, 1)).chunk(2)
        return {"contrast": nt_xent(first, second, self.temperature)}

    @torch.no_grad()
    def look(self, clip: Clip) -> Look:
        """The two views of each clip's first frame, as training draws them."""
        return Look(clip.unit(), large=first_frames(self.crops(clip).large, clip.frames.shape[1]))

"""PixPro: Propagate yourself, pixel-level consistency for unsupervised learning (Xie et al., CVPR 2021).

Two views of an image. A cell of one, smoothed by the cells that are like it, is to equal the cells of the
other view that show the same place, as a slowly moving copy of the network sees them. No negatives. On video
every frame is an image.

=====================  ==============================================================
in the paper           here
=====================  ==============================================================
A(i, j) (Eq. 1), T     ``positive_pairs``, ``threshold``
x_i; x'_j              ``self.online(view)``; ``self.target(view)``
y_i (Eqs. 3, 4)        ``self.propagation``
L_PixPro (Eq. 5)       ``consistency``, both directions
=====================  ==============================================================

With a decoder (PooDLe's baseline "PixPro, FPN") the loss is on the levels of its pyramid, one projector and
one propagation for all, and is averaged over them. Which levels carry it is not known: the public code has no
pyramid, and PooDLe says only that there was one. All four is ours (``decoder.levels`` takes fewer).

Deviations: the loss is the code's, twice the paper's (zdaxie/PixPro ``contrast/models/PixPro.py``). The copy
moves behind each optimiser step (the code: before each forward pass). The learning rate rises from 0 (the
code: from a hundredth of its height). The optional loss on whole images is not here: the released setting has
none. Crops are plain bilinear, of the training crop that the data brings.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from poodle_lightning.augment.multicrop import MultiCrop, first_frames
from poodle_lightning.losses.pixel_consistency import consistency, positive_pairs
from poodle_lightning.methods.base import Method
from poodle_lightning.methods.moco import check_two_views
from poodle_lightning.methods.vicreg import byol_crops
from poodle_lightning.nn.ema import EMA
from poodle_lightning.nn.encoder import Encoder
from poodle_lightning.nn.heads import ConvMLP
from poodle_lightning.nn.online import Online
from poodle_lightning.nn.optim import Recipe
from poodle_lightning.nn.pixel_propagation import PixelPropagation
from poodle_lightning.nn.pixpro_fpn import HeadedFPN
from poodle_lightning.nn.resnet import ResNet
from poodle_lightning.ops.geometry import Affine
from poodle_lightning.types import Clip, Look, Losses, UserError

RECIPE = Recipe(
    optimizer="lars",
    lr=1.0,
    min_lr=1e-6,
    weight_decay=1e-5,
    warmup_epochs=5.0,
    horizon_epochs=100.0,
    scale_lr="linear",
    reference_batch=256,
    ema_start=0.99,
    ema_end=1.0,
)
"""The paper's for 100 epochs at batches of 1024 (section 4.1; zdaxie/PixPro ``tools/``)."""


@dataclass(frozen=True)
class PyramidSizes:
    """Sizes of the pyramid, see :class:`HeadedFPN`.

    Args:
        dims: channels of the pyramid and its head. (PooDLe's baseline: 256)
        levels: layers of the encoder at whose sizes the loss is; None: all.
    """

    dims: int = 256
    levels: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        if self.levels is not None:
            object.__setattr__(self, "levels", tuple(self.levels))  # plain data brings a list


class PixProNet(Online):
    """Everything the target copies: encoder, pyramid if there is one, projector."""

    decoder: HeadedFPN | None

    def __init__(self, encoder: Encoder, decoder: HeadedFPN | None, hidden: int, out: int) -> None:
        super().__init__(encoder, decoder)
        dims = list(encoder.channels.values())[-1] if decoder is None else decoder.dims
        self.projector = ConvMLP(dims, hidden, out)

    def forward(self, images: Tensor) -> list[Tensor]:
        """Projected maps ``(N, out, h, w)`` of images: the deepest, or those of the pyramid's levels."""
        maps = self.encoder(images).maps
        levels = list(maps.values())[-1:] if self.decoder is None else self.decoder.pyramid(maps).values()
        return [self.projector(level) for level in levels]


class PixPro(Method):
    """PixPro.

    Args:
        encoder: default ResNet-50 with ``zero_init_residual``, as in the code.
        decoder: sizes of a pyramid that is trained too. None: the loss is on the encoder's deepest map.
        hidden: width of the projector's hidden layer. (Paper: 4096)
        out: channels of the projection. (Paper: 256)
        threshold: T, largest distance of a positive pair, as a share of a cell's diagonal. (Paper: 0.7)
        gamma: γ, sharpness of the propagation. (Paper: 2)
        layers: of the propagation's transformation g. (Paper: 1)
        crops: the two views. (Paper: 224 px, area 0.08–1, BYOL's colours)
        recipe: optimiser and schedules; None: the paper's for 100 epochs.

    Raises:
        UserError: ``crops`` does not make two crops, or their side is no multiple of the encoder's patch, or
            a level of the pyramid is no layer of the encoder, or no pair of cells could be positive.
    """

    online: PixProNet
    target: EMA[PixProNet]

    def __init__(
        self,
        encoder: Encoder | None = None,
        decoder: PyramidSizes | None = None,
        hidden: int = 4096,
        out: int = 256,
        threshold: float = 0.7,
        gamma: float = 2.0,
        layers: int = 1,
        crops: MultiCrop | None = None,
        recipe: Recipe | None = None,
    ) -> None:
        super().__init__(recipe or RECIPE)
        if not threshold > 0:
            raise UserError(f"PixPro: threshold={threshold} leaves no positive pair: set it above 0")
        encoder = encoder or ResNet(50, zero_init_residual=True)
        pyramid = None if decoder is None else HeadedFPN(encoder.channels, decoder.dims, decoder.levels)
        self.online = PixProNet(encoder, pyramid, hidden, out)
        self.target = EMA(self.online)
        self.propagation = PixelPropagation(out, layers, gamma)
        self.threshold = threshold
        self.crops = crops or byol_crops()
        check_two_views(self.crops, encoder, "PixPro")

    def losses(self, clip: Clip) -> Losses:
        """Consistency from each view to the other (Eq. 5), of each level, averaged over levels.

        Each view is a batch of its own to BatchNorm, as in the code.
        """
        crops = self.crops(clip)
        a, b = crops.large
        rows, device = len(a), clip.device
        where = crops.large_to_clean
        to_a, to_b = (Affine(matrix).to(device) for matrix in where.matrix.split(rows))
        online_a, online_b = self.online(a), self.online(b)
        target_a, target_b = self.target(a), self.target(b)
        levels = []
        for x_a, x_b, t_a, t_b in zip(online_a, online_b, target_a, target_b, strict=True):
            height, width = x_a.shape[-2:]
            positive = positive_pairs(to_a, to_b, (height, width), self.threshold)
            there = consistency(self.propagation(x_a), t_b, positive)
            levels.append(there + consistency(self.propagation(x_b), t_a, positive.mT))
        return {"pixel": torch.stack(levels).mean()}

    @torch.no_grad()
    def look(self, clip: Clip) -> Look:
        """The two views of each clip's first frame, as training draws them."""
        return Look(clip.unit(), large=first_frames(self.crops(clip).large, clip.frames.shape[1]))

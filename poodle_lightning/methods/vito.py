"""VITO: Self-supervised video pretraining yields general image representations (Parthasarathy et al., 2022).

MoCLR on three frames of a short window of video, with larger crops, and with vectors that are pooled from the
maps of several stages by attention: a small network says of every cell of a view how much it counts. It sees
that view alone, and so learns to look at what is likely to be found again in the others.

=====================  ==============================================================
in the paper           here
=====================  ==============================================================
x_1, x_2, x_3 ~ 𝒯      frames of the clip, by ``WindowSampler(3, 2.56)``
h^{l,s}, s = 1 … S     maps of ``scales``
a^s_θ; m^{l,s}         ``self.online.pools[s]``; its ``weights``
ĥ^l = [ĥ^{l,s}]        ``self.online.pool``
g_θ, L^ij              as in :mod:`poodle_lightning.methods.moclr`
=====================  ==============================================================

Deviations: those of MoCLR. Not told in the paper and so ours: the width of the attention's hidden layer is
the number of the map's channels, between its two layers is a ReLU.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from poodle_lightning.augment.geometric import ResizedCrop
from poodle_lightning.augment.photometric import Colour
from poodle_lightning.methods.moclr import MoCLR, MoCLRNet
from poodle_lightning.nn.attention_pool import AttentionPool
from poodle_lightning.nn.ema import EMA
from poodle_lightning.nn.encoder import Encoder
from poodle_lightning.nn.heads import MLP
from poodle_lightning.nn.optim import Recipe
from poodle_lightning.nn.resnet import ResNet
from poodle_lightning.types import Clip, Look, UserError


class VITONet(MoCLRNet):
    """Encoder, a pooling for each scale, and the projector of the pooled vectors behind each other."""

    def __init__(
        self,
        encoder: Encoder,
        scales: Sequence[str],
        attention: bool,
        attention_hidden: int | None,
        hidden: int,
        out: int,
    ) -> None:
        super().__init__(encoder, hidden, out)
        widths = {layer: encoder.channels[layer] for layer in scales}
        self.pools = nn.ModuleDict()
        if attention:
            self.pools.update(
                {name: AttentionPool(width, attention_hidden) for name, width in widths.items()}
            )
        self.scales = tuple(scales)
        self.projector = MLP(sum(widths.values()), hidden, out)

    def pool(self, maps: dict[str, Tensor]) -> Tensor:
        """Pooled vectors of all scales behind each other, ``(N, ΣC)``, of maps ``{layer: (N, C, h, w)}``."""
        if not self.pools:
            return torch.cat([maps[layer].mean(dim=(2, 3)) for layer in self.scales], dim=1)
        return torch.cat([self.pools[layer](maps[layer]) for layer in self.scales], dim=1)

    def weights(self, images: Tensor) -> dict[str, Tensor]:
        """Weights ``{layer: (N, h, w)}`` of images ``(N, 3, h, w)``; none without attention."""
        maps, found = self.encoder(images).maps, {}
        for layer, pool in self.pools.items():
            assert isinstance(pool, AttentionPool)
            found[layer] = pool.weights(maps[layer])
        return found

    def pooled(self, images: Tensor) -> Tensor:
        """Projected vector ``(N, out)`` of images ``(N, 3, h, w)``."""
        projected: Tensor = self.projector(self.pool(self.encoder(images).maps))
        return projected


class VITO(MoCLR):
    """VITO.

    Args:
        encoder: default ResNet-50 with ``zero_init_residual``.
        views: of each clip; see :class:`MoCLR`. (Paper: 3)
        scales: layers whose maps are pooled, the deepest among them. (Paper: the last two of a ResNet)
        attention: pools by attention; without, each map's mean is taken.
        attention_hidden: width of the attention's hidden layer; None: as many as the map has channels.
            (Paper: not told)
        hidden: see :class:`MoCLR`.
        out: see :class:`MoCLR`.
        temperature: τ. (Paper: 0.1)
        negatives: see :class:`MoCLR`.
        crop: of every view. (Paper: 224 px, area 0.4–1)
        colour_a: see :class:`MoCLR`.
        colour_b: see :class:`MoCLR`.
        recipe: optimiser and schedules; None: the paper's for 300 epochs.

    Raises:
        UserError: there are fewer than two views, a scale is none of the encoder's layers, or the deepest is
            missing: what lies behind the others would not be trained.
    """

    online: VITONet
    target: EMA[VITONet]  # type: ignore[assignment]

    def __init__(
        self,
        encoder: Encoder | None = None,
        views: int = 3,
        scales: tuple[str, ...] = ("layer3", "layer4"),
        attention: bool = True,
        attention_hidden: int | None = None,
        hidden: int = 4096,
        out: int = 256,
        temperature: float = 0.1,
        negatives: Literal["all", "partner"] = "all",
        crop: ResizedCrop | None = None,
        colour_a: Colour | None = None,
        colour_b: Colour | None = None,
        recipe: Recipe | None = None,
    ) -> None:
        encoder = encoder or ResNet(50, zero_init_residual=True)
        _check_scales(scales, encoder)
        super().__init__(
            encoder, views, hidden, out, temperature, negatives, crop, colour_a, colour_b, recipe
        )
        self._build(VITONet(encoder, scales, attention, attention_hidden, hidden, out))

    @torch.no_grad()
    def look(self, clip: Clip) -> Look:
        """The views of each clip, as training draws them, and the weights with which they are pooled."""
        views = self.views(clip)
        large, weights = views.transpose(0, 1), self.online.weights(views.flatten(0, 1))
        pooling = {layer: w.unflatten(0, (len(views), -1)).transpose(0, 1) for layer, w in weights.items()}
        return Look(clip.unit(), large=large, pooling=pooling or None)


def _check_scales(scales: Sequence[str], encoder: Encoder) -> None:
    layers = list(encoder.channels)
    if set(scales) - set(layers) or len(set(scales)) != len(scales) or layers[-1] not in scales:
        raise UserError(
            f"model.scales={list(scales)} does not fit the encoder: name layers of "
            f"{', '.join(layers)}, each once, and {layers[-1]} among them"
        )

"""The feature pyramid with a head that PixPro pretrains along with the encoder (Xie et al., CVPR 2021).

PooDLe's appendix I has it as "ResNet-50 + FPN decoder", 124.4 GFLOPs at 512x1024, and the public code has no
pyramid. The structure here is one whose count comes to that (``poodle_lightning.analysis.flops``: 124.44);
another could.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from poodle_lightning.nn.encoder import Decoder
from poodle_lightning.nn.fpn import FPN
from poodle_lightning.types import Features, UserError


class HeadedFPN(Decoder):
    """An FPN, and one head for all of its levels: two 3x3 convolutions with BatchNorm, ReLU between them.

    As one decoder it gives the finest level that it was made for. On ResNet-50 it has 4.52 M parameters.

    Args:
        channels: the encoder's ``{layer: channels}``, from shallow to deep.
        dims: channels of the pyramid and of the head.
        levels: the layers at whose sizes there is a map, from shallow to deep; None: all. What others need
            alone is not trained.

    Attributes:
        fpn: the pyramid.
        head: shared by all levels.

    Raises:
        UserError: a level is no layer of the encoder, or there is none.
    """

    name = "fpn"

    def __init__(
        self, channels: Mapping[str, int], dims: int = 256, levels: Sequence[str] | None = None
    ) -> None:
        super().__init__()
        layers = list(channels)
        wanted = layers if levels is None else list(levels)
        if not wanted or not set(wanted) <= set(layers):
            raise UserError(f"the FPN's levels={wanted} must be among the encoder's layers {layers}")
        self.levels = [layer for layer in layers if layer in wanted]
        self.dims = dims
        first = layers.index(self.levels[0])
        self.level = first - len(layers)
        self.fpn = FPN(dict(list(channels.items())[first:]), dims)
        for layer, block in zip(layers[first:], self.fpn.pyramid.layer_blocks, strict=True):
            block.requires_grad_(layer in self.levels)
        self.head = nn.Sequential(
            nn.Conv2d(dims, dims, 3, padding=1, bias=False),
            nn.BatchNorm2d(dims),
            nn.ReLU(inplace=True),
            nn.Conv2d(dims, dims, 3, padding=1, bias=False),
            nn.BatchNorm2d(dims),
        )

    def pyramid(self, maps: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """All levels ``(B, dims, h, w)`` behind the head, of the encoder's maps ``{layer: (B, C, h, w)}``."""
        found = self.fpn(maps)
        return {layer: self.head(found[layer]) for layer in self.levels}

    def forward(self, features: Features) -> Features:
        """The map ``"fpn" (B, dims, h, w)`` of the finest level, as large as the encoder's there."""
        finest = self.levels[0]
        z = self.head(self.fpn(features.maps)[finest])
        return Features(maps={self.name: z}, strides={self.name: features.strides[finest]})

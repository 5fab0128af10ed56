"""The spatial decoder module of PooDLe (Wang et al., ICLR 2025, section 3.3 and appendix A)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fractions import Fraction

from timm.models.resnet import Bottleneck
from torch import nn
from torch.nn import functional

from poodle_lightning.nn.encoder import Decoder
from poodle_lightning.types import Features, UserError


class SDM(Decoder):
    """Walks from the deepest map to finer ones: residual block at low resolution, upsample, add a lateral.

    Per block: ``z = Bottleneck(z)``; bilinear to the size of the next finer map (twice as large); ``z = z +
    Conv1x1(finer map)``. The lateral is a single 1x1 convolution with bias, as appendix A says; the "2-layer
    convolutional MLP" of the main text would cost 103 GFLOPs, where the paper reports 60.5. On ResNet-50
    the module has 6.43 M parameters. Convolutions start as PyTorch's default has them.

    Args:
        channels: the encoder's ``{layer: channels}``, or just the channels, from shallow to deep.
        dims: channels of every map inside and of the output. Where the deepest map has other ones, a 1x1
            convolution comes first (not in the paper: for small encoders).
        hidden: channels of the 3x3 convolutions; None: ``dims / 8``, the paper's 256 of 2048.
        top_down: False leaves the residual blocks out (ablation row without top-down path).
        lateral: False leaves the laterals out (ablation row without laterals).
        blocks: number of steps; 2 leads from stride 32 to stride 8.

    Raises:
        UserError: there are not enough maps for so many blocks, or ``dims`` is not a multiple of 4.
    """

    name = "sdm"

    def __init__(
        self,
        channels: Mapping[str, int] | Sequence[int],
        dims: int = 2048,
        hidden: int | None = None,
        top_down: bool = True,
        lateral: bool = True,
        blocks: int = 2,
    ) -> None:
        super().__init__()
        counts = list(channels.values() if isinstance(channels, Mapping) else channels)
        if not 0 < blocks < len(counts):
            raise UserError(
                f"SDM blocks={blocks} needs {blocks + 1} maps of the encoder, it has {len(counts)}"
            )
        if dims % 4:
            raise UserError(f"SDM dims={dims} must be a multiple of 4")
        self.dims = dims
        self.level = -1 - blocks
        deepest, finer = counts[-1], counts[-2 : self.level - 1 : -1]
        self.entry = nn.Identity() if deepest == dims else nn.Conv2d(deepest, dims, 1)
        hidden = dims // 8 if hidden is None else hidden
        self.blocks = nn.ModuleList(_block(dims, hidden) if top_down else nn.Identity() for _ in finer)
        self.laterals = nn.ModuleList(nn.Conv2d(count, dims, 1) for count in finer if lateral)

    def forward(self, features: Features) -> Features:
        """The map ``"sdm" (B, dims, H / 8, W / 8)``: size and stride are those of the finest map used."""
        names = list(features.maps)
        z = self.entry(features.maps[names[-1]])
        for i, block in enumerate(self.blocks):
            finer = features.maps[names[-2 - i]]
            z = functional.interpolate(block(z), size=finer.shape[-2:], mode="bilinear", align_corners=False)
            if len(self.laterals):
                z = z + self.laterals[i](finer)
        return Features(maps={self.name: z}, strides={self.name: features.strides[names[self.level]]})


def _block(dims: int, hidden: int) -> nn.Module:
    # A fraction, because the block computes planes * base_width / 64 and cuts off what follows the point.
    width = Fraction(64 * hidden, dims // 4)
    block: nn.Module = Bottleneck(dims, dims // 4, base_width=width)
    return block

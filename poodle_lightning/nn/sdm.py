"""The spatial decoder module of PooDLe (Wang et al., ICLR 2025, section 3.3 and appendix A)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any

import torch
from timm.models.resnet import Bottleneck
from torch import Tensor, nn
from torch.nn import functional

from poodle_lightning.nn.encoder import Decoder
from poodle_lightning.nn.heads import ConvMLP
from poodle_lightning.nn.recompute import recomputed
from poodle_lightning.ops.geometry import island
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
        recompute: the backward pass computes the residual blocks again instead of keeping their inside.

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
        recompute: bool = False,
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
        self.recompute = recompute
        self.level = -1 - blocks
        deepest, finer = counts[-1], counts[-2 : self.level - 1 : -1]
        self.entry = nn.Identity() if deepest == dims else nn.Conv2d(deepest, dims, 1)
        hidden = dims // 8 if hidden is None else hidden
        self.blocks = nn.ModuleList(_block(dims, hidden) if top_down else nn.Identity() for _ in finer)
        self.laterals = nn.ModuleList(nn.Conv2d(count, dims, 1) for count in finer if lateral)

    def forward(self, features: Features, projector: ConvMLP | None = None) -> Features:
        """The map ``"sdm" (B, dims, H / 8, W / 8)``: size and stride are those of the finest map used.

        Args:
            features: the encoder's.
            projector: the map is ``projector(sdm) (B, out, H / 8, W / 8)`` instead, and the ``dims`` channels
                are never made at its size: a 1x1 convolution commutes with bilinear interpolation, whose
                weights sum to 1, so ``W (up(g) + L c + l) + b = up(W g + b) + (W L) c + W l``. Equal to
                ``projector(sdm)`` to rounding, and so are all gradients and BatchNorm statistics. Where
                one of the two convolutions is another layer or has hooks, the plain order is taken.
        """
        names = list(features.maps)
        z = self.entry(features.maps[names[-1]])
        for i, block in enumerate(self.blocks):
            finer = features.maps[names[-2 - i]]
            z = recomputed(block, z) if self.recompute else block(z)
            if i < len(self.blocks) - 1:
                z = self._joined(z, finer, i)
        if projector is None:
            z = self._joined(z, finer, -1)
        elif not self._commutes_with(projector):
            z = projector(self._joined(z, finer, -1))
        elif projector.recompute:
            z = recomputed(lambda g, c: self._projected(g, c, projector), z, finer, of=projector)
        else:
            z = self._projected(z, finer, projector)
        return Features(maps={self.name: z}, strides={self.name: features.strides[names[self.level]]})

    def _joined(self, z: Tensor, finer: Tensor, i: int) -> Tensor:
        """Step ``i`` behind its residual block."""
        z = _upsampled(z, finer)
        return z + self.laterals[i](finer) if len(self.laterals) else z

    def _projected(self, coarse: Tensor, finer: Tensor, projector: ConvMLP) -> Tensor:
        """``projector`` of the last step's result, its first convolution at the coarse map's size."""
        first: Any = projector[0]
        z = _upsampled(first(coarse), finer)
        if len(self.laterals):
            # in place: neither of the two is needed in the backward pass
            z += functional.conv2d(finer, *_product(first, self.laterals[-1]))
        return projector.behind_first(z)

    def _commutes_with(self, projector: ConvMLP) -> bool:
        whole = type(projector).forward is ConvMLP.forward and not _has_hooks(projector)
        return whole and all(map(_is_plain, [projector[0], *self.laterals[-1:]]))


def _upsampled(maps: Tensor, like: Tensor) -> Tensor:
    return functional.interpolate(maps, size=like.shape[-2:], mode="bilinear", align_corners=False)


def _is_plain(layer: nn.Module) -> bool:
    """Whether a layer is a 1x1 convolution and does nothing beside."""
    return (
        isinstance(layer, nn.Conv2d)
        and type(layer).forward is nn.Conv2d.forward
        and (layer.kernel_size, layer.stride, layer.padding, layer.groups) == ((1, 1), (1, 1), (0, 0), 1)
        and not _has_hooks(layer)
    )


def _has_hooks(layer: nn.Module) -> bool:
    kinds = (layer._forward_hooks, layer._forward_pre_hooks, layer._backward_hooks, layer._backward_pre_hooks)
    return any(kinds)


def _product(first: Any, lateral: Any) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of two 1x1 convolutions as one, ``first`` (without its bias) behind ``lateral``."""
    kind = first.weight.dtype
    wide = torch.promote_types(kind, torch.float32)
    with island(first.weight.device.type):
        outer, inner = first.weight.flatten(1).to(wide), lateral.weight.flatten(1).to(wide)
        weight = (outer @ inner).to(kind)[:, :, None, None]
        bias = None if lateral.bias is None else (outer @ lateral.bias.to(wide)).to(kind)
    return weight, bias


def _block(dims: int, hidden: int) -> nn.Module:
    # A fraction, because the block computes planes * base_width / 64 and cuts off what follows the point.
    width = Fraction(64 * hidden, dims // 4)
    block: nn.Module = Bottleneck(dims, dims // 4, base_width=width)
    return block

"""UPerNet (Xiao et al., ECCV 2018) in MMSegmentation's layout, for pyramids and for vision transformers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from poodle_lightning.nn.seg_heads import ConvModule, SegHead, built, classifier, find_layers, resize
from poodle_lightning.types import Features, UserError


class UPerNet(SegHead):
    """Pyramid pooling on the deepest map, a feature pyramid above it, all levels fused, a 1x1 convolution.

    Layers, their names in the state dict and their order of operations are those of MMSegmentation
    (``mmseg/models/decode_heads/uper_head.py``, ``psp_head.py``): ``psp_modules.{i}.1``, ``bottleneck``,
    ``lateral_convs.{i}``, ``fpn_convs.{i}``, ``fpn_bottleneck``, each with ``conv`` and ``bn``, and
    ``conv_seg``. For a ResNet-50 and 19 classes the head has 40.52 M parameters.

    Args:
        layers: four maps, by name or by place from 0, from shallow to deep; None takes the first four of the
            encoder's, for a ResNet ``layer1`` to ``layer4``.
        channels: of everything inside; MMSegmentation's 512, iBOT's 384 for ViT-S.
        pools: sides of the pooled grids.
        dropout: share of the channels left out in training, before the last convolution.
        vit_pyramid: the maps all have one stride: bring them to ×4, ×2, ×1, ×1/2 first (:class:`ViTPyramid`).
        vit_norm: LayerNorm in front of that pyramid.
    """

    def __init__(
        self,
        layers: Sequence[str | int] | None = None,
        channels: int = 512,
        pools: Sequence[int] = (1, 2, 3, 6),
        dropout: float = 0.1,
        vit_pyramid: bool = False,
        vit_norm: bool = True,
    ) -> None:
        super().__init__()
        self.wanted: list[str | int] = [0, 1, 2, 3] if layers is None else list(layers)
        self.channels, self.pools = channels, tuple(pools)
        self.vit_pyramid, self.vit_norm = vit_pyramid, vit_norm
        if len(self.wanted) < 2 or (vit_pyramid and len(self.wanted) != 4):
            raise UserError(f"UPerNet: {len(self.wanted)} layers; give four")
        self.layers: list[str] = []
        self.dropout = nn.Dropout2d(dropout)
        self.pyramid: ViTPyramid | None = None
        self.conv_seg: nn.Conv2d | None = None

    def build(self, channels: Mapping[str, int], strides: Mapping[str, int], classes: int) -> None:
        """See :class:`SegHead`.

        Raises:
            UserError: a map does not exist, or the maps of a ViT are read without ``vit_pyramid``.
        """
        self.layers = find_layers(channels, self.wanted)
        dims = [channels[name] for name in self.layers]
        found = [strides[name] for name in self.layers]
        if self.vit_pyramid:
            if len(set(found)) > 1 or len(set(dims)) > 1:
                raise UserError(
                    "UPerNet: vit_pyramid is for maps of one stride and width (a ViT's): set it to false"
                )
            self.pyramid = ViTPyramid(dims[0], self.vit_norm)
        elif len(set(found)) == 1:
            raise UserError(
                f"UPerNet: {', '.join(self.layers)} all have stride {found[0]}, so they are no pyramid: set "
                "--model.head.vit_pyramid true (and --model.head.layers [3,5,7,11])"
            )
        width = self.channels
        self.psp_modules = nn.ModuleList(
            nn.Sequential(nn.AdaptiveAvgPool2d(side), ConvModule(dims[-1], width, 1)) for side in self.pools
        )
        self.bottleneck = ConvModule(dims[-1] + len(self.pools) * width, width, 3)
        self.lateral_convs = nn.ModuleList(ConvModule(count, width, 1) for count in dims[:-1])
        self.fpn_convs = nn.ModuleList(ConvModule(width, width, 3) for _ in dims[:-1])
        self.fpn_bottleneck = ConvModule(len(dims) * width, width, 3)
        self.conv_seg = classifier(width, classes)

    def forward(self, features: Features) -> Tensor:
        """See :class:`SegHead`; as fine as the first map.

        Raises:
            UserError: a single image in training, whose one pooled cell BatchNorm cannot normalise.
        """
        conv = built(self.conv_seg, self)
        maps = [features.maps[name] for name in self.layers]
        alone = self.training and 1 in self.pools and len(maps[0]) == 1
        if alone and isinstance(self.bottleneck.bn, nn.BatchNorm2d):
            raise UserError(
                "UPerNet cannot normalise the one pooled cell of a single image: give --data.batch_size 2 or "
                "more, or --trainer.sync_batchnorm true on several devices"
            )
        if self.pyramid is not None:
            maps = self.pyramid(maps)
        sizes = [(found.shape[-2], found.shape[-1]) for found in maps]
        levels = [lateral(found) for lateral, found in zip(self.lateral_convs, maps[:-1], strict=True)]
        pooled = [resize(module(maps[-1]), sizes[-1]) for module in self.psp_modules]
        levels.append(self.bottleneck(torch.cat([maps[-1], *pooled], dim=1)))
        for i in range(len(levels) - 1, 0, -1):
            levels[i - 1] = levels[i - 1] + resize(levels[i], sizes[i - 1])
        fused = [conv(level) for conv, level in zip(self.fpn_convs, levels[:-1], strict=True)] + levels[-1:]
        wide = torch.cat([resize(level, sizes[0]) for level in fused], dim=1)
        found: Tensor = conv(self.dropout(self.fpn_bottleneck(wide)))
        return found


class ViTPyramid(nn.Module):
    """Four maps of one stride to ×4, ×2, ×1 and ×1/2 of their size (iBOT, after BEiT).

    ``fpn1`` is two transposed convolutions 2x2 with BatchNorm and GELU between them, ``fpn2`` one, ``fpn3``
    nothing, ``fpn4`` max-pooling 2x2 (bytedance/ibot ``evaluation/semantic_segmentation``).

    Args:
        dims: channels of all maps.
        norm: one LayerNorm over the channels of every map but the last. iBOT runs all four through the
            encoder's own final norm; that norm is inside the encoder here and already behind the last map,
            so that the others get a fresh one.
    """

    def __init__(self, dims: int, norm: bool = True) -> None:
        super().__init__()
        self.norm: nn.LayerNorm | None = nn.LayerNorm(dims, eps=1e-6) if norm else None
        self.fpn1 = nn.Sequential(
            nn.ConvTranspose2d(dims, dims, 2, stride=2),
            nn.BatchNorm2d(dims),
            nn.GELU(),
            nn.ConvTranspose2d(dims, dims, 2, stride=2),
        )
        self.fpn2 = nn.Sequential(nn.ConvTranspose2d(dims, dims, 2, stride=2))

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """``(B, dims, h, w)`` four times to 4h, 2h, h and h/2 rows."""
        first, second, third, last = maps
        if self.norm is not None:
            first, second, third = (
                self.norm(found.movedim(1, -1)).movedim(-1, 1) for found in (first, second, third)
            )
        return [self.fpn1(first), self.fpn2(second), third, functional.max_pool2d(last, 2)]

"""Segmentation heads: what stands between an encoder's maps and a class per pixel.

A head is made without knowing the encoder or the classes, so that a YAML file can name it; ``build`` makes
its layers. Logits are as coarse as the map that was read; the caller upsamples them. Layouts and the names
in the state dict are MMSegmentation's (``mmseg/models/decode_heads``). :class:`~poodle_lightning.nn.upernet.
UPerNet` has its own file.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from poodle_lightning.configured import Configured
from poodle_lightning.types import Features, UserError

INITIAL_STD = 0.01
"""Deviation of the weights of the layer that makes logits, as MMSegmentation starts it; its bias is 0."""


class ConvModule(nn.Module):
    """Convolution without bias, BatchNorm, ReLU; ``conv`` and ``bn`` in the state dict (mmcv's names).

    Args:
        in_dims: channels of the input.
        out_dims: channels of the output.
        kernel: side of the kernel, odd; the map keeps its size.
        dilation: of the kernel.
    """

    def __init__(self, in_dims: int, out_dims: int, kernel: int, dilation: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(
            in_dims, out_dims, kernel, padding=kernel // 2 * dilation, dilation=dilation, bias=False
        )
        self.bn = nn.BatchNorm2d(out_dims)
        nn.init.kaiming_normal_(self.conv.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        """``(B, in, h, w)`` to ``(B, out, h, w)``."""
        return functional.relu(self.bn(self.conv(x)), inplace=True)


class SegHead(nn.Module, Configured, ABC):
    """Features in, logits out."""

    @abstractmethod
    def build(self, channels: Mapping[str, int], strides: Mapping[str, int], classes: int) -> None:
        """Makes the layers.

        Args:
            channels: the encoder's, from shallow to deep.
            strides: the encoder's, same keys.
            classes: number of classes.

        Raises:
            UserError: the head does not fit the encoder.
        """

    @abstractmethod
    def forward(self, features: Features) -> Tensor:
        """Logits ``(B, classes, h, w)``, as coarse as the map that is read."""


class LinearHead(SegHead):
    """One convolution on one map and nothing else: the "linear" readout.

    PooDLe's and FlowE's is DeepLab-v1's (FlowE, section 4.3: the backbone's last stages dilated to stride 8,
    one convolution). How large the kernel is, neither says; 1x1 is linear in the features of one cell and is
    what is taken here, ``kernel`` 3 is the other reading. PiCo's readout is a 1x1 convolution on a map of
    stride 4 (section 4.1).

    Args:
        layer: name of the map, or its place from 0; None reads the last, which is the decoder's where there
            is one.
        kernel: side of the convolution, odd.
        dropout: share of the channels left out in training.
        max_stride: refuse a coarser map: 8 for PooDLe, 4 for PiCo; None takes any.
        norm: BatchNorm without learned scale in front: still linear, for features of any scale. No paper's.
    """

    def __init__(
        self,
        layer: str | int | None = None,
        kernel: int = 1,
        dropout: float = 0.0,
        max_stride: int | None = None,
        norm: bool = False,
    ) -> None:
        super().__init__()
        _check_kernel(kernel)
        self.norm = norm
        self.bn: nn.Module = nn.Identity()
        self.wanted, self.kernel, self.max_stride = layer, kernel, max_stride
        self.layer = ""
        self.dropout = nn.Dropout2d(dropout)
        self.conv_seg: nn.Conv2d | None = None

    def build(self, channels: Mapping[str, int], strides: Mapping[str, int], classes: int) -> None:
        """See :class:`SegHead`; refuses a map coarser than ``max_stride``."""
        name = self.layer = find_layers(channels, [self.wanted])[0]
        if self.max_stride is not None and strides[name] > self.max_stride:
            raise UserError(
                f"the map {name} has stride {strides[name]}, {type(self).__name__} wants {self.max_stride} or"
                f" less: give --model.output_stride {self.max_stride} (ResNet), or an encoder with a decoder "
                "and --model.decoder keep; for a vision transformer, a protocol evaluation/…_vit.yaml"
            )
        self.bn = nn.BatchNorm2d(channels[name], affine=False) if self.norm else nn.Identity()
        self.conv_seg = classifier(channels[name], classes, self.kernel)

    def forward(self, features: Features) -> Tensor:
        """See :class:`SegHead`."""
        conv = built(self.conv_seg, self)
        found: Tensor = conv(self.dropout(self.bn(features.maps[self.layer])))
        return found


class ViTLinear(SegHead):
    """Maps of several blocks side by side, then a 1x1 convolution: iBOT's linear readout of a ViT.

    Source: bytedance/ibot ``evaluation/semantic_segmentation/configs/linear/vit_small_512_ade20k_160k.py``
    (``resize_concat`` of the blocks 3, 5, 7, 11, ``FCNHead`` with ``num_convs=0``).

    Args:
        blocks: places of the maps among the encoder's, counted from 0.
        norm: BatchNorm without learned scale in front, so that blocks of different scale weigh alike (still
            a linear readout; DINOv2 and DINOv3 have it).
        dropout: share of the channels left out in training.
    """

    def __init__(
        self, blocks: Sequence[int] = (3, 5, 7, 11), norm: bool = False, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.blocks, self.norm = tuple(blocks), norm
        self.dropout = nn.Dropout2d(dropout)
        self.layers: list[str] = []
        self.bn: nn.Module = nn.Identity()
        self.conv_seg: nn.Conv2d | None = None

    def build(self, channels: Mapping[str, int], strides: Mapping[str, int], classes: int) -> None:
        """See :class:`SegHead`."""
        self.layers = find_layers(channels, self.blocks)
        count = sum(channels[name] for name in self.layers)
        self.bn = nn.BatchNorm2d(count, affine=False) if self.norm else nn.Identity()
        self.conv_seg = classifier(count, classes)

    def forward(self, features: Features) -> Tensor:
        """See :class:`SegHead`; coarser maps are resized to the first one's size."""
        conv = built(self.conv_seg, self)
        maps = [features.maps[name] for name in self.layers]
        maps = [resize(found, (maps[0].shape[-2], maps[0].shape[-1])) for found in maps]
        found: Tensor = conv(self.dropout(self.bn(torch.cat(maps, dim=1))))
        return found


class FCN(SegHead):
    """Some 3x3 convolutions with BatchNorm and ReLU, then a 1x1 convolution.

    The defaults are MoCo's head for PASCAL VOC (He et al., CVPR 2020, appendix): two convolutions of 256
    channels and dilation 6 on a ResNet whose last stage is dilated to stride 16; VITO finetunes it. One
    convolution without dilation on ``layer3`` is the auxiliary head of MMSegmentation's UPerNet.

    Args:
        layer: name of the map, or its place from 0; None reads the last.
        channels: of the convolutions.
        convs: how many.
        dilation: of the 3x3 kernels.
        dropout: share of the channels left out in training, before the 1x1 convolution.
    """

    def __init__(
        self,
        layer: str | int | None = None,
        channels: int = 256,
        convs: int = 2,
        dilation: int = 6,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if channels < 1 or convs < 1:
            raise UserError(f"FCN needs at least one channel and one convolution, not {channels} and {convs}")
        self.wanted, self.channels, self.count, self.dilation = layer, channels, convs, dilation
        self.layer = ""
        self.dropout = nn.Dropout2d(dropout)
        self.convs = nn.Sequential()
        self.conv_seg: nn.Conv2d | None = None

    def build(self, channels: Mapping[str, int], strides: Mapping[str, int], classes: int) -> None:
        """See :class:`SegHead`."""
        self.layer = find_layers(channels, [self.wanted])[0]
        widths = [channels[self.layer], *[self.channels] * self.count]
        self.convs = nn.Sequential(
            *(ConvModule(widths[i], widths[i + 1], 3, self.dilation) for i in range(self.count))
        )
        self.conv_seg = classifier(self.channels, classes)

    def forward(self, features: Features) -> Tensor:
        """See :class:`SegHead`."""
        conv = built(self.conv_seg, self)
        found: Tensor = conv(self.dropout(self.convs(features.maps[self.layer])))
        return found


# ---- what heads are made of
def classifier(dims: int, classes: int, kernel: int = 1) -> nn.Conv2d:
    """The convolution that makes logits."""
    conv = nn.Conv2d(dims, classes, kernel, padding=kernel // 2)
    nn.init.normal_(conv.weight, std=INITIAL_STD)
    assert conv.bias is not None
    nn.init.zeros_(conv.bias)
    return conv


def resize(x: Tensor, size: tuple[int, int]) -> Tensor:
    """Bilinear, pixel centres mapped to pixel centres (``align_corners=False``)."""
    if x.shape[-2:] == size:
        return x
    return functional.interpolate(x, size=size, mode="bilinear", align_corners=False)


def find_layers(channels: Mapping[str, int], wanted: Sequence[str | int | None]) -> list[str]:
    """Names of maps given by name, by place from 0, or by None for the last.

    Raises:
        UserError: the encoder has no such map.
    """
    names = list(channels)
    found = []
    for one in wanted:
        place = names.index(one) if isinstance(one, str) and one in names else -1 if one is None else one
        if not isinstance(place, int) or not -len(names) <= place < len(names):
            what = f"no map {one!r}" if isinstance(one, str) else f"{len(names)} maps, none at place {one}"
            raise UserError(
                f"the encoder has {what}: choose from {', '.join(names)} (--model.head.layer, .layers or "
                ".blocks), or a head that fits the encoder"
            )
        found.append(names[place])
    return found


def built(layer: nn.Conv2d | None, head: SegHead) -> nn.Conv2d:
    """The layer, once there is one."""
    if layer is None:
        raise RuntimeError(f"{type(head).__name__}.build has not been called")
    return layer


def _check_kernel(kernel: int) -> None:
    if kernel < 1 or kernel % 2 == 0:
        raise UserError(f"kernel {kernel}: give an odd number")

"""ResNet (He et al., CVPR 2016) as torchvision has it ("v1.5": the stride sits in the 3x3 convolution)."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal
from urllib.error import URLError

from timm.models.resnet import BasicBlock, Bottleneck
from torch import Tensor, nn
from torch.nn import functional

from poodle_lightning.nn.encoder import Encoder
from poodle_lightning.nn.recompute import recomputed
from poodle_lightning.nn.weights import load_state, read_state
from poodle_lightning.types import Features, UserError

Depth = Literal[10, 18, 34, 50, 101]
_BLOCKS: dict[Depth, tuple[type[Any], tuple[int, int, int, int]]] = {
    10: (BasicBlock, (1, 1, 1, 1)),
    18: (BasicBlock, (2, 2, 2, 2)),
    34: (BasicBlock, (3, 4, 6, 3)),
    50: (Bottleneck, (3, 4, 6, 3)),
    101: (Bottleneck, (3, 4, 23, 3)),
}
_LAYERS = ("layer1", "layer2", "layer3", "layer4")


class ResNet(Encoder):
    """A ResNet without classifier; maps ``layer1`` ... ``layer4``, vector = mean of ``layer4`` over space.

    Its state dict has the names of torchvision's and timm's ResNets without ``fc``.

    Args:
        depth: 10 (one block per stage), 18, 34, 50 or 101.
        output_stride: input pixels per cell of ``layer4``, counted with the stem's pooling. At 16, 8 and 4
            the strides of the last one, two or three stages become dilation; every second, fourth or eighth
            cell then holds what the undilated network has there. For depth 50 and 101 this is torchvision's
            ``replace_stride_with_dilation`` (8: ``[False, True, True]``), for all depths timm's
            ``output_stride`` (which has no 4).
        width: channels of the stem; the paper's 64.
        weights: None; the name of torchvision weights for this depth, e.g. ``"IMAGENET1K_V2"``; or the path
            of a state dict of torchvision or timm (``fc`` in it is left out).
        stem_pool: False drops the max-pooling and so halves all strides: for small images.
        recompute: keeps for the backward pass only what goes into the stem and into each residual block and
            computes their inside again: a third more multiply-adds, the same results, a fraction of the
            memory (``benchmarks/saved_bytes.py``). (``TimmEncoder`` has no such switch.)
        zero_init_residual: the last BatchNorm of each block starts at scale 0, so that a block begins as its
            shortcut (Goyal et al., 2017; the codes of SimCLR, BYOL, VICReg and PixPro). Only without
            ``weights``.

    Raises:
        UserError: a value that is not offered, or weights that do not exist or do not fit.
    """

    def __init__(
        self,
        depth: Depth = 50,
        output_stride: Literal[4, 8, 16, 32] = 32,
        width: int = 64,
        weights: str | None = None,
        stem_pool: bool = True,
        recompute: bool = False,
        zero_init_residual: bool = False,
    ) -> None:
        if depth not in _BLOCKS:
            raise UserError(
                f"ResNet depth {depth} does not exist: choose from {', '.join(map(str, _BLOCKS))}"
            )
        if output_stride not in (4, 8, 16, 32):
            raise UserError(f"ResNet output_stride {output_stride} is not offered: choose 4, 8, 16 or 32")
        kind, counts = _BLOCKS[depth]
        stem = 4 if stem_pool else 2
        limit = output_stride * stem // 4
        super().__init__(
            channels={name: width * 2**i * kind.expansion for i, name in enumerate(_LAYERS)},
            strides={name: min(stem * 2**i, limit) for i, name in enumerate(_LAYERS)},
        )
        self.recompute = recompute
        self.conv1 = nn.Conv2d(3, width, kernel_size=7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.act1 = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(kernel_size=3, stride=2, padding=1) if stem_pool else nn.Identity()
        channels, dilation, reached = width, 1, stem
        for i, name in enumerate(_LAYERS):
            stride = 2 if self.strides[name] > reached else 1
            # The first convolution of a stage still reads the finer grid of the stage before.
            inner = dilation if i == 0 or stride == 2 else dilation * 2
            setattr(self, name, _stage(kind, counts[i], channels, width * 2**i, stride, dilation, inner))
            channels, dilation, reached = self.channels[name], inner, self.strides[name]
        self._initialise(zero_init_residual)
        if weights is not None:
            load_state(self, _without_classifier(_pretrained(depth, weights)), f"weights {weights!r}")

    def _initialise(self, zero_init_residual: bool) -> None:
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif zero_init_residual and isinstance(module, BasicBlock | Bottleneck):
                last = module.bn3 if isinstance(module, Bottleneck) else module.bn2
                nn.init.zeros_(last.weight)

    def features(self, normalised: Tensor) -> Features:
        """Maps of the four stages and the mean of the last."""
        x = recomputed(self._stem, normalised, of=self.bn1) if self.recompute else self._stem(normalised)
        maps: dict[str, Tensor] = {}
        for name in _LAYERS:
            stage = getattr(self, name)
            if self.recompute:
                for block in stage:
                    x = recomputed(block, x)
            else:
                x = stage(x)
            maps[name] = x
        return Features(
            maps=maps, strides=dict(self.strides), vector=functional.adaptive_avg_pool2d(x, 1).flatten(1)
        )

    def _stem(self, normalised: Tensor) -> Tensor:
        pooled: Tensor = self.maxpool(self.act1(self.bn1(self.conv1(normalised))))
        return pooled


def _stage(
    kind: type[Any], count: int, channels: int, planes: int, stride: int, first: int, inner: int
) -> nn.Sequential:
    """Residual blocks; ``first`` is the dilation of the first 3x3 convolution, ``inner`` the others'."""
    out = planes * kind.expansion
    shortcut = None
    if stride != 1 or channels != out:
        shortcut = nn.Sequential(nn.Conv2d(channels, out, 1, stride=stride, bias=False), nn.BatchNorm2d(out))
    blocks = [
        kind(channels, planes, stride=stride, downsample=shortcut, first_dilation=first, dilation=inner)
    ]
    blocks += [kind(out, planes, dilation=inner) for _ in range(count - 1)]
    return nn.Sequential(*blocks)


def depth_of(counts: tuple[int, ...], bottleneck: bool) -> Depth | None:
    """The depth with these numbers of blocks per stage and this kind of block, if there is one."""
    kind = Bottleneck if bottleneck else BasicBlock
    return next((depth for depth, found in _BLOCKS.items() if found == (kind, counts)), None)


def _pretrained(depth: int, weights: str) -> dict[str, Tensor]:
    if Path(weights).is_file():
        return read_state(weights)
    from torchvision.models import get_model_weights, list_models

    name = f"resnet{depth}"
    known = get_model_weights(name).__members__ if name in list_models() else {}
    if weights not in known:
        names = ", ".join(known) or "none"
        raise UserError(
            f"weights {weights!r}: no such file, and torchvision's weights for {name} are: {names}"
        )
    try:
        return dict(known[weights].get_state_dict(progress=False, check_hash=True))
    except (URLError, OSError) as error:
        raise UserError(
            f"weights {weights!r} for {name} could not be fetched ({error}): "
            "download them elsewhere and give the path"
        ) from error


def _without_classifier(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: value for key, value in state.items() if not key.startswith("fc.")}

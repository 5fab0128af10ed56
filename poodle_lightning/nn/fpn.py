"""Feature pyramids: FPN (Lin et al., CVPR 2017) and the semantic branch on top of it (Kirillov et al., 2019).

Kirillov et al., "Panoptic Feature Pyramid Networks", CVPR 2019, section 3 and Fig. 3; numbers as in
facebookresearch/detectron2 ``modeling/backbone/fpn.py`` and ``modeling/meta_arch/semantic_seg.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn import functional
from torchvision.ops import FeaturePyramidNetwork

from poodle_lightning.nn.encoder import Decoder
from poodle_lightning.types import Features, UserError


class FPN(nn.Module):
    """Maps of one width at all strides: ``P_l = Conv3x3(M_l)``, ``M_l = Conv1x1(C_l) + up(M_{l+1})``.

    The deepest ``M`` is its lateral alone; ``up`` is nearest, to the size of the finer map. Convolutions have
    a bias and no norm. torchvision's module (its weights start as Detectron2's do). On ResNet-50 it has
    3.34 M parameters.

    Args:
        channels: the encoder's ``{layer: channels}``, from shallow to deep; all of them are used.
        dims: channels of every map that comes out.

    Attributes:
        channels: as given.
        dims: as given.

    Raises:
        UserError: there is no map.
    """

    def __init__(self, channels: Mapping[str, int], dims: int = 256) -> None:
        super().__init__()
        if not channels:
            raise UserError("FPN needs at least one map of the encoder")
        self.channels = dict(channels)
        self.dims = dims
        self.pyramid = FeaturePyramidNetwork(list(self.channels.values()), dims)

    def forward(self, maps: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Maps ``(B, dims, h, w)`` at the sizes of the encoder's.

        Args:
            maps: ``{layer: (B, C, h, w)}``; layers that the pyramid was not made for are left out.

        Returns:
            The same layers, from shallow to deep: P2 … P5 under ``layer1`` … ``layer4``.
        """
        found: dict[str, Tensor] = self.pyramid({name: maps[name] for name in self.channels})
        return found


class SemanticFPN(Decoder):
    """An FPN and its semantic branch: one map at the finest stride, 4 for a ResNet.

    Every level of the pyramid goes up to the finest one by steps of a 3x3 convolution (no bias), GroupNorm,
    ReLU and twofold bilinear upsampling, as many as it takes (the finest level: one convolution, no
    upsampling), and the levels are summed. The classifier that Kirillov et al. put behind it is no part of
    it. Upsampling is to the size of the next finer map, which is the twofold one where sides divide by the
    strides and for a dilated encoder none.

    On ResNet-50 it has 4.97 M parameters, 3.34 M of which are the pyramid's.

    Args:
        channels: the encoder's ``{layer: channels}``, from shallow to deep.
        dims: channels of the map, and inside the branch.
        pyramid: channels of the pyramid's maps.
        groups: of GroupNorm.

    Attributes:
        fpn: the pyramid.
        branches: one per level, from shallow to deep, each a list of steps.

    Raises:
        UserError: there is no map, or ``dims`` is no multiple of ``groups``.
    """

    name = "semantic"

    def __init__(
        self, channels: Mapping[str, int], dims: int = 128, pyramid: int = 256, groups: int = 32
    ) -> None:
        super().__init__()
        if dims % groups:
            raise UserError(f"SemanticFPN dims={dims} must be a multiple of groups={groups}")
        self.dims = dims
        self.level = -len(channels)
        self.fpn = FPN(channels, pyramid)
        self.branches = nn.ModuleList(
            nn.ModuleList(_step(dims if i else pyramid, dims, groups) for i in range(max(1, level)))
            for level in range(len(channels))
        )

    def forward(self, features: Features) -> Features:
        """The map ``"semantic" (B, dims, H / 4, W / 4)``: size and stride are those of the finest map.

        Args:
            features: the encoder's.
        """
        return self.join(self.fpn(features.maps), features.strides)

    def join(self, levels: Mapping[str, Tensor], strides: Mapping[str, int]) -> Features:
        """The branch alone, behind the pyramid.

        Args:
            levels: what ``fpn`` returned.
            strides: of its layers.
        """
        names = list(levels)
        total = self._raised(list(levels.values()), 0)
        for level in range(1, len(names)):
            total = total + self._raised(list(levels.values()), level)
        return Features(maps={self.name: total}, strides={self.name: strides[names[0]]})

    def _raised(self, levels: list[Tensor], level: int) -> Tensor:
        """One level at the size of the finest."""
        z = levels[level]
        steps: Any = self.branches[level]
        for i, step in enumerate(steps):
            z = step(z)
            if level:
                size = levels[level - 1 - i].shape[-2:]
                z = functional.interpolate(z, size=size, mode="bilinear", align_corners=False)
        return z


def _step(channels: int, dims: int, groups: int) -> nn.Sequential:
    conv = nn.Conv2d(channels, dims, 3, padding=1, bias=False)
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    return nn.Sequential(conv, nn.GroupNorm(groups, dims), nn.ReLU(inplace=True))

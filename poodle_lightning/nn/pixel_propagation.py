"""PixPro's pixel propagation module (Xie et al., CVPR 2021, Eqs. 3 and 4)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from poodle_lightning.nn.heads import ConvMLP
from poodle_lightning.nn.recompute import recomputed
from poodle_lightning.ops.dense import full_float32
from poodle_lightning.ops.geometry import island
from poodle_lightning.types import UserError

# Similarities of so many pairs of cells at a time; a batch that has more keeps none for the backward pass.
BLOCK_PAIRS = 1 << 24


class PixelPropagation(nn.Module):
    """Every cell becomes a sum over the map: ``y_i = Σ_j max(cos(x_i, x_j), 0)^γ · g(x_j)``.

    g's vectors are brought to length 1 before the sum (zdaxie/PixPro ``contrast/models/PixPro.py``,
    ``featprop``; the paper's Eq. 3 does not say so).

    Args:
        dims: channels.
        layers: of g: 0 is the identity, 1 a 1x1 convolution, 2 two with BatchNorm and ReLU between.
        gamma: γ, 1 or more: below, the gradient has no bound at 0. (Paper: 2)

    Raises:
        UserError: ``layers`` or ``gamma`` is another number.
    """

    def __init__(self, dims: int = 256, layers: int = 1, gamma: float = 2.0) -> None:
        super().__init__()
        if layers not in (0, 1, 2) or gamma < 1:
            raise UserError(
                f"pixel propagation needs layers of 0, 1 or 2 and gamma >= 1, not {layers} and {gamma}"
            )
        self.gamma = gamma
        kinds = (nn.Identity, lambda: nn.Conv2d(dims, dims, 1), lambda: ConvMLP(dims, dims, dims))
        self.transform: nn.Module = kinds[layers]()

    def forward(self, maps: Tensor) -> Tensor:
        """``(B, dims, h, w)`` to the same shape, float32 (float64 stays float64)."""
        values = self.transform(maps)
        with island(maps.device.type), full_float32():
            exact = torch.promote_types(maps.dtype, torch.float32)
            cells = normalize(maps.flatten(2).to(exact), dim=1)
            values = normalize(values.flatten(2).to(exact), dim=1)
            step = max(1, BLOCK_PAIRS // max(1, len(cells) * cells.shape[2]))
            blocks = cells.split(step, dim=2)
            if len(blocks) == 1:
                return self._spread(cells, cells, values).view_as(maps)
            found = [recomputed(self._spread, block, cells, values) for block in blocks]
            return torch.cat(found, dim=2).view_as(maps)

    def _spread(self, block: Tensor, cells: Tensor, values: Tensor) -> Tensor:
        """Sums ``(B, D, k)`` for the cells ``(B, D, k)``, over all ``(B, D, n)``."""
        # again here: a backward pass that computes this a second time is outside the caller's islands
        with island(cells.device.type), full_float32():
            weights = (cells.mT @ block).clamp(min=0.0).pow(self.gamma)
            return values @ weights

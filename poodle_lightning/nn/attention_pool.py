"""Pooling of a map by weights that a small network finds in it (VITO, Parthasarathy et al., section 3)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from poodle_lightning.ops.geometry import island


class AttentionPool(nn.Module):
    """The weighted mean of a map's cells; a network of two layers says each cell's weight.

    ``m = softmax(a(h))`` over all cells of an image, then ``Σ m h``. The paper divides by ``Σ m`` besides,
    which is 1.

    Args:
        channels: of the map.
        hidden: width between the two layers. (Paper: not told; None: ``channels``)
    """

    def __init__(self, channels: int, hidden: int | None = None) -> None:
        super().__init__()
        hidden = channels if hidden is None else hidden
        self.attend = nn.Sequential(
            nn.Conv2d(channels, hidden, 1),
            nn.ReLU(inplace=True),
            nn.Conv2d(hidden, 1, 1, bias=False),  # a softmax takes a bias away again
        )

    def weights(self, maps: Tensor) -> Tensor:
        """Weights ``(N, h, w)`` of maps ``(N, C, h, w)``; they sum to 1, in float32 under any autocast."""
        scores: Tensor = self.attend(maps)[:, 0]
        with island(maps.device.type):
            exact = scores.to(torch.promote_types(scores.dtype, torch.float32))
            return exact.flatten(1).softmax(dim=1).view_as(exact)

    def forward(self, maps: Tensor) -> Tensor:
        """Pooled vectors ``(N, C)`` of maps ``(N, C, h, w)``."""
        weights = self.weights(maps)
        with island(maps.device.type):
            return torch.einsum("nchw,nhw->nc", maps.to(weights.dtype), weights)

"""Feature maps as colours: their first three principal components, fitted once over a set of images."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Principal:
    """Three principal directions of a set of features and the range shown.

    Args:
        mean: ``(C,)`` float64.
        directions: ``(C, 3)`` float64, orthonormal, by falling variance; zero where the set has fewer.
        low: ``(3,)`` projection shown as 0.
        high: ``(3,)`` projection shown as 1.
        share: ``(3,)`` share of the variance along each direction.
    """

    mean: Tensor
    directions: Tensor
    low: Tensor
    high: Tensor
    share: Tensor

    def rgb(self, maps: Tensor) -> Tensor:
        """Feature maps ``(B, C, h, w)`` as colours ``(B, 3, h, w)`` in [0, 1]."""
        rows = maps.detach().cpu().double().movedim(1, -1) - self.mean
        shown = ((rows @ self.directions) - self.low) / (self.high - self.low).clamp(min=1e-12)
        return shown.clamp(0.0, 1.0).movedim(-1, 1).float()


def fit(maps: Tensor, cut: float = 0.01) -> Principal:
    """Fit three directions over the pixels of a set of feature maps.

    Computed from the covariance in float64, without random numbers, so that the same features always get the
    same colours; each direction's largest entry is made positive.

    Args:
        maps: ``(B, C, h, w)``.
        cut: share of pixels beyond each end of the colour range.
    """
    rows = maps.detach().cpu().double().movedim(1, -1).flatten(0, -2)
    mean = rows.mean(dim=0)
    centred = rows - mean
    values, vectors = torch.linalg.eigh(centred.T @ centred / len(rows))
    count = min(3, rows.shape[1])
    top = vectors.flip(-1)[:, :count]
    top = top * top.gather(0, top.abs().argmax(dim=0, keepdim=True)).sign()
    directions = torch.cat([top, top.new_zeros(len(top), 3 - count)], dim=1)
    share = torch.cat([values.flip(0)[:count].clamp(min=0), values.new_zeros(3 - count)])
    ordered = (centred @ directions).sort(dim=0).values
    ends = round(cut * (len(ordered) - 1))
    total = values.clamp(min=0).sum().clamp(min=1e-300)
    return Principal(mean, directions, ordered[ends], ordered[len(ordered) - 1 - ends], share / total)

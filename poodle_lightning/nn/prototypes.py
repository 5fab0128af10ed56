"""SwAV's prototypes: directions with which embeddings are compared (Caron et al., NeurIPS 2020)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from poodle_lightning.ops.dense import full_float32
from poodle_lightning.ops.geometry import island


class Prototypes(nn.Module):
    """K trained rows of length 1; the scores of an embedding are its cosines with them.

    An optimiser moves the rows off their length: :meth:`renormalise` brings them back behind each step, as
    facebookresearch/swav ``main_swav.py`` does before each forward pass.

    Args:
        dims: length of an embedding.
        count: number of prototypes, K.

    Attributes:
        weight: ``(K, dims)``, of length 1 from the start.
    """

    def __init__(self, dims: int, count: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(nn.init.normal_(torch.empty(count, dims)))
        self.renormalise()

    def extra_repr(self) -> str:
        """Shown in the printed network."""
        return f"{self.weight.shape[1]}, {self.weight.shape[0]}"

    @torch.no_grad()
    def renormalise(self) -> None:
        """Brings the rows back to length 1, in place."""
        self.weight.copy_(normalize(self.weight, dim=1))

    def forward(self, embeddings: Tensor) -> Tensor:
        """Scores ``(…, K)``, float32 (float64 stays float64), of embeddings ``(…, dims)`` of any length."""
        with island(embeddings.device.type), full_float32():
            exact = torch.promote_types(embeddings.dtype, torch.float32)
            return normalize(embeddings.to(exact), dim=-1) @ self.weight.to(exact).t()

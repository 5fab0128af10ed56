"""DINO's projection head (Caron et al., 2021; facebookresearch/dino ``vision_transformer.py``)."""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional

from poodle_lightning.types import UserError


class NormedLinear(nn.Module):
    """A linear layer without bias whose rows have a length of their own: ``weight = g · v / ‖v‖`` by rows.

    (Salimans and Kingma, NeurIPS 2016.) The parameters have the names of ``torch.nn.utils.weight_norm``, as
    in DINO's and iBOT's checkpoints.

    Args:
        dims: length of the input.
        out: number of rows.
        norm_last: the lengths stay 1; else they are trained.

    Attributes:
        weight_v: ``(out, dims)`` directions, initialised as those of ``nn.Linear``.
        weight_g: ``(out, 1)`` lengths, 1 at first.
    """

    def __init__(self, dims: int, out: int, norm_last: bool = True) -> None:
        super().__init__()
        self.norm_last = norm_last
        self.weight_g = nn.Parameter(torch.ones(out, 1), requires_grad=not norm_last)
        self.weight_v = nn.Parameter(torch.empty(out, dims))
        nn.init.kaiming_uniform_(self.weight_v, a=math.sqrt(5))

    def extra_repr(self) -> str:
        """Shown in the printed network."""
        out, dims = self.weight_v.shape
        return f"{dims}, {out}, norm_last={self.norm_last}"

    @property
    def weight(self) -> Tensor:
        """``(out, dims)``, what the layer multiplies with."""
        lengths = torch.linalg.vector_norm(self.weight_v, dim=1, keepdim=True)
        return self.weight_v * (self.weight_g / lengths)

    def forward(self, x: Tensor) -> Tensor:
        """``(…, dims)`` to ``(…, out)``."""
        return functional.linear(x, self.weight)


class DINOHead(nn.Module):
    """An MLP to a bottleneck, rows brought to length 1, then a weight-normalised layer to many prototypes.

    The state dict has the names of DINO's: ``mlp.*``, ``last_layer.weight_g``, ``last_layer.weight_v``.

    Args:
        dims: length of the encoder's vectors.
        hidden: length between the MLP's layers.
        bottleneck: length behind the MLP.
        out: number of prototypes, K in the losses.
        norm_last: the last layer's rows have length 1; False: their lengths are trained.
        batch_norm: BatchNorm between the MLP's layers, as for ResNets.
        layers: of the MLP; 1 is a single linear layer to the bottleneck.

    Raises:
        UserError: ``layers`` is below 1.
    """

    def __init__(
        self,
        dims: int,
        hidden: int = 2048,
        bottleneck: int = 256,
        out: int = 65536,
        norm_last: bool = True,
        batch_norm: bool = False,
        layers: int = 3,
    ) -> None:
        super().__init__()
        if layers < 1:
            raise UserError(f"a head of layers={layers} has no output: set layers to 1 or more")
        widths = [dims, *[hidden] * (layers - 1)]
        mlp: list[nn.Module] = []
        for before, behind in pairwise(widths):
            mlp.append(nn.Linear(before, behind))
            if batch_norm:
                mlp.append(nn.BatchNorm1d(behind))
            mlp.append(nn.GELU())
        mlp.append(nn.Linear(widths[-1], bottleneck))
        for layer in mlp:
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=0.02)
                nn.init.zeros_(layer.bias)
        self.mlp = nn.Sequential(*mlp)
        self.last_layer = NormedLinear(bottleneck, out, norm_last)

    def forward(self, x: Tensor) -> Tensor:
        """Logits of ``(…, dims)``, ``(…, out)``."""
        return self.logits(self.project(x))

    def project(self, x: Tensor) -> Tensor:
        """Rows of length 1 in the bottleneck: ``(…, dims)`` to ``(…, bottleneck)``, float32 under autocast.

        BatchNorm takes its statistics over all rows, whatever dimensions they lie in.
        """
        z: Tensor = self.mlp(x.flatten(0, -2)).unflatten(0, x.shape[:-1])
        return functional.normalize(z.to(torch.promote_types(z.dtype, torch.float32)), dim=-1)

    def logits(self, z: Tensor) -> Tensor:
        """``(…, bottleneck)`` to ``(…, out)``.

        The layer is linear, so the logits of a mean of rows are the mean of their logits.
        """
        logits: Tensor = self.last_layer(z)
        return logits

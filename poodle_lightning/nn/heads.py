"""Projectors and predictors: two layers with BatchNorm and ReLU between them (BYOL, Grill et al., 2020)."""

from __future__ import annotations

from torch import Tensor, nn

from poodle_lightning.nn.recompute import recomputed


class ConvMLP(nn.Sequential):
    """1x1 convolution, BatchNorm, ReLU, 1x1 convolution: ``(B, in, h, w)`` to ``(B, out, h, w)``.

    PooDLe's dense projector is 2048 → 4096 → 256, its predictor 256 → 4096 → 256 (appendix A).

    Args:
        in_dims: channels of the input.
        hidden_dims: channels between the two convolutions.
        out_dims: channels of the output.
        bias: whether the first convolution has a bias (the BatchNorm behind it takes it away again; PooDLe's
            code has it, FlowE's has not).
        recompute: the backward pass computes the hidden layer again, which is the largest tensor of a dense
            loss's network, instead of keeping it.
    """

    def __init__(
        self,
        in_dims: int,
        hidden_dims: int = 4096,
        out_dims: int = 256,
        bias: bool = True,
        recompute: bool = False,
    ) -> None:
        super().__init__(
            nn.Conv2d(in_dims, hidden_dims, 1, bias=bias),
            nn.BatchNorm2d(hidden_dims),
            nn.ReLU(inplace=True),
            nn.Conv2d(hidden_dims, out_dims, 1),
        )
        self.recompute = recompute

    def forward(self, maps: Tensor) -> Tensor:
        """``(B, in, h, w)`` to ``(B, out, h, w)``."""
        return recomputed(self.plain, maps, of=self) if self.recompute else self.plain(maps)

    def plain(self, maps: Tensor) -> Tensor:
        """All layers, whatever ``recompute`` says: for a caller that recomputes more than this head."""
        return self.behind_first(self[0](maps))

    def behind_first(self, maps: Tensor) -> Tensor:
        """The layers behind the first: ``(B, hidden, h, w)`` to ``(B, out, h, w)``."""
        for layer in list(self)[1:]:
            maps = layer(maps)
        return maps


class MLP(nn.Sequential):
    """Linear, BatchNorm, ReLU, linear: ``(B, in)`` to ``(B, out)``; BYOL's heads, PooDLe's pooled heads.

    Args:
        in_dims: length of the input vectors.
        hidden_dims: length between the two layers.
        out_dims: length of the output vectors.
        bias: whether the first layer has a bias.
    """

    def __init__(self, in_dims: int, hidden_dims: int = 4096, out_dims: int = 256, bias: bool = True) -> None:
        super().__init__(
            nn.Linear(in_dims, hidden_dims, bias=bias),
            nn.BatchNorm1d(hidden_dims),
            nn.ReLU(inplace=True),
            nn.Linear(hidden_dims, out_dims),
        )

"""The running mean of a teacher's outputs, which keeps DINO from collapsing (Caron et al., 2021)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from poodle_lightning.ops.distributed import mean_across


class Centre(nn.Module):
    """``centre ← momentum · centre + (1 − momentum) · mean``, once per optimiser step.

    What is observed between two steps counts as one batch, over all processes: accumulated batches and a
    batch split over devices move the centre as one large batch does (facebookresearch/dino ``main_dino.py``,
    ``update_center``, moves it at every micro-batch). Nothing is observed in eval mode.

    Args:
        dims: length of the outputs.
        momentum: 0.9 in DINO and iBOT.

    Attributes:
        value: ``(dims,)`` float32, zero at first; in the state dict. What was observed since the last step is
            not.
    """

    value: Tensor

    def __init__(self, dims: int, momentum: float = 0.9) -> None:
        super().__init__()
        self.momentum = momentum
        self.register_buffer("value", torch.zeros(dims))
        # No buffer: DistributedDataParallel overwrites buffers with those of the first process.
        self._sum: Tensor | None = None
        self._rows = 0

    def extra_repr(self) -> str:
        """Shown in the printed network."""
        return f"{len(self.value)}, momentum={self.momentum}"

    @torch.no_grad()
    def observe(self, mean: Tensor, rows: int) -> None:
        """Adds a micro-batch; in eval mode nothing.

        Args:
            mean: ``(dims,)`` mean of the outputs.
            rows: how many outputs it is the mean of: its weight among all that is observed before the step.
        """
        if not self.training:
            return
        seen = mean.detach().to(torch.promote_types(mean.dtype, torch.float32)) * rows
        self._sum = seen if self._sum is None else self._sum + seen
        self._rows += rows

    @torch.no_grad()
    def step(self) -> None:
        """Moves the centre to the mean of all that was observed since the last step, and forgets it.

        With several processes all must call it, and all must have observed something or none. Without
        anything observed the centre stays.
        """
        if self._sum is None:
            return
        count = self._sum.new_full((1,), float(self._rows))  # may differ between processes
        total = mean_across(torch.cat([self._sum, count]))
        self.value.lerp_((total[:-1] / total[-1:]).to(self.value), 1.0 - self.momentum)
        self._sum, self._rows = None, 0

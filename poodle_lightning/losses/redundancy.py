"""VICReg: views agree, no dimension goes flat, no two say the same (Bardes, Ponce, LeCun, ICLR 2022)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import relu

from poodle_lightning.ops.dense import full_float32
from poodle_lightning.ops.distributed import gather
from poodle_lightning.ops.geometry import island


def vicreg(
    first: Tensor, second: Tensor, invariance: float = 25.0, variance: float = 25.0, covariance: float = 1.0
) -> dict[str, Tensor]:
    """The three terms of VICReg, weighted; their sum is the loss.

    As facebookresearch/vicreg ``main_vicreg.py`` has them: the mean squared error; ``max(0, 1 − √(var +
    1e-4))``, averaged over dimensions and over both branches (the paper's Eq. 6 adds the branches); the
    squares of the covariance matrix off its diagonal, over D, added over the branches. Variances and
    covariances are of the rows of all processes, with gradient, and unbiased.

    The squares of XᵀX and of XXᵀ have the same sum, so the smaller of both is made: with 2,048 rows of 8,192
    dimensions that is a sixteenth of the memory and a quarter of the operations.

    Args:
        first: ``(B, D)`` embeddings of one view, not normalised. All processes must have the same shape.
        second: ``(B, D)`` of the other.
        invariance: weight.
        variance: weight.
        covariance: weight.

    Returns:
        ``{"invariance", "variance", "covariance"}``: scalars, float32 (float64 stays float64). The first is
        of this process' rows, the others are the same in all processes.

    Raises:
        ValueError: all processes have one row together, which has no variance.
    """
    with island(first.device.type), full_float32():
        exact = torch.promote_types(first.dtype, torch.float32)
        both = torch.stack([first.to(exact), second.to(exact)])
        rows = gather(both, dim=1)
        count, dims = rows.shape[1:]
        if count < 2:
            raise ValueError("vicreg needs two rows or more, to have a variance")
        rows = rows - rows.mean(dim=1, keepdim=True)
        turned = rows.transpose(1, 2)
        products = rows @ turned if count <= dims else turned @ rows
        energies = rows.square().sum(dim=1)  # (2, D), the diagonal of XᵀX
        apart = products.square().sum() - energies.square().sum()
        flat = relu(1.0 - (energies / (count - 1) + 1e-4).sqrt())
        return {
            "invariance": invariance * (both[0] - both[1]).square().mean(),
            "variance": variance * flat.mean(),
            "covariance": covariance * apart / ((count - 1) ** 2 * dims),
        }

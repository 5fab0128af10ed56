"""MAE's loss on pixels of masked patches (He et al., CVPR 2022; facebookresearch/mae ``models_mae.py``)."""

from __future__ import annotations

import torch
from torch import Tensor

from poodle_lightning.ops.geometry import Size, island


def patchify(images: Tensor, patch: int) -> Tensor:
    """Images as rows of patches.

    Args:
        images: ``(B, 3, H, W)``.
        patch: side of a patch in pixels, a divisor of both sides of the image.

    Returns:
        ``(B, n, patch · patch · 3)``: patches row by row; in a patch row, column, then colour, as MAE has it.

    Raises:
        ValueError: ``patch`` does not divide the sides.
    """
    height, width = images.shape[2:]
    if height % patch or width % patch:
        raise ValueError(f"images of {height}x{width} pixels have no whole patches of {patch}")
    cells = images.unflatten(3, (-1, patch)).unflatten(2, (-1, patch))  # (B, 3, h, p, w, p)
    return cells.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)


def unpatchify(patches: Tensor, patch: int, size: Size) -> Tensor:
    """The images of :func:`patchify`'s rows.

    Args:
        patches: ``(B, n, patch · patch · 3)``.
        patch: side of a patch in pixels.
        size: ``(H, W)`` of the images.

    Returns:
        ``(B, 3, H, W)``.
    """
    grid = (size[0] // patch, size[1] // patch)
    cells = patches.unflatten(1, grid).unflatten(3, (patch, patch, 3))  # (B, h, w, p, p, 3)
    return cells.permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3)


def patch_statistics(patches: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and deviation of each patch by which MAE normalises its targets.

    Args:
        patches: ``(B, n, p · p · 3)``.

    Returns:
        mean and ``√(variance + 1e-6)``, ``(B, n, 1)`` each; the variance is unbiased and of all colours at
        once.
    """
    variance, mean = torch.var_mean(patches, dim=-1, keepdim=True)
    return mean, (variance + 1e-6).sqrt()


def masked_mse(predicted: Tensor, target: Tensor, mask: Tensor, normalise: bool = True) -> Tensor:
    """Mean squared error of the masked patches.

    Args:
        predicted: ``(B, n, p · p · 3)``.
        target: the same of the true image.
        mask: ``(B, n)`` bool, true where the encoder did not see the patch.
        normalise: each target patch has its mean taken away and is divided by its deviation
            (``norm_pix_loss``).

    Returns:
        Scalar, float32 (float64 stays float64): the mean over all masked patches of the batch; 0 where none
        is masked.
    """
    with island(predicted.device.type):
        exact = torch.promote_types(predicted.dtype, torch.float32)
        predicted, target = predicted.to(exact), target.to(exact)
        if normalise:
            mean, deviation = patch_statistics(target)
            target = (target - mean) / deviation
        errors = (predicted - target).square().mean(dim=-1)
        return (errors * mask).sum() / mask.sum().clamp(min=1)

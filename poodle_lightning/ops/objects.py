"""Objects found by attention heads and followed through a clip: DoRA, Eq. 2 to 7 (Venkataramanan et al.).

ICLR 2024. In the paper's letters: A heads' attention of [CLS] to the patches, Q queries, K keys, Z̃ patch
tokens, P object prototypes, P′ refined ones, M* transport plan, T and T′ cross-attention. B clips of T frames
of n patches, d channels with all heads side by side, k objects. "The code" is ``MOT`` in
shashankvkt/DoRA_ICLR24 ``utils.py``. All frames and objects at once; everything is float32 under any autocast
(float64 stays float64).
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from poodle_lightning.ops.dense import full_float32
from poodle_lightning.ops.distributed import mean_across
from poodle_lightning.ops.geometry import Size, island
from poodle_lightning.ops.sinkhorn import transport


def _exact(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def prototypes(attention: Tensor, queries: Tensor) -> Tensor:
    """Object prototypes ``P = A Q``: queries of the first frame, weighted by some heads' attention (Eq. 2).

    Args:
        attention: ``(B, k, n)`` of [CLS] to the patches. The rows are parts of softmaxes that [CLS] itself is
            in; they are not made to sum to 1 again, as in the code.
        queries: ``(B, n, d)`` of the patches.

    Returns:
        ``(B, k, d)``.
    """
    with island(attention.device.type), full_float32():
        return _exact(attention) @ _exact(queries)


def refine(
    prototypes: Tensor,
    patches: Tensor,
    epsilon: float = 0.05,
    iterations: int = 30,
    mass: Literal["patch", "total"] = "patch",
    normalise: bool = True,
) -> Tensor:
    """Refined prototypes ``P′ = M* Z̃``, M* the transport plan between prototypes and patches (Eq. 4, 5).

    Args:
        prototypes: ``(B, k, d)``.
        patches: ``(B, n, d)`` tokens of the first frame behind the final norm.
        epsilon: see :func:`poodle_lightning.ops.sinkhorn.transport`.
        iterations: likewise.
        mass: ``"patch"``: every patch is shared out among the objects with weights that sum to 1, as in the
            code (n times the plan); ``"total"``: the plan itself, mass 1 in all, as in the paper. The second
            gives prototypes n times shorter, so a flatter softmax in :func:`track`.
        normalise: patches are brought to length 1 first, as in the code; False: as they are, as in the paper.

    Returns:
        ``(B, k, d)``.
    """
    with island(patches.device.type), full_float32():
        tokens = _exact(patches)
        if normalise:
            tokens = functional.normalize(tokens, dim=-1)
        plan = transport(_exact(prototypes) @ tokens.transpose(1, 2), epsilon, iterations)
        refined = plan @ tokens
        return refined * tokens.shape[1] if mass == "patch" else refined


def track(prototypes: Tensor, keys: Tensor) -> Tensor:
    """Cross-attention of the objects with every frame, ``softmax(P Kᵗᵀ / √d)`` over its patches (Eq. 3, 6).

    Args:
        prototypes: ``(B, k, d)``; refined: Eq. 6, else Eq. 3.
        keys: ``(B, T, n, d)`` of the patches, without [CLS].

    Returns:
        ``(B, T, k, n)``; rows sum to 1.
    """
    with island(keys.device.type), full_float32():
        frames, patches, dims = keys.shape[1:]
        scaled = _exact(prototypes) * dims**-0.5
        scores = scaled @ _exact(keys).flatten(1, 2).transpose(1, 2)
        return scores.unflatten(2, (frames, patches)).transpose(1, 2).softmax(dim=-1)


def hard_masks(tracks: Tensor) -> Tensor:
    """Patches on which an object is above the average, as in the code.

    A track is divided by its length over the patches of its frame. It is then compared with one threshold per
    time and object: the mean over the patches *and over the batch*, so what is masked in a clip depends a
    little on the others. The code's batch is that of one device. Here the mean goes over all processes, which
    must all call: a batch split over devices is masked as a whole one is. Accumulated batches stay apart.

    Args:
        tracks: ``(B, T, k, n)``.

    Returns:
        ``(B, T, k, n)`` bool, true where the image is kept.
    """
    with island(tracks.device.type):
        directions = functional.normalize(_exact(tracks), dim=-1)
        return directions > mean_across(directions.mean(dim=(0, 3), keepdim=True))


def soft_masks(tracks: Tensor, scale: Literal["peak", "none"] = "peak") -> Tensor:
    """What an image is multiplied with in the paper's form of masking (Eq. 7).

    Args:
        tracks: ``(B, T, k, n)``.
        scale: ``"peak"``: every track is divided by its largest value, so that the object is seen as it is.
            ``"none"``: Eq. 7 to the letter, which names no scale: rows sum to 1, an image of 196 patches is
            multiplied with 1 / 196 on average and is as good as black.

    Returns:
        ``(B, T, k, n)`` in [0, 1].
    """
    tracks = _exact(tracks)
    return tracks / tracks.amax(dim=-1, keepdim=True) if scale == "peak" else tracks


def enlarge(masks: Tensor, size: Size, mode: Literal["nearest", "bilinear"]) -> Tensor:
    """Masks on the grid of patches brought to the pixels of the image.

    Args:
        masks: ``(B, T, k, h, w)`` bool or floating.
        size: height and width of the image.
        mode: ``"nearest"`` for hard masks: each patch is one block of pixels; ``"bilinear"`` for soft ones.

    Returns:
        ``(B, T, k, *size)`` floating; float32 where the masks were bool.
    """
    values = masks if masks.is_floating_point() else masks.float()
    large = functional.interpolate(values.flatten(0, 1), size=size, mode=mode)
    return large.unflatten(0, masks.shape[:2])

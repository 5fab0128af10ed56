"""Which patches a network does not see: blocks (BEiT, iBOT), attention (AttMask), at random (MAE).

What is drawn is drawn on the host from keys, one per image, so it is the same however a batch is split. What
depends on the network, the order of its attention, stays on the device: the host draws which *ranks* are
hidden, and one look-up puts them to patches. So the host always knows how many are.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from poodle_lightning.ops.random import fold, permutation, randint, uniform

AttentionMode = Literal["high", "hint", "low", "random"]

_ATTEMPTS = 10
"""Tries per block before an image has enough, as in BEiT's generator."""


def ratios_fit(choices: Sequence[float], spread: Sequence[float]) -> bool:
    """Whether there is a width for every centre, and no ratio within it leaves [0, 1]."""
    inside = (0 <= width <= centre <= 1 - width for centre, width in zip(choices, spread, strict=False))
    return 0 < len(choices) == len(spread) and all(inside)


def mask_ratios(
    keys: Tensor, choices: Sequence[float] = (0.0, 0.3), spread: Sequence[float] = (0.0, 0.2)
) -> Tensor:
    """Which share of its patches each image hides.

    One of ``choices`` is drawn, then a number within ``spread`` of it (bytedance/ibot ``loader.py``,
    ``get_pred_ratio``: by default half of the images hide nothing, the others 10 to 50 %).

    Args:
        keys: ``(B,)`` int64 on the host.
        choices: centres.
        spread: largest distance from the centre, one for each.

    Returns:
        ``(B,)`` float64 on the host.

    Raises:
        ValueError: the two have different lengths, or a ratio may leave [0, 1].
    """
    if not ratios_fit(choices, spread):
        raise ValueError(f"ratios {tuple(choices)} ± {tuple(spread)} leave the interval from 0 to 1")
    pairs = list(zip(choices, spread, strict=True))
    chosen = randint(fold(keys, "choice"), len(pairs))[:, 0]
    centres, widths = torch.tensor(pairs, dtype=torch.float64)[chosen].unbind(1)
    return centres + widths * uniform(fold(keys, "ratio"), 1, -1.0, 1.0, dtype=torch.float64)[:, 0]


def block_masks(
    keys: Tensor,
    ratios: Tensor,
    grid: tuple[int, int],
    aspect: tuple[float, float] = (0.3, 1 / 0.3),
) -> Tensor:
    """Masks of rectangles of patches, added until an image has what it should or no further one fits.

    As BEiT's generator in iBOT's form (bytedance/ibot ``loader.py``): a block's area is uniform between
    (smaller side // 3)² and what is still wanted, the logarithm of height over width uniform. It is taken if
    it is smaller than the grid both ways, adds a patch, and adds no more than what is wanted; ten failures in
    a row end it. All images at once, one round per block.

    Args:
        keys: ``(B,)`` int64 on the host.
        ratios: ``(B,)`` wanted share of each image, on the host.
        grid: height and width in patches.
        aspect: least and largest height over width of a block.

    Returns:
        ``(B, h, w)`` bool on the host; never more than ``ratios · h · w`` of an image.
    """
    height, width = grid
    wanted = ratios.numpy().astype(np.float64) * height * width
    masks = np.zeros((len(keys), height, width), dtype=bool)
    count = np.zeros(len(keys))
    going = count < wanted
    rows, columns = np.arange(height), np.arange(width)
    turn = 0
    while going.any():
        missing = wanted - count
        draws = uniform(fold(keys, "block", turn), 4 * _ATTEMPTS, dtype=torch.float64).numpy()
        top, left, tall, wide = _boxes(draws.reshape(-1, _ATTEMPTS, 4), missing, grid, aspect)
        added = tall * wide - _inside(masks, top, left, tall, wide)
        fits = (tall < height) & (wide < width) & (added > 0) & (added <= missing[:, None])
        going &= fits.any(axis=1)
        first = (np.arange(len(keys)), fits.argmax(axis=1))
        y, x, dy, dx = (part[first][:, None] for part in (top, left, tall, wide))
        block = ((rows >= y) & (rows < y + dy))[:, :, None] & ((columns >= x) & (columns < x + dx))[:, None]
        masks |= block & going[:, None, None]
        count = masks.sum(axis=(1, 2))
        going &= count < wanted
        turn += 1
    return torch.from_numpy(masks)


def _boxes(
    draws: np.ndarray, missing: np.ndarray, grid: tuple[int, int], aspect: tuple[float, float]
) -> tuple[np.ndarray, ...]:
    """Top, left, height and width of the tried blocks, ``(B, attempts)`` each; some do not fit the grid."""
    height, width = grid
    least = (min(grid) // 3) ** 2
    area = least + draws[..., 0] * (missing[:, None] - least)
    ratio = np.exp(math.log(aspect[0]) + draws[..., 1] * math.log(aspect[1] / aspect[0]))
    area = np.maximum(area, 0.0)  # of images that want no more
    tall = np.rint(np.sqrt(area * ratio)).astype(np.int64)
    wide = np.rint(np.sqrt(area / ratio)).astype(np.int64)
    top = (draws[..., 2] * np.maximum(height - tall + 1, 1)).astype(np.int64)
    left = (draws[..., 3] * np.maximum(width - wide + 1, 1)).astype(np.int64)
    return top, left, tall, wide


def _inside(
    masks: np.ndarray, top: np.ndarray, left: np.ndarray, tall: np.ndarray, wide: np.ndarray
) -> np.ndarray:
    """How many patches of each block are masked already, from sums over all that lies above and left."""
    sums = np.pad(masks.astype(np.int64).cumsum(axis=1).cumsum(axis=2), ((0, 0), (1, 0), (1, 0)))
    image = np.arange(len(masks))[:, None]
    bottom, right = np.minimum(top + tall, masks.shape[1]), np.minimum(left + wide, masks.shape[2])
    whole = sums[image, bottom, right] - sums[image, top, right]
    return whole - sums[image, bottom, left] + sums[image, top, left]


def shown_again(counts: Tensor, patches: int, show: float, hint_from: float) -> Tensor:
    """How many of the hidden patches of each image ``"hint"`` shows again.

    Args:
        counts: ``(B,)`` patches to hide, int on the host.
        patches: of an image.
        show: see :func:`attention_masks`.
        hint_from: likewise.

    Returns:
        ``(B,)`` int64 on the host.
    """
    return (show * counts.double()).long().minimum(counts.clamp(max=int(hint_from * patches)))


def attention_masks(
    attention: Tensor,
    keys: Tensor,
    counts: Tensor,
    mode: AttentionMode = "high",
    show: float = 0.1,
    hint_from: float = 0.1,
) -> Tensor:
    """Masks of the patches that a teacher attends to (AttMask, Kakogeorgiou et al., ECCV 2022).

    ``"high"`` hides the most attended patches, ``"low"`` the least, ``"random"`` any. ``"hint"`` hides the
    most attended and then shows some of the very first again: ``int(show · count)`` drawn from the
    ``int(hint_from · n)`` most attended (gkakogeorgiou/attmask ``attmask.py``; there the number shown comes
    from a second draw of the ratio, here from the image's own).

    Args:
        attention: ``(B, n)`` of [CLS] to the patches, averaged over heads; on any device.
        keys: ``(B,)`` int64 on the host.
        counts: ``(B,)`` patches to hide per image, int on the host; 0 hides nothing.
        mode: which patches.
        show: share of the hidden patches that are shown again (``"hint"``).
        hint_from: share of all patches among which those are drawn (``"hint"``).

    Returns:
        ``(B, n)`` bool on the device of ``attention``; exactly ``counts`` are true in each row, with
        ``"hint"`` fewer by :func:`shown_again`. Of equally attended patches the order is the sort's.
    """
    patches = attention.shape[1]
    place = torch.arange(patches)
    hidden = place < counts[:, None]
    if mode == "hint":
        pool = counts.clamp(max=int(hint_from * patches))[:, None]
        drawn = uniform(fold(keys, "hint"), patches, dtype=torch.float64).masked_fill_(place >= pool, 2.0)
        order = drawn.argsort(dim=1, stable=True).argsort(dim=1)
        hidden &= order >= shown_again(counts, patches, show, hint_from)[:, None]
    device = attention.device
    hidden = hidden.to(device, non_blocking=device.type == "cuda")
    if mode == "random":
        ranks = permutation(fold(keys, "hidden"), patches).to(device, non_blocking=device.type == "cuda")
    else:
        order = attention.float().argsort(dim=1, descending=mode != "low", stable=True)
        ranks = order.argsort(dim=1)
    return hidden.gather(1, ranks)


def random_keep(keys: Tensor, n: int, share: float) -> Tensor:
    """Which patches MAE's encoder sees (facebookresearch/mae ``models_mae.py``, ``random_masking``).

    Args:
        keys: ``(B,)`` int64 on the host.
        n: patches of an image.
        share: of them that are hidden; 0.75 in the paper.

    Returns:
        ``(B, K)`` int64 on the host, patches counted row by row, in random order; K = int(n · (1 − share)).

    Raises:
        ValueError: no patch is left.
    """
    kept = int(n * (1 - share))
    if not 0 < kept <= n:
        raise ValueError(f"hiding {share} of {n} patches leaves {kept}")
    return permutation(fold(keys, "keep"), n)[:, :kept]


def masked_tokens(mask: Tensor, total: int) -> tuple[Tensor, Tensor]:
    """Where the masked patches of a batch are, of which the host knows the number: no device is asked for it.

    Args:
        mask: ``(B, n)`` bool on any device.
        total: how many are true in all of it.

    Returns:
        ``index (total,)`` int64 into the ``B · n`` rows, image by image in their order, and ``weight
        (total,)`` float32, 1 / (number masked in that image) / B. So Σ weight · loss is the mean over images
        of the mean over their masked patches, and 0 of an image without. Where ``total`` is 0 there is one
        row, of weight 0: whatever it goes through still gets a gradient.
    """
    flat = mask.flatten()
    index = flat.to(torch.uint8).argsort(descending=True, stable=True)[: max(total, 1)]
    share = mask / (mask.sum(dim=1, keepdim=True).clamp(min=1) * len(mask))  # 0 where not masked
    return index, share.flatten().index_select(0, index)

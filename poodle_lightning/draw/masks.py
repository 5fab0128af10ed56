"""Pictures of masks that follow objects: some frames of a video with the ids of its pixels laid over them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from poodle_lightning.draw.canvas import sheet


def spread_frames(total: int, count: int) -> list[int]:
    """Numbers of ``count`` frames, evenly spread from the first to the last of ``total``; all, if fewer."""
    if total <= count:
        return list(range(total))
    return [round(place * (total - 1) / (count - 1)) for place in range(count)] if count > 1 else [0]


def ids_overlay(images: Tensor, ids: Tensor, colours: Tensor, strength: float = 0.5) -> Tensor:
    """Images with every object in its colour: its border full, its inside blended.

    Args:
        images: ``(T, 3, H, W)`` in [0, 1].
        ids: ``(T, H, W)`` of the same size; 0 is background and left as it is.
        colours: ``(256, 3)`` in [0, 1], of the ids.
        strength: of the inside; 0 leaves the image, 1 covers it.

    Returns:
        ``(T, 3, H, W)`` in [0, 1], on the host.
    """
    ground, ids = images.detach().float().cpu().clamp(0, 1), ids.detach().cpu().long()
    around = F.pad(ids[:, None].float(), [1, 1, 1, 1], mode="replicate")[:, 0].long()
    sides = (around[:, :-2, 1:-1], around[:, 2:, 1:-1], around[:, 1:-1, :-2], around[:, 1:-1, 2:])
    border = torch.stack([side != ids for side in sides]).any(dim=0)
    share = torch.where(border, 1.0, strength) * (ids > 0)
    return ground.lerp(colours[ids].movedim(-1, 1), share[:, None])


def mask_strip(frames: Tensor, truth: Tensor, guess: Tensor, colours: Tensor, width: int = 240) -> Tensor:
    """Frames of a video from left to right: as they are, with the true masks, with those that were found.

    Borders are drawn at the picture's size. The cells have the shape of the masks, also where the frames were
    squeezed for the network.

    Args:
        frames: ``(T, 3, H, W)`` in [0, 1].
        truth: ``(T, h, w)`` ids.
        guess: the same.
        colours: ``(256, 3)`` in [0, 1], of the ids.
        width: of a cell in pixels.

    Returns:
        ``(3, H', W')`` in [0, 1].
    """
    size = (max(1, round(width * truth.shape[-2] / truth.shape[-1])), width)
    shown = F.interpolate(frames.detach().float().cpu(), size=size, mode="bilinear", antialias=True)
    rows = [shown]
    for ids in (truth, guess):
        small = F.interpolate(ids.detach().cpu()[:, None].float(), size=size, mode="nearest-exact")
        rows.append(ids_overlay(shown, small[:, 0], colours))
    return sheet(list(torch.cat(rows)), columns=len(frames), paper=1.0)

"""Rows of pictures of a clip's objects: the heads they come from, frame by frame what each covers."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from poodle_lightning.draw.attention import head_overlays, masked_frames, object_colours, to_size, tracks_rgb
from poodle_lightning.draw.canvas import fit
from poodle_lightning.types import Objects

_BORDER = 4


def chosen_heads(
    image: Tensor, heads: Tensor, chosen: tuple[int, ...], border: int = _BORDER
) -> list[Tensor]:
    """Every head's attention over the image; heads that became objects are framed in the object's colour.

    Args:
        image: ``(3, H, W)`` in [0, 1].
        heads: ``(heads, h, w)``.
        chosen: numbers of the heads, in the order of the objects; empty where none became one.
        border: width of the frame in pixels, added around the picture.

    Returns:
        One picture per head, those of chosen heads larger by the frame.
    """
    shades = dict(zip(chosen, object_colours(len(chosen)), strict=True))
    drawn = []
    for number, picture in enumerate(head_overlays(image, heads)):
        if number in shades:
            framed = F.pad(picture, [border] * 4)
            outside = F.pad(torch.zeros(picture.shape[-2:], dtype=torch.bool), [border] * 4, value=True)
            drawn.append(torch.where(outside, shades[number].reshape(3, 1, 1), framed))
        else:
            drawn.append(picture)
    return drawn


def restored_patches(crops: Tensor, hidden: Tensor, restored: Tensor) -> Tensor:
    """Crops whose hidden patches show what was predicted for them, the others what is there.

    Args:
        crops: ``(B, 3, H, W)`` in [0, 1].
        hidden: ``(B, h, w)`` bool.
        restored: ``(B, 3, H, W)``; values outside [0, 1] are cut.
    """
    where = to_size(hidden, (crops.shape[-2], crops.shape[-1]))[:, None] > 0.5
    return torch.where(where, restored.detach().float().cpu(), crops.detach().float().cpu()).clamp(0, 1)


def object_rows(objects: Objects, number: int, width: int, most: int = 6) -> dict[str, Tensor]:
    """The clip as rows of pictures, one picture per frame.

    Args:
        objects: of several clips.
        number: which clip.
        width: of a picture in pixels, about.
        most: how many objects' masked frames are shown, the first ones.

    Returns:
        What the row shows → ``(T, 3, H, W)`` in [0, 1]: ``frames``, ``attention`` as the heads give it,
        ``refined`` where that is another, ``object 1`` and so on.
    """
    frames = fit(objects.frames[number], width)
    masks = objects.masks[number, :, :most]
    # what keeps or hides whole patches is shown so, and not smoothed
    hard = bool(((masks == 0) | (masks == 1)).all())
    shown = masked_frames(frames, masks.bool() if hard else masks)
    rows = {
        "frames": frames,
        "attention": tracks_rgb(frames, objects.raw[number]),
    }
    if not torch.equal(objects.raw, objects.tracks):
        rows["refined"] = tracks_rgb(frames, objects.tracks[number])
    return rows | {f"object {i + 1}": shown[:, i] for i in range(shown.shape[1])}

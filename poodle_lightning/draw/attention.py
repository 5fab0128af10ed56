"""Pictures of attention: heat over an image, objects and their tracks in colour, what a mask leaves, boxes.

Objects are shown as in DoRA's Figures 4 to 6 (Venkataramanan et al., ICLR 2024): the first is blue, the
second red, the third green, and where two overlap their colours add up. Maps lie on a grid of patches; they
are brought to the image's size bilinearly, or, where they are yes or no, patch by patch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from poodle_lightning.draw.canvas import MAGENTA, blend
from poodle_lightning.draw.flow import hsv_to_rgb

_FIRST = ((0.0, 0.0, 1.0), (1.0, 0.0, 0.0), (0.0, 1.0, 0.0))
GREEN = (0.0, 0.85, 0.2)
# The colour that ImageNet's mean is: what a network sees where its normalised input is 0.
MEAN_COLOUR = (0.485, 0.456, 0.406)
Range = Literal["frame", "clip"]


def object_colours(count: int) -> Tensor:
    """RGB of k objects, ``(k, 3)`` in [0, 1]: blue, red, green; more than three spread over the hues."""
    if count <= len(_FIRST):
        return torch.tensor(_FIRST[:count]).reshape(count, 3)
    hues = (2 / 3 + torch.arange(count) / count).remainder(1.0)[:, None, None]
    return hsv_to_rgb(hues, torch.ones_like(hues), torch.ones_like(hues)).reshape(count, 3)


def spread(maps: Tensor, dims: Sequence[int] = (-2, -1)) -> Tensor:
    """Maps stretched to [0, 1] over some dimensions; a map without contrast is 0."""
    wide = maps.detach().float().cpu()
    low, high = wide.amin(tuple(dims), keepdim=True), wide.amax(tuple(dims), keepdim=True)
    return (wide - low) / (high - low).clamp(min=torch.finfo(torch.float32).tiny)


def to_size(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """Maps ``(..., h, w)`` at the size of an image, ``(..., H, W)`` float32.

    Args:
        maps: float (bilinear, as DoRA upsamples) or bool (every cell repeated).
        size: ``(H, W)``.
    """
    host = maps.detach().cpu()
    flat = host.reshape(-1, 1, *host.shape[-2:]).float()
    if host.dtype == torch.bool:
        made = F.interpolate(flat, size=size, mode="nearest")
    else:
        made = F.interpolate(flat, size=size, mode="bilinear", align_corners=False)
    return made.reshape(*host.shape[:-2], *size)


def heat(values: Tensor, colours: str = "inferno") -> Tensor:
    """Values ``(..., H, W)`` in [0, 1] as colours ``(..., 3, H, W)``, by one of Matplotlib's colour maps."""
    from matplotlib import colormaps

    table = torch.from_numpy(colormaps[colours](range(256))[:, :3]).float()
    return table[(values.clamp(0, 1) * 255).round().long()].movedim(-1, -3)


def attention_overlay(
    images: Tensor, attention: Tensor, strength: float = 0.6, colours: str = "inferno"
) -> Tensor:
    """Images with the heat of one attention map each laid over them.

    Args:
        images: ``(B, 3, H, W)`` in [0, 1].
        attention: ``(B, h, w)``; each is stretched over its own range.
        strength: 0 leaves the image, 1 shows the heat alone.
        colours: name of one of Matplotlib's colour maps.

    Returns:
        ``(B, 3, H, W)`` in [0, 1], on the host.

    Raises:
        ValueError: not one map per image.
    """
    if len(images) != len(attention):
        raise ValueError(f"{len(attention)} attention maps for {len(images)} images")
    ground = images.detach().float().cpu().clamp(0, 1)
    over = heat(to_size(spread(attention), (images.shape[-2], images.shape[-1])), colours)
    return ground.lerp(over, strength)


def head_overlays(image: Tensor, attention: Tensor, strength: float = 0.6) -> Tensor:
    """An image ``(3, H, W)`` with every head's attention ``(heads, h, w)`` over it, ``(heads, 3, H, W)``."""
    return attention_overlay(image.expand(len(attention), *image.shape), attention, strength)


def tracks_rgb(frames: Tensor, tracks: Tensor, strength: float = 0.7, over: Range = "frame") -> Tensor:
    """Frames with the objects' cross-attention laid over them, one colour per object (DoRA Fig. 4 to 6).

    A pixel's colour is the sum of the objects' colours by their attention there (of blue and green: cyan),
    and as strong as the strongest of them.

    Args:
        frames: ``(T, 3, H, W)`` in [0, 1].
        tracks: ``(T, k, h, w)``.
        strength: share of the colour where an object's attention is largest.
        over: what is stretched to the full colour: every ``frame`` for itself, or an object over the
            ``clip``, so that a track that fades is seen to fade.

    Returns:
        ``(T, 3, H, W)`` in [0, 1], on the host.

    Raises:
        ValueError: frames and tracks differ in number.
    """
    if len(frames) != len(tracks):
        raise ValueError(f"{len(tracks)} tracked frames for {len(frames)} frames")
    maps = spread(tracks, (-2, -1) if over == "frame" else (0, -2, -1))
    weights = to_size(maps, (frames.shape[-2], frames.shape[-1]))
    strongest = weights.amax(dim=1, keepdim=True)
    mixed = torch.einsum("tkhw,kc->tchw", weights, object_colours(tracks.shape[1]))
    mixed = (mixed / strongest.clamp(min=torch.finfo(torch.float32).tiny)).clamp(0, 1)
    ground = frames.detach().float().cpu().clamp(0, 1)
    return ground.lerp(mixed, strength * strongest)


def masked_frames(frames: Tensor, masks: Tensor, ground: Sequence[float] = MEAN_COLOUR) -> Tensor:
    """Frames as a network sees them through masks on its normalised input: the hidden is its mean colour.

    Args:
        frames: ``(T, 3, H, W)`` in [0, 1].
        masks: ``(T, k, h, w)``: bool keeps or hides a patch, float scales a pixel's distance to that colour.
        ground: the mean colour.

    Returns:
        ``(T, k, 3, H, W)`` in [0, 1], on the host.

    Raises:
        ValueError: frames and masks differ in number.
    """
    if len(frames) != len(masks):
        raise ValueError(f"masks of {len(masks)} frames for {len(frames)} frames")
    kept = to_size(masks, (frames.shape[-2], frames.shape[-1]))[:, :, None]
    shown = frames.detach().float().cpu()[:, None]
    colour = torch.tensor(ground).reshape(3, 1, 1)
    return (colour + (shown - colour) * kept).clamp(0, 1)


def pixel_boxes(
    image: Tensor, boxes: Tensor, colour: Sequence[float] = MAGENTA, thickness: int = 2
) -> Tensor:
    """An image with the outlines of boxes.

    Args:
        image: ``(3, H, W)`` in [0, 1].
        boxes: ``(N, 4)`` left, top, right, bottom in pixels: (0, 0, W, H) is the whole image.
        colour: RGB in [0, 1].
        thickness: of the lines in pixels; they lie inside the box, which is cut at the image's border.

    Returns:
        ``(3, H, W)`` in [0, 1], on the host.
    """
    drawn = image.detach().float().cpu().clamp(0, 1).clone()
    height, width = drawn.shape[-2:]
    shade = torch.tensor(colour).reshape(3, 1, 1)
    for left, top, right, bottom in boxes.detach().cpu().double().tolist():
        x0, y0 = max(0, math.floor(left)), max(0, math.floor(top))
        x1, y1 = min(width, math.ceil(right)), min(height, math.ceil(bottom))
        border = torch.zeros(height, width, dtype=torch.bool)
        border[y0:y1, x0:x1] = True
        border[y0 + thickness : y1 - thickness, x0 + thickness : x1 - thickness] = False
        drawn = torch.where(border, shade, drawn)
    return drawn


def discovery(
    image: Tensor, attention: Tensor, mask: Tensor, box: Tensor, truth: Tensor, objects: Tensor | None = None
) -> list[Tensor]:
    """What object discovery did on one image, as cells of a contact sheet.

    Args:
        image: ``(3, H, W)`` in [0, 1].
        attention: ``(h, w)`` over the image.
        mask: ``(H, W)`` bool, what was kept of it.
        box: ``(4,)`` the box that was found, in pixels, see :func:`pixel_boxes`.
        truth: ``(N, 4)`` boxes of the objects that are there.
        objects: ``(H, W)`` number of the object at each pixel, 0 = none, 255 = not judged.

    Returns:
        The image with the boxes (found: magenta, true: green), the heat of the attention, the mask in
        magenta, and, if they are given, the true objects in green; ``(3, H, W)`` each.
    """
    # the true boxes are the thicker ones: where both agree, green shows inside magenta
    boxed = pixel_boxes(pixel_boxes(image, truth, GREEN, 4), box.reshape(1, 4))
    ground = image.detach().float().cpu().clamp(0, 1)[None]
    cells = [
        boxed,
        attention_overlay(ground, attention[None])[0],
        blend(ground, MAGENTA, mask.cpu()[None])[0],
    ]
    if objects is not None:
        there = objects.cpu()[None]
        cells.append(blend(ground, GREEN, (there > 0) & (there != 255))[0])
    return cells

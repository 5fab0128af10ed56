"""The dense loss as the PooDLe and FlowE papers describe it: on feature maps of the image's size.

Both maps are upsampled to the image and un-augmented by a sampling at full size, the target's is warped along
the flow by a second one, both are normalised, and the squared difference is averaged over the valid pixels
(PooDLe §3 and App. A; FlowE Eq. 3). Written from that description with its own pixel coordinates, so it is a
reference for the package's geometry too.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def published_loss(p: Tensor, z: Tensor, a: Tensor, b: Tensor, flow: Tensor, visible: Tensor) -> Tensor:
    """The loss; the target gets no gradient.

    Args:
        p: ``(B, C, h, w)`` online map.
        z: ``(B, C, h, w)`` target map.
        a: ``(B, 2, 3)`` pixel matrix, clean image → online view.
        b: ``(B, 2, 3)`` pixel matrix, clean image → target view.
        flow: ``(B, 2, H, W)`` px.
        visible: ``(B, H, W)`` bool.
    """
    size = (flow.shape[-2], flow.shape[-1])
    ys, xs = torch.meshgrid(
        torch.arange(size[0], device=p.device), torch.arange(size[1], device=p.device), indexing="ij"
    )
    here = torch.stack([xs, ys], dim=-1).to(p.dtype).expand(len(p), *size, 2)
    there = here + flow.permute(0, 2, 3, 1)
    seen = visible & _within(there, size) & _within(_apply(a, here), size) & _within(_apply(b, there), size)
    with torch.no_grad():
        target = _read(_up(z, size), _apply(b, here))
        target = F.normalize(_read(target, there), dim=1)
    online = F.normalize(_read(_up(p, size), _apply(a, here)), dim=1)
    distance = (online - target).square().sum(dim=1)
    return ((distance * seen).sum(dim=(1, 2)) / seen.sum(dim=(1, 2)).clamp(min=1)).mean()


def _up(maps: Tensor, size: tuple[int, int]) -> Tensor:
    return F.interpolate(maps, size, mode="bilinear", align_corners=False)


def _apply(matrix: Tensor, pixels: Tensor) -> Tensor:
    return torch.einsum("bij,bhwj->bhwi", matrix[:, :, :2], pixels) + matrix[:, None, None, :, 2]


def _read(maps: Tensor, pixels: Tensor) -> Tensor:
    """Values at pixel coordinates, the border continued."""
    size = pixels.new_tensor([maps.shape[-1], maps.shape[-2]])
    return F.grid_sample(maps, (2 * pixels + 1) / size - 1, padding_mode="border", align_corners=False)


def _within(pixels: Tensor, size: tuple[int, int]) -> Tensor:
    """Points on the image's area; a thousandth of a pixel is allowed for rounding."""
    low, high = -0.501, pixels.new_tensor([size[1], size[0]]) - 0.499
    return ((pixels >= low) & (pixels <= high)).all(dim=-1)

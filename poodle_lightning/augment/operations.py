"""The colour operations themselves, on planes of pixels ``(…, 3, n)`` in place, and the blur of images.

Semantics of torchvision and Kornia: an operation that can leave [0, 1] ends by clamping, grey is
0.299 R + 0.587 G + 0.114 B (torchvision writes 0.2989), hue turns in HSV. A factor is a number, for one
image, or a tensor that broadcasts against ``(…, 3, n)``, for several images at once. Nothing looks at a
value, so nothing is read back from a device.
"""

from __future__ import annotations

import math

import cv2
import torch
import torch.nn.functional as F
from torch import Tensor

GRAY = (0.299, 0.587, 0.114)
# Of a Gaussian, less than 5e-6 lies outside ±4.57 sigma: cutting both axes there changes no pixel by more
# than 1e-5 of the value range, whatever the image.
_CUT_SIGMA = 4.57
# stands for a chroma of 0, where the numerator of the hue is 0 as well
_SMALL = 1e-30


def gray(x: Tensor) -> Tensor:
    """Luma ``(…, 1, n)`` of ``(…, 3, n)``."""
    r, g, b = x.unbind(-2)
    return (r * GRAY[0]).add_(g, alpha=GRAY[1]).add_(b, alpha=GRAY[2]).unsqueeze(-2)


def brightness_(x: Tensor, factor: float | Tensor) -> None:
    """Values times the factor."""
    x.mul_(factor).clamp_(0.0, 1.0)


def contrast_(x: Tensor, factor: float | Tensor, mean: Tensor) -> None:
    """Away from (or towards) the mean grey of the whole image, ``(…, 1, 1)``, as it is before this step."""
    x.mul_(factor).add_(mean * (1.0 - factor)).clamp_(0.0, 1.0)


def saturation_(x: Tensor, factor: float | Tensor) -> None:
    """Away from (or towards) every pixel's own grey."""
    torch.lerp(gray(x), x, factor, out=x).clamp_(0.0, 1.0)


def hue_(x: Tensor, turns: float | Tensor) -> None:
    """A turn of the colour circle in HSV, in closed form: no sector is looked up.

    With V the largest channel, C the chroma, h the hue in turns and ``d`` the distance of ``h + shift`` on
    the circle from a channel's opposite colour (where the channel is at its smallest, V − C), the channel is
    ``V − C · clamp(2 − 6 d, 0, 1)``. Same as ``k = (n + 6 h) mod 6``, ``V − C · clamp(min(k, 4 − k), 0, 1)``
    for n = 5, 3, 1.
    """
    r, g, b = x.unbind(-2)
    top = torch.maximum(r, g)
    low = torch.minimum(r, g)
    top, low = torch.maximum(top, b, out=top), torch.minimum(low, b, out=low)
    chroma = torch.sub(top, low, out=low)
    # Masks of 0 and 1 and lerp in place of where: exact with such weights, and vectorised on a CPU.
    red, green = (torch.eq(c, top, out=torch.empty_like(top)) for c in (r, g))
    hue = torch.lerp((r - g).add_(chroma, alpha=4.0), (b - r).add_(chroma, alpha=2.0), green)
    hue = torch.lerp(hue, g - b, red).div_((chroma * 6.0).clamp_(min=_SMALL))
    opposite = torch.linspace(1 / 2, -1 / 6, 3, dtype=x.dtype, device=x.device)[:, None]  # (n − 2)/6
    away = hue.unsqueeze(-2) + (opposite + turns)
    away.sub_(away.round()).abs_()
    share = away.mul_(-6.0).add_(2.0).clamp_(0.0, 1.0)
    torch.addcmul(top.unsqueeze(-2), chroma.unsqueeze(-2), share, value=-1.0, out=x)


def gray_(x: Tensor) -> None:
    """All channels become the grey."""
    x.copy_(gray(x).expand_as(x))


def solarized(x: Tensor) -> Tensor:
    """Values of 0.5 and above inverted: that is the smaller of a value and its inverse."""
    return torch.minimum(x, 1.0 - x)


# ---- blur
def reach(sigma: float, size: tuple[int, int]) -> int:
    """Pixels to either side that a Gaussian needs; reflection asks for a border narrower than the image."""
    return max(0, min(math.ceil(_CUT_SIGMA * sigma - 0.5), min(size) - 1))


def gaussian(sigma: Tensor, radius: int) -> Tensor:
    """Weights ``(R, 2·radius + 1)`` that add up to 1, of R standard deviations in pixels."""
    steps = torch.arange(-radius, radius + 1, dtype=sigma.dtype, device=sigma.device)
    # below a hundredth of a pixel all weight is on the centre; 0 must not divide
    weights = torch.exp(-0.5 * (steps / sigma.clamp(min=0.01)[:, None]).square())
    return weights / weights.sum(dim=1, keepdim=True)


def blur_(image: Tensor, sigma: float) -> None:
    """Gaussian blur of one image on the CPU, in place, cut at its own reach; borders are reflected.

    OpenCV's separable filter: it takes about a third of the time of shifted sums in torch and a 25th of
    torch's grouped convolution.

    Args:
        image: ``(3, H, W)`` float32 on the CPU, each plane contiguous.
        sigma: standard deviation in pixels.
    """
    if radius := reach(sigma, (image.shape[-2], image.shape[-1])):
        taps = gaussian(torch.tensor([sigma]), radius)[0].numpy()
        for plane in image.numpy():
            cv2.sepFilter2D(plane, -1, taps, taps, dst=plane, borderType=cv2.BORDER_REFLECT_101)


def blurred(images: Tensor, sigma: Tensor, widest: float) -> Tensor:
    """The same for all images at once, on any device: one grouped convolution per axis.

    Args:
        images: ``(R, 3, H, W)``.
        sigma: ``(R,)`` on the images' device.
        widest: the recipe's largest sigma; all are cut at its reach, which is then known without a look at
            what was drawn.
    """
    radius = reach(widest, (images.shape[-2], images.shape[-1]))
    taps = gaussian(sigma.to(images.dtype), radius).repeat_interleave(3, dim=0)[:, None]  # (3R, 1, taps)
    planes = F.pad(images, (radius,) * 4, mode="reflect").flatten(0, 1)[None]
    planes = F.conv2d(planes, taps[:, :, None, :], groups=len(taps))
    return F.conv2d(planes, taps[:, :, :, None], groups=len(taps))[0].unflatten(0, (-1, 3))

"""Colour and geometry of one image as the published loader computes them: torchvision's operations in turn.

Everything works on single float images on the CPU. What is drawn is handed over, so that other forms can be
measured on the same draws.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import torchvision.transforms.functional as TF
from torch import Tensor

from poodle_lightning.augment.photometric import Drawn

# Kernel of the published blur at 512×1024: a tenth of the height and of the width, made odd.
KERNEL = (53, 105)


def colour(images: Tensor, drawn: Drawn) -> Tensor:
    """ColorJitter, greyscale and GaussianBlur, image by image: one pass or more of the memory for each.

    Args:
        images: ``(B, 3, H, W)`` float32 in [0, 1], larger than half the kernel.
        drawn: operations in the order of ``ColorJitter`` (brightness, contrast, saturation, hue, greyscale).
    """
    jitter = (TF.adjust_brightness, TF.adjust_contrast, TF.adjust_saturation, TF.adjust_hue)
    done = []
    for image, steps, blur, sigma in zip(images, drawn.steps, drawn.blur, drawn.sigma, strict=True):
        for number, factor in steps:
            image = jitter[number](image, factor) if number < 4 else TF.rgb_to_grayscale(image, 3)
        done.append(TF.gaussian_blur(image, list(KERNEL), [float(sigma)] * 2) if blur else image)
    return torch.stack(done)


def geometry(
    frame: Tensor,
    box: tuple[int, int, int, int],
    size: tuple[int, int],
    degrees: float,
    scale: float,
    crop_first: bool = False,
) -> Tensor:
    """Resize, crop, rotate and flip in turn: every step makes a whole image of its own.

    Args:
        frame: ``(3, h, w)`` uint8.
        box: left, top, right and bottom of the crop in pixels of the frame.
        size: height and width of the result.
        degrees: rotation.
        scale: magnification.
        crop_first: False is the published order, in which the whole frame is resized.
    """
    image = frame.float() / 255.0
    left, top, right, bottom = box
    if crop_first:
        crop = _resize(image[:, top:bottom, left:right], size)
    else:
        down, across = size[0] / (bottom - top), size[1] / (right - left)
        whole = _resize(image, (round(frame.shape[-2] * down), round(frame.shape[-1] * across)))
        crop = TF.crop(whole, round(top * down), round(left * across), *size)
    turned = TF.affine(crop, degrees, [0, 0], scale, [0.0], interpolation=TF.InterpolationMode.BILINEAR)
    return TF.hflip(turned)


def _resize(image: Tensor, size: tuple[int, int]) -> Tensor:
    return F.interpolate(image[None], size, mode="bilinear", align_corners=False)[0]

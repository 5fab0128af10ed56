"""A training pair in the order of operations of PooDLe's published loader, all of it in the worker.

Every frame has a seek of its own and is converted whole; both frames are resized whole, to 1080 × 1920 times
U(0.75, 1.25), then cropped to 512 × 1024; each is copied and coloured: jitter (0.8, 0.8, 0.8, 0.2) with
probability 0.8, grey 0.2, blur of 53 × 105 px with σ ~ U(0.1, 2) 0.5, ImageNet's normalisation. What leaves
the worker are two coloured and two clean crops in float32.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import av
import numpy as np
import torch
from torch import Tensor
from torchvision.transforms import v2

Size = tuple[int, int]
SIZE = (512, 1024)
REFERENCE = (1080, 1920)
SCALE = (0.75, 1.25)
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@functools.cache
def _colour(crop: Size) -> v2.Compose:
    """The kernel of the blur is a tenth of the crop on each side, made odd."""
    kernel = [math.ceil(side / 20) * 2 + 1 for side in crop]
    return v2.Compose(
        [
            v2.RandomApply([v2.ColorJitter(0.8, 0.8, 0.8, 0.2)], 0.8),
            v2.RandomGrayscale(0.2),
            v2.RandomApply([v2.GaussianBlur(kernel, (0.1, 2.0))], 0.5),
            v2.Normalize(MEAN, STD),
        ]
    )


def frames(path: Path, seconds: Sequence[float]) -> list[np.ndarray]:
    """Whole frames ``(H, W, 3)`` uint8: the file is opened once, each frame has a seek and the way to it."""
    found = []
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        stream.thread_type = "NONE"
        for second in seconds:
            wanted = (stream.start_time or 0) + round(second / stream.time_base)
            container.seek(wanted, stream=stream, backward=True)
            frame = next(f for f in container.decode(stream) if f.pts >= wanted)
            found.append(frame.to_ndarray(format="rgb24"))
    return found


@dataclass(frozen=True)
class Where:
    """Where a crop was cut: size of the resized frame, and the crop's upper left corner in it, px."""

    height: int
    width: int
    top: int
    left: int


def pair(path: Path, seconds: Sequence[float], crop: Size = SIZE) -> tuple[list[Tensor], Where]:
    """Two coloured crops, then the two clean ones, ``(3, *crop)`` float32 each, and where they were cut.

    Draws come from torch's global generator, as torchvision's do.

    Args:
        path: of a video.
        seconds: of the two frames, from the start of the stream.
        crop: height and width.
    """
    whole = torch.stack(
        [torch.from_numpy(frame).permute(2, 0, 1).contiguous() for frame in frames(path, seconds)]
    )
    scale = float(torch.empty(1).uniform_(*SCALE))
    size = [int(side * scale) for side in REFERENCE]
    resized = v2.functional.resize(whole.float() / 255.0, size, antialias=False)
    top, left = (int(torch.randint(side - part + 1, (1,))) for side, part in zip(size, crop, strict=True))
    first, second = resized[..., top : top + crop[0], left : left + crop[1]]
    colour = _colour(crop)
    return [colour(first), colour(second), first.clone(), second.clone()], Where(*size, top, left)

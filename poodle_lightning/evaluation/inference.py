"""How a segmentation network sees a test image: whole, or in overlapping windows."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from poodle_lightning.configured import Configured
from poodle_lightning.types import UserError

Network = Callable[[Tensor], Tensor]
"""Images ``(B, 3, H, W)`` in [0, 1] to logits ``(B, C, H, W)``."""


class Inference(Configured, ABC):
    """How logits of a whole image are made from a network."""

    @abstractmethod
    def __call__(self, network: Network, images: Tensor) -> Tensor:
        """Logits ``(B, C, H, W)`` of ``images (B, 3, H, W)`` in [0, 1]."""


class WholeImage(Inference):
    """The image in one piece."""

    def __call__(self, network: Network, images: Tensor) -> Tensor:
        """See :class:`Inference`."""
        return network(images)


class Sliding(Inference):
    """Overlapping windows of one size; where they overlap, logits are averaged (before the softmax).

    The grid is that of MMSegmentation (``EncoderDecoder.slide_inference``): windows start every ``stride``
    pixels, and the last ones are moved back so that they end at the border. An image smaller than a window
    is one smaller window.

    Args:
        crop: height and width of a window, px.
        stride: rows and columns from one window to the next, px; not above ``crop``.
        windows: how many go through the network at once.

    Raises:
        UserError: a number below 1, or windows that leave gaps.
    """

    def __init__(
        self, crop: Sequence[int] = (512, 512), stride: Sequence[int] = (341, 341), windows: int = 8
    ) -> None:
        if min(*crop, *stride, windows) < 1 or stride[0] > crop[0] or stride[1] > crop[1]:
            raise UserError(
                f"sliding: crop {tuple(crop)}, stride {tuple(stride)} and windows {windows} must be at least "
                "1, and a stride must not be above its crop"
            )
        self.crop, self.stride, self.windows = (crop[0], crop[1]), (stride[0], stride[1]), windows

    def __call__(self, network: Network, images: Tensor) -> Tensor:
        """See :class:`Inference`; image by image, so that nothing depends on the batch."""
        return torch.cat([self._one(network, image) for image in images])

    def _one(self, network: Network, image: Tensor) -> Tensor:
        size = (image.shape[-2], image.shape[-1])
        rows, columns = (_spans(*numbers) for numbers in zip(size, self.crop, self.stride, strict=True))
        boxes = [(row, column) for row in rows for column in columns]
        total: Tensor | None = None
        count = image.new_zeros(size)
        for first in range(0, len(boxes), self.windows):
            chosen = boxes[first : first + self.windows]
            logits = network(torch.stack([image[:, row, column] for row, column in chosen])).float()
            if total is None:
                total = logits.new_zeros(logits.shape[1], *size)
            for (row, column), part in zip(chosen, logits, strict=True):
                total[:, row, column] += part
                count[row, column] += 1
        assert total is not None
        return (total / count)[None]


def _spans(length: int, crop: int, stride: int) -> list[slice]:
    """Windows of one direction."""
    count = max(length - crop + stride - 1, 0) // stride + 1
    ends = [min(i * stride + crop, length) for i in range(count)]
    return [slice(max(end - crop, 0), end) for end in ends]


def padded(images: Tensor, multiple: tuple[int, int], colour: Tensor) -> Tensor:
    """Images ``(B, 3, H, W)`` filled up at the right and bottom to a multiple, with ``colour (3, 1, 1)``.

    With the encoder's mean colour the filling is 0 after its normalisation.
    """
    height, width = (-have % want for have, want in zip(images.shape[-2:], multiple, strict=True))
    if not (height or width):
        return images
    shifted = functional.pad(images - colour, (0, width, 0, height))
    return shifted + colour

"""What every image encoder of the package looks like from outside."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from poodle_lightning.configured import Configured
from poodle_lightning.types import Features

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class Encoder(nn.Module, Configured, ABC):
    """An image encoder: images in [0, 1] in, :class:`Features` out; it normalises by itself.

    Subclasses write :meth:`features`, which sees normalised images.

    Args:
        channels: ``{layer: channels}`` from shallow to deep.
        strides: ``{layer: input pixels per cell}``, same keys.
        mean: per colour channel, subtracted from images in [0, 1].
        std: per colour channel, divided by afterwards.

    Attributes:
        mean: ``(3, 1, 1)`` buffer, not in the state dict: it belongs to the class, not to the weights.
        std: likewise.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        channels: Mapping[str, int],
        strides: Mapping[str, int],
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
    ) -> None:
        super().__init__()
        self.channels = dict(channels)
        self.strides = dict(strides)
        self.register_buffer("mean", torch.tensor(mean).reshape(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).reshape(3, 1, 1), persistent=False)

    @property
    def vector_dim(self) -> int:
        """Length of ``Features.vector``; by default the channels of the deepest layer."""
        return next(reversed(self.channels.values()))

    def forward(self, images: Tensor) -> Features:
        """Features of ``images (B, 3, H, W)``, float in [0, 1]."""
        return self.features((images - self.mean) / self.std)

    @abstractmethod
    def features(self, normalised: Tensor) -> Features:
        """Features of images ``(B, 3, H, W)`` from which mean and deviation are already taken."""


class Decoder(nn.Module, Configured, ABC):
    """Turns an encoder's maps into one finer map.

    Attributes:
        name: key of its map in :class:`Features`.
        dims: channels of that map.
        level: which of the encoder's layers has the size of that map, counted from the deepest (-1).
    """

    name: str
    dims: int
    level: int

    @abstractmethod
    def forward(self, features: Features) -> Features:
        """Features with the single map ``name (B, dims, h, w)``."""


class DecodedEncoder(Encoder):
    """An encoder and its decoder as one encoder: all maps of both, the encoder's vector.

    Args:
        encoder: normalises and computes ``vector`` and its maps.
        decoder: adds its map at the end of ``maps``; made for the channels of ``encoder``.
    """

    def __init__(self, encoder: Encoder, decoder: Decoder) -> None:
        super().__init__(
            channels={**encoder.channels, decoder.name: decoder.dims},
            strides={**encoder.strides, decoder.name: list(encoder.strides.values())[decoder.level]},
        )
        self.mean, self.std = encoder.mean, encoder.std  # on the encoder's device
        self.encoder = encoder
        self.decoder = decoder

    @property
    def vector_dim(self) -> int:
        """Length of the encoder's own vector: the decoder adds none."""
        return self.encoder.vector_dim

    def features(self, normalised: Tensor) -> Features:
        """The encoder's features with the decoder's map behind them."""
        found = self.encoder.features(normalised)
        decoded = self.decoder(found)
        return Features(
            maps={**found.maps, **decoded.maps},
            strides={**found.strides, **decoded.strides},
            vector=found.vector,
        )

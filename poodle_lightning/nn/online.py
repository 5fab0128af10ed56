"""The container of what a target network copies."""

from __future__ import annotations

from torch import nn

from poodle_lightning.nn.encoder import DecodedEncoder, Decoder, Encoder


class Online(nn.Module):
    """The container of everything that the target copies; predictors stay outside."""

    def __init__(self, encoder: Encoder, decoder: Decoder | None = None) -> None:
        super().__init__()
        self.encoder = encoder
        self.decoder = decoder

    def backbone(self) -> Encoder:
        """The encoder, with its decoder where there is one; the parts are shared, not copied."""
        return self.encoder if self.decoder is None else DecodedEncoder(self.encoder, self.decoder)

"""Which sizes of images an encoder takes: a vision transformer's must divide into whole patches."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from poodle_lightning.nn.encoder import DecodedEncoder, Encoder
from poodle_lightning.types import UserError


def multiple_of(encoder: Encoder) -> tuple[int, int]:
    """Height and width of images must be multiples of these two, px: a ViT's patch, else 1."""
    if isinstance(encoder, DecodedEncoder):
        return multiple_of(encoder.encoder)
    inside = getattr(getattr(encoder, "model", None), "patch_embed", None)  # of a TimmEncoder
    patch: int | Sequence[int] = getattr(encoder, "patch", getattr(inside, "patch_size", 1))
    height, width = patch if isinstance(patch, Sequence) else (patch, patch)
    return int(height), int(width)


def whole_size(size: tuple[int, int], encoder: Encoder) -> tuple[int, int]:
    """The largest height and width, px, that ``size`` holds and the encoder takes.

    Raises:
        UserError: not even one patch has room.
    """
    (height, width), (rows, columns) = size, multiple_of(encoder)
    if height < rows or width < columns:
        raise UserError(
            f"{type(encoder).__name__} with patches of {rows}x{columns} pixels cannot take {height}x{width} "
            "pixels: choose larger images, or a smaller patch"
        )
    return height // rows * rows, width // columns * columns


def whole_patches(images: Tensor, encoder: Encoder) -> Tensor:
    """Images or labels ``(..., H, W)`` without the last rows and columns that do not fill a patch.

    For looking at what training has seen: training crops are cut anew by the methods, so that their size need
    not fit the encoder's patches. Other encoders than vision transformers take all of it.

    Raises:
        UserError: not even one patch has room.
    """
    height, width = whole_size((images.shape[-2], images.shape[-1]), encoder)
    return images[..., :height, :width]

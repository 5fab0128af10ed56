"""One vector per image, and what its nearest neighbours say: what classification without a network needs."""

from __future__ import annotations

import torch
from torch import Tensor

from poodle_lightning.data.image_classes import ImageClassDataModule
from poodle_lightning.evaluation.base import Evaluation
from poodle_lightning.nn.encoder import DecodedEncoder, Encoder
from poodle_lightning.nn.vit import ViT
from poodle_lightning.types import UserError


def read_vectors(encoder: Encoder, images: Tensor, blocks: int = 1) -> Tensor:
    """One vector per image, ``(B, D)`` float32.

    Args:
        encoder: as it is.
        images: ``(B, 3, H, W)`` in [0, 1].
        blocks: 1 reads ``Features.vector``: pooled, or a ViT's [CLS]. More concatenate the [CLS] of a ViT's
            last blocks, each behind the final LayerNorm (DINO: 4 for ViT-S).

    Raises:
        UserError: the encoder has no vector, or not so many blocks.
    """
    bare = encoder.encoder if isinstance(encoder, DecodedEncoder) else encoder
    if blocks == 1:
        vector: Tensor | None = bare(images).vector
        if vector is None:
            raise UserError(f"{type(bare).__name__} gives no vector per image: classify with another encoder")
        return vector.float()
    if not isinstance(bare, ViT) or bare.cls_token is None or not 1 <= blocks <= len(bare.blocks):
        raise UserError(
            f"blocks {blocks}: only a ViT with [CLS] and so many blocks has them; set blocks to 1"
        )
    tokens: list[Tensor] = []
    handles = [
        block.register_forward_hook(lambda _module, _inputs, found: tokens.append(found[:, 0]))
        for block in list(bare.blocks)[-blocks:]
    ]
    try:
        bare(images)
    finally:
        for handle in handles:
            handle.remove()
    return torch.cat([bare.norm(token) for token in tokens], dim=1).float()


def knn_votes(cosines: Tensor, labels: Tensor, classes: int, temperature: float = 0.07) -> Tensor:
    """Votes of neighbours, each with the weight exp(cosine / temperature), up to one factor for all.

    Args:
        cosines: ``(Q, k)`` float32.
        labels: ``(Q, k)`` int64 of the neighbours.
        classes: how many.
        temperature: DINO's 0.07.

    Returns:
        ``(Q, classes)`` float32.
    """
    votes = torch.zeros(len(cosines), classes, device=cosines.device)
    return votes.scatter_add_(1, labels, ((cosines - 1) / temperature).exp())


def image_data(evaluation: Evaluation) -> ImageClassDataModule:
    """The trainer's data module.

    Raises:
        UserError: it gives no images with one class each.
    """
    data = getattr(evaluation.trainer, "datamodule", None)
    if not isinstance(data, ImageClassDataModule):
        raise UserError(
            f"{type(evaluation).__name__} needs images with a class each: give data: ImageClassDataModule"
        )
    return data

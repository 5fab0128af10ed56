"""MAE: Masked autoencoders are scalable vision learners (He et al., CVPR 2022).

Three of four patches of an image are left out. An encoder sees the others only; a small decoder, which knows
where all belong, is to give back the pixels of those left out. On video every frame is an image.

=====================  ==============================================================
in the paper           here
=====================  ==============================================================
masking, 75 %          ``random_keep``: which patches the encoder sees
encoder                ``self.online.encoder.tokens``: [CLS] and K patches
decoder, mask token    ``self.decoder``, beside what is exported
pixels per patch       ``patchify``; with ``normalise`` each patch has mean 0, deviation 1
=====================  ==============================================================

Deviations: crops are plain bilinear (the original resizes bicubically), of the training crop that the data
brings. There is no target network.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn

from poodle_lightning.augment.geometric import ResizedCrop
from poodle_lightning.losses.reconstruction import masked_mse, patch_statistics, patchify, unpatchify
from poodle_lightning.methods.base import Method
from poodle_lightning.nn.encoder import Encoder
from poodle_lightning.nn.mae_decoder import MAEDecoder
from poodle_lightning.nn.online import Online
from poodle_lightning.nn.optim import Recipe
from poodle_lightning.nn.vit import ViT
from poodle_lightning.ops.masking import random_keep
from poodle_lightning.ops.random import fold
from poodle_lightning.types import Clip, Look, Losses, UserError

RECIPE = Recipe(
    lr=1.5e-4, min_lr=0.0, weight_decay=0.05, betas=(0.9, 0.95), eps=1e-8, warmup_epochs=40.0,
    horizon_epochs=800.0, scale_lr="linear", reference_batch=256,
)  # fmt: skip
"""Of the paper's pre-training, for 800 epochs (Table 8)."""


@dataclass(frozen=True)
class DecoderSizes:
    """The decoder; the defaults are the paper's.

    Args:
        dim: channels.
        depth: blocks.
        heads: attention heads.
    """

    dim: int = 512
    depth: int = 8
    heads: int = 16


class MAE(Method):
    """MAE.

    Args:
        encoder: a vision transformer for images of the crop's size; default ViT-S/16 with fixed sine-cosine
            positions. (Paper: ViT-B, -L, -H; DoRA's and PooDLe's tables: ViT-S)
        crop: random resized crop of every frame. (Paper: 224 px, area 0.2–1, flip 0.5; no colour)
        ratio: share of the patches left out.
        normalise: targets are normalised by patch. (Paper: the better half of Table 1d)
        decoder: its sizes.
        recipe: optimiser and schedules; None: the paper's.

    An encoder that has not been trained yet starts as in the original code; a mask token in it stays frozen.

    Raises:
        UserError: the encoder is no vision transformer with [CLS], or made for another size than the crop's;
            ``ratio`` leaves no patch to see or none to predict.
    """

    def __init__(
        self,
        encoder: Encoder | None = None,
        crop: ResizedCrop | None = None,
        ratio: float = 0.75,
        normalise: bool = True,
        decoder: DecoderSizes | None = None,
        recipe: Recipe | None = None,
    ) -> None:
        super().__init__(recipe or RECIPE)
        self.crop = crop or ResizedCrop((224, 224), (0.2, 1.0), fit="redraw")
        encoder = encoder or ViT(positions="sincos")
        if not isinstance(encoder, ViT) or encoder.cls_token is None:
            raise UserError(
                f"MAE leaves patches out: it needs a ViT with [CLS], not {type(encoder).__name__}"
            )
        size = (encoder.grid[0] * encoder.patch, encoder.grid[1] * encoder.patch)
        if size != tuple(self.crop.size):
            raise UserError(
                f"MAE: crop.size={list(self.crop.size)}, encoder.image_size={list(size)}: make them equal"
            )
        if is_fresh(encoder):
            initialise(encoder)
        if encoder.mask_token is not None:  # the decoder has its own: DDP would wait for this one's gradient
            encoder.mask_token.requires_grad_(False)
        self.online = Online(encoder)
        self.decoder = MAEDecoder(
            encoder.vector_dim, encoder.patch, encoder.grid, **asdict(decoder or DecoderSizes())
        )
        self.patch, self.patches = encoder.patch, encoder.grid[0] * encoder.grid[1]
        if not 0 < int(self.patches * (1 - ratio)) < self.patches:
            raise UserError(
                f"MAE: ratio={ratio} of {self.patches} patches leaves none to see or none to predict: choose "
                "a share between 0 and 1"
            )
        self.ratio = ratio
        self.normalise = normalise

    def losses(self, clip: Clip) -> Losses:
        """Squared error of the pixels left out (paper section 3)."""
        images = self.images(clip)  # (N, 3, h, w)
        keep, hidden = self.draw(clip)  # (N, K), (N, n)
        predicted = self.decoder(self.encoder.tokens(images, keep), keep)  # (N, n, p·p·3)
        return {"pixels": masked_mse(predicted, self.target_patches(images), hidden, self.normalise)}

    # ---- the pieces
    @property
    def encoder(self) -> ViT:
        """The encoder, as what it is."""
        encoder = self.online.encoder
        assert isinstance(encoder, ViT)
        return encoder

    @torch.no_grad()
    def images(self, clip: Clip) -> Tensor:
        """A crop of every frame, in [0, 1]; rows ``i·T + t``."""
        frames = clip.frames.shape[1]
        aspect = None if clip.aspect is None else clip.aspect.repeat_interleave(frames)
        return self.crop(clip.unit().flatten(0, 1), self.keys(clip, "crop"), aspect).image

    def draw(self, clip: Clip) -> tuple[Tensor, Tensor]:
        """Which patches the encoder sees ``(N, K)``, and which it does not ``(N, n)`` bool."""
        keep = random_keep(self.keys(clip, "patches"), self.patches, self.ratio)
        hidden = torch.ones(len(keep), self.patches, dtype=torch.bool).scatter_(1, keep, False)
        return keep.to(clip.device, non_blocking=True), hidden.to(clip.device, non_blocking=True)

    def keys(self, clip: Clip, name: str) -> Tensor:
        """One key per frame, ``(N,)``."""
        return torch.stack([fold(clip.key, name, t) for t in range(clip.frames.shape[1])], dim=1).flatten()

    def target_patches(self, images: Tensor) -> Tensor:
        """The pixels to give back: of the image as the encoder sees it, normalised by colour."""
        return patchify((images - self.encoder.mean) / self.encoder.std, self.patch)

    @torch.no_grad()
    def look(self, clip: Clip) -> Look:
        """The crops of the first frames, what is left out of them, and what the decoder puts there."""
        images = self.images(clip)
        keep, hidden = self.draw(clip)
        target = self.target_patches(images)
        pixels = self.decoder(self.encoder.tokens(images, keep), keep).to(target)
        if self.normalise:
            mean, deviation = patch_statistics(target)
            pixels = pixels * deviation + mean
        pixels = torch.where(hidden[:, :, None], pixels, target)
        restored = unpatchify(pixels, self.patch, self.crop.size) * self.encoder.std + self.encoder.mean
        first = slice(None, None, clip.frames.shape[1])
        return Look(
            clip.unit(),
            large=images[first, None],
            hidden=hidden[first, None].unflatten(2, self.encoder.grid),
            restored=restored[first, None].clamp(0, 1),
        )


def is_fresh(encoder: ViT) -> bool:
    """Whether a vision transformer is as it was made: its last norm still does nothing.

    Weights may have come into it from a file of its own or through the hub, which no argument tells.
    """
    weight, bias = encoder.norm.weight, encoder.norm.bias
    return bool(weight.is_meta or ((weight == 1).all() and (bias == 0).all()))


@torch.no_grad()
def initialise(encoder: ViT) -> None:
    """Starts an encoder as the original code does (facebookresearch/mae ``models_mae.py``).

    All linear layers, and the patch embedding as one over its flattened pixels, are uniform within
    √(6 / (inputs + outputs)) (Glorot and Bengio, 2010), biases 0; [CLS] is normal with deviation 0.02. The
    bias of the patch embedding stays what torch makes it.
    """
    kernel = encoder.patch_embed.proj.weight
    kernel.copy_(nn.init.xavier_uniform_(kernel.flatten(1)).view_as(kernel))  # in any memory format
    nn.init.normal_(encoder.cls_token, std=0.02)
    for layer in encoder.modules():
        if isinstance(layer, nn.Linear):
            nn.init.xavier_uniform_(layer.weight)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)

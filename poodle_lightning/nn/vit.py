"""Vision transformer (Dosovitskiy et al., ICLR 2021) as timm, DINO, MAE and MoCo-v3 have it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Literal

import torch
from timm.layers import resample_abs_pos_embed
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor
from torch.nn import functional

from poodle_lightning.nn.encoder import IMAGENET_MEAN, IMAGENET_STD, Encoder
from poodle_lightning.nn.weights import load_state, read_state
from poodle_lightning.types import Features, UserError

# Everything of a vision transformer but its head; a part that this class lacks (register tokens, another
# norm) must be seen, since a network without it would compute something else.
OWN_KEYS = re.compile(
    r"(cls_token|dist_token|reg_token|register_tokens|storage_tokens|pos_embed|pos_embed_\w+"
    r"|(patch_embed|blocks|norm|norm_pre|fc_norm|attn_pool|rope_embed)\..*)"
)


class ViT(Encoder):
    """A vision transformer without head; maps ``block0`` ... ``block{n-1}``, vector = [CLS].

    ``block{i}`` holds the patch tokens behind block i as ``(B, dim, H / patch, W / patch)``; those of the
    last block are behind the final LayerNorm as well, and so is the vector. Without a class token the vector
    is the mean of the last map. Images of any size that is a multiple of the patch are taken: the position
    embeddings are interpolated. The state dict has the names of timm's ``VisionTransformer`` without a head.

    Args:
        patch: side of a patch in pixels; all strides.
        dim: channels of a token.
        depth: number of blocks.
        heads: attention heads; ``dim`` is a multiple of it.
        image_size: ``(H, W)`` in pixels that the position embeddings are made for.
        mlp_ratio: hidden channels of the MLPs over ``dim``.
        qkv_bias: whether queries, keys and values have a bias.
        class_token: whether there is a [CLS] token.
        drop_path: stochastic depth of the last block, rising linearly from 0 at the first.
        pos_interp: ``"timm"``: bicubic to the size of the grid with antialiasing; ``"dino"``: bicubic by the
            factor (grid + 0.1) / (old grid) without (facebookresearch/dino ``vision_transformer.py``,
            ``interpolate_pos_encoding``). They agree at ``image_size`` only.
        weights: path of a state dict with timm's names; a head in it is left out.
        mean: see :class:`Encoder`; several of timm's weights want 0.5.
        std: likewise.

    Raises:
        UserError: sizes that do not fit each other, or weights that do not fit.
    """

    def __init__(
        self,
        patch: int = 16,
        dim: int = 384,
        depth: int = 12,
        heads: int = 6,
        image_size: Sequence[int] = (224, 224),
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        class_token: bool = True,
        drop_path: float = 0.0,
        pos_interp: Literal["timm", "dino"] = "timm",
        weights: str | None = None,
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
    ) -> None:
        if dim % heads:
            raise UserError(f"ViT dim={dim} is no multiple of heads={heads}")
        if pos_interp not in ("timm", "dino"):
            raise UserError(f"ViT pos_interp={pos_interp!r} is not offered: choose timm or dino")
        names = [f"block{i}" for i in range(depth)]
        super().__init__(dict.fromkeys(names, dim), dict.fromkeys(names, patch), mean, std)
        self.patch, self.pos_interp = patch, pos_interp
        self.grid = self._grid((image_size[0], image_size[1]))
        core = VisionTransformer(
            img_size=(image_size[0], image_size[1]),
            patch_size=patch,
            num_classes=0,
            global_pool="token" if class_token else "avg",
            embed_dim=dim,
            depth=depth,
            num_heads=heads,
            mlp_ratio=mlp_ratio,
            qkv_bias=qkv_bias,
            class_token=class_token,
            drop_path_rate=drop_path,
            fc_norm=False,
            dynamic_img_size=True,
        )
        self.cls_token = core.cls_token
        self.pos_embed = core.pos_embed
        self.patch_embed = core.patch_embed
        self.blocks = core.blocks
        self.norm = core.norm
        if weights is not None:
            state = {key: value for key, value in read_state(weights).items() if OWN_KEYS.fullmatch(key)}
            load_state(self, state, f"weights {weights!r}")

    def features(self, normalised: Tensor) -> Features:
        """Patch tokens behind every block, and [CLS].

        Raises:
            UserError: the images' size is no multiple of the patch.
        """
        height, width = self._grid((normalised.shape[-2], normalised.shape[-1]))
        x = self.patch_embed(normalised).flatten(1, 2)  # (B, h, w, dim) -> (B, h w, dim)
        if self.cls_token is not None:
            x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1)
        x = x + self.positions(height, width)
        first = 0 if self.cls_token is None else 1
        maps: dict[str, Tensor] = {}
        for i, block in enumerate(self.blocks):
            x = block(x)
            if i == len(self.blocks) - 1:
                x = self.norm(x)
            maps[f"block{i}"] = x[:, first:].transpose(1, 2).unflatten(2, (height, width))
        vector = x.mean(dim=1) if self.cls_token is None else x[:, 0]
        return Features(maps=maps, strides=dict(self.strides), vector=vector)

    def positions(self, height: int, width: int) -> Tensor:
        """Position embeddings for a grid of ``height x width`` patches, ``(1, [1 +] height width, dim)``."""
        embedding: Tensor = self.pos_embed
        prefix = embedding.shape[1] - self.grid[0] * self.grid[1]
        if (height, width) == self.grid:
            return embedding
        if self.pos_interp == "timm":
            return resample_abs_pos_embed(embedding, [height, width], list(self.grid), prefix)
        patches = embedding[:, prefix:].transpose(1, 2).unflatten(2, self.grid)
        factors = ((height + 0.1) / self.grid[0], (width + 0.1) / self.grid[1])
        patches = functional.interpolate(patches.float(), scale_factor=factors, mode="bicubic")
        return torch.cat([embedding[:, :prefix], patches.flatten(2).transpose(1, 2).to(embedding)], dim=1)

    def _grid(self, size: tuple[int, int]) -> tuple[int, int]:
        height, width = size
        if height % self.patch or width % self.patch:
            raise UserError(
                f"ViT with patches of {self.patch} pixels cannot take {height}x{width} pixels: "
                f"choose a height and width that are multiples of {self.patch}"
            )
        return height // self.patch, width // self.patch

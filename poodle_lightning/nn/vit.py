"""Vision transformer (Dosovitskiy et al., ICLR 2021) as timm, DINO, MAE and MoCo-v3 have it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any, Literal

import torch
from timm.layers import resample_abs_pos_embed
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional

from poodle_lightning.nn.encoder import IMAGENET_MEAN, IMAGENET_STD, Encoder
from poodle_lightning.nn.mae_decoder import sincos_positions
from poodle_lightning.nn.weights import load_state, read_state
from poodle_lightning.ops.dense import full_float32
from poodle_lightning.ops.geometry import island
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

    Without ``weights`` it starts as in DINO, iBOT and DoRA: linear layers, learned positions and [CLS] normal
    with deviation 0.02, biases 0 (facebookresearch/dino ``vision_transformer.py``, ``trunc_normal_``). Timm
    differs by [CLS], with deviation 1e-6.

    Called, it uses fused attention in all blocks; :meth:`look` also returns the last block's attention,
    queries and keys, :meth:`tokens` works on some of the patches.

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
            ``interpolate_pos_encoding``). ``"mae"``: bicubic to the size of the grid without
            (facebookresearch/mae ``util/pos_embed.py``, ``interpolate_pos_embed``). They agree at
            ``image_size`` only.
        mask_token: adds the parameter ``mask_token (1, dim)``, zero at first, that stands for masked patches
            (iBOT; bytedance/ibot ``models/vision_transformer.py``, ``masked_embed``).
        weights: path of a state dict with timm's names; a head in it is left out, and a mask token that it
            lacks stays zero.
        mean: see :class:`Encoder`; several of timm's weights want 0.5.
        std: likewise.
        last_heads: attention heads of the last block, where they are to be others; it computes with them, and
            is trained so. DoRA finds more than 6 objects with 16 or 32 (appendix B.2); see :meth:`look` for
            splitting anew what was trained with other heads.
        positions: ``"learned"`` ones, or ``"sincos"``: MAE's fixed ones, which are not trained but stand in
            the state dict as ``pos_embed`` all the same.

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
        pos_interp: Literal["timm", "dino", "mae"] = "timm",
        mask_token: bool = False,
        weights: str | None = None,
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
        last_heads: int | None = None,
        positions: Literal["learned", "sincos"] = "learned",
    ) -> None:
        for name, count in (("heads", heads), ("last_heads", last_heads or heads)):
            if count < 1 or dim % count:
                raise UserError(f"ViT dim={dim} is no multiple of {name}={count}")
        if pos_interp not in ("timm", "dino", "mae"):
            raise UserError(f"ViT pos_interp={pos_interp!r} is not offered: choose mae, timm or dino")
        if positions not in ("learned", "sincos"):
            raise UserError(f"ViT positions={positions!r} is not offered: choose learned or sincos")
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
        if self.cls_token is not None and weights is None:
            nn.init.trunc_normal_(self.cls_token, std=0.02)
        if positions == "learned":
            self.pos_embed = core.pos_embed
        else:
            self.register_buffer("pos_embed", sincos_positions(dim, self.grid, class_token))
        self.patch_embed = core.patch_embed
        self.blocks = core.blocks
        if last_heads is not None:
            _split_anew(self.blocks[-1].attn, last_heads)
        self.norm = core.norm
        self.mask_token = nn.Parameter(torch.zeros(1, dim)) if mask_token else None
        if weights is not None:
            self._load(read_state(weights), f"weights {weights!r}")

    def forward(self, images: Tensor, mask: Tensor | None = None) -> Features:
        """Features of ``images (B, 3, H, W)``, float in [0, 1].

        Args:
            images: any size that is a multiple of the patch.
            mask: ``(B, H / patch, W / patch)`` bool; where it is true the patch's embedding is replaced by
                the mask token before its position is added. None: no patch is masked.

        Raises:
            UserError: the size is no multiple of the patch, there is no mask token, or the mask has another
                grid.
        """
        return self.features((images - self.mean) / self.std, mask)

    def features(self, normalised: Tensor, mask: Tensor | None = None) -> Features:
        """Patch tokens behind every block, and [CLS]; see :meth:`forward`."""
        x, grid = self._embed(normalised, mask)
        behind: list[Tensor] = []
        for block in self.blocks:
            x = block(x)
            behind.append(x)
        return self._read(behind, grid)

    def look(self, images: Tensor, heads: int | None = None, rows: int | None = None) -> Features:
        """Like a call, with attention, queries and keys of the last block, which are computed once.

        All other blocks use fused attention, and with ``rows`` the last one too. Maps and vector are those of
        a call, up to rounding. Nothing is detached.

        Args:
            images: ``(B, 3, H, W)``, float in [0, 1].
            heads: splits the channels of the last block's queries and keys into another number of heads
                before they are compared, with the scale of heads of that size; None: the network's own. Only
                what is returned changes: the block still computes with the heads that it was trained with.
                DoRA finds k > 6 objects so, with 16 or 32 heads (appendix B.2: "we decompose the query and
                key embeddings"; its public code has no such switch).
            rows: only the attention of the first ``rows`` tokens is computed and returned; 1 is [CLS]'s.

        Returns:
            Features with ``attention (B, heads, N, N)``, or ``(B, heads, rows, N)``, whose rows are softmaxes
            in float32 also under autocast, and ``queries`` and ``keys (B, heads, N, dim / heads)`` of all
            tokens as the block computes them, not scaled; ``queries.transpose(1, 2).flatten(2)`` has the
            heads side by side. N counts all tokens, [CLS] first, then the patches row by row.

        Raises:
            UserError: the size is no multiple of the patch, or ``dim`` is none of ``heads``.
        """
        dim = self.pos_embed.shape[-1]
        if heads is not None and (heads < 1 or dim % heads):
            raise UserError(f"ViT dim={dim} cannot be split into {heads} heads: choose a divisor of {dim}")
        x, grid = self._embed((images - self.mean) / self.std)
        *others, last = self.blocks
        behind: list[Tensor] = []
        for block in others:
            x = block(x)
            behind.append(x)
        x, attention, queries, keys = _attend(last, x, heads, rows)
        return self._read([*behind, x], grid, attention=attention, queries=queries, keys=keys)

    def tokens(self, images: Tensor, keep: Tensor | None = None) -> Tensor:
        """Tokens behind the final LayerNorm, [CLS] first; of some patches only, as MAE's encoder sees them.

        Args:
            images: ``(B, 3, H, W)``, float in [0, 1].
            keep: ``(B, K)`` int64, which patches each image keeps, counted row by row and in any order: their
                positions are added before the others are dropped (He et al., 2022; facebookresearch/mae
                ``models_mae.py``, ``forward_encoder``). None: all.

        Returns:
            ``(B, [1 +] K, dim)``, patches in the order of ``keep``.

        Raises:
            UserError: the size is no multiple of the patch.
            ValueError: ``keep`` is not ``(B, K)``.
        """
        x, _ = self._embed((images - self.mean) / self.std, keep=keep)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)

    def positions(self, height: int, width: int) -> Tensor:
        """Position embeddings for a grid of ``height x width`` patches, ``(1, [1 +] height width, dim)``."""
        embedding: Tensor = self.pos_embed
        prefix = embedding.shape[1] - self.grid[0] * self.grid[1]
        if (height, width) == self.grid:
            return embedding
        if self.pos_interp == "timm":
            return resample_abs_pos_embed(embedding, [height, width], list(self.grid), prefix)
        patches = embedding[:, prefix:].transpose(1, 2).unflatten(2, self.grid).float()
        if self.pos_interp == "mae":
            patches = functional.interpolate(patches, size=(height, width), mode="bicubic")
        else:
            factors = ((height + 0.1) / self.grid[0], (width + 0.1) / self.grid[1])
            patches = functional.interpolate(patches, scale_factor=factors, mode="bicubic")
        return torch.cat([embedding[:, :prefix], patches.flatten(2).transpose(1, 2).to(embedding)], dim=1)

    def _embed(
        self, normalised: Tensor, mask: Tensor | None = None, keep: Tensor | None = None
    ) -> tuple[Tensor, tuple[int, int]]:
        """What enters the first block, ``(B, [1 +] patches, dim)``, and the grid of the whole image."""
        height, width = self._grid((normalised.shape[-2], normalised.shape[-1]))
        x = self.patch_embed(normalised).flatten(1, 2)  # (B, h, w, dim) -> (B, h w, dim)
        if mask is not None:
            x = torch.where(self._masked(mask, len(x), height, width), self._token().to(x.dtype), x)
        positions = self.positions(height, width)
        first = positions.shape[1] - height * width
        x = x + positions[:, first:]
        if keep is not None:
            if keep.ndim != 2 or len(keep) != len(x):
                raise ValueError(f"keep must be ({len(x)}, K), not {tuple(keep.shape)}")
            x = x.gather(1, keep[:, :, None].expand(-1, -1, x.shape[2]))
        if self.cls_token is not None:
            x = torch.cat([(self.cls_token + positions[:, :first]).expand(len(x), -1, -1), x], dim=1)
        return x, (height, width)

    def _masked(self, mask: Tensor, batch: int, height: int, width: int) -> Tensor:
        if mask.shape != (batch, height, width) or mask.dtype != torch.bool:
            raise UserError(
                f"a mask of {tuple(mask.shape)} {mask.dtype} does not fit {batch} images of {height}x{width} "
                f"patches of {self.patch} pixels: make it bool for this grid"
            )
        return mask.flatten(1)[:, :, None]

    def _token(self) -> Tensor:
        if self.mask_token is None:
            raise UserError("ViT has no mask token, so no patch can be masked: set mask_token=True")
        return self.mask_token

    def _read(self, behind: list[Tensor], grid: tuple[int, int], **looked: Tensor) -> Features:
        """Features from the tokens behind every block."""
        first = 0 if self.cls_token is None else 1
        last = self.norm(behind[-1])
        maps = {
            name: x[:, first:].transpose(1, 2).unflatten(2, grid)
            for name, x in zip(self.channels, [*behind[:-1], last], strict=True)
        }
        vector = last[:, 0] if first else last.mean(dim=1)
        return Features(maps=maps, strides=dict(self.strides), vector=vector, **looked)

    def _load(self, state: Mapping[str, Tensor], source: str) -> None:
        own = {key: value for key, value in state.items() if OWN_KEYS.fullmatch(key)}
        self._same_geometry(own, source)
        if self.mask_token is not None:
            token = state.get("mask_token")  # MAE's files have another of this name, as wide as the decoder
            if token is None or token.shape != self.mask_token.shape:
                token = self.mask_token.detach()
            own["mask_token"] = token
        load_state(self, own, source)

    def _same_geometry(self, state: Mapping[str, Tensor], source: str) -> None:
        """Says which argument is wrong where patches or positions are others than the network's."""
        kernel, positions = state.get("patch_embed.proj.weight"), state.get("pos_embed")
        if kernel is not None and kernel.ndim == 4 and kernel.shape[2:] != (self.patch, self.patch):
            raise UserError(
                f"{source}: made for patches of {kernel.shape[2]}x{kernel.shape[3]} pixels, ViT has "
                f"patch={self.patch}: set patch={kernel.shape[3]}"
            )
        tokens = {key for key in state if key.endswith(("_token", "_tokens"))}
        if positions is None or tokens != ({"cls_token"} if self.cls_token is not None else set()):
            return
        found, wanted = positions.shape[1], self.pos_embed.shape[1]
        if found != wanted:
            height, width = (side * self.patch for side in self.grid)
            raise UserError(
                f"{source}: has {found} position embeddings, ViT with image_size=({height}, {width}) has "
                f"{wanted}: set image_size to that of the weights (other sizes are interpolated afterwards)"
            )

    def _grid(self, size: tuple[int, int]) -> tuple[int, int]:
        height, width = size
        if height % self.patch or width % self.patch:
            raise UserError(
                f"ViT with patches of {self.patch} pixels cannot take {height}x{width} pixels: "
                f"choose a height and width that are multiples of {self.patch}"
            )
        return height // self.patch, width // self.patch


def _split_anew(attention: Any, heads: int) -> None:
    """Another number of heads for timm's attention: its weights depend on none."""
    attention.num_heads, attention.head_dim = heads, attention.qkv.out_features // (3 * heads)
    attention.scale = attention.head_dim**-0.5


def _attend(
    block: Any, x: Tensor, heads: int | None, rows: int | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One block of timm's, written out; its output, attention, queries and keys, see :meth:`ViT.look`."""
    own: int = block.attn.num_heads
    qkv: Tensor = block.attn.qkv(block.norm1(x))
    queries, keys, values = qkv.unflatten(2, (3, own, -1)).permute(2, 0, 3, 1, 4).unbind(0)
    if rows is None and heads in (None, own):
        attention = _attention(queries, keys)
        mixed = attention.to(values.dtype) @ values
    else:
        mixed = functional.scaled_dot_product_attention(queries, keys, values)
        if heads is not None:
            queries, keys = (part.unflatten(2, (heads, -1)).transpose(1, 2) for part in qkv.chunk(3, 2)[:2])
        attention = _attention(queries if rows is None else queries[:, :, :rows], keys)
    x = x + block.drop_path1(block.ls1(block.attn.proj(mixed.transpose(1, 2).flatten(2))))
    x = x + block.drop_path2(block.ls2(block.mlp(block.norm2(x))))
    return x, attention, queries, keys


def _attention(queries: Tensor, keys: Tensor) -> Tensor:
    """Softmax of the scaled products, ``(B, heads, rows, N)`` in float32 at least."""
    exact = torch.promote_types(queries.dtype, torch.float32)
    # the compiler can neither read nor change what full_float32 does
    products = nullcontext() if torch.compiler.is_compiling() else full_float32()
    with island(queries.device.type), products:
        scores = (queries.to(exact) * queries.shape[-1] ** -0.5) @ keys.to(exact).transpose(-2, -1)
        return scores.softmax(dim=-1)

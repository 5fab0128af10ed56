"""MAE's decoder and its sine-cosine positions (He et al., 2022; facebookresearch/mae ``models_mae.py``)."""

from __future__ import annotations

from functools import partial

import torch
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from poodle_lightning.types import UserError

_layer_norm = partial(nn.LayerNorm, eps=1e-6)


def sincos_positions(dim: int, grid: tuple[int, int], class_token: bool) -> Tensor:
    """Fixed position embeddings of a grid of patches (facebookresearch/mae ``util/pos_embed.py``).

    The first half of the channels holds the patch's column, the second its row; each half is the sines, then
    the cosines, of the number times ``10000^(−4 i / dim)``, i = 0 … dim / 4 − 1.

    Args:
        dim: channels, a multiple of 4.
        grid: ``(h, w)`` patches.
        class_token: puts a row of zeros in front, for [CLS].

    Returns:
        ``(1, [1 +] h · w, dim)`` float32, patches row by row; worked out in float64.

    Raises:
        UserError: ``dim`` is no multiple of 4.
    """
    if dim % 4:
        raise UserError(f"sine-cosine positions need dim to be a multiple of 4, not {dim}: change dim")
    rates = 10000.0 ** (-torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    rows, columns = (torch.arange(side, dtype=torch.float64)[:, None] * rates for side in grid)
    of_row, of_column = (torch.cat([angle.sin(), angle.cos()], dim=1) for angle in (rows, columns))
    height, width = grid
    both = torch.cat(
        [of_column[None].expand(height, -1, -1), of_row[:, None].expand(-1, width, -1)], dim=2
    ).flatten(0, 1)
    if class_token:
        both = torch.cat([both.new_zeros(1, dim), both])
    return both[None].float()


class MAEDecoder(nn.Module):
    """Predicts the pixels of all patches from the encoder's tokens of those it saw.

    The tokens are brought to the decoder's width and put where they belong, the mask token stands at all
    other places, positions are added, and the blocks work on the whole image ([CLS] with it).

    Args:
        encoder_dims: channels of the encoder's tokens.
        patch: side of a patch in pixels.
        grid: ``(h, w)`` patches of the whole image.
        dim: channels of the decoder, a multiple of 4 and of ``heads``.
        depth: number of blocks.
        heads: attention heads.

    Attributes:
        mask_token: ``(1, 1, dim)``.
        positions: ``(1, 1 + n, dim)``, fixed; not in the state dict.

    Raises:
        UserError: ``dim`` is no multiple of 4 or of ``heads``.
    """

    positions: Tensor

    def __init__(
        self,
        encoder_dims: int,
        patch: int,
        grid: tuple[int, int],
        dim: int = 512,
        depth: int = 8,
        heads: int = 16,
    ) -> None:
        super().__init__()
        if dim % heads:
            raise UserError(f"a decoder of dim={dim} cannot have {heads} heads: choose a divisor of {dim}")
        self.patches = grid[0] * grid[1]
        self.embed = nn.Linear(encoder_dims, dim)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.register_buffer("positions", sincos_positions(dim, grid, class_token=True), persistent=False)
        self.blocks = nn.Sequential(
            *(Block(dim, heads, qkv_bias=True, norm_layer=_layer_norm) for _ in range(depth))
        )
        self.norm = _layer_norm(dim)
        self.predict = nn.Linear(dim, patch * patch * 3)
        nn.init.normal_(self.mask_token, std=0.02)
        for layer in self.modules():
            if isinstance(layer, nn.Linear):
                nn.init.xavier_uniform_(layer.weight)
                nn.init.zeros_(layer.bias)

    def forward(self, tokens: Tensor, keep: Tensor) -> Tensor:
        """Pixels of all patches.

        Args:
            tokens: ``(B, 1 + K, encoder_dims)``, [CLS] first, then the patches in the order of ``keep``.
            keep: ``(B, K)`` int64, which patches they are, counted row by row.

        Returns:
            ``(B, n, patch · patch · 3)`` in the order of
            :func:`poodle_lightning.losses.reconstruction.patchify`.
        """
        x = self.embed(tokens)
        batch, _, dim = x.shape
        places = keep[:, :, None].expand(-1, -1, dim)
        whole = self.mask_token.to(x.dtype).expand(batch, self.patches, dim).scatter(1, places, x[:, 1:])
        x = torch.cat([x[:, :1], whole], dim=1) + self.positions
        predicted: Tensor = self.predict(self.norm(self.blocks(x))[:, 1:])
        return predicted

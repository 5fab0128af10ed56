"""Vision transformers in pairs, ours and timm's, and what both are compared with."""

import math

import numpy as np
import timm
import torch

from poodle_lightning.nn.vit import ViT

SIZES = {"patch": 8, "dim": 64, "depth": 3, "heads": 2, "image_size": (32, 48)}


def pair(class_token=True, **kwargs):
    """Our network and timm's with the same random weights, both in eval mode."""
    torch.manual_seed(0)
    reference = timm.models.VisionTransformer(
        img_size=(32, 48),
        patch_size=8,
        embed_dim=64,
        depth=3,
        num_heads=2,
        num_classes=10,
        class_token=class_token,
        global_pool="token" if class_token else "avg",
        fc_norm=False,
        dynamic_img_size=True,
    ).eval()
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
        reference.pos_embed.normal_()
    ours = ViT(**SIZES, class_token=class_token, **kwargs).eval()
    left = ours.load_state_dict(reference.state_dict(), strict=False)
    assert left.missing_keys == []
    assert sorted(left.unexpected_keys) == ["head.bias", "head.weight"]
    return ours, reference


def cubic(distance, a=-0.75):
    d = abs(distance)
    if d <= 1:
        return (a + 2) * d**3 - (a + 3) * d**2 + 1
    return a * (d**3 - 5 * d**2 + 8 * d - 4) if d < 2 else 0.0


def interpolated(grid, size, extra=0.1):
    """DINO's position embeddings cell by cell, float64: bicubic at the scale (size + 0.1) / old size.

    MAE's add nothing to the size.
    """
    out = np.zeros((*size, grid.shape[-1]))
    for row in range(size[0]):
        for column in range(size[1]):
            y, x = (
                (index + 0.5) * old / (new + extra) - 0.5
                for index, old, new in zip((row, column), grid.shape, size, strict=False)
            )
            for j in range(math.floor(y) - 1, math.floor(y) + 3):
                for i in range(math.floor(x) - 1, math.floor(x) + 3):
                    cell = grid[min(max(j, 0), grid.shape[0] - 1), min(max(i, 0), grid.shape[1] - 1)]
                    out[row, column] += cubic(y - j) * cubic(x - i) * cell
    return out


def antialiased(grid, size):
    """timm's position embeddings, float64: bicubic (a = -1/2) stretched by the scale when it shrinks.

    Rows of weights sum to 1 over the cells that exist, as in Pillow.
    """

    def weights(old, new):
        stretch = max(old / new, 1.0)
        rows = [
            [cubic((j + 0.5 - (i + 0.5) * old / new) / stretch, a=-0.5) for j in range(old)]
            for i in range(new)
        ]
        return np.array(rows) / np.sum(rows, axis=1, keepdims=True)

    down, across = (weights(old, new) for old, new in zip(grid.shape, size, strict=False))
    return np.einsum("yj,xi,jic->yxc", down, across, grid)


def timms_last_block(reference, normalised):
    """Attention ``(B, heads, N, N)``, queries and keys ``(B, N, dim)`` of timm's last block, unfused."""
    seen = {}
    attn = reference.blocks[-1].attn
    attn.fused_attn = False
    handles = [
        attn.attn_drop.register_forward_pre_hook(lambda _module, inputs: seen.update(attention=inputs[0])),
        attn.qkv.register_forward_hook(lambda _module, _inputs, found: seen.update(qkv=found)),
    ]
    with torch.no_grad():
        reference.forward_features(normalised)
    for handle in handles:
        handle.remove()
    attn.fused_attn = True
    queries, keys, _ = seen["qkv"].chunk(3, dim=2)
    return seen["attention"], queries, keys


def split(channels, heads):
    """``(B, N, dim)`` as ``(B, heads, N, dim / heads)``: head i has the i-th run of channels."""
    return torch.stack(channels.chunk(heads, dim=2), dim=1)

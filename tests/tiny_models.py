"""Small clips of analytic content, and small networks."""

import torch

from poodle_lightning.nn.optim import Recipe
from poodle_lightning.nn.resnet import ResNet
from poodle_lightning.nn.sdm import SDM
from poodle_lightning.ops.geometry import Affine
from poodle_lightning.ops.random import key_of
from poodle_lightning.types import Clip

SIZE = (32, 64)


def make_clip(batch=2, size=SIZE, shift=(3.0, 1.0), seed=0) -> Clip:
    """Pairs of smooth textures; the second frame is the first moved by ``shift`` px, with the exact flow."""
    torch.manual_seed(seed)
    height, width = size[0] + 2, size[1] + 2
    y, x = torch.meshgrid(torch.arange(height).double(), torch.arange(width).double(), indexing="ij")
    frames = torch.empty(batch, 2, 3, height, width, dtype=torch.uint8)
    for i in range(batch):
        waves = torch.rand(6, 4, dtype=torch.float64) * torch.tensor([0.6, 0.6, 6.28, 1.0])
        for t in range(2):
            moved_x, moved_y = x - t * shift[0], y - t * shift[1]
            value = sum(w[3] * torch.sin(w[0] * moved_x + w[1] * moved_y + w[2]) for w in waves)
            channels = [value, torch.sin(2 * value), torch.cos(value)]
            frames[i, t] = torch.stack([((c / 6 + 0.5) * 255).clamp(0, 255) for c in channels]).to(
                torch.uint8
            )
    box = torch.tensor([[-1 + 2 / width, -1 + 2 / height, 1 - 2 / width, 1 - 2 / height]]).expand(batch, 4)
    there = torch.tensor(shift).reshape(2, 1, 1).expand(2, height, width)
    return Clip(
        frames=frames,
        window=Affine.box(box),
        size=size,
        times=torch.tensor([[0.0, 0.5]], dtype=torch.float64).expand(batch, 2),
        index=torch.arange(batch),
        key=torch.stack([key_of(seed, 0, i) for i in range(batch)]),
        flow=torch.stack([there, -there])[None].expand(batch, 2, 2, height, width).contiguous(),
    )


def tiny_encoder(**kwargs) -> ResNet:
    return ResNet(10, width=8, **kwargs)


def tiny_sdm(encoder: ResNet, **kwargs) -> SDM:
    return SDM(encoder.channels, dims=32, **kwargs)


def tiny_recipe(**kwargs) -> Recipe:
    return Recipe(**{"lr": 1e-3, "warmup_steps": 0, "horizon_steps": 100, **kwargs})

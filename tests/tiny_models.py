"""Small clips of analytic content, and small networks."""

import torch

from poodle_lightning.augment.geometric import ResizedCrop
from poodle_lightning.augment.multicrop import MultiCrop
from poodle_lightning.methods.distillation import HeadSizes, SelfDistillation
from poodle_lightning.nn.optim import Recipe
from poodle_lightning.nn.resnet import ResNet
from poodle_lightning.nn.sdm import SDM
from poodle_lightning.nn.vit import ViT
from poodle_lightning.ops.geometry import Affine
from poodle_lightning.ops.random import key_of
from poodle_lightning.types import Clip

SIZE = (32, 64)


def make_clip(batch=2, size=SIZE, shift=(3.0, 1.0), seed=0, frames=2) -> Clip:
    """Smooth textures, each frame the one before it moved by ``shift`` px, 16 points; pairs have the flow."""
    torch.manual_seed(seed)
    height, width = size[0] + 2, size[1] + 2
    y, x = torch.meshgrid(torch.arange(height).double(), torch.arange(width).double(), indexing="ij")
    pixels = torch.empty(batch, frames, 3, height, width, dtype=torch.uint8)
    for i in range(batch):
        waves = torch.rand(6, 4, dtype=torch.float64) * torch.tensor([0.6, 0.6, 6.28, 1.0])
        for t in range(frames):
            moved_x, moved_y = x - t * shift[0], y - t * shift[1]
            value = sum(w[3] * torch.sin(w[0] * moved_x + w[1] * moved_y + w[2]) for w in waves)
            channels = [value, torch.sin(2 * value), torch.cos(value)]
            pixels[i, t] = torch.stack([((c / 6 + 0.5) * 255).clamp(0, 255) for c in channels]).to(
                torch.uint8
            )
    box = torch.tensor([[-1 + 2 / width, -1 + 2 / height, 1 - 2 / width, 1 - 2 / height]]).expand(batch, 4)
    first = torch.rand(batch, 16, 1, 2) * 2 - 1
    step = torch.tensor([2 * shift[0] / size[1], 2 * shift[1] / size[0]])
    points = first + step * torch.arange(frames).view(-1, 1)
    there = torch.tensor(shift).reshape(2, 1, 1).expand(2, height, width)
    flow = torch.stack([there, -there])[None].expand(batch, 2, 2, height, width).contiguous()
    return Clip(
        frames=pixels,
        window=Affine.box(box),
        size=size,
        times=(torch.arange(frames, dtype=torch.float64) / 2).expand(batch, frames),
        index=torch.arange(batch),
        key=torch.stack([key_of(seed, 0, i) for i in range(batch)]),
        flow=flow if frames == 2 else None,
        points=points,
    )


def tiny_encoder(**kwargs) -> ResNet:
    return ResNet(10, width=8, **kwargs)


def tiny_sdm(encoder: ResNet, **kwargs) -> SDM:
    return SDM(encoder.channels, dims=32, **kwargs)


def tiny_recipe(**kwargs) -> Recipe:
    return Recipe(**{"lr": 1e-3, "warmup_steps": 0, "horizon_steps": 100, **kwargs})


def tiny_vit(**kwargs) -> ViT:
    sizes = {"patch": 8, "dim": 24, "depth": 2, "heads": 3, "image_size": (32, 32), "pos_interp": "dino"}
    return ViT(**{**sizes, **kwargs})


def tiny_crops(**kwargs) -> MultiCrop:
    large = ResizedCrop((32, 32), (0.4, 1.0), fit="redraw")
    small = ResizedCrop((16, 16), (0.05, 0.4), fit="redraw")
    return MultiCrop(large, small, **{"locals": 2, **kwargs})


def tiny_head(**kwargs) -> HeadSizes:
    return HeadSizes(**{"hidden": 32, "bottleneck": 16, "out": 64, "norm_last": False, **kwargs})


def stirred(method: SelfDistillation, seed: int = 0) -> SelfDistillation:
    """In float64 and evaluation mode, student and teacher apart, weights and centres far from their start."""
    method = method.double().eval()
    generator = torch.Generator().manual_seed(seed)
    moved = [
        *method.parameters(),
        *(m.value for name, m in method.named_modules() if name.endswith("centre")),
    ]
    with torch.no_grad():
        for tensor in moved:
            tensor.add_(0.2 * torch.randn(tensor.shape, generator=generator, dtype=torch.float64))
    return method

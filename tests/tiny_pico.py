"""A small PiCo, and clips that bring points."""

import math
from dataclasses import replace

import torch
from tiny_models import make_clip, tiny_encoder, tiny_recipe
from torch.nn import functional

from poodle_lightning.augment.geometric import ResizedCrop
from poodle_lightning.augment.multicrop import MultiCrop
from poodle_lightning.methods.pico import PiCo
from poodle_lightning.nn.fpn import SemanticFPN

CROP = (32, 48)
PLACES, QUEUE = 7, 40


def two_crops(size=CROP, area=(0.2, 1.0), colours=()):
    return MultiCrop(ResizedCrop(size, area, fit="redraw"), locals=0, colours=colours, clip_wide=False)


def tiny(encoder=None, double=True, **kwargs):
    """Weights of the target apart from those it copies; the queue takes keys."""
    torch.manual_seed(0)
    sizes = {"hidden": 16, "out": 8, "queue": QUEUE, "crops": two_crops(), "places": PLACES}
    encoder = encoder or tiny_encoder()
    decoder = SemanticFPN(encoder.channels, dims=32, pyramid=16)
    method = PiCo(encoder, decoder, **{**sizes, "recipe": tiny_recipe(), **kwargs})
    learnt = [*method.target.module.decoder.parameters(), *method.target.module.projector.parameters()]
    with torch.no_grad():
        for parameter in learnt:
            parameter.add_(0.05 * torch.randn_like(parameter))
    method = method.double() if double else method
    method.queue.rows.copy_(functional.normalize(method.queue.rows, dim=1))  # to float64's rounding
    return method.train()


def tracked(batch=3, frames=2, seed=0, points=PLACES):
    """Clips with places of points, float64; rows that only fill up, and some that one frame lacks."""
    clip = make_clip(batch=batch, frames=frames, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    places = torch.rand(batch, points, frames, 2, generator=generator, dtype=torch.float64) * 2 - 1
    places[:, -1] = math.nan
    places[0, 0, -1] = math.nan
    return replace(clip, points=places)


def untracked(**kwargs):
    """Clips without points."""
    return replace(make_clip(**kwargs), points=None)

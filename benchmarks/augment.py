"""Augmentation of one image: the published operations, Kornia's, and the package's exact and matrix forms.

All forms get the same draws: the recipe with its probabilities, and with everything switched on. Images are
generated streets, or noise with ``--no-streets``. Geometry: resize, crop, rotation and flip in
turn against the two samplings of the package. Times are CPU seconds of one thread, per image, in turns.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable
from typing import Any

from benchmarks import record

import cv2  # isort: skip  (after record, which fixes the number of threads)
import kornia.enhance as enhance
import numpy as np
import torch
import torch.nn.functional as F
from kornia.color import rgb_to_grayscale
from kornia.filters import gaussian_blur2d
from torch import Tensor

from benchmarks.published import colour as published
from poodle_lightning.augment.geometric import AffineFlip
from poodle_lightning.augment.photometric import Colour, Drawn
from poodle_lightning.data.synthetic import Street
from poodle_lightning.ops.geometry import Affine, pixels_to_extent, pull
from poodle_lightning.ops.random import fold, key_of

SETTINGS: dict[str, dict[str, float]] = {
    "recipe": {},
    "everything": {"jitter": 1.0, "gray": 1.0, "blur": 1.0},
}
FORMS = ("published", "kornia", "exact", "matrix")


def by_kornia(images: Tensor, drawn: Drawn, widest: float) -> Tensor:
    """Kornia's operations on the images that have the same one at the same place; one blur for all."""
    jitter: tuple[Callable[[Tensor, Tensor], Tensor], ...] = (
        enhance.adjust_brightness_accumulative,
        enhance.adjust_contrast_with_mean_subtraction,
        enhance.adjust_saturation_with_gray_subtraction,
        lambda x, turns: enhance.adjust_hue(x, turns * (2 * math.pi)),
        lambda x, _: rgb_to_grayscale(x).expand(-1, 3, -1, -1),
    )
    out = images.clone()
    for place in range(5):
        for number in range(5):
            rows = [
                row
                for row, steps in enumerate(drawn.steps)
                if steps[place : place + 1] and steps[place][0] == number
            ]
            if rows:
                factors = torch.tensor([drawn.steps[row][place][1] for row in rows])
                out[rows] = jitter[number](out[rows], factors)
    rows = drawn.blur.nonzero()[0].tolist()
    if rows:
        side = 2 * math.ceil(4 * widest) + 1
        out[rows] = gaussian_blur2d(
            out[rows], (side, side), torch.from_numpy(drawn.sigma[rows])[:, None].expand(-1, 2)
        )
    return out


def recolour(form: str, images: Tensor, keys: Tensor, setting: dict[str, float]) -> Tensor:
    """The images in new colours, by one of ``FORMS``."""
    recipe = Colour(**setting, form="matrix" if form == "matrix" else "exact")
    if form == "published":
        return published.colour(images, recipe.draw(keys))
    if form == "kornia":
        return by_kornia(images, recipe.draw(keys), recipe.sigma[1])
    return recipe(images, keys)


# ---- what is measured on
def make_frames(args: argparse.Namespace) -> Tensor:
    """Frames ``(B, 3, H, W)`` uint8 at 1.4 times the size of the training crop."""
    size = (round(args.h * 1.4), round(args.w * 1.4))
    if args.streets:
        streets = (Street(seed, size, "hard", supersample=1) for seed in range(args.batch))
        frames = np.stack([street.read([2.0])[0][0] for street in streets])
        return torch.from_numpy(frames).permute(0, 3, 1, 2).contiguous()
    draw = torch.Generator().manual_seed(0)
    waves = [
        F.interpolate(torch.rand(args.batch, 3, *(max(2, s // cell) for s in size), generator=draw), size)
        for cell in (64, 8, 1)
    ]
    return (255 * torch.stack(waves).mean(dim=0)).to(torch.uint8)


def crop_box(args: argparse.Namespace) -> tuple[int, int, int, int]:
    """A crop in the middle of the frames, of 1.2 times the training crop's side."""
    left, top = round(0.1 * args.w), round(0.1 * args.h)
    return left, top, left + round(1.2 * args.w), top + round(1.2 * args.h)


def sampled_twice(frames: Tensor, args: argparse.Namespace, keys: Tensor) -> Tensor:
    """The package's way: crop and resize are one sampling of the bytes, rotation and flip another."""
    left, top, right, bottom = crop_box(args)
    corners = torch.tensor([[left - 0.5, top - 0.5], [right - 0.5, bottom - 0.5]])
    box = pixels_to_extent(corners, (frames.shape[-2], frames.shape[-1])).reshape(1, 4).expand(len(frames), 4)
    crops, _ = pull(frames, Affine.box(box), (args.h, args.w))
    return AffineFlip()(crops.div_(255.0), keys).image


def in_turn(frames: Tensor, args: argparse.Namespace, crop_first: bool) -> Tensor:
    """Every step an image of its own; the published order resizes the whole frame and crops then."""
    box, size = crop_box(args), (args.h, args.w)
    return torch.stack([published.geometry(frame, box, size, 7.0, 1.05, crop_first) for frame in frames])


# ---- measuring
def measure(ways: dict[str, Callable[[int], object]], rounds: int, batch: int) -> dict[str, list[float]]:
    """CPU milliseconds per image of every round, the ways in turn; one round before does not count."""
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds + 1):
        for name, way in ways.items():
            began = time.process_time()
            way(number)
            if number:
                taken[name].append(1e3 * (time.process_time() - began) / batch)
    return taken


def summary(taken: dict[str, list[float]], reference: str) -> dict[str, Any]:
    """Spreads of the times, and of how many times faster each is than the reference."""
    others = [name for name in taken if name != reference]
    return {
        "ms_per_image": {name: record.spread(values) for name, values in taken.items()},
        "times_faster": {name: record.ratio(taken[reference], taken[name]) for name in others},
    }


def distance(images: Tensor, keys: Tensor, setting: dict[str, float]) -> dict[str, float]:
    """How far the matrix, and Kornia, are from the exact form; without the blur, which they share."""
    setting = {**setting, "blur": 0.0}
    exact = recolour("exact", images, keys, setting)
    found = {}
    for form in ("matrix", "kornia"):
        off = (recolour(form, images, keys, setting) - exact).abs()
        found |= {f"{form}_mean": off.mean().item(), f"{form}_max": off.max().item()}
    return found | {"change_mean": (exact - images).abs().mean().item()}


def measure_colour(images: Tensor, setting: dict[str, float], args: argparse.Namespace) -> dict[str, Any]:
    """One setting: every round has draws of its own, the same for all forms."""
    keys = torch.stack([key_of(0, row) for row in range(len(images))])
    ways = {form: lambda n, form=form: recolour(form, images, fold(keys, n), setting) for form in FORMS}
    results = summary(measure(ways, args.rounds, len(images)), "published")
    many = torch.stack([key_of(1, row) for row in range(args.draws)])
    small = F.avg_pool2d(images, 4).repeat(-(-args.draws // len(images)), 1, 1, 1)[: args.draws]
    # with everything grey, hue and saturation would not be compared
    return results | {"distance": distance(small, many, {**setting, "gray": 0.0})}


def measure_geometry(frames: Tensor, args: argparse.Namespace) -> dict[str, Any]:
    """Crop, resize, rotation and flip."""
    keys = torch.stack([key_of(0, row) for row in range(len(frames))])
    ways = {
        "published order": lambda _: in_turn(frames, args, crop_first=False),
        "crop first": lambda _: in_turn(frames, args, crop_first=True),
        "two samplings": lambda _: sampled_twice(frames, args, keys),
    }
    return summary(measure(ways, args.rounds, len(frames)), "published order")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """All results."""
    cv2.setNumThreads(1)
    frames = make_frames(args)
    left, top = crop_box(args)[:2]
    images = frames[:, :, top : top + args.h, left : left + args.w].float() / 255.0
    colours = {name: measure_colour(images, setting, args) for name, setting in SETTINGS.items()}
    return colours | {"geometry": measure_geometry(frames, args)}


def main(words: list[str] | None = None) -> dict[str, Any]:
    parser = record.arguments(__doc__, rounds=7)
    parser.add_argument("--h", type=int, default=512, help="height of the training crop, px; above 106")
    parser.add_argument("--w", type=int, default=1024, help="width of the training crop, px")
    parser.add_argument("--batch", type=int, default=4, help="images")
    parser.add_argument("--draws", type=int, default=64, help="small images on which forms are compared")
    parser.add_argument("--no-streets", dest="streets", action="store_false", help="noise, not streets")
    args = parser.parse_args(words)
    results = run(args)
    path = record.save("augment", args, results)
    print(_report(results))
    print(f"written to {path}")
    return results


def _report(results: dict[str, Any]) -> str:
    rows = []
    for part, found in results.items():
        for name, values in found["ms_per_image"].items():
            faster = found["times_faster"].get(name)
            rows.append((part, name, record.shown(values, 1), record.shown(faster, 1) if faster else "1"))
    apart = [
        (part, name, f"{value:.2g}")
        for part, found in results.items()
        for name, value in found.get("distance", {}).items()
    ]
    return "\n\n".join(
        [
            record.table(("what", "form", "CPU ms per image", "times faster"), rows),
            record.table(("what", "distance to the exact form", "of the value range"), apart),
        ]
    )


if __name__ == "__main__":
    main()

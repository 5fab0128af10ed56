"""A contrastive step against the same step with loops over pairs: PiCo's points, VITO's views.

Forward and backward pass of one batch, networks and views included, in process CPU seconds on one thread.
Both forms share weights and views and must give the same loss and gradients: the program fails where they do
not. BatchNorm is frozen: it would see other batches in loops.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from benchmarks import record

import torch  # isort: skip  (after record, which fixes the number of threads)
from torch import Tensor

from benchmarks.published import contrastive
from poodle_lightning.augment.geometric import ResizedCrop
from poodle_lightning.augment.multicrop import MultiCrop
from poodle_lightning.augment.photometric import Colour
from poodle_lightning.methods.base import Method
from poodle_lightning.methods.pico import PiCo
from poodle_lightning.methods.vito import VITO
from poodle_lightning.nn.fpn import SemanticFPN
from poodle_lightning.nn.resnet import ResNet
from poodle_lightning.ops.geometry import Affine
from poodle_lightning.ops.random import key_of, normal, uniform
from poodle_lightning.types import Clip

# What rounding may make of loss and gradients in other orders of float32 sums, as a share of their lengths.
_SAME = 1e-5


def make_clip(batch: int, frames: int, size: int, points: int) -> Clip:
    """Noise, and points at the same places of all frames."""
    key = torch.stack([key_of(0, 0, number) for number in range(batch)])
    pixels = (normal(key, frames * 3 * size * size) * 60 + 128).clamp(0, 255).to(torch.uint8)
    where = uniform(key, 2 * points, -1.0, 1.0).view(batch, points, 1, 2).expand(-1, -1, frames, -1)
    return Clip(
        frames=pixels.view(batch, frames, 3, size, size),
        window=Affine.identity(batch),
        size=(size, size),
        times=torch.arange(frames, dtype=torch.float64).expand(batch, frames),
        index=torch.arange(batch),
        key=key,
        points=where.contiguous(),
    )


def pico(crop: int, queue: int) -> PiCo:
    """On a ResNet-18 with a quarter of its channels."""
    torch.manual_seed(0)
    encoder = ResNet(18, width=16)
    crops = MultiCrop(
        ResizedCrop((crop, crop), (0.2, 1.0), fit="redraw"),
        locals=0,
        colours=(Colour(0.4, 0.4, 0.4, 0.1),),
        clip_wide=False,
    )
    decoder = SemanticFPN(encoder.channels, 64, 64, 16)
    return PiCo(encoder, decoder, hidden=256, out=128, queue=queue, crops=crops).eval()


def vito(crop: int) -> VITO:
    """On a ResNet-18 with a quarter of its channels."""
    torch.manual_seed(0)
    return VITO(ResNet(18, width=16), crop=ResizedCrop((crop, crop), (0.4, 1.0)), hidden=256, out=128).eval()


def difference(method: Method, forms: dict[str, Callable[[], Tensor]]) -> float:
    """Largest difference of loss and gradients between the forms, as shares of their lengths."""
    found = []
    for form in forms.values():
        method.zero_grad()
        loss = form()
        loss.backward()
        found.append([loss.detach(), *[p.grad.clone() for p in method.parameters() if p.grad is not None]])
    whole = torch.stack([part.norm() for part in found[0]]).norm()
    apart = torch.stack([(a - b).norm() for a, b in zip(*found, strict=True)])
    return float(apart.max() / whole)  # torch's maximum of what holds a NaN is one


def main(words: list[str] | None = None) -> dict[str, object]:
    parser = record.arguments(__doc__, rounds=5)
    parser.add_argument("--batch", type=int, default=4, help="clips of PiCo")
    parser.add_argument("--points", type=int, default=256, help="per clip, of PiCo")
    parser.add_argument("--queue", type=int, default=65_536, help="keys, of PiCo")
    parser.add_argument("--clips", type=int, default=32, help="of VITO, three views each")
    parser.add_argument("--crop", type=int, default=64, help="side of all views, px")
    args = parser.parse_args(words)
    points, views = pico(args.crop, args.queue), vito(args.crop)
    pairs = make_clip(args.batch, 2, 96, args.points)
    triples = make_clip(args.clips, 3, 96, 1)
    cases: dict[str, tuple[Method, dict[str, Callable[[], Tensor]]]] = {
        "PiCo": (
            points,
            {
                "package": lambda: points.losses(pairs)["pixels"],
                "pair by pair": lambda: contrastive.pico(points, pairs),
            },
        ),
        "VITO": (
            views,
            {
                "package": lambda: views.losses(triples)["contrast"],
                "pair by pair": lambda: contrastive.moclr(views, triples),
            },
        ),
    }
    results: dict[str, object] = {}
    rows = []
    for name, (method, forms) in cases.items():
        apart = difference(method, forms)
        if not apart < _SAME:
            raise SystemExit(f"{name}: loss and gradients of the two forms differ by {apart:.1e}")
        seconds = measure(method, forms, args.rounds)
        found: dict[str, object] = {"difference": apart}
        found |= {form: record.spread(taken) for form, taken in seconds.items()} if args.rounds else {}
        results[name] = found
        if args.rounds:
            faster = record.ratio(seconds["pair by pair"], seconds["package"])
            found["times_faster"] = faster
            rows.append(
                (name, *map(record.shown, map(record.spread, seconds.values())), record.shown(faster))
            )
    path = record.save("contrastive_step", args, results)
    print(record.table(("step", "package, s", "pair by pair, s", "times faster"), rows))
    print(f"written to {path}")
    return results


def measure(method: Method, forms: dict[str, Callable[[], Tensor]], rounds: int) -> dict[str, list[float]]:
    """CPU seconds of forward and backward pass of every form in every round."""
    seconds: dict[str, list[float]] = {name: [] for name in forms}
    for _ in range(rounds):
        for name, form in forms.items():
            method.zero_grad()
            began = time.process_time()
            form().backward()
            seconds[name].append(time.process_time() - began)
    return seconds


if __name__ == "__main__":
    main()

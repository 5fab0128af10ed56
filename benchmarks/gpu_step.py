"""PooDLe's training step on one GPU: pairs per second, memory, and whether the host ever waits.

Every variant takes optimiser steps on the same clips, which are ready in page-locked memory; copying them to
the device is part of the step, reading videos is not. The package with cached flow stands beside the
published formulation (float32, TF32 in convolutions as torch has it by default) with the same flow, and
beside itself with RAFT in every step. Variants take turns; times are wall-clock seconds between two
synchronisations. "peak GiB" is what a step takes above the weights of all variants, which stay on the device;
optimiser and gradients of the variant itself are in it.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from benchmarks import record

import torch  # isort: skip  (after record, which fixes the number of threads)
import torch.nn.functional as F

from benchmarks.published.step import PublishedStep
from benchmarks.step import Loop
from poodle_lightning.analysis.flops import counted
from poodle_lightning.analysis.peaks import peak_flops
from poodle_lightning.augment.photometric import recolour
from poodle_lightning.flow.given import Given
from poodle_lightning.flow.raft import RAFT
from poodle_lightning.methods.poodle import PooDLe
from poodle_lightning.nn.resnet import ResNet
from poodle_lightning.nn.sdm import SDM
from poodle_lightning.ops.crops import SubcropRecipe
from poodle_lightning.ops.geometry import Affine, Size
from poodle_lightning.ops.random import key_of
from poodle_lightning.types import Clip, FlowEstimator

GIB = 2.0**30
# A window of a BDD100K frame has about three quarters of the training crop's pixels on each side.
STORED = 0.77
Step = Callable[[Clip], Any]


@dataclass(frozen=True)
class Variant:
    """A name, the step, and how its arithmetic is judged."""

    name: str
    step: Step
    precision: str


def make_clips(size: Size, batch: int, count: int) -> list[Clip]:
    """Smooth textures and a smooth motion of about 12 px; content does not matter to the time."""
    height, width = (round(STORED * side) + 2 for side in size)
    draw = torch.Generator().manual_seed(0)
    clips = []
    for number in range(count):
        knots = torch.rand(2 * batch, 3, height // 8, width // 8, generator=draw)
        frames = (255 * F.interpolate(knots, (height, width), mode="bilinear")).byte()
        coarse = 12 * torch.randn(batch, 2, 4, 8, generator=draw)
        there = F.interpolate(coarse, (height, width), mode="bicubic", align_corners=True)
        inner = torch.tensor([1 / width, 1 / height, -1 / width, -1 / height]) * 2
        box = torch.tensor([-1.0, -1.0, 1.0, 1.0]) + inner
        clip = Clip(
            frames=frames.unflatten(0, (batch, 2)),
            window=Affine.box(box.expand(batch, 4)),
            size=size,
            times=torch.tensor([[0.0, 0.75]], dtype=torch.float64).expand(batch, 2),
            index=torch.arange(batch) + number * batch,
            key=torch.stack([key_of(0, number, i) for i in range(batch)]),
            flow=torch.stack([there, -there], dim=1),
            present=torch.ones(batch, 2, dtype=torch.bool),
        )
        clips.append(clip.pin_memory() if torch.cuda.is_available() else clip)
    return clips


def make_method(args: argparse.Namespace, flow: FlowEstimator | None = None, **changes: Any) -> PooDLe:
    """PooDLe with ResNet-50 (a small one with ``--tiny``), the same weights each time."""
    torch.manual_seed(0)
    recompute = bool(changes.get("recompute", False))
    if args.tiny:
        encoder = ResNet(10, width=8, recompute=recompute)
        decoder = SDM(encoder.channels, dims=32, recompute=recompute)
        subcrops = SubcropRecipe(count=2, size=(32, 32))
        return PooDLe(encoder, decoder, flow or Given(), hidden=32, out=16, subcrops=subcrops, **changes)
    encoder = ResNet(50, recompute=recompute)
    return PooDLe(encoder, SDM(encoder.channels, recompute=recompute), flow or Given(), **changes)


def package(args: argparse.Namespace, *, bf16: bool = True, compiled: bool = False, **changes: Any) -> Step:
    """The package's step."""
    method = make_method(args, **changes).to(args.device)
    loop = Loop(method, args.batch, bf16=bf16)
    if compiled:
        for net in (method.online, method.target.module):
            net.encoder.compile()
            assert net.decoder is not None
            net.decoder.compile()
    return lambda clip: loop(clip.to(args.device))


def published(args: argparse.Namespace) -> Step:
    """The published step; colour is the package's, on the device: the published loader did it on the CPU."""
    method = make_method(args, commute=False).to(args.device)
    step = PublishedStep(method, args.batch)

    def run(clip: Clip) -> None:
        here = clip.to(args.device)
        clean = here.unit()
        step(recolour(method.colour, clean, clip.key), method.flow(here, clean).to_pixels(), clip.key)

    return run


def variants(args: argparse.Namespace) -> Iterator[Variant]:
    """What is compared; the first is what the others are divided by."""
    makers: dict[str, tuple[Callable[[], Step], str]] = {
        "published, float32": (lambda: published(args), "32-true"),
        "package, float32": (lambda: package(args, bf16=False), "32-true"),
        "package, bfloat16": (lambda: package(args), "bf16-mixed"),
        "package, bfloat16, recompute": (lambda: package(args, recompute=True), "bf16-mixed"),
        "package, bfloat16, compiled": (lambda: package(args, compiled=True), "bf16-mixed"),
        "package, bfloat16, RAFT-24 online": (
            lambda: package(args, flow=_Online(RAFT("large", None, 24).to(args.device))),
            "bf16-mixed",
        ),
    }
    for name in args.variants or makers:
        make, precision = makers[name]
        yield Variant(name, make(), precision)


class _Online(FlowEstimator):
    """RAFT whatever the clip knows."""

    def __init__(self, raft: RAFT) -> None:
        self.raft = raft

    def __call__(self, clip: Clip, clean: torch.Tensor) -> Any:
        return self.raft.estimate(clean)


# ---- measuring
def measure(variant: Variant, clips: list[Clip], args: argparse.Namespace) -> dict[str, Any]:
    """Warm-up, peak memory, multiply-adds of one step, and whether the host waits in it."""
    before = _allocated(args.device, reset=True)
    for clip in clips[: args.warmup]:
        variant.step(clip)
    _wait(args.device)
    found: dict[str, Any] = {"peak_gib": (_peak(args.device) - before) / GIB}
    if "compiled" not in variant.name:  # what a compiler made cannot be counted
        with counted() as work:
            variant.step(clips[0])
        found["tflop_per_pair"] = 2 * work.total / args.batch / 1e12
    found["host_waits"] = _waits(lambda: variant.step(clips[0]), args.device)
    return found


def _waits(step: Callable[[], Any], device: str) -> str:
    """What torch's debug mode says of the host waiting for the device in a step."""
    if device == "cpu":
        return "not asked"
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    except torch.cuda.OutOfMemoryError:
        raise
    except RuntimeError as error:
        return str(error).splitlines()[0]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return "never"


def timed(variant: Variant, clips: list[Clip], device: str) -> float:
    """Seconds for one step on each clip."""
    _wait(device)
    began = time.perf_counter()
    for clip in clips:
        variant.step(clip)
    _wait(device)
    return time.perf_counter() - began


def _wait(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize()


def _allocated(device: str, reset: bool) -> int:
    if device == "cpu":
        return 0
    if reset:
        torch.cuda.reset_peak_memory_stats()
    return int(torch.cuda.memory_allocated())


def _peak(device: str) -> int:
    return 0 if device == "cpu" else int(torch.cuda.max_memory_allocated())


@contextmanager
def _best_convolutions() -> Iterator[None]:
    before, torch.backends.cudnn.benchmark = torch.backends.cudnn.benchmark, True
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


def run(args: argparse.Namespace) -> dict[str, Any]:
    """All variants, in turns."""
    clips = make_clips((args.h, args.w), args.batch, max(args.steps, args.warmup))
    with _best_convolutions():
        every = []
        found: dict[str, Any] = {}
        for variant in variants(args):
            found[variant.name] = measure(variant, clips, args)
            every.append(variant)
        seconds: dict[str, list[float]] = {variant.name: [] for variant in every}
        for _ in range(args.rounds):
            for variant in every:
                seconds[variant.name].append(timed(variant, clips[: args.steps], args.device))
    first = every[0].name
    card = "cpu" if args.device == "cpu" else torch.cuda.get_device_name()
    for variant in every:
        mine = found[variant.name]
        speeds = [args.steps * args.batch / s for s in seconds[variant.name]]
        mine["pairs_per_s"] = record.spread(speeds)
        mine["times_faster"] = record.ratio(seconds[first], seconds[variant.name])
        peak = peak_flops(card, variant.precision)
        if peak is not None and "tflop_per_pair" in mine:
            mine["mfu"] = mine["pairs_per_s"]["median"] * mine["tflop_per_pair"] * 1e12 / peak
    return {"device": card, "first": first, "variants": found}


def report(results: dict[str, Any]) -> str:
    """The table as Markdown."""
    rows = []
    for name, found in results["variants"].items():
        share = f"{100 * found['mfu']:.0f}%" if "mfu" in found else "-"
        rows.append(
            (
                name,
                record.shown(found["pairs_per_s"], 1),
                record.shown(found["times_faster"], 2),
                f"{found['peak_gib']:.1f}",
                f"{found['tflop_per_pair']:.2f}" if "tflop_per_pair" in found else "-",
                share,
                found["host_waits"],
            )
        )
    head = ("variant", "pairs/s", f"times {results['first']}", "peak GiB", "TFLOP/pair", "MFU", "host waits")
    return record.table(head, rows)


def main(words: list[str] | None = None) -> dict[str, Any]:
    parser = record.arguments(__doc__, rounds=5)
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--h", type=int, default=512)
    parser.add_argument("--w", type=int, default=1024)
    parser.add_argument("--batch", type=int, default=4, help="pairs per step")
    parser.add_argument("--steps", type=int, default=10, help="per round and variant")
    parser.add_argument("--warmup", type=int, default=3, help="steps before anything is measured")
    parser.add_argument("--tiny", action="store_true", help="small networks: to try the program itself")
    parser.add_argument("--variants", nargs="+", help="only these, by the names in the table")
    args = parser.parse_args(words)
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("there is no CUDA device here; --device cpu --tiny tries the program itself")
    results = run(args)
    path = record.save("gpu_step", args, results)
    print(f"{results['device']}\n{report(results)}\nwritten to {path}")
    return results


if __name__ == "__main__":
    main()

"""The dense loss: one composed look-up (the package) against upsampling, un-augmenting and warping.

Both forms get the same two low-resolution maps, affine views, flow and mask, and return the loss and its
gradient to the online map. The plain form is written here with its own coordinates, so it is a reference for
the package's geometry too. Time is process CPU time of forward and backward; memory is what the resident
peak of a fresh process rises above what it held before.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

from benchmarks import record

import torch  # isort: skip  (after record, which fixes the number of threads)
import torch.nn.functional as F
from torch import Tensor

from poodle_lightning.losses import regression
from poodle_lightning.losses.regression import warped_distance
from poodle_lightning.ops.geometry import Affine, Flow, warp_into_view

STRIDE = 8
MIB = 2.0**20


@dataclass
class Problem:
    """One dense loss, B images.

    Args:
        p: ``(B, C, h, w)`` online map, of stride 8.
        z: ``(B, C, h, w)`` target map.
        a: ``(B, 2, 3)`` pixel matrix, clean image → online view.
        b: ``(B, 2, 3)`` pixel matrix, clean image → target view.
        flow: ``(B, 2, H, W)`` px.
        visible: ``(B, H, W)`` bool.
    """

    p: Tensor
    z: Tensor
    a: Tensor
    b: Tensor
    flow: Tensor
    visible: Tensor

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the loss grid."""
        return self.flow.shape[-2], self.flow.shape[-1]


def make_problem(
    height: int, width: int, channels: int, *, batch: int = 1, motion: float = 12.0, seed: int = 0
) -> Problem:
    """Smoothed noise for features and flow, views of ±10° and 0.9–1.1; about a tenth is not visible."""
    draw = torch.Generator().manual_seed(seed)
    coarse = (height // STRIDE, width // STRIDE)

    def field(count: int, fine: tuple[int, int], cell: int) -> Tensor:
        knots = torch.randn(batch, count, max(2, fine[0] // cell), max(2, fine[1] // cell), generator=draw)
        return F.interpolate(knots, fine, mode="bicubic", align_corners=True)

    shared = field(channels, coarse, 2)
    maps = [shared + 0.5 * field(channels, coarse, 2) for _ in range(2)]
    flow = motion * field(2, (height, width), 64)
    visible = field(1, (height, width), 32)[:, 0] > -0.8
    views = [_view(draw, batch, height, width) for _ in range(2)]
    return Problem(maps[0], maps[1], views[0], views[1], flow, visible)


def _view(draw: torch.Generator, batch: int, height: int, width: int) -> Tensor:
    angle = (torch.rand(batch, generator=draw) * 2 - 1) * math.radians(10)
    scale = 0.9 + 0.2 * torch.rand(batch, generator=draw)
    cos, sin = scale * angle.cos(), scale * angle.sin()
    x, y = (width - 1) / 2, (height - 1) / 2
    rows = [cos, sin, x - cos * x - sin * y, -sin, cos, y + sin * x - cos * y]
    return torch.stack(rows, dim=-1).reshape(batch, 2, 3)


# ---- the two forms
def composed(problem: Problem) -> Tensor:
    """The package's loss."""
    last = problem.a.new_tensor([0.0, 0.0, 1.0]).expand(len(problem.a), 1, 3)
    into_a, into_b = (
        Affine.from_pixels(torch.cat([view, last], dim=1), write=problem.size, read=problem.size)
        for view in (problem.a, problem.b)
    )
    to_z = warp_into_view(into_b.inverse(), Flow.from_pixels(problem.flow))
    return warped_distance(problem.p, into_a, problem.z, to_z, problem.size, problem.visible)


def upsampled(problem: Problem) -> Tensor:
    """Both maps upsampled to the image, un-augmented, the target's warped by the flow, then compared."""
    height, width = problem.size
    ys, xs = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    here = torch.stack([xs, ys], dim=-1).to(problem.p.dtype).expand(len(problem.p), height, width, 2)
    there = here + problem.flow.permute(0, 2, 3, 1)
    seen = (
        problem.visible
        & _within(there, problem.size)
        & _within(_apply(problem.a, here), problem.size)
        & _within(_apply(problem.b, there), problem.size)
    )
    with torch.no_grad():
        target = _read(_up(problem.z, problem.size), _apply(problem.b, here))
        target = F.normalize(_read(target, there), dim=1)
    online = F.normalize(_read(_up(problem.p, problem.size), _apply(problem.a, here)), dim=1)
    distance = (online - target).square().sum(dim=1)
    return ((distance * seen).sum(dim=(1, 2)) / seen.sum(dim=(1, 2)).clamp(min=1)).mean()


def _up(maps: Tensor, size: tuple[int, int]) -> Tensor:
    return F.interpolate(maps, size, mode="bilinear", align_corners=False)


def _apply(matrix: Tensor, pixels: Tensor) -> Tensor:
    return torch.einsum("bij,bhwj->bhwi", matrix[:, :, :2], pixels) + matrix[:, None, None, :, 2]


def _read(maps: Tensor, pixels: Tensor) -> Tensor:
    """Values at pixel coordinates, the border continued."""
    size = pixels.new_tensor([maps.shape[-1], maps.shape[-2]])
    return F.grid_sample(maps, (2 * pixels + 1) / size - 1, padding_mode="border", align_corners=False)


def _within(pixels: Tensor, size: tuple[int, int]) -> Tensor:
    """Points on the image's area; a thousandth of a pixel is allowed for rounding."""
    low, high = -0.501, pixels.new_tensor([size[1], size[0]]) - 0.499
    return ((pixels >= low) & (pixels <= high)).all(dim=-1)


FORMS: dict[str, Callable[[Problem], Tensor]] = {"composed": composed, "upsampled": upsampled}


def loss_and_gradient(form: str, problem: Problem) -> tuple[float, Tensor]:
    """The loss and its gradient to the online map."""
    problem.p = problem.p.detach().requires_grad_()
    loss = FORMS[form](problem)
    loss.backward()
    assert problem.p.grad is not None
    return loss.item(), problem.p.grad


# ---- measuring
def distance(problem: Problem) -> dict[str, float]:
    """How far the two forms are apart: relative in the loss, relative and as a cosine in the gradient."""
    (ours, gradient), (plain, reference) = (loss_and_gradient(form, problem) for form in FORMS)
    off = (gradient - reference).norm() / reference.norm()
    return {
        "loss": ours,
        "loss_relative": abs(ours - plain) / plain,
        "gradient_cosine": F.cosine_similarity(
            gradient.double().flatten(), reference.double().flatten(), dim=0
        ).item(),
        "gradient_relative": off.item(),
    }


def measure_time(problem: Problem, rounds: int) -> dict[str, list[float]]:
    """CPU seconds of every round, the forms in turn; one round before does not count."""
    seconds: dict[str, list[float]] = {form: [] for form in FORMS}
    for number in range(rounds + 1):
        for form in FORMS:
            began = time.process_time()
            loss_and_gradient(form, problem)
            if number:
                seconds[form].append(time.process_time() - began)
    return seconds


def measure_memory(form: str, args: argparse.Namespace) -> float:
    """MiB by which the resident peak of a fresh process rises; NaN where the system does not tell."""
    if not Path("/proc/self/status").is_file():
        return math.nan
    shape = ["--h", args.h, "--w", args.w, "--channels", args.channels, "--batch", args.batch]
    words = [sys.executable, "-m", "benchmarks.dense_loss", "--peak-of", form, *map(str, shape)]
    # glibc keeps freed blocks below its threshold: without this the peak is partly what it did not give back
    env = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run(words, cwd=record.ROOT, check=True, capture_output=True, text=True, env=env)
    return float(json.loads(done.stdout))


def _peak_here(form: str, problem: Problem) -> float:
    """Called in the fresh process. ru_maxrss would start from the parent's peak; VmHWM is this process's."""
    with patch.object(regression, "CPU_CHUNK_VALUES", 1):  # imports what chunks need
        loss_and_gradient(form, make_problem(32, 32, 4))
    before = _status("VmRSS")
    loss_and_gradient(form, problem)
    return (_status("VmHWM") - before) / MIB


def _status(field: str) -> float:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(float(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":"))


def run(args: argparse.Namespace) -> dict[str, object]:
    """All results of one setting; what is measured by time is there only with rounds."""
    problem = make_problem(args.h, args.w, args.channels, batch=args.batch)
    results: dict[str, object] = {"distance": distance(problem)}
    if args.rounds:
        seconds = measure_time(problem, args.rounds)
        results["seconds"] = {form: record.spread(values) for form, values in seconds.items()}
        results["times_faster"] = record.ratio(seconds["upsampled"], seconds["composed"])
    if not args.no_memory:
        peaks = {form: measure_memory(form, args) for form in FORMS}
        results["peak_mib"] = peaks
        results["times_less_memory"] = peaks["upsampled"] / peaks["composed"]
    return results


def main(words: list[str] | None = None) -> dict[str, object]:
    parser = record.arguments(__doc__, rounds=7)
    parser.add_argument("--h", type=int, default=128, help="height of the loss grid, px")
    parser.add_argument("--w", type=int, default=256, help="width of the loss grid, px")
    parser.add_argument("--channels", type=int, default=64, help="of the projections")
    parser.add_argument("--batch", type=int, default=1, help="images")
    parser.add_argument("--no-memory", action="store_true", help="start no further processes")
    parser.add_argument("--peak-of", choices=list(FORMS), help=argparse.SUPPRESS)
    args = parser.parse_args(words)
    if args.peak_of:
        problem = make_problem(args.h, args.w, args.channels, batch=args.batch)
        print(json.dumps(_peak_here(args.peak_of, problem)))
        return {}
    results = run(args)
    name = f"dense_loss_{args.h}x{args.w}x{args.channels}"
    del args.peak_of
    path = record.save(name, args, results)
    print(_report(results))
    print(f"written to {path}")
    return results


def _report(results: dict) -> str:
    rows = [(f"distance: {name}", f"{value:.3g}") for name, value in results["distance"].items()]
    rows[2] = ("distance: 1 − gradient cosine", f"{1 - results['distance']['gradient_cosine']:.1e}")
    if "seconds" in results:
        rows += [
            (f"CPU ms {form}", record.shown({k: 1e3 * v for k, v in s.items()}, 1))
            for form, s in results["seconds"].items()
        ]
        rows.append(("times faster", record.shown(results["times_faster"])))
    if "peak_mib" in results:
        rows += [(f"peak MiB {form}", f"{peak:.1f}") for form, peak in results["peak_mib"].items()]
        rows.append(("times less memory", f"{results['times_less_memory']:.1f}"))
    return record.table(("what", "value (min / median / max)"), rows)


if __name__ == "__main__":
    main()

"""The dense loss in the package's forms against the published one, which samples maps of the image's size.

All forms get the same two low-resolution maps, affine views, flow and mask, and return the loss and its
gradient to the online map. Time is process CPU time of forward and backward (on a GPU the time between two
events). Memory is what the resident peak of a fresh process rises above what it held before (on a GPU what
the allocator gave out). Bytes are those that every operation reads and writes, counted.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

from benchmarks import record

import torch  # isort: skip  (after record, which fixes the number of threads)
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.published.dense import published_loss
from poodle_lightning.losses import regression
from poodle_lightning.losses.regression import Form, warped_distance
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

    def to(self, device: str) -> Problem:
        """On a device."""
        return Problem(**{name: value.to(device) for name, value in vars(self).items()})


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


# ---- the forms
def package(problem: Problem, form: Form) -> Tensor:
    """The package's loss."""
    last = problem.a.new_tensor([0.0, 0.0, 1.0]).expand(len(problem.a), 1, 3)
    into_a, into_b = (
        Affine.from_pixels(torch.cat([view, last], dim=1), write=problem.size, read=problem.size)
        for view in (problem.a, problem.b)
    )
    to_z = warp_into_view(into_b.inverse(), Flow.from_pixels(problem.flow))
    return warped_distance(problem.p, into_a, problem.z, to_z, problem.size, problem.visible, form)


def published(problem: Problem) -> Tensor:
    """The papers' loss."""
    return published_loss(**vars(problem))


FORMS: dict[str, Callable[[Problem], Tensor]] = {
    "published": published,
    "direct": partial(package, form="direct"),
    "cells": partial(package, form="cells"),
    "all_pairs": partial(package, form="all_pairs"),
}


def loss_and_gradient(form: str, problem: Problem) -> tuple[Tensor, Tensor]:
    """The loss and its gradient to the online map."""
    problem.p = problem.p.detach().requires_grad_()
    loss = FORMS[form](problem)
    loss.backward()
    assert problem.p.grad is not None
    return loss.detach(), problem.p.grad


# ---- measuring
class Traffic(TorchDispatchMode):
    """Bytes that operations read and write while this is entered: all arguments and results, once each.

    Views move nothing, and zeroing only writes. The two operations that take rows by number are counted by
    the rows that they take, which is more than the table where rows come again.
    """

    VIEWS = ("view", "expand", "permute", "transpose", "select", "slice", "unsqueeze", "squeeze", "detach")
    VIEWS += ("alias", "as_strided", "unbind", "split", "t", "_unsafe_view", "diagonal", "unflatten", "empty")

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name not in self.VIEWS:
            tensors = [leaf for leaf in tree_leaves((args, kwargs, result)) if isinstance(leaf, Tensor)]
            self.bytes += sum(t.numel() * t.element_size() for t in tensors if t.layout == torch.strided)
            self.bytes += self._further(name, args)
        return result

    @staticmethod
    def _further(name: str, args: Sequence[Any]) -> int:
        """What the sizes of arguments and results do not tell."""
        if name == "zero_":
            return -args[0].nbytes
        if name == "_embedding_bag_forward_only":
            return max(0, args[1].numel() - len(args[0])) * args[0][0].nbytes
        if name == "sparse_sampled_addmm":
            pattern, left, right = args[:3]
            row = left[0].nbytes
            return max(0, 2 * pattern.values().numel() - len(left) - right.shape[1]) * row
        return 0


def count_bytes(form: str, problem: Problem) -> tuple[float, Tensor, int]:
    """Loss, gradient and the bytes that took."""
    with Traffic() as traffic:
        loss, gradient = loss_and_gradient(form, problem)
    return loss.item(), gradient, traffic.bytes


def between(gradient: Tensor, reference: Tensor) -> dict[str, float]:
    """How far two gradients are apart: as a cosine, and relative."""
    gradient, reference = gradient.double().flatten(), reference.double().flatten()
    return {
        "cosine": F.cosine_similarity(gradient, reference, dim=0).item(),
        "relative": ((gradient - reference).norm() / reference.norm()).item(),
    }


def measure_time(forms: Sequence[str], problem: Problem, rounds: int) -> dict[str, list[float]]:
    """Seconds of every round, the forms in turn; one round before does not count."""
    seconds: dict[str, list[float]] = {form: [] for form in forms}
    for number in range(rounds + 1):
        for form in forms:
            spent = _seconds(form, problem)
            if number:
                seconds[form].append(spent)
    return seconds


def _seconds(form: str, problem: Problem) -> float:
    if problem.p.device.type == "cpu":
        began = time.process_time()
        loss_and_gradient(form, problem)
        return time.process_time() - began
    began_event, ended_event = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    began_event.record()
    loss_and_gradient(form, problem)
    ended_event.record()
    torch.cuda.synchronize()
    return began_event.elapsed_time(ended_event) / 1e3


def measure_memory(form: str, problem: Problem, args: argparse.Namespace) -> float:
    """MiB by which the peak rises; NaN where the system does not tell."""
    if problem.p.device.type == "cuda":
        problem.p = problem.p.detach()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        loss_and_gradient(form, problem)
        return (torch.cuda.max_memory_allocated() - before) / MIB
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


def run(args: argparse.Namespace) -> dict[str, Any]:
    """All results of one setting, by form; what is measured by time is there only with rounds."""
    problem = make_problem(args.h, args.w, args.channels, batch=args.batch).to(args.device)
    forms = ["published", *(form for form in args.forms if form != "published")]
    results: dict[str, Any] = {}
    gradients = {}
    for form in forms:
        loss, gradients[form], moved = count_bytes(form, problem)
        results[form] = {"loss": loss, "bytes": moved}
    for form in forms:
        for reference in ("published", "direct"):
            if reference in gradients:
                results[form][f"gradient_to_{reference}"] = between(gradients[form], gradients[reference])
        results[form]["times_fewer_bytes"] = results["published"]["bytes"] / results[form]["bytes"]
    if args.rounds:
        seconds = measure_time(forms, problem, args.rounds)
        for form in forms:
            results[form]["seconds"] = record.spread(seconds[form])
            results[form]["times_faster"] = record.ratio(seconds["published"], seconds[form])
    if not args.no_memory:
        for form in forms:
            results[form]["peak_mib"] = measure_memory(form, problem, args)
            results[form]["times_less_memory"] = results["published"]["peak_mib"] / results[form]["peak_mib"]
    return results


def main(words: list[str] | None = None) -> dict[str, Any]:
    parser = record.arguments(__doc__, rounds=3)
    parser.add_argument("--h", type=int, default=512, help="height of the loss grid, px")
    parser.add_argument("--w", type=int, default=1024, help="width of the loss grid, px")
    parser.add_argument("--channels", type=int, default=256, help="of the projections")
    parser.add_argument("--batch", type=int, default=1, help="images")
    parser.add_argument("--forms", nargs="+", choices=list(FORMS), default=["direct", "cells"], help="forms")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--no-memory", action="store_true", help="start no further processes")
    parser.add_argument("--peak-of", choices=list(FORMS), help=argparse.SUPPRESS)
    args = parser.parse_args(words)
    if args.peak_of:
        problem = make_problem(args.h, args.w, args.channels, batch=args.batch)
        print(json.dumps(_peak_here(args.peak_of, problem)))
        return {}
    results = run(args)
    place = "" if args.device == "cpu" else f"_{args.device.partition(':')[0]}"
    name = f"dense_loss_{args.h}x{args.w}x{args.channels}{place}"
    del args.peak_of
    path = record.save(name, args, results)
    print(_report(results))
    print(f"written to {path}")
    return results


def _report(results: dict[str, Any]) -> str:
    """One column per form; spreads as min / median / max."""
    rows = [("loss", *(f"{found['loss']:.6f}" for found in results.values()))]
    for reference in ("published", "direct"):
        key = f"gradient_to_{reference}"
        if reference in results:
            found = [form[key] for form in results.values()]
            rows.append((f"1 − cosine to {reference}", *(f"{1 - one['cosine']:.1e}" for one in found)))
            rows.append((f"relative to {reference}", *(f"{one['relative']:.1e}" for one in found)))
    if all("seconds" in form for form in results.values()):
        spreads = [{k: 1e3 * v for k, v in form["seconds"].items()} for form in results.values()]
        rows.append(("ms", *(record.shown(spread, 1) for spread in spreads)))
        rows.append(("times faster", *(record.shown(form["times_faster"], 1) for form in results.values())))
    if all("peak_mib" in form for form in results.values()):
        rows.append(("peak, MiB", *(f"{form['peak_mib']:.1f}" for form in results.values())))
        rows.append(("times less memory", *(f"{form['times_less_memory']:.1f}" for form in results.values())))
    rows.append(("GB moved", *(f"{form['bytes'] / 1e9:.3f}" for form in results.values())))
    rows.append(("times fewer bytes", *(f"{form['times_fewer_bytes']:.1f}" for form in results.values())))
    return record.table(("what", *results), rows)


if __name__ == "__main__":
    main()

"""DoRA's training step: all frames, masks and crops at once against the published loops.

The forms are those of ``dora_forms``; they start from the same weights and crops and give the same loss.
Crops are drawn before and timed by themselves. Times are CPU seconds of the process (on a GPU the time
between two synchronisations), forms in turns. Counts are of what torch dispatches on a CPU, without views: a
GPU launches a kernel or a few for each. Bytes kept for the backward pass are counted at one and two frames
and clips; for more they follow. Peak: what the resident peak of a fresh process rises in forward and backward
pass (on a GPU what the allocator gave out).
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks import record

import torch  # isort: skip  (after record, which fixes the number of threads)
from torch import Tensor

from benchmarks.dense_loss import Traffic
from benchmarks.dora_forms import FORMS, PARTS, Size, Step, steps
from benchmarks.published.dora import mean_of_pairs
from benchmarks.saved_bytes import Kept
from benchmarks.step import Stopwatch
from benchmarks.subcrops import Counter
from poodle_lightning.losses.distillation import view_losses
from poodle_lightning.methods.distillation import other_views

SIZES = {
    "small": Size(192, 4, 3, large=96, small=48, frames=4, batch=2, hidden=512, out=4096),
    "ViT-Ti/16": Size(192, 12, 3, out=8192),
    "ViT-S/16": Size(384, 12, 6),
}
# all that the numbers of operations depend on, at little cost
COUNTED = Size(48, 12, 6, patch=8, large=32, small=16, batch=2, hidden=32, out=64)
PAIRS = (10, 2, 16, 65536)  # V, U, B, K of DINO on one GPU
MIB = 2.0**20
NO_HEAD = 64  # outputs of a head whose last layer does not count


# ---- time
class Watch(Stopwatch):
    """A stopwatch for a device: CPU seconds, or wall seconds between synchronisations."""

    def __init__(self, device: str) -> None:
        super().__init__()
        self.device = device

    def _now(self) -> float:
        if self.device == "cpu":
            return time.process_time()
        torch.cuda.synchronize()
        return time.perf_counter()

    def _switch(self) -> None:
        now = self._now()
        self.seconds[self._open[-1]] += now - self._since
        self._since = now

    def start(self) -> None:
        """Begin anew."""
        self.seconds, self._since = defaultdict(float), self._now()


def times(size: Size, rounds: int, device: str) -> dict[str, Any]:
    """Seconds of steps and of their parts, of every form; one round before does not count."""
    every, watch = steps(size, device=device), Watch(device)
    first = {form: step(watch).item() for form, step in every.items()}
    seconds: dict[str, list[dict[str, float]]] = {form: [] for form in FORMS}
    crops: list[float] = []
    package = every["package"]
    for _ in range(rounds):
        for form, step in every.items():
            watch.start()
            step(watch)
            seconds[form].append(dict(watch.seconds))
        watch.start()
        with watch.stage("crops"):
            package.method.crops(package.clip)
        crops.append(watch.seconds["crops"])
    results: dict[str, Any] = {"size": vars(size), "crops": record.spread(crops), "forms": {}}
    whole = {form: [sum(one[part] for part in PARTS) for one in seconds[form]] for form in FORMS}
    for form in FORMS:
        results["forms"][form] = {
            "loss": first[form],
            "seconds": record.spread(whole[form]),
            "times_package": record.ratio(whole[form], whole["package"]),
            "parts": {part: record.spread(one[part] for one in seconds[form]) for part in PARTS},
        }
    return results


class Launches(Counter):
    """Counts operations that compute something apart from those that only look at memory in another way."""

    def __init__(self, on_device: list[Tensor]) -> None:
        super().__init__(on_device)
        self.views = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.views += func.overloadpacket.__name__ in Traffic.VIEWS
        return super().__torch_dispatch__(func, types, args, kwargs)


def counts(size: Size) -> dict[str, dict[str, int]]:
    """Operations and waits of a step without the optimiser, which is torch's own in all forms."""
    results = {}
    for form, step in steps(size).items():

        def work(step: Step = step) -> None:
            step.backward()
            step.clip_gradients()
            step.follow()

        counter = Launches(step.on_device)
        found = counter.count(work)
        results[form] = {"computing": found["operations"] - counter.views, "waits": found["waits"]}
    return results


def kept(form: str, size: Size, bf16: bool = False) -> int:
    """Bytes that autograd keeps of one forward pass."""
    step = steps(size, (form,))[form]
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16), Kept(step.method, *step.on_device) as found:
        value = step.loss()
        total = found.total
    del value
    return total


def kept_by_clip(form: str, size: Size, bf16: bool = False) -> dict[str, int]:
    """Bytes kept for every clip of the size, and once for a step, from what few frames keep.

    Two clips at least: of one alone some operations make views where they copy else.
    """
    two, longer, more = (
        kept(form, replace(size, frames=frames, batch=batch), bf16)
        for frames, batch in ((1, 2), (2, 2), (1, 3))
    )
    frame = more - two  # of one clip
    call = longer - two - 2 * frame  # of one frame, whatever the number of clips
    return {"per_clip": frame * size.frames, "per_step": two - 2 * frame + call * (size.frames - 1)}


def peak(form: str, name: str, out: int, device: str) -> float:
    """MiB by which the peak rises in a step's forward and backward pass."""
    if device != "cpu":
        step = steps(replace(SIZES[name], out=out), (form,), device)[form]
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step.backward()
        return (torch.cuda.max_memory_allocated() - before) / MIB
    if not Path("/proc/self/status").is_file():
        return math.nan
    words = [sys.executable, "-m", "benchmarks.dora_step", "--peak-of", form, name, str(out)]
    # glibc keeps freed blocks below its threshold: without this the peak is partly what it did not give back
    env = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run(words, cwd=record.ROOT, check=True, capture_output=True, text=True, env=env)
    return float(json.loads(done.stdout))


def _peak_here(form: str, name: str, out: str) -> float:
    """Called in the fresh process."""
    steps(COUNTED, (form,))[form].backward()  # imports what a step needs
    step = steps(replace(SIZES[name], out=int(out)), (form,))[form]
    before = _resident("VmRSS")
    step.backward()
    return (_resident("VmHWM") - before) / MIB


def _resident(field: str) -> float:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(float(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":"))


def pairs(shape: tuple[int, int, int, int], rounds: int, device: str) -> dict[str, Any]:
    """DINO's loss of V student and U teacher views ``(V, U, B, K)``, forward and backward."""
    views, others, batch, outputs = shape
    draw = torch.Generator().manual_seed(0)
    student = torch.randn(views, batch, outputs, generator=draw).to(device)
    teacher = torch.randn(others, batch, outputs, generator=draw).softmax(dim=-1).to(device)
    forms: dict[str, Callable[[Tensor], Tensor]] = {
        "package": lambda s: other_views(view_losses(s, teacher)),
        "published": lambda s: mean_of_pairs(list(s), list(teacher), 0.1, others=True),
    }
    watch = Watch(device)
    seconds: dict[str, list[float]] = {form: [] for form in forms}
    results: dict[str, Any] = {"shape": list(shape), "forms": {form: {} for form in forms}}
    for number in range(rounds + 1):
        for form, loss in forms.items():
            logits = student.clone().requires_grad_()
            watch.start()
            with watch.stage("both"):
                value = loss(logits)
                value.backward()
            if number:
                seconds[form].append(watch.seconds["both"])
            else:
                results["forms"][form]["loss"] = value.item()
    for form, loss in forms.items():
        with Kept(student, teacher) as found:
            value = loss(student.detach().requires_grad_())
            results["forms"][form]["kept"] = found.total
        results["forms"][form]["seconds"] = record.spread(seconds[form])
        results["forms"][form]["times_package"] = record.ratio(seconds[form], seconds["package"])
    return results


# ---- all of it
def memory(name: str, device: str, with_peak: bool) -> dict[str, Any]:
    """Bytes kept and peaks of a size, with its head and with one of few outputs."""
    size = SIZES[name]
    found: dict[str, Any] = {"size": name}
    for out in (size.out, NO_HEAD):
        here = replace(size, out=out)
        found[str(out)] = {form: {"kept": kept_by_clip(form, here)} for form in FORMS}
        found[str(out)]["package, bfloat16"] = {"kept": kept_by_clip("package", here, bf16=True)}
        for form in FORMS if with_peak else ():
            found[str(out)][form]["peak_mib"] = peak(form, name, out, device)
    return found


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Everything asked for; of the largest size fewer rounds."""
    results: dict[str, Any] = {"counts": counts(COUNTED)}
    results["pairs"] = pairs(args.pairs, args.rounds, args.device)
    last = args.sizes[-1]
    results["times"] = {
        name: times(
            replace(SIZES[name], batch=args.batch or SIZES[name].batch),
            args.last_rounds if name == last else args.rounds,
            args.device,
        )
        for name in args.sizes
    }
    results["memory"] = memory(last, args.device, not args.no_peak)
    return results


def report(results: dict[str, Any]) -> str:
    """All tables as Markdown; spreads as min / median / max."""
    count, pair = results["counts"], results["pairs"]["forms"]
    tables = [
        record.table(
            ("operations of a step", "computing", "waits of a GPU"),
            [(form, f"{found['computing']:,}", found["waits"]) for form, found in count.items()],
        ),
        record.table(
            ("view losses", "loss", "CPU s", "times package", "MB kept"),
            [
                (form, f"{found['loss']:.6f}", *_seconds(found), _mb(found["kept"]))
                for form, found in pair.items()
            ],
        ),
    ]
    for name, found in results["times"].items():
        rows = [(form, f"{one['loss']:.6f}", *_seconds(one)) for form, one in found["forms"].items()]
        tables.append(record.table((name, "loss", "s per step", "times package"), rows))
        parts = [
            (part, *(record.shown(found["forms"][form]["parts"][part], 3) for form in FORMS))
            for part in PARTS
        ]
        crops = record.shown(found["crops"], 3)
        tables.append(record.table((f"s, {name}", *FORMS), [*parts, ("crops, before", crops, crops, crops)]))
    memory = dict(results["memory"])
    name = memory.pop("size")
    rows = [
        (form, outputs, *(_mb(one["kept"][per]) for per in ("per_clip", "per_step")), _peak(one))
        for outputs, forms in memory.items()
        for form, one in forms.items()
    ]
    head = (f"memory, {name}", "outputs", "MB kept per clip", "MB kept per step", "peak MiB of a step")
    return "\n\n".join([*tables, record.table(head, rows)])


def _seconds(found: dict[str, Any]) -> tuple[str, str]:
    return record.shown(found["seconds"]), record.shown(found["times_package"])


def _mb(amount: float) -> str:
    return f"{amount / 1e6:,.1f}"


def _peak(found: dict[str, Any]) -> str:
    return f"{found['peak_mib']:,.0f}" if "peak_mib" in found else "-"


def main(words: list[str] | None = None) -> dict[str, Any]:
    parser = record.arguments(__doc__, rounds=5)
    parser.add_argument(
        "--sizes", nargs="+", choices=list(SIZES), default=list(SIZES), help="small ones first"
    )
    parser.add_argument("--last-rounds", type=int, default=2, help="of the last size, whose steps are long")
    parser.add_argument("--batch", type=int, help="clips per step; without, that of the size")
    parser.add_argument("--pairs", type=int, nargs=4, default=PAIRS, help="V, U, B, K of the view losses")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--no-peak", action="store_true", help="start no further processes")
    parser.add_argument("--peak-of", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args(words)
    if args.peak_of:
        print(json.dumps(_peak_here(*args.peak_of)))
        return {}
    del args.peak_of
    results = run(args)
    name = "dora_step" if args.device == "cpu" else f"dora_step_{args.device}"
    path = record.save(name, args, results)
    print(f"{report(results)}\nwritten to {path}")
    return results


if __name__ == "__main__":
    main()

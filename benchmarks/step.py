"""Where the time of a PooDLe training step goes, and what memory layout and bfloat16 are worth.

The package's own step runs: functions on its way are wrapped by a stopwatch that gives every moment to the
innermost stage, so nothing is counted twice and what no stage claims is shown as "rest". Times are CPU
seconds of the process; data is read in the process, as with ``num_workers: 0``.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

from benchmarks import record

import torch  # isort: skip  (after record, which fixes the number of threads)

from poodle_lightning import cli
from poodle_lightning.data.clips import ClipDataset
from poodle_lightning.data.synthetic import write_videos
from poodle_lightning.data.video import VideoDataModule
from poodle_lightning.flow.dis import DIS
from poodle_lightning.methods import poodle
from poodle_lightning.methods.poodle import PooDLe
from poodle_lightning.nn.optim import Schedule, build_optimizer
from poodle_lightning.types import Clip

STAGES = (
    *("data: read", "data: flow", "clip.unit", "flow", "colour", "views", "subcrops", "occlusion"),
    *("forward online", "forward target", "loss", "backward", "optimizer + EMA", "rest"),
)


class Stopwatch:
    """CPU seconds per stage; a stage inside another one stops the outer one's clock."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._open = ["rest"]
        self._since = time.process_time()

    def _switch(self) -> None:
        now = time.process_time()
        self.seconds[self._open[-1]] += now - self._since
        self._since = now

    def start(self) -> None:
        """Forget what passed since the last stage."""
        self._since = time.process_time()

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Give the time inside to a stage."""
        self._switch()
        self._open.append(name)
        try:
            yield
        finally:
            self._switch()
            self._open.pop()

    def around(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        """The function, its time given to a stage."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            with self.stage(name):
                return call(*args, **kwargs)

        return timed


@dataclass
class Setting:
    """A method and where its clips come from."""

    name: str
    method: PooDLe
    data: VideoDataModule


def demo(folder: Path) -> Setting:
    """``configs/experiment/demo_poodle.yaml`` on generated streets in video files, as in ``make demo``."""
    if not any(folder.glob("*.mp4")):
        write_videos(folder, 24, seconds=1.5, fps=6.0)
    method, data = cli.build(
        [record.ROOT / "configs/experiment/demo_poodle.yaml"], ["--data.init_args.root", str(folder)]
    )
    assert isinstance(method, PooDLe)
    assert isinstance(data, VideoDataModule)
    return Setting("demo", method, data)


def small(folder: Path) -> Setting:
    """``configs/method/poodle_small.yaml`` on 128 × 256 crops of generated streets, two pairs per step."""
    if not any(folder.glob("*.mp4")):
        write_videos(folder, 6, seconds=2.0, size=(192, 384))
    config = record.ROOT / "configs/method/poodle_small.yaml"
    method, _ = cli.build([], ["--model", str(config), "--data.init_args.root", str(folder)])
    assert isinstance(method, PooDLe)
    data = VideoDataModule(
        "folder", str(folder), size=(128, 256), area=(0.4, 0.7), batch_size=2, num_workers=0, flow=DIS()
    )
    return Setting("small", method, data)


# ---- one step
class Loop:
    """The package's step by hand: losses, backward, optimiser, EMA."""

    def __init__(self, method: PooDLe, batch: int, channels_last: bool = True, bf16: bool = False) -> None:
        self.method = method.train()
        if channels_last:
            method.setup("fit")
        self.optimizer = build_optimizer(method.recipe, method, batch)
        self.schedule = Schedule.from_recipe(method.recipe, 1, batch)
        self.bf16 = bf16
        self.step = 0

    def __call__(self, clip: Clip, watch: Stopwatch | None = None) -> None:
        """One optimiser step; the watch is told what no function of its own does."""
        stage: Callable[[str], Any] = watch.stage if watch else nullcontext
        self.optimizer.zero_grad()
        with torch.autocast(clip.device.type, torch.bfloat16, enabled=self.bf16):
            loss = torch.stack(list(self.method.losses(clip).values())).sum()
        with stage("backward"):
            loss.backward()
        with stage("optimizer + EMA"):
            for group in self.optimizer.param_groups:
                group["lr"] = self.schedule.lr(self.step)
            self.optimizer.step()
            self.method.target.update(self.method.online, self.schedule.momentum(self.step))
        self.step += 1


@contextmanager
def watched(setting: Setting, watch: Stopwatch) -> Iterator[None]:
    """Wraps what the step calls."""
    method = setting.method
    online, target = method.online, method.target.module
    # as strings: `forward` of a module and functions that poodle.py imported by name
    places: list[tuple[Any, str, str]] = [
        (Clip, "unit", "clip.unit"),
        (DIS, "pixels", "data: flow"),
        (DIS, "__call__", "flow"),
        (poodle, "recolour", "colour"),
        (poodle, "draw_views", "views"),
        (poodle, "visible_ddflow", "occlusion"),
        (poodle, "warped_distance", "loss"),
        (poodle, "cosine_distance", "loss"),
        (ClipDataset, "__getitem__", "data: read"),
        (method, "pairs", "subcrops"),
        (method, "cut", "subcrops"),
        (online, "dense", "forward online"),
        (online, "pooled", "forward online"),
        (method.dense_predictor, "forward", "forward online"),
        (method.pooled_predictor, "forward", "forward online"),
        (target, "dense", "forward target"),
        (target, "pooled", "forward target"),
    ]
    with ExitStack() as stack:
        for owner, name, stage in places:
            timed = watch.around(stage, getattr(owner, name))
            stack.enter_context(patch.object(owner, name, timed))
        yield


def clips(data: VideoDataModule) -> Iterator[Clip]:
    """Batches without end."""
    data.setup("fit")
    while True:
        yield from data.train_dataloader()


# ---- measuring
def shares(setting: Setting, rounds: int) -> dict[str, object]:
    """Share of every stage, over steps with fresh data; three steps before do not count."""
    loop = Loop(setting.method, setting.data.batch_size)
    batches = clips(setting.data)
    for _ in range(3):
        loop(next(batches))
    steps: list[dict[str, float]] = []
    watch = Stopwatch()
    with watched(setting, watch):
        for _ in range(rounds):
            watch.seconds = defaultdict(float)
            watch.start()
            with watch.stage("data: read"):
                clip = next(batches)
            loop(clip, watch)
            with watch.stage("rest"):
                pass
            steps.append(dict(watch.seconds))
    totals = [sum(step.values()) for step in steps]
    found = {
        stage: record.spread(step.get(stage, 0.0) / total for step, total in zip(steps, totals, strict=True))
        for stage in STAGES
    }
    return {"step_cpu_ms": record.spread(1e3 * total for total in totals), "share": found}


def variants(setting: Setting, rounds: int) -> dict[str, object]:
    """Steps on one batch: channels last against contiguous, bfloat16 against float32, in turns."""
    clip = next(clips(setting.data))
    kinds: dict[str, dict[str, bool]] = {
        "channels last": {},
        "contiguous": {"channels_last": False},
        "bfloat16": {"bf16": True},
    }
    loops = {
        name: Loop(copy.deepcopy(setting.method), setting.data.batch_size, **kind)
        for name, kind in kinds.items()
    }
    seconds: dict[str, list[float]] = {name: [] for name in loops}
    for number in range(rounds + 2):
        for name, loop in loops.items():
            began = time.process_time()
            loop(clip)
            if number >= 2:
                seconds[name].append(time.process_time() - began)
    return {
        "cpu_ms": {name: record.spread(1e3 * s for s in values) for name, values in seconds.items()},
        "channels_last_times_faster": record.ratio(seconds["contiguous"], seconds["channels last"]),
        "bfloat16_times_faster": record.ratio(seconds["channels last"], seconds["bfloat16"]),
    }


def measure(make: Callable[[Path], Setting], folder: Path, rounds: int) -> dict[str, object]:
    """One setting; layouts first, from untouched weights."""
    setting = make(folder)
    found = variants(setting, rounds)
    return {"batch": setting.data.batch_size, "size": setting.data.size, **shares(setting, rounds), **found}


def main(words: list[str] | None = None) -> dict[str, object]:
    parser = record.arguments(__doc__, rounds=20)
    parser.add_argument("--settings", nargs="+", choices=["demo", "small"], default=["demo", "small"])
    parser.add_argument(
        "--videos",
        type=Path,
        default=Path(tempfile.gettempdir()) / "poodle-lightning-benchmarks",
        help="where generated videos are kept",
    )
    args = parser.parse_args(words)
    results: dict[str, Any] = {
        name: measure({"demo": demo, "small": small}[name], args.videos / f"streets-{name}", args.rounds)
        for name in args.settings
    }
    kept = argparse.Namespace(**{key: value for key, value in vars(args).items() if key != "videos"})
    path = record.save("step", kept, results)
    print(_report(results))
    print(f"written to {path}")
    return results


def _report(results: dict[str, Any]) -> str:
    def row(name: str, values: Iterator[dict[str, float]], digits: int, unit: float = 1.0) -> list[str]:
        return [
            name,
            *(record.shown({k: unit * v for k, v in value.items()}, digits) for value in values),
        ]

    every = list(results.values())
    rows = [row("step, CPU ms", (found["step_cpu_ms"] for found in every), 0)]
    rows += [row(f"{stage}, %", (found["share"][stage] for found in every), 1, 100.0) for stage in STAGES]
    rows += [
        row(key.replace("_", " "), (found[key] for found in every), 2)
        for key in ("channels_last_times_faster", "bfloat16_times_faster")
    ]
    return record.table(["min / median / max", *results], rows)


if __name__ == "__main__":
    main()

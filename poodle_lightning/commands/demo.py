"""``poodle-lightning demo``: from nothing to a trained encoder, honest numbers and a report, on a CPU."""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING

from poodle_lightning.commands._pretraining import Start, fast_precision, side_by_side, threads_each

if TYPE_CHECKING:
    from poodle_lightning.commands import Build
    from poodle_lightning.report import LabelReadout

NAME = "demo"
HELP = "pretrain on generated street videos (or your own), read out, write a report: minutes on a CPU"

SIZE = (96, 192)
METHODS = {"poodle": "PooDLe", "flowe": "FlowE"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.add_argument("--out", default="demo", help="folder of everything it makes (default: %(default)s)")
    parser.add_argument("--videos", metavar="DIR", help="your own videos, in place of generated streets")
    parser.add_argument("--steps", type=int, default=700, help="training steps (default: %(default)s)")
    parser.add_argument("--count", type=int, default=240, help="generated videos (default: %(default)s)")
    parser.add_argument(
        "--labelled",
        type=int,
        default=300,
        help="labelled frames to fit the readout on (default: %(default)s)",
    )
    parser.add_argument("--without-flowe", action="store_true", help="train PooDLe alone")


def run(args: argparse.Namespace, build: Build) -> int:
    """Make videos, train, read out, report.

    Raises:
        UserError: a training run failed; its log is named.
    """
    began = time.monotonic()
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    videos = Path(args.videos) if args.videos else _make_videos(out / "videos", args.count)
    names = ["poodle"] if args.videos or args.without_flowe else list(METHODS)
    _say(began, f"training {' and '.join(METHODS[n] for n in names)}, {args.steps} steps each")
    runs = _train(names, videos, out, args.steps)
    readouts = {} if args.videos else _read_out(runs, args.labelled, began)
    page = _report(runs["poodle"], readouts.get("poodle"), build)
    if readouts:
        print(_table(readouts, args.steps))
    print(f"\nreport      {page}")
    print(f"checkpoint  {runs['poodle'] / 'checkpoints' / 'last.ckpt'}")
    print(
        f"            poodle_lightning.from_pretrained({str(runs['poodle'] / 'checkpoints' / 'last.ckpt')!r})"
    )
    _say(began, "done")
    return 0


def _make_videos(folder: Path, count: int) -> Path:
    from poodle_lightning.data.synthetic import write_videos

    made = list(folder.glob("street_*.mp4"))
    if len(made) != count:
        for path in made:
            path.unlink()
        print(f"making {count} street videos in {folder}", flush=True)
        write_videos(folder, count, seconds=1.5, fps=6.0, size=SIZE, workers=os.cpu_count() or 1)
    return folder


def _train(names: list[str], videos: Path, out: Path, steps: int) -> dict[str, Path]:
    """Train side by side, one process per method; the first one's progress is shown."""
    from poodle_lightning.runs import folders
    from poodle_lightning.types import UserError

    starts = [
        Start(name, _words(name, videos, out, steps), out / f"{name}.log" if number else None)
        for number, name in enumerate(names)
    ]
    failed = side_by_side(starts, threads=threads_each(len(names)))
    if failed:
        where = failed[0].log or "the messages above"
        raise UserError(f"training {METHODS[failed[0].name]} failed: see {where}")
    return {name: folders(out / "runs" / f"demo_{name}")[-1] for name in names}


def _words(name: str, videos: Path, out: Path, steps: int) -> list[str]:
    return [
        *("--config", f"experiment/demo_{name}.yaml"),
        f"--data.root={videos}",
        f"--trainer.default_root_dir={out / 'runs'}",
        f"--trainer.max_steps={steps}",
        f"--model.recipe.horizon_steps={steps}",
        f"--model.recipe.warmup_steps={min(50, steps // 10)}",
        f"--trainer.precision={fast_precision(on_cpu=True)}",
    ]


def _read_out(runs: dict[str, Path], count: int, began: float) -> dict[str, LabelReadout]:
    """Linear readouts of every trained encoder and of its random twin, on other streets."""
    from poodle_lightning.data.label_sets import BDD100K
    from poodle_lightning.data.synthetic import labelled_frames
    from poodle_lightning.evaluation.linear_readout import ReadoutRecipe, same_architecture_random
    from poodle_lightning.hub import from_pretrained
    from poodle_lightning.report import read_labels

    _say(began, f"reading out on {count} labelled frames, tested on {count // 2} others")
    workers = os.cpu_count() or 1
    train = labelled_frames(count, size=SIZE, seed=1_000_000, workers=workers)
    test = labelled_frames(max(1, count // 2), size=SIZE, seed=2_000_000, workers=workers)
    found = {}
    for name, folder in runs.items():
        encoder = from_pretrained(folder / "checkpoints" / "last.ckpt")
        random = same_architecture_random(encoder)
        found[name] = read_labels(encoder, random, train, test, BDD100K, ReadoutRecipe(steps=500))
    return found


def _report(folder: Path, readout: LabelReadout | None, build: Build) -> Path:
    from dataclasses import replace

    from poodle_lightning.commands.report import material_of
    from poodle_lightning.report import write_report

    material = material_of(folder, build)
    return write_report(folder, material if readout is None else replace(material, readout=readout))


def _table(readouts: dict[str, LabelReadout], steps: int) -> str:
    """MIoU over all, small and large classes, in percent, and who led."""
    lines = [
        "",
        f"linear readout, mIoU in % ({steps} steps, one seed)",
        f"{'':<28}{'all':>7}{'small':>7}{'large':>7}",
    ]

    def row(name: str, scores: dict[str, float]) -> str:
        return f"{name:<28}" + "".join(
            f"{100 * scores[key]:>7.1f}" for key in ("miou", "miou_small", "miou_large")
        )

    for name, found in readouts.items():
        lines.append(row(METHODS[name], found.trained.summary()))
        lines.append(row("  random, same architecture", found.untrained.summary()))
    first = next(iter(readouts.values()))
    lines.append(row("position alone", first.prior.summary(first.trained.classes.numbered())))
    if len(readouts) > 1:
        best = max(readouts, key=lambda name: readouts[name].trained.confusion.miou())
        lines.append(
            f"\n{METHODS[best]} led in this run. At this size (minutes, tiny networks) the order says\n"
            "nothing about the papers' results, which took days on dozens of GPUs."
        )
    return "\n".join(lines)


def _say(began: float, text: str) -> None:
    print(f"[{time.monotonic() - began:4.0f} s] {text}", flush=True)

"""``poodle-lightning prepare``: re-encode a folder of videos so that pairs of frames are read faster.

Training then reads the new folder in place of the old one (``--data.root``). The gain is measured.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING

from poodle_lightning.commands._prepare_figures import Plan, counted, forecast, gain
from poodle_lightning.types import UserError

if TYPE_CHECKING:
    from poodle_lightning.commands import Build
    from poodle_lightning.data.index import Index
    from poodle_lightning.data.prepare import Job, Outcome
    from poodle_lightning.data.prepared import Made, Settings

NAME = "prepare"
HELP = "re-encode a folder of videos, smaller and with more key frames, so that training reads them faster"
# How often the bar looks at what the workers have done, seconds.
_GLANCE = 0.2
_SHOWN = 20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.add_argument("--root", metavar="DIR", required=True, help="folder of videos; it is only read")
    parser.add_argument("--out", metavar="DIR", required=True, help="the new videos; may hold some already")
    side = parser.add_mutually_exclusive_group()
    side.add_argument("--height", type=int, metavar="PX", help="of the new frames; never more than it was")
    side.add_argument("--short-side", type=int, metavar="PX", help="or the length of their shorter side")
    parser.add_argument(
        "--gop",
        type=int,
        default=12,
        metavar="N",
        help="frames from key frame to key frame (default: %(default)s)",
    )
    parser.add_argument("--crf", type=int, default=20, help="quality, lower is better (default: %(default)s)")
    parser.add_argument(
        "--codec", default="libx264", help="encoder, as FFmpeg names it (default: %(default)s)"
    )
    parser.add_argument("--preset", default="veryfast", help="of libx264 and libx265 (default: %(default)s)")
    parser.add_argument(
        "--every", type=int, default=1, metavar="N", help="keep one frame of N (default: all)"
    )
    parser.add_argument(
        "--workers", type=int, default=0, metavar="N", help="processes (default: one per core)"
    )
    parser.add_argument("--dry-run", action="store_true", help="say what would be done, from a short sample")
    parser.add_argument(
        "--measure",
        type=int,
        default=3,
        metavar="N",
        help="videos on which the gain is measured (default: %(default)s)",
    )
    parser.add_argument(
        "--pairs-per-s", type=float, default=20.0, metavar="N",
        help="that one GPU trains on, for the number of cores (default: %(default)g)",
    )  # fmt: skip


def run(args: argparse.Namespace, build: Build) -> int:
    """Make what is lacking; may be stopped and started again. 1 if some videos were left out.

    Raises:
        UserError: wrong arguments, no usable video, or the folder cannot be written.
    """
    from poodle_lightning.data.index import build_index

    settings = _settings(args)
    root, out = Path(args.root), Path(args.out)
    _check_folders(root, out)
    workers = args.workers or os.cpu_count() or 1
    try:
        index = build_index(root, workers=0 if workers == 1 else workers)
    except UserError as error:
        raise UserError(str(error).replace("--data.root", "--root")) from error
    plan = _planned(index, out, settings)
    if args.dry_run:
        print(forecast(plan, workers))
        return 0
    began = time.monotonic()
    total = _make(plan, workers)
    seconds = max(time.monotonic() - began, 1e-9)
    _say_skipped(total, plan)
    _say_stale(total, plan)
    if not total.made + plan.kept:
        raise UserError(f"none of the {len(index.videos)} videos in {root} could be prepared: see above")
    film = sum(made.seconds for made in total.made)
    print(
        f"{out}: {counted(len(total.made), 'video')} made in {seconds:.1f} s "
        f"({film / seconds:.1f} × real time), "
        f"{len(plan.kept)} were there, {len(total.skipped) + len(index.refused)} left out"
    )
    table, faults = gain(plan, total.made, args.measure, args.pairs_per_s)
    print(table)
    if faults:
        lines = (f"  {skip.path}: {skip.reason}: {skip.detail}" for skip in faults)
        print("\n".join(["could not be read when measured:", *lines]), file=sys.stderr)
    return 1 if total.skipped or index.refused or faults else 0


@dataclass
class _Total:
    """What a run has done."""

    made: list[Made] = field(default_factory=list)
    skipped: list[Outcome] = field(default_factory=list)


def _settings(args: argparse.Namespace) -> Settings:
    from poodle_lightning.data.prepare import try_settings
    from poodle_lightning.data.prepared import Settings, WrongSetting

    if args.workers < 0 or args.measure < 0 or not args.pairs_per_s > 0:
        raise UserError("--workers and --measure are at least 0, --pairs-per-s is above 0")
    sides = {"height": args.height, "short_side": args.short_side}
    coded = {"gop": args.gop, "crf": args.crf, "codec": args.codec, "preset": args.preset}
    try:
        settings = Settings(**sides, **coded, every=args.every)
        try_settings(settings)
    except WrongSetting as error:
        raise UserError(f"--{error.name.replace('_', '-')} {error.value}: {error.advice}") from error
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise UserError(
            f"the folder for temporary files cannot be written ({reason}): make room, or set TMPDIR"
        ) from error
    return settings


def _check_folders(root: Path, out: Path) -> None:
    """The two must not lie within each other: what is made would be indexed as further videos.

    Raises:
        UserError: they do, or ``out`` holds videos of other origin.
    """
    from poodle_lightning.data.index import VIDEO_EXTENSIONS
    from poodle_lightning.data.prepared import FILE_NAME

    real, made = (Path(os.path.realpath(path.expanduser())) for path in (root, out))
    if made == real or real in made.parents or made in real.parents:
        raise UserError(f"--out {out} and --root {root} lie within each other: choose a folder beside it")
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out} is a file: choose a folder")
    if out.is_dir() and not (out / FILE_NAME).is_file():
        for _, _, files in os.walk(out):
            strange = [name for name in files if Path(name).suffix.lower() in VIDEO_EXTENSIONS]
            if any(not name.startswith(".") for name in strange):
                raise UserError(f"--out {out} holds videos that were not made here: choose an empty folder")


def _planned(index: Index, out: Path, settings: Settings) -> Plan:
    from poodle_lightning.data.prepare import Job
    from poodle_lightning.data.prepared import load, names

    known = load(out)
    sources = {Path(video.path).relative_to(index.root).as_posix(): video for video in index.videos}
    targets = names(sorted(sources), known)
    jobs, kept = [], []
    for name, video in sources.items():
        made = known.get(name)
        if made is not None and made.stands(out, video.fingerprint, settings):
            kept.append(made)
        else:
            jobs.append(Job(video.path, name, str(out), targets[name], settings))
    sizes = {video.path: video.frames * video.width * video.height for video in index.videos}
    # the longest first: at the end no core waits for one that was begun last
    jobs.sort(key=lambda job: -sizes[job.source])
    return Plan(index, out, settings, jobs, kept, known)


def _make(plan: Plan, workers: int) -> _Total:
    """All videos, several at a time, with a bar; what is made is written down at once."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from poodle_lightning.data.prepared import note, working_in

    infos, every = plan.infos, plan.settings.every
    frames = sum(-(-infos[job.source].frames // every) for job in plan.jobs)
    total = _Total()
    columns = (TextColumn("frames"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    try:
        plan.out.mkdir(parents=True, exist_ok=True)
        names = [job.made for job in plan.jobs] + [made.made for made in plan.kept]
        bar = Progress(*columns, console=Console(stderr=True))
        with working_in(plan.out, names), bar:
            task = bar.add_task("prepare", total=frames)
            outcomes = _outcomes(plan.jobs, workers, lambda done: bar.update(task, completed=done))
            with closing(outcomes):
                for outcome in outcomes:
                    if outcome.fatal:
                        raise OSError(0, outcome.detail)
                    if outcome.made is None:
                        total.skipped.append(outcome)
                    else:
                        note(plan.out, outcome.made)
                        total.made.append(outcome.made)
            bar.update(task, completed=frames)
    except OSError as error:
        raise UserError(
            f"--out {plan.out} cannot be written ({error.strerror or error}): make room or choose another "
            "folder; what is there stays, and the same command goes on from it"
        ) from error
    return total


def _outcomes(jobs: Sequence[Job], workers: int, show: Callable[[int], object]) -> Generator[Outcome]:
    """What becomes of the jobs, in the order in which they end; ``show`` is told the frames done so far."""
    from poodle_lightning.data.prepare import attempt, start_worker, work

    if min(workers, len(jobs)) <= 1:
        done = 0

        def tick() -> None:
            nonlocal done
            done += 1
            show(done)

        yield from (attempt(job, tick) for job in jobs)
        return
    # fresh interpreters: forking a process that holds threads of a decoder can hang
    context = get_context("spawn")
    frames, stop = context.Value("q", 0), context.Event()
    workers = min(workers, len(jobs))
    waiting, running = iter(jobs), dict["Future[Outcome]", "Job"]()
    pool = ProcessPoolExecutor(workers, context, start_worker, (frames, stop))
    try:
        while True:
            while len(running) < 2 * workers and (job := next(waiting, None)) is not None:
                running[pool.submit(work, job)] = job
            if not running:
                return
            ended, _ = wait(running, _GLANCE, FIRST_COMPLETED)
            show(frames.value)
            for future in ended:
                job = running.pop(future)
                yield future.result()
    except BrokenProcessPool as error:
        raise UserError(
            "a process that prepared videos died, perhaps for lack of memory: try fewer --workers; what is "
            "there stays, and the same command goes on from it"
        ) from error
    finally:
        stop.set()
        pool.shutdown(wait=True, cancel_futures=True)


def _say_skipped(total: _Total, plan: Plan) -> None:
    lines = [f"{skip.path}: {skip.reason}: {skip.detail}" for skip in plan.index.refused]
    lines += [f"{one.job.source}: {one.reason}: {one.detail}" for one in total.skipped]
    if lines:
        reasons = Counter(
            [skip.reason for skip in plan.index.refused] + [one.reason for one in total.skipped]
        )
        print(
            "left out: " + ", ".join(f"{count} {reason}" for reason, count in reasons.most_common()),
            file=sys.stderr,
        )
        print("\n".join(f"  {line}" for line in lines[:_SHOWN]), file=sys.stderr)
        if len(lines) > _SHOWN:
            print(f"  and {len(lines) - _SHOWN} more", file=sys.stderr)


def _say_stale(total: _Total, plan: Plan) -> None:
    standing = {made.made for made in (*total.made, *plan.kept)}
    earlier = sorted(made.made for made in plan.known.values() if made.made not in standing)
    stale = [name for name in earlier if (plan.out / name).is_file()]
    if stale:
        print(
            f"{counted(len(stale), 'earlier video')} in {plan.out}, made of what is no longer in "
            f"{plan.index.root}, would be trained on: remove what is not wanted; the first is {stale[0]}",
            file=sys.stderr,
        )

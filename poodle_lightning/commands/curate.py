"""``poodle-lightning curate``: of a table of videos those that show what their titles say (VideoNet)."""

from __future__ import annotations

import argparse
import json
import os
import sys
import threading
import time
from collections import Counter
from collections.abc import Generator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from poodle_lightning.types import Skip, UserError

if TYPE_CHECKING:
    import torch

    from poodle_lightning.commands import Build
    from poodle_lightning.data.curation import Retrieved, Verdict
    from poodle_lightning.data.frame_classes import FrameClassifier
    from poodle_lightning.data.info import VideoInfo
    from poodle_lightning.data.looks import Looks, Stamp
    from poodle_lightning.data.shares import Share
    from poodle_lightning.data.titles import TitleClass

NAME = "curate"
HELP = "keep of a table of videos those that show what their titles say (VideoNet), for source videonet"
_SHOWN = 10


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.add_argument(
        "--videos",
        metavar="TABLE",
        required=True,
        help="CSV, TSV or JSON lines: id, title, path, duration (s)",
    )
    parser.add_argument(
        "--classes",
        default="imagenet",
        metavar="FILE",
        help="names and synonyms, .json or .txt (default: imagenet, its 1,000 classes)",
    )
    parser.add_argument(
        "--classifier",
        default="torchvision:resnet50",
        metavar="NAME|FILE",
        help="torchvision:NAME[:FILE], timm:NAME[:FILE] or a ResNet's weights (default: %(default)s)",
    )
    parser.add_argument("--out", metavar="FILE", required=True, help="the list to write, e.g. videonet.jsonl")
    numbers = {
        "frames": (100, "looked at, the first ones of every video"),
        "per-class": (5000, "videos retrieved of every class, the first ones of the table"),
        "batch": (64, "frames classified at once"),
        "workers": (0, "threads that decode; 0: one per core"),
    }
    for name, (default, what) in numbers.items():
        parser.add_argument(
            f"--{name}", type=int, default=default, metavar="N", help=f"{what} (default: %(default)s)"
        )
    parser.add_argument(
        "--min-seconds",
        type=float,
        default=10.0,
        metavar="S",
        help="shorter videos are dropped (default: 10)",
    )
    parser.add_argument("--device", default="cpu", help="of the classifier (default: %(default)s)")
    parser.add_argument(
        "--shard",
        metavar="I/N",
        help="look at only the I-th of N shares of the videos, from 1; whoever ends last writes the list "
        "(default: by RANK and WORLD_SIZE, or SLURM_PROCID and SLURM_STEP_NUM_TASKS, if set; else all)",
    )


def run(args: argparse.Namespace, build: Build) -> int:
    """Look at what was not looked at yet, and write list and report; may be stopped and started again.

    Raises:
        UserError: a file is missing or of another form, no title names a class, the classifier is of another
            label set, nothing is kept, or the list cannot be written.
    """
    from poodle_lightning.data.curation import read_table, retrieve
    from poodle_lightning.data.frame_classes import load_classifier, outputs_of
    from poodle_lightning.data.looks import Looks
    from poodle_lightning.data.shares import Share
    from poodle_lightning.data.titles import read_classes

    out = _check(args)
    share = Share.find(args.shard, os.environ)
    listed, classes = read_table(args.videos), read_classes(args.classes)
    retrieved = retrieve(listed, classes, args.per_class)
    _say_titles(retrieved, classes, args)
    classifier = load_classifier(args.classifier, args.device)
    outputs = outputs_of(classes, classifier.outputs)
    folder = Path(f"{out}.looks")
    try:
        looks = Looks(folder, classifier.fingerprint(), args.frames)
        verdicts = _decide(retrieved, looks, outputs, args.min_seconds)
        todo = [
            one.listed.path
            for one, verdict in zip(retrieved.candidates, verdicts, strict=True)
            if not verdict
        ]
        # the shares are of all, so that they are the same whenever a process begins
        chosen = set(share.of({one.listed.path: 1.0 for one in retrieved.candidates}))
        mine = [path for path in todo if path in chosen]
        print(
            f"curate: {len(listed)} videos in the table, {len(verdicts)} retrieved by their titles, "
            f"{len(todo)} to be looked at" + (f", {len(mine)} in {share}" if share.count > 1 else ""),
            file=sys.stderr,
        )
        if mine:
            _look(mine, classifier, looks, share, args)
        looks.read()  # others may have seen more in the meantime
        verdicts = _decide(retrieved, looks, outputs, args.min_seconds, failed=True)
        return _write(_Outcome(out, retrieved, classes, verdicts, len(listed)), args)
    except OSError as error:
        raise UserError(
            f"--out {out} cannot be written ({error.strerror or error}): make room or choose another place; "
            "the same command goes on from what is there"
        ) from error


@dataclass(frozen=True)
class _Outcome:
    """All that list and report are made of; a verdict is None where nobody has looked yet."""

    out: Path
    retrieved: Retrieved
    classes: Sequence[TitleClass]
    verdicts: Sequence[Verdict | None]
    listed: int


def _check(args: argparse.Namespace) -> Path:
    """Refuse what is out of range before anything is read or loaded; where the list goes."""
    least = {"frames": 1, "per_class": 1, "batch": 1, "workers": 0}
    for name, bound in least.items():
        if getattr(args, name) < bound:
            raise UserError(f"--{name.replace('_', '-')} must be at least {bound}, not {getattr(args, name)}")
    if not 0 <= args.min_seconds < float("inf"):
        raise UserError(f"--min-seconds must be at least 0, not {args.min_seconds:g}")
    out = Path(args.out).expanduser()
    if out.is_dir():
        raise UserError(f"--out {out} is a folder: give the file of the list, e.g. {out / 'videonet.jsonl'}")
    given = {"videos": args.videos, "classes": args.classes, "classifier": args.classifier.rpartition(":")[2]}
    for name, path in given.items():
        if out.exists() and Path(path).exists() and os.path.samefile(out, path):
            raise UserError(f"--out {out} is the file of --{name} itself: choose another one")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {out}: its folder cannot be made ({error.strerror or error})") from error
    if not os.access(out.parent, os.W_OK):
        raise UserError(f"--out {out}: its folder cannot be written: choose another one")
    return out


def _say_titles(retrieved: Retrieved, classes: Sequence[TitleClass], args: argparse.Namespace) -> None:
    if not retrieved.candidates:
        raise UserError(
            f"no title in {args.videos} names a class of {args.classes}, e.g. {classes[0].names[0]!r}: give "
            "other classes, or synonyms that titles use"
        )
    lacking = [one.names[0] for one, count in zip(classes, retrieved.matched, strict=True) if not count]
    if lacking:
        more = ", …" if len(lacking) > _SHOWN else ""
        print(
            f"curate: no title names {len(lacking)} of {len(classes)} classes: "
            f"{', '.join(lacking[:_SHOWN])}{more}",
            file=sys.stderr,
        )


def _decide(
    retrieved: Retrieved, looks: Looks, outputs: Sequence[int], min_seconds: float, failed: bool = False
) -> list[Verdict | None]:
    from poodle_lightning.data.curation import judge

    return [
        judge(one, looks.get(one.listed.path, failed), outputs, min_seconds) for one in retrieved.candidates
    ]


def _look(
    paths: Sequence[str], classifier: FrameClassifier, looks: Looks, share: Share, args: argparse.Namespace
) -> None:
    """Look at videos, with a bar; what was seen is written down at once."""
    import numpy as np
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from poodle_lightning.data.looks import Look

    columns = (TextColumn("videos"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    began, frames = time.monotonic(), 0
    workers = args.workers or os.cpu_count() or 1
    bar = Progress(*columns, console=Console(stderr=True))
    with bar, closing(_read(paths, classifier, workers, args)) as videos:
        task = bar.add_task("curate", total=len(paths))
        for path, stamp, read in videos:
            if isinstance(read, Skip):
                looks.add(Look(path, stamp, None, skip=read), share)
            elif read[1] is None:
                looks.add(Look(path, stamp, None, read[0]), share)
            else:
                video, images = read[0], read[1]
                seen, counts = np.unique(classifier.top1(images, args.batch), return_counts=True)
                frames += len(images)
                first = dict(zip(seen.tolist(), counts.tolist(), strict=True))
                looks.add(Look(path, stamp, first, video), share)
            bar.advance(task)
    seconds = max(time.monotonic() - began, 1e-9)
    print(
        f"curate: looked at {len(paths)} videos, {frames} frames in {seconds:.1f} s "
        f"({frames / seconds:.1f} frames/s)",
        file=sys.stderr,
    )


_Read = tuple[str, "Stamp | None", "Skip | tuple[VideoInfo, torch.Tensor | None]"]


def _read(
    paths: Sequence[str], classifier: FrameClassifier, workers: int, args: argparse.Namespace
) -> Generator[_Read]:
    """First frames of videos in the order in which they are ready, at most two videos per thread ahead."""
    from poodle_lightning.data.curation import first_frames
    from poodle_lightning.data.info import DecodeError
    from poodle_lightning.data.looks import stamp_of

    stop = threading.Event()

    def one(path: str) -> _Read:
        stamp = stamp_of(path)
        try:
            return (
                path,
                stamp,
                first_frames(path, args.frames, args.min_seconds, classifier.shrink, stop.is_set),
            )
        except DecodeError as error:
            return path, stamp, Skip(path, error.reason, error.detail, error.time)
        except OSError as error:  # it vanished or its disk failed while it was read
            return path, stamp, Skip(path, "unreadable", error.strerror or type(error).__name__)

    waiting, running = iter(paths), set["Future[_Read]"]()
    pool = ThreadPoolExecutor(workers)
    try:
        while True:
            while len(running) < 2 * workers and (path := next(waiting, None)) is not None:
                running.add(pool.submit(one, path))
            if not running:
                return
            ended, running = wait(running, return_when=FIRST_COMPLETED)
            # what was seen comes before what went wrong, so that it is written down
            for future in sorted(ended, key=lambda one: one.exception() is not None):
                yield future.result()
    finally:
        stop.set()  # or the pool would wait for all frames of the videos that it reads
        pool.shutdown(wait=True, cancel_futures=True)


def _write(found: _Outcome, args: argparse.Namespace) -> int:
    """List and report, if nothing is left to be looked at."""
    from poodle_lightning.data.class_balance import balance, markdown
    from poodle_lightning.data.curation import curated
    from poodle_lightning.data.videonet import save_text, write_manifest

    verdicts = [verdict for verdict in found.verdicts if verdict is not None]
    if left := len(found.verdicts) - len(verdicts):
        print(
            f"{found.out}: not written yet, {left} videos are left to other shares; the last of them writes, "
            "or the same command with --shard 1/1"
        )
        return 0
    settings = {
        "classifier": args.classifier,
        "classes": args.classes,
        "frames": args.frames,
        "min_seconds": args.min_seconds,
        "per_class": args.per_class,
    }
    numbers = balance(found.classes, found.retrieved, verdicts, found.listed, settings)
    report = found.out.with_name(f"{found.out.name}.report.md")
    save_text(report, [markdown(numbers)])
    save_text(report.with_suffix(".json"), [json.dumps(numbers, indent=1, allow_nan=False) + "\n"])
    outcomes = Counter(verdict.outcome for verdict in verdicts)
    kept = [curated(verdict, found.classes) for verdict in verdicts if verdict.outcome == "kept"]
    listed = ", ".join(f"{count} {name}" for name, count in outcomes.most_common())
    if not kept:
        older = f"; the list that is there is of an earlier run: {found.out}" if found.out.exists() else ""
        raise UserError(
            f"no video is kept ({listed}), see {report}: mend the paths, or give other classes or another "
            f"classifier{older}"
        )
    write_manifest(found.out, kept, settings)
    print(f"{found.out}: {len(kept)} of {len(verdicts)} retrieved videos kept ({listed}); report: {report}")
    return 0

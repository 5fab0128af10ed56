"""``poodle-lightning trace``: follow points through every video by optical flow, once, for PiCo.

One file per video, or per stretch of one, which training maps into memory. What is there is left out, so a
run that was stopped goes on by the same command. Processes share the videos out among themselves as those of
``poodle-lightning flow`` do; ``poodle-lightning predict`` with a ``Trace`` does the same under Lightning.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import TYPE_CHECKING, Any

from poodle_lightning.commands import Build, add_config_arguments
from poodle_lightning.commands._estimators import add_estimator_arguments, check_estimator, on_devices
from poodle_lightning.types import Skip, UserError

if TYPE_CHECKING:
    from poodle_lightning.data.footage import Footage
    from poodle_lightning.data.shares import Share
    from poodle_lightning.data.sources import Entry, Source
    from poodle_lightning.data.track_counts import Count
    from poodle_lightning.methods.trace import Trace

NAME = "trace"
HELP = "follow points through a folder of videos once, for training on tracks"

_PER_DEVICE = 2  # threads: one reads the next video while the other's flow is computed


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    add_config_arguments(parser)
    parser.add_argument("--root", metavar="DIR", help="folder of videos, in place of --config")
    parser.add_argument("--out", metavar="DIR", required=True, help="of the tracks; may hold some already")
    add_estimator_arguments(parser)
    parser.add_argument(
        "--exact", action="store_true", help="the exact flow of generated videos in place of an estimator's"
    )
    parser.add_argument(
        "--points", type=int, default=1000, metavar="N", help="per video or stretch (default: %(default)s)"
    )
    parser.add_argument(
        "--gamma",
        type=float,
        default=0.01,
        help="share of the motion that flow there and back may disagree by (default: %(default)s); another "
        "one needs other tracks",
    )
    parser.add_argument(
        "--limit",
        type=float,
        default=8.0,
        metavar="PX2",
        help="largest delta that training may ask for, squared pixels (default: %(default)s); inf follows "
        "points through occlusions",
    )
    parser.add_argument(
        "--short-side",
        type=int,
        metavar="PX",
        help="reduce larger frames to this length of their shorter side first (default: as they are)",
    )
    parser.add_argument(
        "--every", type=int, default=1, metavar="N", help="one frame of so many (default: all)"
    )
    parser.add_argument(
        "--clip-seconds",
        type=float,
        metavar="S",
        help="with --root: cut longer videos into stretches, each tracked for itself; as data.clip_seconds",
    )
    parser.add_argument(
        "--seed", type=int, help="of the points (default: 0, or that of the configuration's data)"
    )
    parser.add_argument(
        "--shard", metavar="I/N", help="only the I-th of N shares of the videos; see poodle-lightning flow"
    )
    parser.add_argument(
        "--workers",
        type=int,
        default=0,
        metavar="N",
        help=f"threads (default: one per core; of RAFT on a GPU {_PER_DEVICE} per device)",
    )


def run(args: argparse.Namespace, build: Build) -> int:
    """Track what is lacking; may be stopped and started again.

    Args:
        args: as parsed.
        build: ``(configs, overrides) -> (method, data module)``, for ``--config``.

    Raises:
        UserError: there are no videos, most of them cannot be tracked, the folder cannot be written or holds
            tracks made otherwise, a device is not there or has no room, the share is none, or an argument is
            out of range.
    """
    from poodle_lightning.data.footage import footage_of
    from poodle_lightning.data.shares import Share

    _check(args)
    _check_folder(args.out)
    share = Share.find(args.shard, os.environ)
    source, entries, root, seed = _what(args, build)
    traces = _traces(args, share, args.seed if args.seed is not None else seed)
    halt = threading.Event()
    videos = footage_of(source, entries, root, share.number - 1, share.count, halt=halt)
    if share.count > 1:
        remedy = "" if share.origin == "--shard" else "; --shard 1/1 does all"
        print(
            f"trace: {share} (by {share.origin}{remedy}): {len(videos)} of {len(entries)} videos",
            file=sys.stderr,
        )
    if source.refused and share.number == 1:  # every share sees the same ones
        _note_refused(source.refused, args.out)
    began = time.monotonic()
    total = track_all(traces, videos, halt)
    if total.skipped:
        from poodle_lightning.data.track_counts import SKIPPED, listed

        where = os.path.join(args.out, SKIPPED)
        print(f"trace: videos left out: {listed(total.skipped)}; see {where}", file=sys.stderr)
    total.check()
    where = args.out if share.count == 1 else f"{args.out}, {share}"
    print(f"{where}: {total.told(time.monotonic() - began)}")
    return 0


def _note_refused(refused: Sequence[Skip], out: str) -> None:
    """Say and write down which files are no readable videos; they are in no share."""
    from poodle_lightning.data.track_counts import SKIPPED, listed, note_skip

    for skip in refused:
        note_skip(Path(out), skip.path, skip.reason, skip.detail)
    reasons = listed(Counter(skip.reason for skip in refused))
    print(f"trace: files left out: {reasons}; see {os.path.join(out, SKIPPED)}", file=sys.stderr)


def _check_folder(out: str) -> None:
    """Refuse a folder that cannot be written, before a video is looked at."""
    try:
        os.makedirs(out, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {out}: the folder cannot be made ({error.strerror or error})") from error
    if not os.access(out, os.W_OK):
        raise UserError(f"--out {out}: the folder cannot be written: choose another one")


def _check(args: argparse.Namespace) -> None:
    """Refuse what is out of range before anything is read or loaded."""
    check_estimator(args, {"workers": 0, "points": 1, "every": 1})
    if bool(args.config) == bool(args.root):
        raise UserError("trace needs either --root DIR or --config FILE")
    if args.root and args.overrides:
        raise UserError(
            f"trace: {args.overrides[0]} is no option of --root; see poodle-lightning trace --help"
        )
    if args.root and not os.path.exists(args.root):
        raise UserError(f"--root {args.root}: no such folder; give a folder of videos")
    if not 0 <= args.gamma < math.inf:
        raise UserError(f"--gamma {args.gamma:g}: give a number from 0 on")
    if not args.limit > 0:
        raise UserError(f"--limit {args.limit:g}: give the largest delta, above 0, or inf")
    if args.short_side is not None and args.short_side < 16:
        raise UserError(f"--short-side {args.short_side}: give at least 16 px")
    if args.clip_seconds is not None and (args.config or not 0 < args.clip_seconds < math.inf):
        raise UserError(
            f"--clip-seconds {args.clip_seconds:g}: give a length above 0, and that with --root; a "
            "configuration has data.clip_seconds"
        )


def _what(args: argparse.Namespace, build: Build) -> tuple[Source, Sequence[Entry], str | None, int]:
    """Source, stretches, root and seed: of the configuration's data module, or of a folder and the flags."""
    from poodle_lightning.data.sources import FilmSource, FolderSource
    from poodle_lightning.data.split import segments

    if args.config:
        data: Any = build(args.config, args.overrides)[1]
        if not hasattr(data, "train_entries"):
            raise UserError(
                f"the configuration's data are a {type(data).__name__}, which has no videos to follow points "
                "through: take one with a VideoDataModule"
            )
        data.setup("predict")
        return data.source, [*data.train_entries, *data.val_entries], data.root, data.seed
    folder = os.path.isdir(args.root)
    source = FolderSource(args.root, workers=args.workers) if folder else FilmSource(args.root)
    entries = source.entries
    if args.clip_seconds is not None:
        entries = segments(entries, args.clip_seconds)
    return source, entries, args.root, 0


def _traces(args: argparse.Namespace, share: Share, seed: int) -> list[Trace]:
    """Who tracks: one per thread. Those of one device share its network."""
    from poodle_lightning.flow.dis import DIS
    from poodle_lightning.flow.given import Given
    from poodle_lightning.methods.trace import Trace

    settings: dict[str, Any] = {
        "points": args.points,
        "gamma": args.gamma,
        "limit": args.limit,
        "every": args.every,
    }
    settings |= {"short_side": args.short_side, "seed": seed}
    cores = args.workers or os.cpu_count() or 1
    if args.exact or args.estimator == "dis":
        one = Trace(Given() if args.exact else DIS(args.preset), args.out, **settings)
        return [one] * cores
    traces = [Trace(raft, args.out, **settings) for raft in on_devices(args, share)]
    threads = args.workers or len(traces) * (1 if args.device == "cpu" else _PER_DEVICE)
    return [traces[number % len(traces)] for number in range(max(threads, len(traces)))]


def track_all(traces: Sequence[Trace], videos: Sequence[Footage], halt: threading.Event) -> Count:
    """All videos, one thread for each of ``traces``, with a bar.

    Args:
        traces: may name one several times.
        videos: that give up when ``halt`` is set.
        halt: is set when something ends the work early.

    Raises:
        UserError: see ``Trace.video``.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from poodle_lightning.data.track_counts import Count

    total, queue = Count(), _Queue(videos)
    columns = (TextColumn("videos"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar, ThreadPoolExecutor(len(traces)) as pool:
        task = bar.add_task("trace", total=len(videos))
        try:
            jobs = [pool.submit(_serve, trace, queue, lambda: bar.advance(task)) for trace in traces]
            for job in as_completed(jobs):
                total += job.result()
        except BaseException:
            halt.set()  # or the pool would wait until all running videos are done
            queue.close()
            raise
    return total


class _Queue:
    """Hands out each item once, to whichever thread asks."""

    def __init__(self, items: Iterable[Footage]) -> None:
        self._items, self._lock = iter(items), threading.Lock()

    def next(self) -> Footage | None:
        """The next one; None when there are no more."""
        with self._lock:
            return next(self._items, None)

    def close(self) -> None:
        """There are no more."""
        with self._lock:
            self._items = iter(())


def _serve(trace: Trace, queue: _Queue, advance: Callable[[], object]) -> Count:
    from poodle_lightning.data.footage import Halted
    from poodle_lightning.data.track_counts import Count

    total = Count()
    while (video := queue.next()) is not None:
        try:
            total += trace.video(video)
        except Halted:
            break
        advance()
    return total

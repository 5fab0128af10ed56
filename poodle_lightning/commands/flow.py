"""``poodle-lightning flow``: compute the optical flow of fixed pairs of frames once, both ways.

What it stores is what ``FixedPairs`` draws in training; the settings of both must agree, and with
``--config`` they do by themselves.

Processes share the videos out among themselves: by ``--shard``, or by what a launcher (torchrun, srun) tells
them. Each writes other files of the same cache, so they need not know of each other.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import TYPE_CHECKING, Any

from poodle_lightning.commands import Build, add_config_arguments
from poodle_lightning.commands._estimators import add_estimator_arguments, check_estimator, on_devices
from poodle_lightning.commands._flow_work import AtOnce, Count, Estimators, OnDevices, Work
from poodle_lightning.types import UserError

if TYPE_CHECKING:
    from poodle_lightning.data.cached_flow import FixedPairs
    from poodle_lightning.data.shares import Share
    from poodle_lightning.data.sources import Entry, Source

NAME = "flow"
HELP = "compute the optical flow of a folder of videos once, for training"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    add_config_arguments(parser)
    parser.add_argument("--root", metavar="DIR", help="folder of videos, in place of --config")
    parser.add_argument("--out", metavar="DIR", required=True, help="the cache; may hold flow already")
    add_estimator_arguments(parser)
    parser.add_argument(
        "--shard",
        metavar="I/N",
        help="only the I-th of N shares of the videos, from 1 (default: by RANK and WORLD_SIZE, or else by "
        "SLURM_PROCID and SLURM_STEP_NUM_TASKS, if they are set; otherwise all)",
    )
    parser.add_argument(
        "--pairs-per-video", type=int, default=10, metavar="N", help="with --root (default: %(default)s)"
    )
    parser.add_argument(
        "--gap",
        type=float,
        nargs="+",
        default=[0.5, 1.0],
        metavar="S",
        help="with --root: seconds between the frames, shortest and longest (default: 0.5 1.0)",
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="with --root: of the pairs (default: %(default)s)"
    )
    parser.add_argument(
        "--full-resolution", action="store_true", help="store every pixel, three times as much"
    )
    parser.add_argument(
        "--form",
        choices=("delta", "jpeg"),
        default="delta",
        help="delta: numbers, within 1/16 px with --full-resolution, otherwise coarser where motions meet "
        "(default); jpeg: as PiCo, smaller, approximate",
    )
    parser.add_argument(
        "--quality", type=int, default=95, metavar="Q", help="of jpeg, 1 to 100 (default: %(default)s)"
    )
    parser.add_argument("--workers", type=int, default=0, metavar="N", help="threads (default: one per core)")


def run(args: argparse.Namespace, build: Build) -> int:
    """Compute what is lacking; may be stopped and started again.

    Args:
        args: as parsed.
        build: ``(configs, overrides) -> (method, data module)``, for ``--config``.

    Raises:
        UserError: there are no videos, none of them can be used, the cache cannot be written, a device is not
            there or has no room, the share is none, or an argument is out of range.
    """
    from poodle_lightning.data.flow_cache import FlowCache
    from poodle_lightning.data.shares import Share

    _check(args)
    share = Share.find(args.shard, os.environ)
    source, entries, sampler = _what(args, build)
    name, estimators, threads = _estimators(args, share)
    cache = FlowCache(args.out, name, args.full_resolution, args.form, args.quality)
    videos = _share(share, entries, sampler.fixed)
    if source.refused and share.number == 1:  # every share sees the same ones
        reasons = _listed(Counter(skip.reason for skip in source.refused))
        first = source.refused[0].path
        print(f"flow: files left out: {reasons}; the first is {first}", file=sys.stderr)
    began = time.monotonic()
    try:
        total = _compute(Work(source, sampler, estimators, cache), videos, threads, share)
    finally:
        estimators.close()
    seconds = max(time.monotonic() - began, 1e-9)
    if total.left_out:
        print(f"flow: pairs left out: {_listed(total.left_out)}", file=sys.stderr)
    if videos and not total.stored + total.kept:
        raise UserError(f"no pair of frames could be used ({_listed(total.left_out)}): check the videos")
    speed = ""
    if total.stored:
        speed = (
            f"; {total.stored / seconds:.2f} pairs/s, {total.seconds / seconds:.2f} s of video/s, "
            f"{total.bytes / 1e6:.1f} MB, {total.bytes / total.stored / 1e3:.0f} KB a pair, "
            f"{total.bytes / max(total.seconds, 1e-9) * 3600 / 1e6:.1f} MB per hour of video"
        )
    where = args.out if share.count == 1 else f"{args.out}, {share}"
    print(f"{where}: {total.stored} pairs computed in {seconds:.1f} s, {total.kept} were there{speed}")
    return 0


def _check(args: argparse.Namespace) -> None:
    """Refuse numbers out of range before anything is read or loaded."""
    check_estimator(args, {"workers": 0, "pairs_per_video": 1})
    if not 1 <= args.quality <= 100:
        raise UserError(f"--quality goes from 1 to 100, not {args.quality}")
    if len(args.gap) > 2:
        raise UserError("--gap takes the shortest and the longest, or one for both: give one or two numbers")


def _what(args: argparse.Namespace, build: Build) -> tuple[Source, Sequence[Entry], FixedPairs]:
    """Videos and pairs: of the configuration's data module, or of a folder and the flags."""
    from poodle_lightning.data.cached_flow import FixedPairs
    from poodle_lightning.data.sources import FolderSource

    if bool(args.config) == bool(args.root):
        raise UserError("flow needs either --root DIR or --config FILE")
    if args.root and args.overrides:
        raise UserError(f"flow: {args.overrides[0]} is no option of --root; see poodle-lightning flow --help")
    if args.config:
        with warnings.catch_warnings():
            # CachedFlow's advice to run this command
            warnings.filterwarnings("ignore", message="no flow cache at", category=RuntimeWarning)
            data: Any = build(args.config, args.overrides)[1]
        if not isinstance(getattr(data, "sampler", None), FixedPairs):
            raise UserError(
                "the configuration draws fresh pairs every time, so a cache would not be used: set "
                "data.sampler to poodle_lightning.data.cached_flow.FixedPairs"
            )
        data.setup("fit")
        return data.source, [*data.train_entries, *data.val_entries], data.sampler
    if not os.path.isdir(args.root):
        raise UserError(f"--root {args.root}: no such folder; give a folder of videos")
    sampler = FixedPairs(gap=(args.gap[0], args.gap[-1]), fixed=args.pairs_per_video, seed=args.seed)
    try:
        sampler.check()
    except UserError as error:
        raise UserError(f"--gap or --pairs-per-video: {error}") from error
    source = FolderSource(args.root)
    return source, source.entries, sampler


def _share(share: Share, entries: Sequence[Entry], fixed: int) -> dict[str, list[Entry]]:
    """The share's videos, each with all its stretches: two writers of one file would undo each other's work.

    They are weighed by their pairs, for a pair takes as long in a long video as in a short one.
    """
    videos: dict[str, list[Entry]] = {}
    for entry in entries:
        videos.setdefault(entry.path, []).append(entry)
    if share.count == 1:
        return videos
    weights = {path: float(fixed * len(stretches)) for path, stretches in videos.items()}
    chosen = {path: videos[path] for path in share.of(weights)}
    pairs = sum(weights[path] for path in chosen)
    remedy = "" if share.origin == "--shard" else "; --shard 1/1 does all"
    print(
        f"flow: {share} (by {share.origin}{remedy}): "
        f"{len(chosen)} of {len(videos)} videos, {pairs:.0f} pairs",
        file=sys.stderr,
    )
    return chosen


def _estimators(args: argparse.Namespace, share: Share) -> tuple[str, Estimators, int]:
    """What the flow depends on, what computes it, and how many threads read videos for it."""
    cores = args.workers or os.cpu_count() or 1
    if args.estimator == "dis":
        from poodle_lightning.flow.dis import DIS

        dis = DIS(args.preset)
        return dis.fingerprint, AtOnce(dis), cores
    rafts = on_devices(args, share)
    threads = args.workers or (1 if args.device == "cpu" else cores)
    return rafts[0].fingerprint, OnDevices(rafts, args.batch, threads), threads


def _compute(work: Work, videos: Mapping[str, Sequence[Entry]], threads: int, share: Share) -> Count:
    """All videos of a share, several at a time, with a bar."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    total = Count()
    label = "pairs" if share.count == 1 else f"pairs of {share}"
    columns = (TextColumn(label), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar, ThreadPoolExecutor(threads) as pool:
        stretches = sum(len(entries) for entries in videos.values())
        task = bar.add_task("flow", total=stretches * work.sampler.fixed)
        try:
            jobs = [
                pool.submit(work.video, entries, lambda n: bar.advance(task, n))
                for entries in videos.values()
            ]
            for job in as_completed(jobs):
                total += job.result()
        except BaseException:
            work.estimators.close()  # or the pool would wait until all running videos are done
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return total


def _listed(reasons: Counter[str]) -> str:
    return ", ".join(f"{count} {reason}" for reason, count in reasons.most_common()) or "none"

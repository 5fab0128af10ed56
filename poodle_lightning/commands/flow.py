"""``poodle-lightning flow``: compute the optical flow of fixed pairs of frames once, both ways.

What it stores is what ``FixedPairs`` draws in training; the settings of both must agree, and with
``--config`` they do by themselves.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Self

from poodle_lightning.commands import Build, add_config_arguments
from poodle_lightning.types import UserError

if TYPE_CHECKING:
    import numpy as np

    from poodle_lightning.data.cached_flow import FixedPairs, PixelEstimator
    from poodle_lightning.data.flow_cache import FlowCache, Moments
    from poodle_lightning.data.sources import Entry, Source

NAME = "flow"
HELP = "compute the optical flow of a folder of videos once, for training"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    add_config_arguments(parser)
    parser.add_argument("--root", metavar="DIR", help="folder of videos, in place of --config")
    parser.add_argument("--out", metavar="DIR", required=True, help="the cache; may hold flow already")
    parser.add_argument(
        "--estimator", choices=("dis", "raft"), default="dis", help="what computes it (default: %(default)s)"
    )
    parser.add_argument("--preset", default="medium", help="of DIS: ultrafast, fast or medium (default)")
    parser.add_argument("--size", default="large", help="of RAFT: large (default) or small")
    parser.add_argument(
        "--weights", default="C_T_V1", help="of RAFT: a name or a file (default: %(default)s)"
    )
    parser.add_argument("--iterations", type=int, default=24, help="of RAFT (default: %(default)s)")
    parser.add_argument("--device", default="cpu", help="where RAFT runs (default: %(default)s)")
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
    parser.add_argument("--workers", type=int, default=0, metavar="N", help="threads (default: one per core)")


def run(args: argparse.Namespace, build: Build) -> int:
    """Compute what is lacking; may be stopped and started again.

    Args:
        args: as parsed.
        build: ``(configs, overrides) -> (method, data module)``, for ``--config``.

    Raises:
        UserError: there are no videos, none of them can be used, or the cache cannot be written.
    """
    from poodle_lightning.data.flow_cache import FlowCache

    source, entries, sampler = _what(args, build)
    estimator = _estimator(args)
    cache = FlowCache(args.out, estimator.fingerprint, args.full_resolution)
    threads = 1 if args.estimator == "raft" else args.workers or os.cpu_count() or 1
    began = time.monotonic()
    total = _compute(_Work(source, sampler, estimator, cache), entries, threads)
    seconds = max(time.monotonic() - began, 1e-9)
    if total.left_out:
        print(f"flow: pairs left out: {_listed(total.left_out)}", file=sys.stderr)
    if not total.stored + total.kept:
        raise UserError(f"no pair of frames could be used ({_listed(total.left_out)}): check the videos")
    per_pair = total.bytes / total.stored / 1e3 if total.stored else 0.0
    print(
        f"{args.out}: {total.stored} pairs computed in {seconds:.1f} s, {total.kept} were there; "
        f"{total.stored / seconds:.2f} pairs/s, {total.bytes / 1e6:.1f} MB, {per_pair:.0f} KB a pair"
    )
    return 0


def _what(args: argparse.Namespace, build: Build) -> tuple[Source, Sequence[Entry], FixedPairs]:
    """Videos and pairs: of the configuration's data module, or of a folder and the flags."""
    from poodle_lightning.data.cached_flow import FixedPairs
    from poodle_lightning.data.sources import FolderSource

    if bool(args.config) == bool(args.root):
        raise UserError("flow needs either --root DIR or --config FILE")
    if args.config:
        data: Any = build(args.config, args.overrides)[1]
        if not isinstance(getattr(data, "sampler", None), FixedPairs):
            raise UserError(
                "the configuration draws fresh pairs every time, so a cache would not be used: set "
                "data.sampler to poodle_lightning.data.cached_flow.FixedPairs"
            )
        data.setup("fit")
        return data.source, [*data.train_entries, *data.val_entries], data.sampler
    try:
        gap = (args.gap[0], args.gap[-1])
        sampler = FixedPairs(gap=gap, fixed=args.pairs_per_video, seed=args.seed)
    except ValueError as error:
        raise UserError(f"--gap or --pairs-per-video: {error}") from error
    source = FolderSource(args.root)
    return source, source.entries, sampler


def _estimator(args: argparse.Namespace) -> PixelEstimator:
    if args.estimator == "dis":
        from poodle_lightning.flow.dis import DIS

        return DIS(args.preset)
    from poodle_lightning.flow.raft import RAFT

    raft = RAFT(args.size, args.weights, args.iterations)
    try:
        return raft.to(args.device)
    except (RuntimeError, AssertionError) as error:  # torch without CUDA asserts
        raise UserError(f"--device {args.device}: {str(error).splitlines()[0]}") from error


@dataclass
class _Count:
    """Pairs of a stretch, or of all."""

    stored: int = 0
    kept: int = 0
    bytes: int = 0
    left_out: Counter[str] = field(default_factory=Counter)

    def __iadd__(self, other: _Count) -> Self:
        self.stored += other.stored
        self.kept += other.kept
        self.bytes += other.bytes
        self.left_out += other.left_out
        return self


@dataclass(frozen=True)
class _Work:
    """What is done to each video."""

    source: Source
    sampler: FixedPairs
    estimator: PixelEstimator
    cache: FlowCache

    def video(self, stretches: Sequence[Entry], advance: Callable[[int], object]) -> _Count:
        """All stretches of one video, one after the other: they share files.

        Raises:
            UserError: the cache cannot be written.
        """
        total = _Count()
        for entry in stretches:
            total += self._stretch(entry, advance)
            if not self.cache.writable:
                raise UserError(
                    f"{self.cache.folder} cannot be written: make room or choose another --out; what is "
                    "there stays, and the same command goes on from it"
                )
        return total

    def _stretch(self, entry: Entry, advance: Callable[[int], object]) -> _Count:
        from poodle_lightning.data.cached_flow import video_of
        from poodle_lightning.data.sampling import TooShort

        count = _Count()
        video = video_of(entry.path)
        try:
            pairs = [(entry.start + a, entry.start + b) for a, b in self.sampler.pairs(entry.duration)]
        except TooShort:
            pairs = []
        if video is None or not pairs:
            count.left_out["not_a_file" if video is None else "too_short"] += self.sampler.fixed
            advance(self.sampler.fixed)
            return count
        lacking = self.cache.lacking(video, pairs)
        count.kept = len(pairs) - len(lacking)
        advance(count.kept)
        flows = self._flows(entry, lacking, count, advance)
        count.stored, count.bytes = self.cache.put_all(video, flows)
        return count

    def _flows(
        self, entry: Entry, pairs: Sequence[Moments], count: _Count, advance: Callable[[int], object]
    ) -> Iterator[tuple[float, float, np.ndarray]]:
        """Flow of the pairs that can be read; a damaged place ends one pair, not the video."""
        from poodle_lightning.data.info import DecodeError

        reader = None
        for first, second in pairs:
            try:
                reader = reader or self.source.open(entry)
                frames, _ = reader.read([first, second])
                yield first, second, self.estimator.pixels(frames[0], frames[1])
            except (DecodeError, OSError, UserError) as error:  # UserError: too small for the estimator
                count.left_out[
                    "too_small" if isinstance(error, UserError) else getattr(error, "reason", "unreadable")
                ] += 1
                if reader is not None:
                    reader.close()
                reader = None
            advance(1)
        if reader is not None:
            reader.close()


def _compute(work: _Work, entries: Sequence[Entry], threads: int) -> _Count:
    """All videos, several at a time, with a bar."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    videos: dict[str, list[Entry]] = {}
    for entry in entries:
        videos.setdefault(entry.path, []).append(entry)
    total = _Count()
    columns = (TextColumn("pairs"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar, ThreadPoolExecutor(threads) as pool:
        task = bar.add_task("flow", total=len(entries) * work.sampler.fixed)
        jobs = [
            pool.submit(work.video, stretches, lambda n: bar.advance(task, n))
            for stretches in videos.values()
        ]
        try:
            for job in as_completed(jobs):
                total += job.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return total


def _listed(reasons: Counter[str]) -> str:
    return ", ".join(f"{count} {reason}" for reason, count in reasons.most_common()) or "none"

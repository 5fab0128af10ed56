"""``poodle-lightning stats``: what videos are like to learn from: lightness, objects, classes, shots."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING

from poodle_lightning.types import Skip, UserError

if TYPE_CHECKING:
    from poodle_lightning.analysis.object_lists import ObjectCounts
    from poodle_lightning.analysis.video_stats import VideoStats
    from poodle_lightning.commands import Build

NAME = "stats"
HELP = "lightness over time, objects per frame, class frequencies and shots of videos, as table and figure"
_SHOWN = 20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Videos, lists of objects, and where the result goes."""
    parser.add_argument("paths", nargs="+", metavar="PATH", help="video files, or folders of them")
    parser.add_argument(
        "--output", default="stats", metavar="DIR", help="folder of the results (default: %(default)s)"
    )
    parser.add_argument(
        "--objects",
        action="append",
        default=[],
        metavar="FILE",
        help="objects that a detector found: CSV or JSON lines of time, class, perhaps video; repeatable",
    )
    parser.add_argument(
        "--step",
        type=float,
        default=1.0,
        help="seconds between looks at the lightness (default: %(default)g)",
    )
    parser.add_argument(
        "--no-shots", action="store_true", help="do not look for cuts, which decodes every frame"
    )
    parser.add_argument(
        "--workers", type=int, default=0, help="processes that share the work (default: %(default)s)"
    )


def run(args: argparse.Namespace, build: Build) -> int:
    """Writes ``stats.json``, ``stats.md``, ``stats.png``; the exit code is 1 where something is unreadable.

    Raises:
        UserError: an argument is wrong, or there is nothing to show.
    """
    from poodle_lightning.analysis.object_lists import objects_of
    from poodle_lightning.analysis.video_stats import markdown
    from poodle_lightning.commands._videos import given_videos

    if not 0 < args.step < float("inf"):
        raise UserError(f"--step {args.step:g}: the seconds between two looks are above 0")
    if args.workers < 0:
        raise UserError("--workers is at least 0")
    output = Path(args.output)
    if output.exists() and not output.is_dir():
        raise UserError(f"--output {output} is a file: choose a folder")
    infos, refused = given_videos(args.paths, args.workers)
    paths = list(dict.fromkeys(video.path for video in infos))
    objects = objects_of(paths, args.objects)
    found: list[VideoStats] = []
    # several videos are shared out whole; one is cut up in the search for shots
    within = args.workers if len(paths) == 1 else 0
    work = partial(_look, objects=objects, step=args.step, find_shots=not args.no_shots, workers=within)
    for one in _each(work, paths, args.workers):
        if isinstance(one, Skip):
            refused.append(one)
        else:
            found.append(one)
            refused += one.faults
    _say(refused)
    if not found:
        raise UserError(f"none of the {len(refused)} videos can be read: see above")
    _write(output, found, args.step)
    print(markdown(found))
    print(output)
    return 1 if refused else 0


def _look(
    path: str, objects: dict[str, ObjectCounts], step: float, find_shots: bool, workers: int
) -> VideoStats | Skip:
    from poodle_lightning.analysis.video_stats import video_stats
    from poodle_lightning.data.info import DecodeError

    try:
        return video_stats(path, step, objects.get(path), find_shots, workers)
    except DecodeError as error:
        return Skip(path, error.reason, error.detail, error.time)


def _each(work: partial[VideoStats | Skip], paths: Sequence[str], workers: int) -> list[VideoStats | Skip]:
    """What becomes of the videos, in their order, with a bar."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("videos"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        if min(workers, len(paths)) <= 1:
            return list(bar.track(map(work, paths), total=len(paths)))
        # fresh interpreters: forking a process that holds threads of a decoder can hang
        with ProcessPoolExecutor(min(workers, len(paths)), get_context("spawn")) as pool:
            return list(bar.track(pool.map(work, paths), total=len(paths)))


def _say(refused: Sequence[Skip]) -> None:
    if refused:
        lines = [f"  {skip.path}: {skip.reason}: {skip.detail}" for skip in refused[:_SHOWN]]
        more = [f"  and {len(refused) - _SHOWN} more"] if len(refused) > _SHOWN else []
        print("\n".join(["not usable:", *lines, *more]), file=sys.stderr)


def _write(output: Path, found: Sequence[VideoStats], step: float) -> None:
    from poodle_lightning.analysis.video_stats import as_plain, markdown, names_of
    from poodle_lightning.draw.canvas import figure_png
    from poodle_lightning.draw.video_stats import stats_figure

    named = dict(zip(names_of([video.path for video in found]), found, strict=True))
    counted = {name: video.objects for name, video in named.items() if video.objects is not None}
    drawn = stats_figure(
        {name: (video.times, video.lightness) for name, video in named.items()},
        {name: (one.times, one.classes) for name, one in counted.items()},
        {name: tuple(one.frames_with.values()) for name, one in counted.items() if one.frames_with},
        {name: len(video.shots) for name, video in named.items() if video.shots is not None},
    )
    try:
        output.mkdir(parents=True, exist_ok=True)
        text = json.dumps(as_plain(found, step), indent=1, allow_nan=False)
        (output / "stats.json").write_text(text + "\n", encoding="utf-8")
        (output / "stats.md").write_text(markdown(found), encoding="utf-8")
        (output / "stats.png").write_bytes(figure_png(drawn))
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"--output {output} cannot be written ({reason}): choose another folder") from error

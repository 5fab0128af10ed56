"""``poodle-lightning inspect``: what is in video files, which cannot be used, and what reading them costs."""

from __future__ import annotations

import argparse
import os
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from typing import TYPE_CHECKING

from poodle_lightning.types import Skip, UserError

if TYPE_CHECKING:
    from poodle_lightning.commands import Build
    from poodle_lightning.data.cost import Cost
    from poodle_lightning.data.info import VideoInfo

NAME = "inspect"
HELP = "duration, size, rate and key frames of videos, and cores that reading takes; what cannot be read"
# More files are not opened just for the column of their coding.
_OPENED = 500
# What is suggested, and the gain in decoded frames from which it is.
_SHORT_GOP, _WORTHWHILE = 12, 1.5


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Files or folders."""
    parser.add_argument("paths", nargs="+", metavar="PATH", help="video files, or folders of them")
    parser.add_argument(
        "--workers", type=int, default=0, help="processes that measure (default: %(default)s)"
    )
    parser.add_argument(
        "--measure",
        type=int,
        default=3,
        metavar="N",
        help="videos on which the price of a pair is measured (default: %(default)s; 0: none)",
    )
    parser.add_argument(
        "--pairs-per-s",
        type=float,
        default=20.0,
        metavar="N",
        help="that one GPU trains on, for the number of cores (default: %(default)g)",
    )


def run(args: argparse.Namespace, build: Build) -> int:
    """Prints a table; the exit code is 1 where a file cannot be read.

    Raises:
        UserError: a path does not exist, or a folder has no video.
    """
    if args.measure < 0 or not args.pairs_per_s > 0:
        raise UserError("--measure is at least 0, --pairs-per-s is above 0")
    from poodle_lightning.commands._videos import given_videos

    videos, refused = given_videos(args.paths, args.workers)
    print(table(videos))
    if refused:
        print("\nnot usable:")
        for skip in refused:
            print(f"  {skip.path}: {skip.reason}: {skip.detail}")
    hours = sum(video.duration for video in videos) / 3600
    counts = ", ".join(
        f"{count} {reason}" for reason, count in Counter(s.reason for s in refused).most_common()
    )
    noun = "video" if len(videos) == 1 else "videos"
    print(f"\n{len(videos)} {noun}, {hours:.2f} h" + (f"; not usable: {counts}" if counts else ""))
    if args.measure and videos:
        price, faults = _price(videos, args.measure, args.pairs_per_s)
        print("\n" + price)
        refused += faults
    return 1 if refused else 0


def table(videos: list[VideoInfo]) -> str:
    """One row per video.

    Duration, size as shown, mean rate, seconds and frames between key frames, rotation, size on disk, coding,
    path.
    """
    rows = [("seconds", "size", "fps", "key every", "GOP", "turned", "MB", "coding", "path")]
    for video in videos:
        size = f"{video.width}x{video.height}"
        key, turned = f"{video.keyframe_interval:.2f} s", f"{video.rotation}°" if video.rotation else "-"
        coded = _coding(video.path) if len(videos) <= _OPENED else "-"
        gop, disk = f"{video.gop:.0f}", _megabytes(video.path)
        seconds, fps = f"{video.duration:.2f}", f"{video.fps:.2f}"
        rows.append((seconds, size, fps, key, gop, turned, disk, coded, video.path))
    return "\n".join(_aligned(rows))


def _coding(path: str) -> str:
    from poodle_lightning.data.encode import coding

    with suppress(OSError, ValueError):
        found = coding(path)
        return f"{found.codec} {found.pix_fmt}".strip()
    return "-"


def _megabytes(path: str) -> str:
    with suppress(OSError):
        return f"{os.path.getsize(path) / 1e6:.2f}"
    return "-"


def _price(videos: Sequence[VideoInfo], most: int, pairs_per_s: float) -> tuple[str, list[Skip]]:
    """What a pair costs, how many cores one GPU needs, and whether re-encoding would help.

    Also the videos that turn out to be damaged: the table is made from timestamps and first frames alone.
    """
    from poodle_lightning.data.cost import TOO_SHORT, measure_each, spread

    found = measure_each([videos[place].path for place in spread(len(videos), most)])
    costs = [one for one in found if not isinstance(one, Skip)]
    faults = [one for one in found if isinstance(one, Skip) and one.reason != TOO_SHORT]
    lines = [f"{skip.path}: {skip.reason}: {skip.detail}" for skip in faults]
    if costs:
        lines += _prices(costs, pairs_per_s)
    elif faults:
        lines.append("the price of a pair was not measured: none of the videos that were tried can be read")
    else:
        lines.append(
            "the price of a pair was not measured: frames 1 s apart are needed, and none of the videos that "
            "were tried is that long"
        )
    return "\n".join(lines), faults


def _prices(costs: Sequence[Cost], pairs_per_s: float) -> list[str]:
    from poodle_lightning.data.cost import cores_for, frames_per_pair, together

    rate = together(costs)
    cores = cores_for(pairs_per_s, rate)
    noun = "video" if len(costs) == 1 else "videos"
    lines = [
        f"a pair of frames 0.5 to 1 s apart, the crop of it, one thread (measured on {len(costs)} {noun}):",
        *_rows(costs),
        f"one GPU that trains on {pairs_per_s:g} pairs/s needs pairs/s ÷ pairs per CPU-second ="
        f" {pairs_per_s:g} ÷ {rate:.1f} = {cores:.1f} cores for reading (for another speed: --pairs-per-s)",
    ]
    now = sum(cost.frames_per_pair for cost in costs) / len(costs)
    short = [min(_SHORT_GOP, max(1.0, cost.info.gop)) for cost in costs]
    then = sum(frames_per_pair(g, c.info.fps) for g, c in zip(short, costs, strict=True)) / len(costs)
    if now > _WORTHWHILE * then:
        lines.append(
            f"key frames are far apart: with one every {_SHORT_GOP} frames a pair would take {then:.0f}"
            f" decoded frames in place of {now:.0f}; `poodle-lightning prepare` re-encodes a folder so"
        )
    return lines


def _rows(costs: Sequence[Cost]) -> list[str]:
    rows = [("frames/CPU-s", "frames/pair", "pairs/CPU-s", "expected", "path")]
    for cost in costs:
        frames = f"{cost.frames_per_cpu_s:.0f}", f"{cost.frames_per_pair:.1f}"
        pairs = f"{cost.pairs_per_cpu_s:.1f}", f"{cost.expected_pairs_per_cpu_s:.1f}"
        rows.append((*frames, *pairs, cost.info.path))
    return _aligned(rows)


def _aligned(rows: Sequence[tuple[str, ...]]) -> list[str]:
    """Columns aligned to the right; the last one, a path, to the left."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(cell.rjust(width) for cell, width in zip(row[:-1], widths, strict=False)) + f"  {row[-1]}"
        for row in rows
    ]

"""``poodle-lightning inspect``: what is in video files, and which of them cannot be used."""

from __future__ import annotations

import argparse
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

from poodle_lightning.types import Skip, UserError

if TYPE_CHECKING:
    from poodle_lightning.commands import Build
    from poodle_lightning.data.info import VideoInfo

NAME = "inspect"
HELP = "duration, size, rate and key frames of video files; which cannot be read, and why"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Files or folders."""
    parser.add_argument("paths", nargs="+", metavar="PATH", help="video files, or folders of them")
    parser.add_argument(
        "--workers", type=int, default=0, help="processes that measure (default: %(default)s)"
    )


def run(args: argparse.Namespace, build: Build) -> int:
    """Prints a table; the exit code is 1 where a file cannot be read.

    Raises:
        UserError: a path does not exist, or a folder has no video.
    """
    videos: list[VideoInfo] = []
    refused: list[Skip] = []
    for path in map(Path, args.paths):
        good, bad = _measure(path, args.workers)
        videos += good
        refused += bad
    print(table(videos))
    if refused:
        print("\nnot usable:")
        for skip in refused:
            print(f"  {skip.path}: {skip.reason}: {skip.detail}")
    hours = sum(video.duration for video in videos) / 3600
    counts = ", ".join(
        f"{count} {reason}" for reason, count in Counter(s.reason for s in refused).most_common()
    )
    print(f"\n{len(videos)} videos, {hours:.2f} h" + (f"; not usable: {counts}" if counts else ""))
    return 1 if refused else 0


def table(videos: list[VideoInfo]) -> str:
    """One row per video: duration, size as shown, mean rate, seconds between key frames, rotation, path."""
    rows = [("seconds", "size", "fps", "key every", "turned", "path")]
    for video in videos:
        size = f"{video.width}x{video.height}"
        key, turned = f"{video.keyframe_interval:.2f} s", f"{video.rotation}°" if video.rotation else "-"
        rows.append((f"{video.duration:.2f}", size, f"{video.fps:.2f}", key, turned, video.path))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.rjust(width) for cell, width in zip(row[:-1], widths, strict=False)) + f"  {row[-1]}"
        for row in rows
    )


def _measure(path: Path, workers: int) -> tuple[list[VideoInfo], list[Skip]]:
    from poodle_lightning.data.decode import probe
    from poodle_lightning.data.index import build_index
    from poodle_lightning.data.info import DecodeError

    if path.is_dir():
        try:
            index = build_index(path, workers=workers)
        except UserError as error:
            raise UserError(str(error).replace("--data.root", "the path")) from error
        return list(index.videos), list(index.refused)
    if not path.exists() and not path.is_symlink():
        raise UserError(f"{path}: no such file or folder")
    try:
        return [probe(path)], []
    except DecodeError as error:
        return [], [Skip(str(path), error.reason, error.detail, error.time)]

"""Videos that are named on the command line, as files or as folders of them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from poodle_lightning.types import Skip, UserError

if TYPE_CHECKING:
    from poodle_lightning.data.info import VideoInfo


def given_videos(paths: Sequence[str | Path], workers: int = 0) -> tuple[list[VideoInfo], list[Skip]]:
    """Measurements of all videos below the paths, and those that cannot be read.

    Args:
        paths: files and folders.
        workers: processes that measure a folder; 0 is this one.

    Raises:
        UserError: a path does not exist, or a folder has no video.
    """
    videos: list[VideoInfo] = []
    refused: list[Skip] = []
    for path in map(Path, paths):
        good, bad = _look(path, workers)
        videos += good
        refused += bad
    return videos, refused


def _look(path: Path, workers: int) -> tuple[list[VideoInfo], list[Skip]]:
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

"""A folder of videos, measured once.

Every non-hidden file below a folder whose name ends like a video's is opened and measured
(:func:`poodle_lightning.data.decode.probe`). The results are kept in a file of the user's cache, one per
folder; a later run measures only what is new or changed in size or modification time. Files that cannot be
read are part of the index too, each with its reason: nothing is dropped silently.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from functools import partial
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from poodle_lightning.data.decode import MAX_PIXELS, probe
from poodle_lightning.data.info import DecodeError, VideoInfo
from poodle_lightning.types import Skip, UserError

__all__ = [
    "VIDEO_EXTENSIONS",
    "Index",
    "VideoInfo",
    "build_index",
    "cache_folder",
    "find_files",
    "index_file",
    "save_whole",
]

VIDEO_EXTENSIONS = frozenset(
    {".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".ts", ".mts", ".m2ts", ".mpg", ".mpeg"}
    | {".flv", ".ogv", ".wmv", ".asf", ".3gp", ".mxf", ".gif"}
)
# Older caches are not believed: the number is raised when a measurement changes its meaning, and another
# release of the decoder may read what this one refuses.
_FORMAT = f"1 av {version('av')}"
# These can end without a change of the file's size and time, so they are looked at anew each time.
_PASSING = {"missing", "not_a_file", "unreadable", "timeout"}

# What the cache holds for a file: its size and modification time, and either outcome.
_Entry = dict[str, Any]


@dataclass(frozen=True)
class Index:
    """The videos of a folder.

    Args:
        root: the folder.
        videos: those that can be read, sorted by path.
        refused: those that cannot, with reasons, sorted by path.
    """

    root: str
    videos: tuple[VideoInfo, ...]
    refused: tuple[Skip, ...]


def cache_folder() -> Path:
    """Where measurements are kept: ``$POODLE_CACHE``, else ``~/.cache/poodle_lightning``."""
    chosen = os.environ.get("POODLE_CACHE")
    return Path(chosen) if chosen else Path.home() / ".cache" / "poodle_lightning"


def build_index(
    root: str | Path,
    *,
    cache: bool = True,
    workers: int = 0,
    max_pixels: int = MAX_PIXELS,
    extensions: Collection[str] = VIDEO_EXTENSIONS,
) -> Index:
    """Measure every video below a folder, or recall the measurement.

    Args:
        root: a folder; searched with its sub-folders, links followed, names starting with a dot left out.
        cache: keep and use measurements of earlier runs. A cache that cannot be read or written is no error.
        workers: processes that measure; 0 is this one.
        max_pixels: larger videos are refused.
        extensions: endings of file names that are tried, lower case with the dot.

    Returns:
        The index; never without a readable video.

    Raises:
        UserError: the folder is missing, no folder, holds no file of these endings, or none that can be read.
    """
    folder = _check_root(root)
    paths = sorted(find_files(folder, frozenset(e.lower() for e in extensions)))
    if not paths:
        endings = " ".join(sorted(extensions))
        raise UserError(
            f"no video found in {str(folder)!r}: put files there that end in one of {endings}, "
            "or set --data.root to another folder"
        )
    return _index(folder, paths, cache, workers, max_pixels)


def index_file(path: str | Path, *, cache: bool = True, max_pixels: int = MAX_PIXELS) -> Index:
    """Measure one video file, or recall the measurement, as :func:`build_index` does for a folder.

    Raises:
        UserError: the file is missing, a folder, or cannot be read.
    """
    file = Path(os.path.abspath(Path(path).expanduser()))
    if file.is_dir():
        raise UserError(f"{str(file)!r} is a folder, not a film; set --data.root to the file")
    if not file.exists():
        raise UserError(f"{str(file)!r}: no such film; set --data.root to the file")
    return _index(file, [str(file)], cache, 0, max_pixels)


def _index(root: Path, paths: Sequence[str], cache: bool, workers: int, max_pixels: int) -> Index:
    store = _cache_file(root, max_pixels)
    known = _load(store) if cache else {}
    stamps = {path: _stamp(path) for path in paths}
    changed = [path for path in paths if path not in known or known[path]["stamp"] != stamps[path]]
    outcomes = _measure_all(changed, max_pixels, workers)
    entries = {path: known[path] for path in paths if path in known} | {
        path: {"stamp": stamps[path], **outcome} for path, outcome in zip(changed, outcomes, strict=True)
    }
    if cache and (changed or len(known) != len(entries)):
        _save(store, {path: entry for path, entry in entries.items() if _is_lasting(entry)})
    videos = tuple(VideoInfo(**entries[path]["video"]) for path in paths if "video" in entries[path])
    refused = tuple(Skip(**entries[path]["refused"]) for path in paths if "refused" in entries[path])
    if not videos:
        reasons = ", ".join(
            f"{count} {reason}" for reason, count in Counter(s.reason for s in refused).most_common()
        )
        first = refused[0]
        raise UserError(
            f"none of the {len(refused)} files in {str(root)!r} is a readable video ({reasons}); "
            f"the first is {first.path!r}: {first.detail}"
        )
    return Index(str(root), videos, refused)


def _check_root(root: str | Path) -> Path:
    folder = Path(root).expanduser()
    if not folder.exists():
        raise UserError(
            f"the video folder {str(folder)!r} does not exist; set --data.root to a folder of videos"
        )
    if not folder.is_dir():
        raise UserError(
            f"{str(folder)!r} is a file, not a folder; set --data.root to the folder that holds it"
        )
    return Path(os.path.abspath(folder))


def find_files(folder: Path, extensions: frozenset[str]) -> Iterator[str]:
    """Paths below a folder that end like this, whatever they turn out to be: folders and dead links too.

    Args:
        folder: searched with its sub-folders, links followed, names starting with a dot left out.
        extensions: lower case, with the dot.
    """
    seen: set[str] = set()
    for parent, folders, files in os.walk(folder, followlinks=True):
        here = os.path.realpath(parent)
        if here in seen:  # a link that leads back up
            folders.clear()
            continue
        seen.add(here)
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in [*files, *folders]:
            if not name.startswith(".") and os.path.splitext(name)[1].lower() in extensions:
                yield os.path.join(parent, name)


def _stamp(path: str) -> list[int]:
    """Size and modification time, or nothing for what cannot be looked at."""
    try:
        found = os.stat(path)
    except OSError:
        return []
    return [found.st_size, found.st_mtime_ns]


def _measure_all(paths: Sequence[str], max_pixels: int, workers: int) -> list[_Entry]:
    task = partial(_measure, max_pixels=max_pixels)
    if workers < 1 or len(paths) < 2:
        return [task(path) for path in paths]
    # A fresh interpreter per worker: forking a process that holds decoder or torch threads can hang.
    with ProcessPoolExecutor(min(workers, len(paths)), mp_context=get_context("spawn")) as pool:
        return list(pool.map(task, paths, chunksize=max(1, min(16, len(paths) // workers))))


def _measure(path: str, max_pixels: int) -> _Entry:
    try:
        return {"video": asdict(probe(path, max_pixels=max_pixels))}
    except DecodeError as error:
        return {"refused": asdict(Skip(path, error.reason, error.detail, error.time))}
    except OSError as error:  # it vanished or its disk failed while it was read
        return {"refused": asdict(Skip(path, "unreadable", error.strerror or type(error).__name__))}


def _cache_file(folder: Path, max_pixels: int) -> Path:
    name = hashlib.blake2b(os.fsencode(folder) + f"\0{max_pixels}".encode(), digest_size=16).hexdigest()
    return cache_folder() / "index" / f"{name}.json"


def _load(store: Path) -> dict[str, _Entry]:
    """The entries of a cache file; none if it is missing, torn or of another format."""
    try:
        content = json.loads(store.read_text(encoding="utf-8"))
        if content["format"] != _FORMAT:
            return {}
        return {path: entry for path, entry in content["entries"].items() if _is_whole(entry)}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def _is_whole(entry: _Entry) -> bool:
    if not isinstance(entry, dict) or "stamp" not in entry:
        return False
    for key, kind in (("video", VideoInfo), ("refused", Skip)):
        if isinstance(entry.get(key), dict):
            return set(entry[key]) == {field.name for field in fields(kind)}
    return False


def _is_lasting(entry: _Entry) -> bool:
    return "video" in entry or entry["refused"]["reason"] not in _PASSING


def _save(store: Path, entries: dict[str, _Entry]) -> None:
    save_whole(store, {"format": _FORMAT, "entries": entries})


def save_whole(store: Path, content: Any) -> None:
    """Write a file of the cache whole or not at all; without it the next run merely measures again."""
    with suppress(OSError):
        store.parent.mkdir(parents=True, exist_ok=True)
        handle, part = tempfile.mkstemp(prefix=store.stem, suffix=".part", dir=store.parent)
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                # escaped to ASCII: names that are not valid text survive the round trip
                json.dump(content, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(part, store)
        except BaseException:
            Path(part).unlink(missing_ok=True)
            raise

"""Lists of curated videos (``poodle-lightning curate``), and the source that reads them.

A list is a file of JSON lines. The first one says what it is and how many follow:
``{"format": "poodle_lightning curated videos 1", "videos": 2, …}``; each other one is a video:

``{"id", "title", "path", "classes": [key, …], "video": {what was measured of it}}``

``path`` is relative to the list's folder for what lies below it, else absolute. As the measurements are in
the list, no video is opened to read it.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from poodle_lightning.data.index import Index
from poodle_lightning.data.info import DecodeError, VideoInfo, check_file
from poodle_lightning.data.sources import FolderSource
from poodle_lightning.types import Skip, UserError

FORMAT = "poodle_lightning curated videos 1"
_MEASURED = {field.name for field in fields(VideoInfo)} - {"path"}


@dataclass(frozen=True)
class Curated:
    """A video that was kept.

    Args:
        id: of the table it is from.
        title: its title there.
        video: what was measured of it; the path is absolute.
        classes: keys of the classes that its title names and a classifier saw.
    """

    id: str
    title: str
    video: VideoInfo
    classes: tuple[str, ...]


class VideoNetSource(FolderSource):
    """VideoNet (Parthasarathy et al. 2023, §3.3), or any other list that ``poodle-lightning curate`` wrote.

    Args:
        root: the list; videos may lie anywhere.

    Raises:
        UserError: there is no such list, it is damaged, or none of its videos is there.
    """

    def __init__(self, root: str | Path) -> None:
        kept = read_manifest(root)
        found, refused = [], []
        for one in kept:
            try:
                check_file(one.video.path)
                found.append(one.video)
            except DecodeError as error:
                refused.append(Skip(one.video.path, error.reason, error.detail))
        if not found:
            raise UserError(
                f"{root}: none of its {len(kept)} videos is there, e.g. {refused[0].path}: put them where "
                "the list says, relative to its folder, or run poodle-lightning curate again"
            )
        super().__init__(root, index=Index(str(root), tuple(found), tuple(refused)))


def write_manifest(path: str | Path, kept: Sequence[Curated], facts: Mapping[str, Any]) -> None:
    """Write a list whole, or not at all.

    Args:
        path: of the list.
        kept: in the order in which they are written.
        facts: plain data for its first line: how they were chosen.

    Raises:
        OSError: it cannot be written.
    """
    folder = Path(os.path.abspath(path)).parent
    first = {"format": FORMAT, "videos": len(kept), **facts}
    save_text(path, (json.dumps(line) + "\n" for line in (first, *(_line(one, folder) for one in kept))))


def save_text(path: str | Path, lines: Iterable[str]) -> None:
    """Write a text file whole, or not at all.

    Raises:
        OSError: it cannot be written.
    """
    target = Path(os.path.abspath(path))
    handle, part = tempfile.mkstemp(prefix=f".{target.name}", suffix=".part", dir=target.parent)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.writelines(lines)
            file.flush()
            os.fsync(file.fileno())
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(part, 0o666 & ~mask)  # as any other file; a temporary one is its owner's alone
        os.replace(part, target)
    except BaseException:
        Path(part).unlink(missing_ok=True)
        raise


def read_manifest(path: str | Path) -> list[Curated]:
    """The videos of a list.

    Raises:
        UserError: there is no such list, it is none, is damaged, or holds no video.
    """
    file = Path(path).expanduser()
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise UserError(
            f"{file}: cannot be read ({error.strerror or error}): set --data.root to a list that "
            "poodle-lightning curate wrote"
        ) from error
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: is no list of curated videos ({error.reason})") from error
    first = _json(lines[0]) if lines else None
    if not isinstance(first, dict) or first.get("format") != FORMAT:
        raise UserError(
            f"{file}: is no list of curated videos, or of another release: poodle-lightning curate writes one"
        )
    folder = Path(os.path.abspath(file)).parent
    found = []
    for number, line in enumerate(lines[1:], start=2):
        one = _curated(_json(line), folder)
        if one is None:
            raise UserError(f"{file}, line {number}: is damaged: run poodle-lightning curate again")
        found.append(one)
    if len(found) != first.get("videos"):
        raise UserError(
            f"{file}: is damaged, {len(found)} of {first.get('videos')} videos are in it: run "
            "poodle-lightning curate again"
        )
    if not found:
        raise UserError(f"{file}: holds no video")
    return found


def as_video(content: Any, path: str) -> VideoInfo | None:
    """A measurement as it was written; None if it is damaged."""
    if not isinstance(content, dict) or set(content) != _MEASURED:
        return None
    if not all(isinstance(value, (int, float)) for name, value in content.items() if name != "fingerprint"):
        return None
    return VideoInfo(path=path, **content)


def as_plain(video: VideoInfo) -> dict[str, Any]:
    """A measurement without its path, to be written."""
    return {name: value for name, value in asdict(video).items() if name != "path"}


def _line(one: Curated, folder: Path) -> dict[str, Any]:
    path = Path(one.video.path)
    inside = path.is_relative_to(folder)
    name = path.relative_to(folder).as_posix() if inside else str(path)
    named = {"id": one.id, "title": one.title, "path": name, "classes": list(one.classes)}
    return {**named, "video": as_plain(one.video)}


def _json(line: str) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError:
        return None


def _curated(content: Any, folder: Path) -> Curated | None:
    if not isinstance(content, dict):
        return None
    name, identity, title = (content.get(key) for key in ("path", "id", "title"))
    classes = content.get("classes")
    if not (isinstance(name, str) and isinstance(identity, str) and isinstance(title, str)):
        return None
    if not isinstance(classes, list) or not all(isinstance(key, str) for key in classes):
        return None
    video = as_video(content.get("video"), os.path.normpath(folder / name))
    return None if video is None else Curated(identity, title, video, tuple(classes))

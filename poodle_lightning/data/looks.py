"""What a classifier saw in videos, written down one by one, so that no video is looked at twice.

A folder of JSON lines, one file per share of the work and setting: ``<setting>-all.jsonl`` or
``<setting>-2-of-4.jsonl``. The setting is the classifier's fingerprint and the number of frames; what another
one saw stays there and does not count. All files of a setting are read, so shares may be divided anew.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from poodle_lightning.data.info import VideoInfo
from poodle_lightning.data.shares import Share
from poodle_lightning.data.videonet import as_plain, as_video
from poodle_lightning.types import Skip

# These can end without a change of the file, so the share that a video belongs to tries them again.
_PASSING = {"missing", "not_a_file", "unreadable", "timeout"}
Stamp = tuple[int, int]
"""Bytes of a file and the time of its last change, ns."""


@dataclass(frozen=True)
class Look:
    """What a classifier saw in a video.

    Args:
        path: of the video, absolute.
        stamp: of the file that was looked at; None if there was none.
        seen: output → frames on which it came first; None if it was only measured, being too short.
        video: what was measured of it.
        skip: why it could not be read, in place of the two.
    """

    path: str
    stamp: Stamp | None
    seen: Mapping[int, int] | None
    video: VideoInfo | None = None
    skip: Skip | None = None


def stamp_of(path: str) -> Stamp | None:
    """The stamp of a file; None if it cannot be looked at."""
    try:
        found = os.stat(path)
    except (OSError, ValueError):  # a name that no file can have is a ValueError
        return None
    return found.st_size, found.st_mtime_ns


class Looks:
    """What was seen so far.

    Args:
        folder: where it is kept; made at the first line.
        classifier: fingerprint of who looks.
        frames: how many it looks at.

    Raises:
        OSError: a file that is there cannot be read.
    """

    def __init__(self, folder: str | Path, classifier: str, frames: int) -> None:
        self.folder = Path(folder)
        self._setting = f"{classifier[:16]}-{frames}"
        # by path and stamp: a share may have seen another state of the file than the one that is there now
        self._found: dict[tuple[str, Stamp | None], Look] = {}
        self._failed: dict[tuple[str, Stamp | None], Look] = {}  # what may pass
        self.read()

    def read(self) -> None:
        """Take in what was written since, by other shares too.

        Raises:
            OSError: a file cannot be read.
        """
        for file in sorted(self.folder.glob(f"{self._setting}-*.jsonl")):
            with file.open(encoding="utf-8", errors="replace") as stream:
                for line in stream:
                    look = _parsed(line)
                    if look is not None:  # a torn line is a video to look at again
                        self._keep(look)

    def _keep(self, look: Look) -> None:
        passing = look.skip is not None and look.skip.reason in _PASSING
        (self._failed if passing else self._found)[look.path, look.stamp] = look

    def get(self, path: str, failed: bool = False) -> Look | None:
        """What was seen in a video; None where it is new or has changed since.

        That a file is missing is told without a look.

        Args:
            path: of the video.
            failed: faults that may pass count too, of all shares: nothing will be tried again in this run.
        """
        stamp = stamp_of(path)
        if stamp is None:
            return Look(path, None, None, skip=Skip(path, "missing", "no such file"))
        for kept in (self._found, self._failed) if failed else (self._found,):
            look = kept.get((path, stamp))
            if look is not None:
                return look
        return None

    def add(self, look: Look, share: Share) -> None:
        """Write down what was seen, by one write; a missing file is not: that is told without a look.

        Raises:
            OSError: the disk refuses.
        """
        self._keep(look)
        if look.stamp is None:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        whose = "all" if share.count == 1 else f"{share.number}-of-{share.count}"
        file = self.folder / f"{self._setting}-{whose}.jsonl"
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            size = os.fstat(descriptor).st_size
            # a killed run may have torn its last line
            torn = size > 0 and os.pread(descriptor, 1, size - 1) != b"\n"
            os.write(descriptor, (b"\n" if torn else b"") + _line(look))
        finally:
            os.close(descriptor)


def _line(look: Look) -> bytes:
    line: dict[str, Any] = {"path": look.path, "stamp": look.stamp}
    if look.skip is not None:
        line |= {"reason": look.skip.reason, "detail": look.skip.detail}
    if look.video is not None:
        line["seen"] = None if look.seen is None else {str(k): frames for k, frames in look.seen.items()}
        line["video"] = as_plain(look.video)
    return (json.dumps(line) + "\n").encode()


def _parsed(line: str) -> Look | None:
    try:
        content = json.loads(line)
        path, (size, changed) = content["path"], content["stamp"]
        if "reason" in content:
            return Look(path, (size, changed), None, skip=Skip(path, content["reason"], content["detail"]))
        seen = content["seen"]
        if seen is not None:
            seen = {int(output): int(frames) for output, frames in seen.items()}
    except (KeyError, TypeError, ValueError, AttributeError):
        return None
    video = as_video(content.get("video"), path)
    return None if video is None else Look(path, (size, changed), seen, video)

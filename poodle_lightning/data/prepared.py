"""The record of a folder of prepared videos: by which settings each was made, of what, and what it gained.

``prepared.jsonl`` lies in that folder, with one line per video. Whatever still agrees with its line is not
made again.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import chain, count
from pathlib import Path, PurePosixPath
from typing import Any

from poodle_lightning.data.info import fingerprint

FILE_NAME = "prepared.jsonl"
# Raised when the same settings would give another file.
_FORMAT = 1


@dataclass(frozen=True)
class Settings:
    """How videos are re-encoded.

    Args:
        height: of the frames as they are shown, px, even; None leaves it.
        short_side: or the length of the shorter side, px, even.
        gop: frames from key frame to key frame.
        crf: quality, lower is better.
        codec: FFmpeg's name of an encoder that can be put into MP4.
        preset: speed of libx264 and libx265.
        every: keep one frame of so many.

    Raises:
        ValueError: a number is out of range, or both sides are given.
    """

    height: int | None = None
    short_side: int | None = None
    gop: int = 12
    crf: int = 20
    codec: str = "libx264"
    preset: str = "veryfast"
    every: int = 1

    def __post_init__(self) -> None:
        if self.height is not None and self.short_side is not None:
            raise ValueError("height and short side are two ways to give a size: use one of them")
        for side in (self.height, self.short_side):
            if side is not None and (side < 2 or side % 2):
                raise ValueError(f"a side of {side} px: give an even number, at least 2")
        if min(self.gop, self.every) < 1 or not 0 <= self.crf <= 63:
            raise ValueError(
                f"gop {self.gop} and every {self.every} are at least 1, crf {self.crf} is between 0 and 63"
            )

    @property
    def stated(self) -> dict[str, Any]:
        """As plain data, with the number of the format."""
        return {"format": _FORMAT, **asdict(self)}

    def size(self, width: int, height: int) -> tuple[int, int]:
        """Width and height of the new frames, px: even, and never larger than the old ones."""
        scale = 1.0
        if self.height is not None:
            scale = min(1.0, self.height / height)
        elif self.short_side is not None:
            scale = min(1.0, self.short_side / min(width, height))
        return _even(width, scale), _even(height, scale)


@dataclass(frozen=True)
class Made:
    """One prepared video: a line of ``prepared.jsonl``.

    Args:
        source: path of the source below its folder, with ``/``.
        made: path of the new video below the folder of prepared videos.
        settings: those that made it, and the number of this format.
        source_hash: ``fingerprint`` of the source.
        made_hash: ``fingerprint`` of the new video.
        frames: number of its frames.
        seconds: of the source.
        bytes: before and after.
        gop: mean number of frames from key frame to key frame, before and after.
        psnr: the lowest of the compared frames, dB.
    """

    source: str
    made: str
    settings: dict[str, Any]
    source_hash: str
    made_hash: str
    frames: int
    seconds: float
    bytes: tuple[int, int]
    gop: tuple[float, float]
    psnr: float

    def stands(self, folder: str | Path, source_hash: str, settings: Settings) -> bool:
        """Whether the file is there, intact, and what this source and these settings would give."""
        if self.source_hash != source_hash or self.settings != settings.stated:
            return False
        try:
            return fingerprint(os.path.join(folder, self.made)) == self.made_hash
        except OSError:
            return False


def names(sources: Sequence[str], known: Mapping[str, Made]) -> dict[str, str]:
    """Where each source's new video lies: the same path ending in ``.mp4``.

    Sources that differ only in their ending, or in upper and lower case, get names of their own; names once
    given stay.

    Args:
        sources: paths below the source folder, with ``/``.
        known: what was made before, by source.
    """
    found = {source: known[source].made for source in sources if source in known}
    taken = {made.casefold() for made in found.values()}
    fresh = [source for source in sources if source not in known]
    for source in sorted(fresh, key=lambda name: (PurePosixPath(name).suffix != ".mp4", name)):
        path = PurePosixPath(source)
        tries = chain(
            (path.with_suffix(".mp4"), path.with_name(f"{path.name}.mp4")),
            (path.with_name(f"{path.name}.{number}.mp4") for number in count(2)),
        )
        found[source] = next(str(name) for name in tries if str(name).casefold() not in taken)
        taken.add(found[source].casefold())
    return found


def load(folder: str | Path) -> dict[str, Made]:
    """What was made before, by source; torn lines are passed over, of several the last one counts."""
    try:
        lines = (Path(folder) / FILE_NAME).read_text(encoding="utf-8").splitlines()
    except OSError:
        return {}
    found = {}
    for line in lines:
        try:
            made = Made(**json.loads(line))
            (old, new), (before, after) = made.bytes, made.gop  # JSON has no tuples
            found[made.source] = replace(made, bytes=(old, new), gop=(before, after))
        except (ValueError, TypeError):
            continue
    return found


def note(folder: str | Path, made: Made) -> None:
    """Add a line to ``prepared.jsonl`` with one write.

    Raises:
        OSError: it cannot be written.
    """
    with open(Path(folder) / FILE_NAME, "ab", buffering=0) as file:
        # a line that a killed run tore must not swallow this one
        file.write(b"\n" * (file.tell() > 0) + json.dumps(asdict(made)).encode())


def _even(side: int, scale: float) -> int:
    return max(2, min(2 * round(side * scale / 2), side - side % 2))

"""The record of a folder of prepared videos: by which settings each was made, of what, and what it gained.

``prepared.jsonl`` lies in that folder, with one line per video. Whatever still agrees with its line is not
made again.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from itertools import chain, count
from pathlib import Path, PurePosixPath
from typing import IO, Any

from poodle_lightning.data.encode import HAS_PRESET, PRESETS, leftovers
from poodle_lightning.data.info import fingerprint

FILE_NAME = "prepared.jsonl"
# Raised when the same settings would give another file.
_FORMAT = 1
# The coarsest quality of an encoder; of others 63.
_CRF = {"libx264": 51, "libx265": 51}


class WrongSetting(ValueError):
    """A setting that cannot be used.

    Args:
        name: of the field of :class:`Settings`.
        value: that was given.
        advice: what is wrong and what to choose.
    """

    def __init__(self, name: str, value: object, advice: str) -> None:
        super().__init__(f"{name} {value}: {advice}")
        self.name, self.value, self.advice = name, value, advice


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
        WrongSetting: a number is out of range, or the preset is none.
        ValueError: both sides are given.
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
        for name, side in (("height", self.height), ("short_side", self.short_side)):
            if side is not None and (side < 2 or side % 2):
                raise WrongSetting(name, side, "give an even number of pixels, at least 2")
        for name, number in (("gop", self.gop), ("every", self.every)):
            if number < 1:
                raise WrongSetting(name, number, "give a number of frames, at least 1")
        worst = _CRF.get(self.codec, 63)
        if not 0 <= self.crf <= worst:
            raise WrongSetting("crf", self.crf, f"give a number from 0 to {worst} for {self.codec}")
        if self.codec in HAS_PRESET and self.preset not in PRESETS:
            raise WrongSetting(
                "preset", self.preset, f"{self.codec} has none such; choose {', '.join(PRESETS)}"
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


@contextmanager
def working_in(folder: str | Path, made: Iterable[str]) -> Iterator[None]:
    """While videos are made in a folder: first remove what killed runs have left half written.

    A lock on ``prepared.jsonl``, which the system takes back from a killed process, tells whether others work
    there too: then nothing is removed, and nothing either where a file system knows no locks.

    Args:
        folder: of the prepared videos.
        made: paths below it that are or will be there; only unfinished files of these names are removed.

    Raises:
        OSError: the folder cannot be written.
    """
    with open(Path(folder) / FILE_NAME, "ab") as file:
        if _locked(file, alone=True):
            for part in leftovers(Path(folder) / name for name in made):
                part.unlink(missing_ok=True)
        _locked(file, alone=False)
        yield


def _locked(file: IO[bytes], alone: bool) -> bool:
    """Lock a file, alone if nobody else has it, or together with others."""
    try:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB if alone else fcntl.LOCK_SH)
    except (ImportError, OSError):
        return False
    return True


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

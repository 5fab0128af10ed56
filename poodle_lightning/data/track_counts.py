"""What a run over videos has tracked and what it had to leave out, counted and written down.

``skipped.jsonl`` in the folder of the tracks has one line per failure, ``{"video", "reason", "detail"}``. A
run that goes on tries again what failed, so a video may stand there several times.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

from poodle_lightning.types import UserError

SKIPPED = "skipped.jsonl"


@dataclass
class Count:
    """What was done to some stretches of video.

    Args:
        videos: stretches that were tracked.
        kept: stretches whose tracks were there.
        tracks: points that were followed.
        places: points times the frames on which they were followed.
        seconds: of video that were tracked.
        bytes: that were written.
        skipped: stretches that could not be tracked, by reason.
    """

    videos: int = 0
    kept: int = 0
    tracks: int = 0
    places: int = 0
    seconds: float = 0.0
    bytes: int = 0
    skipped: Counter[str] = field(default_factory=Counter)

    def __iadd__(self, other: Count) -> Self:
        for name in ("videos", "kept", "tracks", "places", "seconds", "bytes"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.skipped += other.skipped
        return self

    def told(self, took: float) -> str:
        """One line: what was done in ``took`` seconds, how fast, and how large an hour of video is."""
        said = f"{self.videos} videos tracked in {took:.1f} s, {self.kept} were there"
        if self.videos:
            took, hours = max(took, 1e-9), max(self.seconds / 3600, 1e-9)
            said += (
                f"; {self.tracks} tracks, {self.places / took:.0f} points*frames/s, {self.seconds / took:.2f}"
                f" s of video/s, {self.bytes / hours / 1e6:.1f} MB per hour of video"
            )
        return said

    def check(self) -> None:
        """Refuse a result of which most is missing.

        Raises:
            UserError: more than half of the stretches could not be tracked.
        """
        failed = self.skipped.total()
        if 2 * failed > failed + self.videos + self.kept:
            raise UserError(
                f"{failed} of {failed + self.videos + self.kept} videos could not be tracked "
                f"({listed(self.skipped)}): check the videos; {SKIPPED} beside the tracks lists them"
            )


def listed(reasons: Counter[str]) -> str:
    """Reasons and how often, the most frequent first."""
    return ", ".join(f"{count} {reason}" for reason, count in reasons.most_common())


def note_skip(folder: Path, video: str, reason: str, detail: str) -> None:
    """Write down a video that could not be tracked, in one write: processes never mix their lines.

    Raises:
        UserError: the folder cannot be written.
    """
    line = json.dumps({"video": video, "reason": reason, "detail": detail}) + "\n"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder / SKIPPED, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            os.write(descriptor, line.encode())
        finally:
            os.close(descriptor)
    except OSError as error:
        raise UserError(f"{folder} cannot be written: {error.strerror or error}") from error

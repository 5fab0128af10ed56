"""Generated streets as a source of clips, with exact flow and labels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from poodle_lightning.data.pixels import Box
from poodle_lightning.data.sources import Entry, Reader
from poodle_lightning.types import Skip, UserError

if TYPE_CHECKING:
    from poodle_lightning.data.synthetic import Street


@dataclass(frozen=True)
class StreetSet:
    """Which streets to generate.

    Args:
        videos: how many.
        seconds: length of each; a street can be seen at any moment of it.
        size: height and width of the frames, px.
        difficulty: ``easy`` or ``hard``, see ``data.synthetic``.
        supersample: samples per pixel and direction.
        seed: of the first street; the n-th has ``seed + n``.
    """

    videos: int = 64
    seconds: float = 8.0
    size: tuple[int, int] = (96, 192)
    difficulty: Literal["easy", "hard"] = "easy"
    supersample: int = 2
    seed: int = 0


class SyntheticSource:
    """Streets generated when they are read; nothing on disk.

    Args:
        streets: which.

    Raises:
        UserError: a setting is out of range.
    """

    refused: tuple[Skip, ...] = ()

    def __init__(self, streets: StreetSet) -> None:
        if streets.videos < 1 or streets.seconds < 0:
            raise UserError(
                f"synthetic: videos {streets.videos} and seconds {streets.seconds} must be positive"
            )
        self.streets = streets
        height, width = int(streets.size[0]), int(streets.size[1])
        self.entries = [
            Entry(number, f"street-{streets.seed + number}", 0.0, streets.seconds, width, height)
            for number in range(streets.videos)
        ]
        self.open(self.entries[0])  # a wrong setting is refused now, not in a worker

    def open(self, entry: Entry) -> Reader:
        """The entry's street."""
        from poodle_lightning.data.synthetic import Street

        streets = self.streets
        size = (entry.height, entry.width)
        return StreetReader(Street(streets.seed + entry.id, size, streets.difficulty, streets.supersample))


class StreetReader:
    """A street read as a video is, which also knows its flow and labels."""

    def __init__(self, street: Street) -> None:
        self.street = street

    def read(
        self, times: Sequence[float], box: Box | Sequence[Box] | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """See ``VideoReader.read``."""
        return self.street.read(times, box)

    def flow(self, first: float, second: float, box: Box) -> tuple[np.ndarray, np.ndarray]:
        """See ``ExactReader.flow``."""
        return self.street.flow(first, second, box)

    def labels(self, time: float, box: Box) -> np.ndarray:
        """See ``ExactReader.labels``."""
        return self.street.labels(time, box)

    def close(self) -> None:
        """Nothing is held open."""

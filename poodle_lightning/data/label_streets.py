"""Generated streets with exact labels; nothing on disk."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from poodle_lightning.data.label_files import Array
from poodle_lightning.data.label_sets import BDD100K
from poodle_lightning.data.label_sources import Split
from poodle_lightning.types import ClassSet, UserError

# From the first training street to the first held-out one.
_APART = 1_000_000
_KEEP_BYTES = 256 << 20  # drawing a street costs 50 ms, reading one from memory nothing


@dataclass(frozen=True)
class StreetLabels:
    """Which labelled streets to generate; training and held-out streets are never the same.

    Args:
        train: training images, each of another street.
        val: held-out images, each of another street.
        size: height and width of the images, px.
        difficulty: ``easy`` or ``hard``, see ``data.synthetic``.
        supersample: samples per pixel and direction.
        seed: training image n shows the street ``seed + n``, held-out image n ``seed + 1,000,000 + n``. The
            default is far from the streets of ``StreetSet``, on which an encoder is trained.
    """

    train: int = 64
    val: int = 32
    size: tuple[int, int] = (96, 192)
    difficulty: Literal["easy", "hard"] = "easy"
    supersample: int = 2
    seed: int = 1_000_000


class SyntheticLabels:
    """Streets that are generated when they are read.

    Args:
        streets: which.

    Raises:
        UserError: a setting is out of range.
    """

    name = "synthetic"
    classes: ClassSet = BDD100K
    published: Mapping[str, int] = {}

    def __init__(self, streets: StreetLabels) -> None:
        if not (1 <= streets.train <= _APART and 1 <= streets.val <= _APART):
            raise UserError(
                f"synthetic: train {streets.train} and val {streets.val} must be from 1 to {_APART:,}"
            )
        self.streets = streets
        self._kept: dict[int, tuple[Array, Array]] = {}
        self.read("val", 0)  # a wrong setting is refused now, not in a worker

    def names(self, split: Split) -> Sequence[str]:
        """See ``LabelSource.names``."""
        count = self.streets.train if split == "train" else self.streets.val
        return [f"street-{self._seed(split, number)}" for number in range(count)]

    def problems(self, split: Split) -> tuple[str, ...]:
        """None: they are made as they should be."""
        return ()

    def read(self, split: Split, number: int) -> tuple[Array, Array]:
        """See ``LabelSource.read``; the image of ``labelled_frames`` for this street."""
        from poodle_lightning.data.synthetic import labelled_frames

        seed, streets = self._seed(split, number), self.streets
        if seed not in self._kept:
            size = (int(streets.size[0]), int(streets.size[1]))
            images, labels = labelled_frames(1, size, seed, streets.difficulty, streets.supersample)
            made = np.ascontiguousarray(images[0].permute(1, 2, 0).numpy()), labels[0].numpy()
            if len(self._kept) * (made[0].nbytes + made[1].nbytes) > _KEEP_BYTES:
                return made
            self._kept[seed] = made
        return self._kept[seed]

    def sizes(self, split: Split, number: int) -> tuple[tuple[int, int], tuple[int, int]]:
        """See ``LabelSource.sizes``."""
        size = (int(self.streets.size[0]), int(self.streets.size[1]))
        return size, size

    def _seed(self, split: Split, number: int) -> int:
        return self.streets.seed + number + (_APART if split == "val" else 0)

"""From the settings of the data module to an opened source."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from poodle_lightning.data.audioset import AudioSetSource
from poodle_lightning.data.frames import FramesSource
from poodle_lightning.data.images import ImagesSource
from poodle_lightning.data.shot_lists import ShotListSource
from poodle_lightning.data.sources import (
    BDD100KSource,
    EpicKitchensSource,
    FilmSource,
    FolderSource,
    Kinetics400Source,
    Kinetics700Source,
    Source,
    WalkingToursSource,
)
from poodle_lightning.data.streets import StreetSet, SyntheticSource
from poodle_lightning.data.videonet import VideoNetSource
from poodle_lightning.types import UserError

SourceName = Literal[
    "folder",
    "bdd100k",
    "walking_tours",
    "epic_kitchens",
    "kinetics400",
    "kinetics700",
    "audioset",
    "youtube8m_shots",
    "videonet",
    "film",
    "frames",
    "images",
    "synthetic",
]
# Sources of anything but video files, which alone have planes and cuts.
NO_FILMS = ("frames", "images", "synthetic")


@dataclass(frozen=True)
class Origin:
    """Where clips come from; see ``poodle_lightning.data.sources`` for the layouts.

    Args:
        source: which kind.
        root: folder or file; None only of ``synthetic``.
        split: of ``bdd100k``, ``kinetics400``, ``kinetics700`` and ``audioset``.
        city: of ``walking_tours``.
        rate: of ``frames``, images per second.
        synthetic: what to generate.
        workers: processes that measure videos the first time.

    Raises:
        UserError: the root is missing.
    """

    source: SourceName
    root: str | None
    split: str = "train"
    city: str = "venice"
    rate: float = 10.0
    synthetic: StreetSet | None = None
    workers: int = 0

    def __post_init__(self) -> None:
        if self.source != "synthetic" and self.root is None:
            what = "file" if self.source in ("film", "videonet") else "folder"
            raise UserError(f"source {self.source} needs a {what}: give --data.root")

    @property
    def name(self) -> str:
        """For messages."""
        return self.root or self.source

    def open(self) -> Source:
        """List what there is.

        Raises:
            UserError: it is not there, or not laid out so.
        """
        if self.source == "synthetic":
            return SyntheticSource(self.synthetic or StreetSet())
        assert self.root is not None
        if self.source == "bdd100k":
            return BDD100KSource(self.root, self.split, self.workers)
        if self.source == "walking_tours":
            return WalkingToursSource(self.root, self.city, self.workers)
        if self.source == "epic_kitchens":
            return EpicKitchensSource(self.root, self.workers)
        if self.source == "kinetics400":
            return Kinetics400Source(self.root, self.split, self.workers)
        if self.source == "kinetics700":
            return Kinetics700Source(self.root, self.split, self.workers)
        if self.source == "audioset":
            return AudioSetSource(self.root, self.split, self.workers)
        if self.source == "youtube8m_shots":
            return ShotListSource(self.root, self.workers)
        if self.source == "videonet":
            return VideoNetSource(self.root)
        if self.source == "film":
            return FilmSource(self.root)
        if self.source == "frames":
            return FramesSource(self.root, self.rate)
        if self.source == "images":
            return ImagesSource(self.root)
        return FolderSource(self.root, workers=self.workers)

"""Videos with one class each, in clips: UCF101, for action recognition.

::

    root/UCF-101/<class>/*.avi                     or the class folders in root itself
    root/ucfTrainTestlist/classInd.txt             "1 ApplyEyeMakeup", from 1
    root/ucfTrainTestlist/trainlist01.txt          "ApplyEyeMakeup/v_….avi 1"
    root/ucfTrainTestlist/testlist01.txt           "ApplyEyeMakeup/v_….avi"

Clips and views are those of Morgado et al. (CVPR 2021) and Wu & Wang (2021): facebookresearch/AVID-CMA
``datasets/preprocessing.py`` (``VideoPrep_MSC_CJ``), happywu/AVID-CMA-CycleContrast
``configs/benchmark/ucf/32at16-fold1-r50-4gpu-drop09.yaml``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from poodle_lightning.augment.photometric import Colour
from poodle_lightning.data.decode import DecodeError, VideoReader
from poodle_lightning.data.image_views import ImageViews
from poodle_lightning.data.label_files import Array
from poodle_lightning.data.label_sources import SPLITS, Split
from poodle_lightning.data.loading import SharedDataModule, each_once, whole_batches
from poodle_lightning.data.order import ClipLoader, Order, Request, RequestSampler
from poodle_lightning.data.video import HELD_OUT_EPOCH
from poodle_lightning.ops.random import bernoulli, fold, key_of, uniform
from poodle_lightning.types import ClassSet, UserError

LISTS, VIDEOS = "ucfTrainTestlist", "UCF-101"
_LISTED = {"train": "trainlist", "val": "testlist"}
_TRIES = 64


@dataclass(frozen=True)
class ActionBatch:
    """Videos with a class each, as clips.

    Args:
        frames: ``(B, K, T, 3, H, W)`` uint8 RGB: K clips of T frames; K is 1 in training. Zeros for a video
            that cannot be read.
        labels: ``(B,)`` int64.
        readable: ``(B,)`` bool; always true in training, where another video takes its place. On the host.
        replaced: videos that could not be read and whose place others took, in training.
        index: ``(B,)`` int64, place in the list; stays on the host.
        names: of the files; stays on the host.
    """

    frames: Tensor
    labels: Tensor
    readable: Tensor
    replaced: int
    index: Tensor
    names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.frames)

    def to(self, device: torch.device | str, non_blocking: bool | None = None) -> ActionBatch:
        """Moved to a device (to CUDA without waiting); all but frames and labels stays on the host."""
        on = torch.device(device).type == "cuda" if non_blocking is None else non_blocking
        frames, labels = (part.to(device, non_blocking=on) for part in (self.frames, self.labels))
        return replace(self, frames=frames, labels=labels)

    def pin_memory(self) -> ActionBatch:
        """With its tensors in page-locked memory, so that the copy to the device does not block."""
        return replace(self, frames=self.frames.pin_memory(), labels=self.labels.pin_memory())


@dataclass(frozen=True)
class ClipView:
    """Which frames make a clip, and what a network is shown of them: all frames of a clip alike.

    A video that is too short begins again, as in AVID-CMA.

    Args:
        frames: of a clip.
        fps: frames per second at which the video is read.
        size: height and width, px.
        resize: the short side in a test, before the centre is cut out; 224 / 0.875.
        scale: share of the frame's area that a random crop covers.
        flip: probability of a mirror image.
        jitter: of brightness, contrast, saturation and hue; always applied.

    Raises:
        UserError: numbers out of range.
    """

    frames: int = 32
    fps: float = 16.0
    size: int = 224
    resize: int = 256
    scale: tuple[float, float] = (0.08, 1.0)
    flip: float = 0.5
    jitter: tuple[float, float, float, float] = (0.4, 0.4, 0.4, 0.2)

    def __post_init__(self) -> None:
        if self.frames < 1 or self.fps <= 0 or not 1 <= self.size <= self.resize:
            raise UserError(
                f"clip view: frames {self.frames} at least 1, fps {self.fps} above 0, size {self.size} from "
                f"1 to resize, {self.resize}"
            )

    def starts(self, duration: float, count: int) -> list[float]:
        """Seconds at which ``count`` clips of a test start: evenly, from the first to the last possible."""
        return [float(start) for start in np.linspace(0.0, self._room(duration), count)]

    def draw(self, duration: float, key: Tensor) -> float:
        """Second at which a clip for training starts, uniform; ``key (1,)``."""
        return float(uniform(key, 1, dtype=torch.float64)) * self._room(duration)

    def times(self, start: float, duration: float) -> list[float]:
        """Seconds of the frames; from the front again where the video ends."""
        there = int((duration - start) * self.fps + 1e-6) + 1
        return [min(start + number % there / self.fps, duration) for number in range(self.frames)]

    def _room(self, duration: float) -> float:
        return max(0.0, duration - (self.frames - 1) / self.fps)

    def train(self, clip: Array, key: Tensor) -> Array:
        """One crop, one mirroring and one change of colours for ``(T, H, W, 3)`` uint8; ``key (1,)``."""
        views = ImageViews(size=self.size, resize=self.size, scale=self.scale)
        top, left, height, width = views.box((clip.shape[1], clip.shape[2]), fold(key, "crop"))
        part = _resized(clip[:, top : top + height, left : left + width], (self.size, self.size))
        if bool(bernoulli(fold(key, "flip"), self.flip)[0, 0]):
            part = part[:, :, ::-1]
        if not any(self.jitter):
            return np.ascontiguousarray(part)
        colour = Colour(*self.jitter, jitter=1.0, gray=0.0, blur=0.0)
        images = torch.from_numpy(np.ascontiguousarray(part.transpose(0, 3, 1, 2))).float() / 255.0
        found = colour(images, fold(key, "colour").expand(len(part)))
        made: Array = (found * 255.0).round().clamp(0, 255).byte().permute(0, 2, 3, 1).numpy()
        return made

    def test(self, clip: Array) -> Array:
        """Short side to ``resize``, then the centre, of ``(T, H, W, 3)`` uint8."""
        height, width = clip.shape[1:3]
        short = min(height, width)  # whole numbers: 256 / 253 * 253 is 255.99…, and would be 255
        part = _resized(clip, (height * self.resize // short, width * self.resize // short))
        top, left = (round((side - self.size) / 2) for side in part.shape[1:3])
        return part[:, top : top + self.size, left : left + self.size]


def _resized(clip: Array, size: tuple[int, int]) -> Array:
    """Frames at another size, bilinear."""
    frames = [cv2.resize(f, (size[1], size[0]), interpolation=cv2.INTER_LINEAR) for f in clip]
    return np.stack(frames)


class ActionDataModule(SharedDataModule):
    """Clips of videos with a class each, from UCF101's layout; see the module.

    In training a video that cannot be read is replaced by the next of the epoch and counted; in a test it
    stays, and whoever scores counts it as wrong.

    Args:
        root: the folder with ``UCF-101`` and ``ucfTrainTestlist``.
        split: of the published lists, 1 to 3.
        view: clips and what is shown of them.
        clips_per_video: clips of a video per epoch of training; AVID-CMA's 5.
        test_clips: clips of a video in a test.
        batch_size: clips per device and step.
        val_batch_size: videos per device in a test.
        num_workers: processes that read videos.
        seed: of the order and of all draws; None is 0, or ``seed_everything`` on the command line.

    Raises:
        UserError: a setting is out of range, or a list is missing or damaged.
    """

    def __init__(
        self,
        root: str | None = None,
        *,
        split: int = 1,
        view: ClipView | None = None,
        clips_per_video: int = 5,
        test_clips: int = 10,
        batch_size: int = 32,
        val_batch_size: int = 1,
        num_workers: int = 2,
        seed: int | None = None,
    ) -> None:
        super().__init__()
        if root is None:
            raise UserError("videos with actions need a folder: give --data.root, the one with UCF-101")
        if min(clips_per_video, test_clips, batch_size, val_batch_size) < 1 or num_workers < 0:
            raise UserError("data: clips and batch sizes must be at least 1, num_workers at least 0")
        self.root, self.split, self.view, self.seed = Path(root), split, view or ClipView(), seed or 0
        self.clips_per_video, self.test_clips = clips_per_video, test_clips
        self.batch_size, self.val_batch_size, self.num_workers = batch_size, val_batch_size, num_workers
        self.classes = ClassSet(tuple(_classes(self.root / LISTS / "classInd.txt")))
        self._videos: dict[Split, list[tuple[Path, int]]] = {}

    def setup(self, stage: str | None = None) -> None:
        """Read the lists.

        Raises:
            UserError: a list is missing or damaged, or none of its videos is there.
        """
        for split in SPLITS if stage in ("fit", None) else ("val",):
            self.videos(split)  # type: ignore[arg-type]

    def videos(self, split: Split) -> list[tuple[Path, int]]:
        """The videos of a split with their labels, in the order of the list.

        Raises:
            UserError: the list is missing or damaged, or none of its videos is there.
        """
        if split not in self._videos:
            path = self.root / LISTS / f"{_LISTED[split]}{self.split:02d}.txt"
            inner = self.root / VIDEOS
            base = inner if inner.is_dir() else self.root
            found = [(base / name, label) for name, label in _entries(path, self.classes.names)]
            if not any(video.is_file() for video, _ in found):
                raise UserError(f"{base}: none of the {len(found)} videos of {path.name} is there")
            self._videos[split] = found
        return self._videos[split]

    def train_dataloader(self) -> ClipLoader:
        """Random clips in batches of ``batch_size``; starts where training stands."""
        videos, passes = len(self.videos("train")), self.clips_per_video
        order = whole_batches(videos, self.batch_size, self._world, self.seed, passes)
        return self._loader("train", order, None, self.batch_size, consumed=self._consumed)

    def val_dataloader(self) -> ClipLoader:
        """Every held-out video exactly once over all devices, ``test_clips`` clips of each."""
        total = len(self.videos("val"))
        order = each_once(total, self._world, f"{self.root}: {total} videos of the test")
        return self._loader("val", order, HELD_OUT_EPOCH, self.val_batch_size)

    def _loader(
        self, split: Split, order: Order, epoch: int | None, batch_size: int, **kwargs: Any
    ) -> ClipLoader:
        clips = None if epoch is None else self.test_clips
        return ClipLoader(
            _Clips(self.videos(split), order, self.view, self.seed, clips),
            batch_size=batch_size,
            sampler=RequestSampler(order, self._rank, epoch),
            collate_fn=_collate,
            num_workers=self.num_workers,
            seed=self.seed,
            **kwargs,
        )


@dataclass(frozen=True)
class _Read:
    """Clips ``(K, T, H, W, 3)`` of one video."""

    clips: Array
    label: int
    index: int
    name: str
    readable: bool = True
    replaced: int = 0


class _Clips(Dataset[_Read]):
    """Clips of a list's videos: random ones, or ``test_clips`` evenly over each video."""

    def __init__(
        self,
        videos: Sequence[tuple[Path, int]],
        order: Order,
        view: ClipView,
        seed: int,
        test_clips: int | None,
    ) -> None:
        self.videos, self.order, self.view, self.seed = videos, order, view, seed
        self.test_clips = test_clips

    def __len__(self) -> int:
        return self.order.length

    def __getitem__(self, request: Request) -> _Read:
        epoch, position = request
        first: DecodeError | None = None
        for tries in range(_TRIES):
            item = self.order.item(epoch, position + tries * self.order.stride)
            index = item % len(self.videos)
            path, label = self.videos[index]
            key = key_of(self.seed, epoch, index, item // len(self.videos)).reshape(1)
            try:
                clips = self._read(path, key)
            except DecodeError as error:
                if self.test_clips is not None:
                    size, view = self.view.size, self.view
                    none = np.zeros((self.test_clips, view.frames, size, size, 3), np.uint8)
                    return _Read(none, label, index, str(path), readable=False)
                first = first or error
                continue
            return _Read(clips, label, index, str(path), replaced=tries)
        raise UserError(f"{path}: {_TRIES} videos in a row cannot be read, the first because {first}")

    def _read(self, path: Path, key: Tensor) -> Array:
        view = self.view
        with VideoReader(path) as reader:
            duration = reader.info.duration
            if self.test_clips is None:
                start = view.draw(duration, fold(key, "start"))
                pixels, _ = reader.read(view.times(start, duration))
                return view.train(pixels, key)[None]
            starts = view.starts(duration, self.test_clips)
            return np.stack([view.test(reader.read(view.times(start, duration))[0]) for start in starts])


def _collate(items: Sequence[_Read]) -> ActionBatch:
    stacked = np.stack([np.ascontiguousarray(item.clips.transpose(0, 1, 4, 2, 3)) for item in items])
    return ActionBatch(
        frames=torch.from_numpy(stacked),
        labels=torch.tensor([item.label for item in items]),
        readable=torch.tensor([item.readable for item in items]),
        replaced=sum(item.replaced for item in items),
        index=torch.tensor([item.index for item in items]),
        names=tuple(item.name for item in items),
    )


def _lines(path: Path) -> list[tuple[int, list[str]]]:
    """Words of the lines that are not empty, with the lines' numbers."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read; UCF101's lists belong in {LISTS}") from error
    found = [(number, line.split()) for number, line in enumerate(text.splitlines(), 1) if line.strip()]
    if not found:
        raise UserError(f"{path}: the list is empty; take UCF101's own")
    return found


def _classes(path: Path) -> list[str]:
    names: list[str] = []
    for number, words in _lines(path):
        if len(words) != 2 or words[0] != str(len(names) + 1) or words[1] in names:
            raise UserError(
                f'{path}:{number}: "{" ".join(words)}", but "{len(names) + 1} <new class>" is expected'
            )
        names.append(words[1])
    return names


def _entries(path: Path, classes: Sequence[str]) -> list[tuple[str, int]]:
    """Relative path and label of every video; the folder is the class, a number beside it must agree."""
    found: list[tuple[str, int]] = []
    for number, words in _lines(path):
        name = words[0].split("/")[0]
        if len(words) > 2 or name not in classes or "/" not in words[0]:
            raise UserError(f'{path}:{number}: "{" ".join(words)}" is no <class>/<file> of classInd.txt')
        label = classes.index(name)
        if len(words) == 2 and words[1] != str(label + 1):
            raise UserError(f"{path}:{number}: {name} is class {label + 1} in classInd.txt, not {words[1]}")
        found.append((words[0], label))
    return found

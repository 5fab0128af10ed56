"""Streets as video files and as labelled images."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import TypeVar

import cv2
import numpy as np
import torch
from torch import Tensor

from poodle_lightning.data.synthetic.patches import Array
from poodle_lightning.data.synthetic.scene import Size, Street
from poodle_lightning.data.synthetic.streets import Difficulty
from poodle_lightning.ops.random import key_of, uniform
from poodle_lightning.types import UserError

T = TypeVar("T")
_LONGEST = 5.0  # seconds into a street at which a labelled image may be taken


def write_videos(
    root: str | Path,
    count: int,
    seconds: float = 10.0,
    fps: float = 10.0,
    size: Size = (96, 192),
    seed: int = 0,
    workers: int = 1,
    difficulty: Difficulty = "easy",
    supersample: int = 2,
    crf: int = 14,
) -> list[Path]:
    """Write streets as ordinary MP4 files ``street_0000.mp4``, …; video ``i`` shows the street ``seed + i``.

    Frame ``k`` of a file shows its street at ``k / fps`` seconds.

    Args:
        root: folder; made if it is missing.
        count: how many videos.
        seconds: length of each.
        fps: frames per second.
        size: height and width in pixels, even numbers.
        seed: of the first street.
        workers: processes; 1 = none but this one.
        difficulty: "easy" or "hard".
        supersample: samples per pixel and direction.
        crf: quality of the encoder, lower is better. At this size most of what is lost is lost by storing
            colour at half resolution, whatever the quality.

    Returns:
        The files, in order.

    Raises:
        UserError: an argument is out of range.
    """
    if round(seconds * fps) < 1:
        raise UserError(f"synthetic: {seconds} s at {fps} frames per second is no frame; make it longer")
    if size[0] % 2 or size[1] % 2:
        raise UserError(f"synthetic: a video's size must be even, not {size[0]}x{size[1]}")
    folder = Path(root)
    folder.mkdir(parents=True, exist_ok=True)
    one = partial(_write_one, folder, round(seconds * fps), fps, size, seed, difficulty, supersample, crf)
    return _each(one, count, workers)


def labelled_frames(
    count: int,
    size: Size = (96, 192),
    seed: int = 0,
    difficulty: Difficulty = "easy",
    supersample: int = 2,
    workers: int = 1,
) -> tuple[Tensor, Tensor]:
    """Images with their classes, each of another street: image ``i`` shows the street ``seed + i``.

    Args:
        count: how many.
        size: height and width in pixels.
        seed: of the first street.
        difficulty: "easy" or "hard".
        supersample: samples per pixel and direction.
        workers: processes; 1 = none but this one.

    Returns:
        images ``(N, 3, H, W)`` uint8 RGB and labels ``(N, H, W)`` uint8, see ``CLASSES``.

    Raises:
        UserError: an argument is out of range.
    """
    made = _each(partial(_labelled_one, size, seed, difficulty, supersample), count, workers)
    images = torch.from_numpy(np.stack([image for image, _ in made])).permute(0, 3, 1, 2).contiguous()
    return images, torch.from_numpy(np.stack([labels for _, labels in made]))


def _write_one(
    folder: Path,
    frames: int,
    fps: float,
    size: Size,
    seed: int,
    difficulty: Difficulty,
    supersample: int,
    crf: int,
    number: int,
) -> Path:
    from poodle_lightning.data.encode import write_video  # only who writes files needs the encoder

    street = Street(seed + number, size, difficulty, supersample)

    def shown() -> Iterator[Array]:
        for index in range(frames):
            yield street.read([index / fps])[0][0]

    path = folder / f"street_{number:04d}.mp4"
    write_video(path, shown(), fps, crf=crf)
    return path


def _labelled_one(
    size: Size, seed: int, difficulty: Difficulty, supersample: int, number: int
) -> tuple[Array, Array]:
    street = Street(seed + number, size, difficulty, supersample)
    time = float(uniform(key_of(seed + number, "labelled").reshape(1), 1, 0.0, _LONGEST))
    return street.read([time])[0][0], street.labels(time)


def _each(make: Callable[[int], T], count: int, workers: int) -> list[T]:
    """Call ``make`` with 0 … count − 1, in order, in this process or several."""
    if count < 1:
        raise UserError(f"synthetic: count must be 1 or more, not {count}")
    if workers <= 1:
        return [make(number) for number in range(count)]
    # a forked child would inherit the locks of torch's threads; a spawned one starts clean
    pool = ProcessPoolExecutor(min(workers, count), get_context("spawn"), initializer=_single_thread)
    with pool:
        return list(pool.map(make, range(count)))


def _single_thread() -> None:
    """One thread per process: the processes already fill the cores."""
    cv2.setNumThreads(0)  # 0 runs without OpenCV's pool; 1 may wait for threads that a fork left behind
    torch.set_num_threads(1)

"""The data: pairs with exact flow and labels, and labelled frames, made once and kept in a file."""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from torch import Tensor

from benchmarks.street.settings import FIRST_STREET, Setting
from poodle_lightning.data.synthetic import Street, labelled_frames
from poodle_lightning.ops.geometry import Affine
from poodle_lightning.ops.random import key_of, permutation, uniform
from poodle_lightning.types import Clip

Labelled = tuple[Tensor, Tensor]
Pairs = dict[str, Tensor]
_SECONDS = 5.0  # of a street from which pairs are taken


def pairs(setting: Setting, out: Path, workers: int) -> Pairs:
    """Pairs of frames with labels and the exact flow of both directions.

    Returns:
        ``frames (N, 2, 3, H, W)`` uint8, ``labels (N, 2, H, W)`` uint8, ``flow (N, 2, 2, H, W)`` float16 in
        pixels, ``times (N, 2)`` float64.
    """
    s = setting
    path = out / f"pairs_{s.pairs}_{s.streets}_{s.height}_{s.difficulty}_{s.gap_low}_{s.gap_high}.pt"
    if not path.exists():
        made = _each(partial(_pair, setting), s.pairs, workers)
        stacked = {name: torch.from_numpy(np.stack([one[name] for one in made])) for name in made[0]}
        _keep(stacked, path)
    found: Pairs = torch.load(path, weights_only=True)
    return found


def labelled(setting: Setting, part: str, out: Path, workers: int) -> Labelled:
    """Frames and labels of a part ("readout", "val" or "test"), each of a street of its own."""
    count = setting.readout_frames if part == "readout" else setting.test_frames
    path = out / f"{part}_{count}_{setting.height}_{setting.difficulty}.pt"
    if not path.exists():
        kind: Any = setting.difficulty
        made = labelled_frames(count, setting.frame, FIRST_STREET[part], kind, workers=workers)
        _keep(list(made), path)
    images, labels = torch.load(path, weights_only=True)
    return images, labels


def on(data: Pairs, device: torch.device) -> Pairs:
    """The pairs on a device; times stay on the host."""
    return {name: part if name == "times" else part.to(device) for name, part in data.items()}


def batches(data: Pairs, setting: Setting, seed: int, device: torch.device) -> Iterator[Clip]:
    """Batches of crops without end: every pair once per pass, in an order and with draws of the seed."""
    count = len(data["frames"])
    per_pass = count // setting.batch
    if per_pass < 1:
        raise ValueError(f"{count} pairs do not fill a batch of {setting.batch}")
    number = 0
    while True:
        turn, place = divmod(number, per_pass)
        order = permutation(key_of(seed, "order", turn).reshape(1), count)[0]
        yield _clip(data, order[place * setting.batch :][: setting.batch], setting, seed, turn).to(device)
        number += 1


def _clip(data: Pairs, index: Tensor, setting: Setting, seed: int, turn: int) -> Clip:
    keys = torch.stack([key_of(seed, turn, int(i)) for i in index])
    rows = index.to(data["frames"].device)  # of a GPU, where the data lies there
    return Clip(
        frames=data["frames"][rows],
        window=windows(torch.stack([key_of(int(key), "window") for key in keys]), setting),
        size=setting.crop_size,
        times=data["times"][index],
        index=index,
        key=keys,
        flow=data["flow"][rows].float(),
        labels=data["labels"][rows],
    )


def windows(keys: Tensor, setting: Setting) -> Affine:
    """Crops of the frame's aspect, uniform in area and place."""
    draws = uniform(keys, 3)
    half = (setting.area_low + (setting.area_high - setting.area_low) * draws[:, :1]).sqrt()
    centre = (2 * draws[:, 1:] - 1) * (1 - half)
    return Affine.box(torch.cat([centre - half, centre + half], dim=1))


def _pair(setting: Setting, number: int) -> dict[str, np.ndarray]:
    kind: Any = setting.difficulty
    street = Street(FIRST_STREET["pairs"] + number % setting.streets, setting.frame, kind)
    key = key_of(FIRST_STREET["pairs"], "pair", number).reshape(1)
    start, more = uniform(key, 2, dtype=torch.float64)[0].tolist()
    gap = setting.gap_low + (setting.gap_high - setting.gap_low) * more
    first = start * (_SECONDS - gap)
    second = first + gap
    frames, times = street.read([first, second])
    flows = street.flow(first, second)[0], street.flow(second, first)[0]
    return {
        "frames": np.ascontiguousarray(frames.transpose(0, 3, 1, 2)),
        "labels": np.stack([street.labels(first), street.labels(second)]),
        "flow": np.stack(flows).astype(np.float16),
        "times": times,
    }


def _each(make: Any, count: int, workers: int) -> list[Any]:
    if workers <= 1:
        return [make(number) for number in range(count)]
    pool = ProcessPoolExecutor(min(workers, count), get_context("spawn"), initializer=_single_thread)
    with pool:
        return list(pool.map(make, range(count), chunksize=8))


def _single_thread() -> None:
    cv2.setNumThreads(0)
    torch.set_num_threads(1)


def _keep(content: Any, path: Path) -> None:
    """Written beside and renamed: a file that is there is whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(f".{os.getpid()}")
    torch.save(content, unfinished)
    unfinished.replace(path)

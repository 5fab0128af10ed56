"""Small data sets in the layout of DAVIS 2017: squares of their own colours move over a coloured ground."""

from __future__ import annotations

import numpy as np
from label_trees import save

from poodle_lightning.nn.encoder import Encoder
from poodle_lightning.types import Features

SIZE = (32, 48)
STEP = 4  # px per frame, and the side of a cell of `Colours`
COLOURS = {0: (40, 70, 60), 1: (220, 40, 30), 2: (30, 60, 230)}


def ids(time, objects=2, size=SIZE):
    """Object 1 moves to the right, object 2 down; whole cells at a time."""
    mask = np.zeros(size, np.uint8)
    mask[4:16, 4 + STEP * time : 16 + STEP * time] = 1
    if objects > 1:
        mask[16 : 24 + STEP * min(time, 2), 32:44] = 2
    return mask


def painted(mask, seed=0):
    """A frame that shows the ids in their colours, with noise."""
    colours = np.array([COLOURS[number] for number in range(3)])
    noise = np.random.default_rng(seed).integers(-9, 10, (*mask.shape, 3))
    return np.clip(colours[np.minimum(mask, 2)] + noise, 0, 255).astype(np.uint8)


def davis(root, sequences=(("dog", 5, 2), ("swan", 4, 1)), resolution="480p", size=SIZE):
    """Sequences ``(name, frames, objects)``; returns the root."""
    listed = root / "ImageSets/2017/val.txt"
    listed.parent.mkdir(parents=True)
    listed.write_text("".join(f"{name}\n" for name, *_ in sequences))
    for name, frames, objects in sequences:
        for time in range(frames):
            mask = ids(time, objects, size)
            save(root / f"JPEGImages/{resolution}/{name}/{time:05d}.jpg", painted(mask, time))
            save(root / f"Annotations/{resolution}/{name}/{time:05d}.png", mask, "P")
    return root


class Colours(Encoder):
    """An encoder that gives the mean colour of each cell; its stride is the step of the objects."""

    def __init__(self):
        super().__init__({"colour": 3}, {"colour": STEP})

    def features(self, normalised):
        maps = {"colour": normalised.unfold(2, STEP, STEP).unfold(3, STEP, STEP).mean(dim=(-2, -1))}
        return Features(maps=maps, strides=dict(self.strides))

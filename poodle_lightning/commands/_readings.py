"""Readouts of the encoders that ``compare`` has trained, each made once and noted down."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from poodle_lightning.callbacks.checkpoints import write_atomically
from poodle_lightning.data.labelled import LabelledDataModule
from poodle_lightning.evaluation.linear_readout import ReadoutRecipe, linear_readout, position_prior
from poodle_lightning.evaluation.memory import RetrievalRecipe
from poodle_lightning.evaluation.metrics import Confusion
from poodle_lightning.evaluation.retrieval import dense_retrieval
from poodle_lightning.hub import dilate
from poodle_lightning.nn.encoder import Encoder
from poodle_lightning.ops.geometry import Size

Scores = dict[str, float]
READOUT = ReadoutRecipe(steps=500)
# Neighbours are sought among so many patches of each image: all would make the search longer than a training.
_PATCHES = 32
_STRIDE = 8


class Readings:
    """Scores of encoders on one labelled sample: a linear layer, and labels of the nearest patches.

    Args:
        path: JSON file with the scores that are already there; others are added.
        key: stands for the labelled sample; scores of other samples in the file are left alone.
        labels: where the sample comes from.
        size: height and width of the images, px.
        most: images to learn from; half as many others are scored. Fewer where there are fewer.
        device: where the encoders run.
    """

    def __init__(
        self, path: Path, key: str, labels: LabelledDataModule, size: Size, most: int, device: str
    ) -> None:
        self.path, self.labels, self.size, self.most, self.device = path, labels, size, most, device
        self.key = f"{key}-{most}"
        self._all: dict[str, dict[str, Scores]] = _read(path)
        self.made = 0

    @property
    def measures(self) -> list[str]:
        """Names of the scores: ``linear_miou``, ``knn_miou``, and ``<either>_<group>`` per group."""
        ends = ["miou", *(f"miou_{group}" for group in self.labels.classes.groups)]
        return [f"{kind}_{end}" for kind in ("linear", "knn") for end in ends]

    def of(self, name: str, encoder: Callable[[], Encoder]) -> Scores:
        """The scores of an encoder, which is only asked for where they are not known."""
        return self._known(name, lambda: self._read_out(encoder().to(torch.device(self.device))))

    def of_position(self) -> Scores:
        """The scores of guessing, at every position, the class that is most frequent there."""

        def guess() -> Scores:
            train, test = self._sample
            found = self._scores(position_prior(train[1], test[1], len(self.labels.classes)))
            return {f"{kind}_{name}": value for kind in ("linear", "knn") for name, value in found.items()}

        return self._known("position alone", guess)

    def _known(self, name: str, make: Callable[[], Scores]) -> Scores:
        known = self._all.setdefault(self.key, {})
        if name not in known:
            known[name] = make()
            self.made += 1
            text = json.dumps(self._all, indent=1) + "\n"
            write_atomically(self.path, lambda part: _write(part, text))
        return known[name]

    def _read_out(self, encoder: Encoder) -> Scores:
        encoder, classes = as_read(encoder), self.labels.classes
        train, test = self._sample
        linear = linear_readout(encoder, train, test, classes, READOUT).confusion
        memory = RetrievalRecipe(vectors=_PATCHES * len(train[0]))
        nearest = dense_retrieval(encoder, train, test, classes, memory).confusion
        found = {"linear": self._scores(linear), "knn": self._scores(nearest)}
        return {f"{kind}_{name}": value for kind, scores in found.items() for name, value in scores.items()}

    def _scores(self, confusion: Confusion) -> Scores:
        groups = self.labels.classes.numbered()
        return {"miou": confusion.miou()} | {
            f"miou_{name}": confusion.group_iou(members) for name, members in groups.items()
        }

    @cached_property
    def _sample(self) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        # the probes' sample is of another seed: what they show while training is not what is scored
        train = self.labels.sample("train", min(self.most, self.labels.count("train")), self.size, seed=1)
        few = min(max(1, self.most // 2), self.labels.count("val"))
        return train, self.labels.sample("val", few, self.size, seed=1)


def as_read(encoder: Encoder) -> Encoder:
    """The encoder as it is read out: without a decoder, its last stages are dilated, as FlowE's readout does.

    Else a network would lose for the stride of its map, not for its features.
    """
    return dilate(encoder, _STRIDE) if "output_stride" in encoder.init_args else encoder


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")

"""Watches what a network has learned, on labelled images that it is not trained on. An observer.

Every n optimiser steps the features are read in two ways that need next to no training: by the labels of the
nearest patches of other images (``evaluation.retrieval``), and by one linear layer
(``evaluation.linear_readout``). Both see a small fixed sample, so the numbers say whether a run gets better,
not how good an encoder is in the end: ``poodle-lightning evaluate`` says that.

What it costs follows from the defaults. The images have the size of the training crops, and each is embedded
twice without gradients. A pair costs a method with a target network about 8 such passes (two frames, each
forward and backward for one network and forward for the other), so 144 images cost as much as 36 pairs. The
search among 4,096 patches and 200 steps of the linear layer cost as much again, or more where the network is
cheap: 6 steps of 500 for a small PooDLe, 17 for a small BYOL (measured by ``benchmarks/probes.py``).
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Literal, TypeVar

import lightning as L
import torch
from torch import Tensor

from poodle_lightning.data.labelled import LabelledDataModule
from poodle_lightning.evaluation.linear_readout import ReadoutRecipe, feature_map, linear_readout
from poodle_lightning.evaluation.memory import RetrievalRecipe, patch_counts
from poodle_lightning.evaluation.retrieval import dense_retrieval
from poodle_lightning.methods.base import Method
from poodle_lightning.nn.encoder import Encoder
from poodle_lightning.nn.observed import observed
from poodle_lightning.nn.patches import whole_size
from poodle_lightning.ops.geometry import Size
from poodle_lightning.types import IGNORE, UserError

T = TypeVar("T")
Kind = Literal["knn", "linear"]
_log = logging.getLogger(__name__)
_SIZE: Size = (128, 256)
_VECTORS = 4096
_READOUT = ReadoutRecipe(steps=200, images=16, pixels=2048)
# The user is told when probing has taken so many seconds and this share of the run.
_LONG, _DEAR = 60.0, 0.05


class Probes(L.Callback):
    """Logs ``probe/<name>/knn_miou`` and ``/linear_miou``, with ``_<group>`` for the groups of the classes.

    Beside them ``probe/<name>/best_knn_miou`` and ``/best_linear_miou`` (the best so far), and
    ``perf/probe_s``, the seconds that it took. All are fractions but the last.

    Nothing is drawn from a global generator, modes and buffers stay as they are: with or without it, training
    is bit-equal. With several devices the first one reads its own weights and tells the others, so the result
    does not depend on how many there are.

    Args:
        labels: where the images and labels come from; not the data of the pretraining.
        name: of the labelled set in the logs; two of these callbacks need two names.
        every_n_steps: optimiser steps between two probes; there is always one at the end.
        network: ``online``, or ``target``, the slowly moving copy.
        layer: name of the map that is read; None reads the last, the decoder's where there is one.
        kinds: which of the two readouts.
        train_images: images that labels are learned from; all, where there are fewer.
        test_images: other images that are scored; likewise.
        size: height and width of the images, px; None is the size of the training crops, without what does
            not fill a patch of a vision transformer.
        seed: of the choice of images, and of all draws of the readouts.
        retrieval: how neighbours are searched.
        readout: how the linear layer is trained.

    Raises:
        UserError: a setting is out of range.
    """

    def __init__(
        self,
        labels: LabelledDataModule,
        name: str = "labels",
        every_n_steps: int = 500,
        network: Literal["online", "target"] = "online",
        layer: str | None = None,
        kinds: Sequence[Kind] = ("knn", "linear"),
        train_images: int = 96,
        test_images: int = 48,
        size: tuple[int, int] | None = None,
        seed: int = 0,
        retrieval: RetrievalRecipe | None = None,
        readout: ReadoutRecipe | None = None,
    ) -> None:
        super().__init__()
        if min(every_n_steps, train_images, test_images, len(kinds)) < 1:
            raise UserError("Probes: every_n_steps, train_images, test_images: 1 or more, and one of kinds")
        self.labels, self.name, self.every_n_steps = labels, name, every_n_steps
        self.network, self.layer, self.kinds = network, layer, tuple(kinds)
        self.train_images, self.test_images, self.seed = train_images, test_images, seed
        self.size = None if size is None else (int(size[0]), int(size[1]))
        self.retrieval = retrieval or RetrievalRecipe(vectors=max(_VECTORS, train_images), seed=seed)
        self.readout = readout or replace(_READOUT, seed=seed)
        self.best: dict[str, float] = {}
        self._sample: tuple[tuple[Tensor, Tensor], ...] = ()
        self._last_step = 0
        self._began = self._spent = 0.0
        self._told = False

    @property
    def state_key(self) -> str:
        """Several of these callbacks keep apart what they remember."""
        return f"{type(self).__name__}[{self.name}]"

    # ---- before the first step
    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Reads the images, so that labels that do not fit end the run before it begins.

        Raises:
            UserError: they do not fit, or the module has no such network.
        """
        if stage != "fit":
            return
        if not isinstance(pl_module, Method):
            raise UserError(f"Probes read the encoder of a method, and {type(pl_module).__name__} is none")
        if self.network == "target" and pl_module.target is None:
            raise UserError(f"Probes.network: target: {type(pl_module).__name__} has no target network")
        others = [one for one in _probes(trainer) if one is not self]
        if any(one.name == self.name for one in others):
            raise UserError(f"Probes.name: two callbacks are called {self.name}: give them different names")
        crop = getattr(getattr(trainer, "datamodule", None), "size", None)
        size = self.size or whole_size(crop or _SIZE, self._encoder(pl_module))
        on_first(trainer, lambda: self._fetch(size))

    def _fetch(self, size: Size) -> None:
        self._sample = (self._draw("train", size), self._draw("val", size))

    def _draw(self, split: Literal["train", "val"], size: Size) -> tuple[Tensor, Tensor]:
        """The sample of a split, images ``(N, 3, *size)`` and labels ``(N, *size)`` uint8."""
        count = self.train_images if split == "train" else self.test_images
        few = min(count, self.labels.count(split))
        images, labels = self.labels.sample(split, few, size, self.seed)
        if not bool((labels != IGNORE).any()):
            raise UserError(f"probe {self.name}: no pixel of the {len(labels)} images of {split} has a class")
        return images, labels

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Sees that the network has the layer, and that its map has enough patches.

        Raises:
            UserError: it has not.
        """
        assert isinstance(pl_module, Method)
        self._last_step = trainer.global_step
        self._began, self._spent = time.perf_counter(), 0.0
        on_first(trainer, lambda: self._try(self._encoder(pl_module)))

    def _try(self, encoder: Encoder) -> None:
        images, labels = self._sample[0]
        try:
            with observed(encoder):
                found = feature_map(encoder, images[:1], self.layer)
        except ValueError as error:
            raise UserError(f"probe {self.name}: {error}: set Probes.layer") from error
        cells = (found.shape[-2], found.shape[-1])
        there = (patch_counts(labels, cells, len(self.labels.classes)).sum(dim=-1) > 0).flatten(1).sum(dim=1)
        if self.retrieval.vectors is not None:
            there = there.clamp(max=self.retrieval.vectors // len(images))
        patches, wanted = int(there.sum()), self.retrieval.k
        if "knn" in self.kinds and patches < wanted:
            raise UserError(
                f"probe {self.name}: {patches} labelled patches ({cells[0]}×{cells[1]} per image) for"
                f" {wanted} neighbours: raise Probes.train_images or size, or lower retrieval.k"
            )

    def _encoder(self, method: Method) -> Encoder:
        if self.network == "online":
            return method.backbone()
        assert method.target is not None
        found: Encoder = method.target.module.backbone()
        return found

    # ---- while training
    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Probes every n optimiser steps, and after the last one if the end is known."""
        step = trainer.global_step
        # under accumulation the step stands still for several batches
        if step != self._last_step and (
            step % self.every_n_steps == 0 or step == trainer.estimated_stepping_batches
        ):
            self._probe(trainer, pl_module)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Probes where the run was ended early."""
        if trainer.global_step != self._last_step:
            self._probe(trainer, pl_module)

    def _probe(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert isinstance(pl_module, Method)
        step = self._last_step = trainer.global_step
        began = time.perf_counter()
        numbers = on_first(trainer, lambda: self.look(self._encoder(pl_module)))
        seconds = time.perf_counter() - began
        for kind in self.kinds:
            key = f"{kind}_miou"
            self.best[key] = max(self.best.get(key, 0.0), numbers[key])
            numbers[f"best_{key}"] = self.best[key]
        logged = {f"probe/{self.name}/{key}": value for key, value in numbers.items()}
        for logger in trainer.loggers:
            # Lightning counts from 0 where it logs the loss of the same batch
            logger.log_metrics({**logged, "perf/probe_s": seconds}, step=step - 1)
        trainer.callback_metrics.update({key: torch.tensor(value) for key, value in logged.items()})
        self._weigh(trainer, seconds)

    def look(self, encoder: Encoder) -> dict[str, float]:
        """The numbers of an encoder: ``<kind>_miou`` and ``<kind>_miou_<group>``, as fractions."""
        numbers: dict[str, float] = {}
        train, test = self._sample
        classes = self.labels.classes
        for kind in self.kinds:
            if kind == "knn":
                confusion = dense_retrieval(
                    encoder, train, test, classes, self.retrieval, self.layer
                ).confusion
            else:
                confusion = linear_readout(encoder, train, test, classes, self.readout, self.layer).confusion
            numbers[f"{kind}_miou"] = confusion.miou()
            groups = classes.numbered()
            numbers |= {f"{kind}_miou_{name}": confusion.group_iou(each) for name, each in groups.items()}
        return numbers

    def _weigh(self, trainer: L.Trainer, seconds: float) -> None:
        """Says once when probing takes more of the run than it should."""
        self._spent += seconds
        share = self._spent / (time.perf_counter() - self._began)
        if not self._told and self._spent > _LONG and share > _DEAR and trainer.is_global_zero:
            self._told = True
            _log.warning(
                "probe %s takes %.0f %% of the time: raise Probes.every_n_steps (%d) or lower train_images",
                *(self.name, 100 * share, self.every_n_steps),
            )

    # ---- what is kept
    def state_dict(self) -> dict[str, Any]:
        """The best values so far."""
        return {"best": dict(self.best)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes up those of the run that is resumed."""
        self.best = dict(state_dict["best"])


def on_first(trainer: L.Trainer, compute: Callable[[], T]) -> T:
    """What the first process computes, on every process; the others wait for it.

    Args:
        trainer: whose processes they are.
        compute: called on the first process alone; its result must be plain data or tensors on the host.

    Raises:
        UserError: on the other processes, with the message of whatever the first one raised. The first raises
            its own error: were it silent, the others would wait for ever.
    """
    failure: Exception | None = None
    said: tuple[Any, str | None] = (None, None)
    if trainer.is_global_zero:
        try:
            said = (compute(), None)
        except Exception as error:
            failure, said = error, (None, str(error) or type(error).__name__)
    found, problem = trainer.strategy.broadcast(said)
    if failure is not None:
        raise failure
    if problem is not None:
        raise UserError(problem)
    result: T = found
    return result


def _probes(trainer: L.Trainer) -> list[Probes]:
    return [one for one in getattr(trainer, "callbacks", []) if isinstance(one, Probes)]

"""``env.json``: what ran, with which versions, on which machine, from which command and configuration."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import platform
import shlex
import subprocess
from collections.abc import Sequence, Sized
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.trainer.states import TrainerFn

import poodle_lightning
from poodle_lightning.callbacks.checkpoints import write_atomically
from poodle_lightning.callbacks.metrics_file import MetricsFile
from poodle_lightning.callbacks.throughput import clips_in

_log = logging.getLogger(__name__)
_PACKAGES = (
    *("torch", "torchvision", "lightning", "jsonargparse", "kornia", "av"),
    *("timm", "numpy", "opencv-python-headless"),
)


def versions() -> dict[str, str]:
    """Version of Python, of this package and of what it stands on ("missing" where not installed)."""
    found = {"python": platform.python_version(), "poodle-lightning": poodle_lightning.__version__}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "missing"
    return found


def git_state(folder: Path) -> dict[str, Any] | None:
    """Commit of the repository around ``folder`` and whether it has uncommitted changes; None outside one."""

    def git(*words: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", *words], cwd=folder, capture_output=True, text=True, timeout=10, check=True
            )
        except (OSError, subprocess.SubprocessError):
            return None
        return done.stdout.strip()

    commit = git("rev-parse", "HEAD")
    if commit is None:
        return None
    return {"commit": commit, "dirty": bool(git("status", "--porcelain", "--untracked-files=no"))}


def machine() -> dict[str, Any]:
    """Processor count, and the name and memory of each GPU."""
    gpus = []
    if torch.cuda.is_available():
        for number in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(number)
            gpus.append({"name": properties.name, "gib": round(properties.total_memory / 2**30, 1)})
    return {"system": platform.platform(), "cpus": os.cpu_count(), "gpus": gpus}


class Record(L.Callback):
    """Writes ``env.json`` into the run folder (rank 0), and carries the metrics file over a resume.

    Args:
        command: the words of the command line.
        config: the whole configuration as YAML text, for its hash.
        resumed_from: checkpoint the run goes on from.
    """

    def __init__(
        self, command: Sequence[str] = (), config: str = "", resumed_from: str | None = None
    ) -> None:
        self.content: dict[str, Any] = {
            "started": datetime.now(UTC).isoformat(timespec="seconds"),
            "command": shlex.join(command),
            "config_sha256": hashlib.sha256(config.encode()).hexdigest(),
            "resumed_from": resumed_from,
        }
        self._earlier: list[Any] | None = None

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Agrees on rank 0's run folder, then writes what is known before data are read."""
        agreed = trainer.strategy.broadcast(trainer.default_root_dir)
        if agreed != trainer.default_root_dir:
            # ranks started apart cannot know rank 0's clock; Lightning has no public way to set this later
            vars(trainer)["_default_root_dir"] = agreed
        self.content |= {
            "versions": versions(),
            "git": git_state(Path.cwd()),
            "machine": machine(),
            "devices": trainer.world_size,
            "precision": str(trainer.precision),
        }
        self._write(trainer)

    def on_load_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Without training, too, the epoch is that of the weights: temperatures and queues follow it."""
        if trainer.state.fn != TrainerFn.FITTING:
            trainer.fit_loop.epoch_progress.current.completed = checkpoint["epoch"]

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Adds the sizes of the data; drops metrics of an attempt that went further than its checkpoint."""
        data = trainer.train_dataloader
        with_size: dict[str, Any] = {"batches_per_epoch": trainer.num_training_batches}
        dataset = getattr(data, "dataset", None)
        if isinstance(dataset, Sized):
            with_size["clips"] = len(dataset)
        per_device = getattr(getattr(trainer, "datamodule", None), "batch_size", None) or getattr(
            data, "batch_size", None
        )
        if isinstance(per_device, int):
            with_size["global_batch"] = per_device * trainer.world_size * trainer.accumulate_grad_batches
        self.content["data"] = with_size
        self.content["start_step"] = trainer.global_step
        self._write(trainer)
        for logger in trainer.loggers:
            if isinstance(logger, MetricsFile):
                logger.resume_at(trainer.global_step)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Corrects Lightning's count of steps, and adds the global batch where only a batch can tell it."""
        counter = trainer.fit_loop.epoch_loop
        if counter._batches_that_stepped != trainer.global_step:
            # one too many after a run that broke off within a step: its rows would be numbered wrongly
            counter._batches_that_stepped = trainer.global_step
        data = self.content.get("data", {})
        if "global_batch" not in data:
            data["global_batch"] = clips_in(batch) * trainer.world_size * trainer.accumulate_grad_batches
            self._write(trainer)

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Notes the end."""
        self.content["ended"] = datetime.now(UTC).isoformat(timespec="seconds")
        self.content["end_step"] = trainer.global_step
        self._write(trainer)

    def _write(self, trainer: L.Trainer) -> None:
        if not trainer.is_global_zero:
            return
        path = Path(trainer.default_root_dir) / "env.json"
        if self._earlier is None:
            self._earlier = _earlier_starts(path)
        content = {**self.content, "earlier": self._earlier} if self._earlier else self.content
        text = json.dumps(content, indent=2, default=str) + "\n"

        def write(part: Path) -> None:
            part.write_text(text)

        write_atomically(path, write)


def _earlier_starts(path: Path) -> list[Any]:
    """The starts noted by the runs that this one goes on from, oldest first."""
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError):
        return []
    earlier = content.pop("earlier", [])
    return [*earlier, content]

"""How fast a run is, what it waits for, and when it will be done."""

from __future__ import annotations

import logging
import math
import sys
import time
from contextlib import ExitStack
from datetime import timedelta
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import RichProgressBar
from torch import Tensor

from poodle_lightning.analysis.flops import Counter, counted
from poodle_lightning.analysis.peaks import peak_flops
from poodle_lightning.data.actions import ActionBatch
from poodle_lightning.types import Clip

_log = logging.getLogger(__name__)
_GIB = 2.0**30


class Throughput(L.Callback):
    """Logs the speed, the wait for data, the arithmetic and the memory of each logging interval.

    * ``perf/pairs_per_s``: clips of all devices per second of training (validation is left out), pairs or
      not; shown as clips/s where they are none. Labelled images are ``perf/images_per_s``.
    * ``perf/data_wait``: share of the training time in which the host stood waiting for the next batch. The
      device may still have been at work, so this is an upper bound of what faster data would save.
    * ``perf/tflops``: floating-point operations a second of one device, 10¹²: convolutions and products of
      everything that a training step runs (both networks, forward and backward, the flow network), counted in
      the first step; a multiply-add is two of them, and what is computed again (``recompute``) counts once.
    * ``perf/mfu``: that as a share of what the GPU can do at most (``analysis.peaks``), where it is known.
    * ``perf/gpu_gb``: on CUDA, peak memory of this process's tensors so far, GiB.
    * ``perf/host_gb``: peak resident memory of this process so far, GiB; workers are processes of their own.

    Args:
        print_every: seconds between two progress lines where there is no progress bar; None prints none.
    """

    def __init__(self, print_every: float | None = None) -> None:
        self.print_every = print_every
        self.latest: dict[str, float] = {}
        self._key = "perf/pairs_per_s"
        self._unit = "pairs"
        self._counting = ExitStack()
        self._counter: Counter | None = None
        self._flops_per_clip: float | None = None
        self._clear()
        self._left = self._began = self._printed = 0.0

    def _clear(self) -> None:
        self._pairs = 0
        self._steps = 0
        self._waited = self._worked = 0.0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Starts the clocks."""
        self._clear()
        self.latest = {}
        self._left = self._printed = time.perf_counter()
        self._last_step = trainer.global_step
        if pl_module.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(pl_module.device)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Validation is not training time."""
        self._left = time.perf_counter()

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """The batch is here: the wait is over. The arithmetic of the first one is counted."""
        self._began = time.perf_counter()
        self._waited += self._began - self._left
        if self._flops_per_clip is None:
            self._counter = self._counting.enter_context(counted())

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Counts the batch; at a logging step, reports."""
        self._counting.close()
        if self._counter is not None:
            self._flops_per_clip = 2.0 * self._counter.total / max(1, clips_in(batch))
            self._counter = None
        self._left = time.perf_counter()
        self._worked += self._left - self._began
        self._unit = _unit_of(batch)
        self._key = "perf/images_per_s" if self._unit == "images" else "perf/pairs_per_s"
        self._pairs += clips_in(batch) * trainer.world_size
        step = trainer.global_step
        self._steps += step - self._last_step
        due = step != self._last_step and (step % logging_interval(trainer) == 0 or not self.latest)
        self._last_step = step
        if due and self._worked + self._waited > 0:
            self._report(trainer, pl_module, outputs)
            self._left = time.perf_counter()

    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        """Ends a count that was broken off."""
        self._counting.close()

    def _report(self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any) -> None:
        elapsed = self._worked + self._waited
        perf = {self._key: self._pairs / elapsed, "perf/data_wait": self._waited / elapsed}
        if self._flops_per_clip is not None:
            flops = self._flops_per_clip * self._pairs / trainer.world_size / elapsed
            perf["perf/tflops"] = flops / 1e12
            peak = _peak(pl_module.device, str(trainer.precision))
            if peak is not None:
                perf["perf/mfu"] = flops / peak
        if pl_module.device.type == "cuda":
            perf["perf/gpu_gb"] = torch.cuda.max_memory_allocated(pl_module.device) / _GIB
        resident = _resident_peak()
        if resident is not None:
            perf["perf/host_gb"] = resident / _GIB
        if trainer.global_step % logging_interval(trainer) == 0:
            for logger in trainer.loggers:
                # the row of this step: Lightning numbers steps from 0 in its logs
                logger.log_metrics(perf, step=trainer.global_step - 1)
        self.latest = {**perf, "eta_s": self._seconds_left(trainer, elapsed)}
        loss = outputs.get("loss") if isinstance(outputs, dict) else outputs
        if isinstance(loss, Tensor):
            self.latest["loss"] = loss.item() * trainer.accumulate_grad_batches
        self._clear()
        now = time.perf_counter()
        if (
            self.print_every is not None
            and now - self._printed >= self.print_every
            and trainer.is_global_zero
        ):
            self._printed = now
            _log.info(self.line(trainer))

    def _seconds_left(self, trainer: L.Trainer, elapsed: float) -> float:
        total = trainer.estimated_stepping_batches
        if self._steps == 0 or not math.isfinite(total) or total < 0:
            return math.nan
        return (total - trainer.global_step) * elapsed / self._steps

    def line(self, trainer: L.Trainer) -> str:
        """The state of the run in one line."""
        total = trainer.estimated_stepping_batches
        of = f"/{int(total)}" if math.isfinite(total) and total > 0 else ""
        return f"epoch {trainer.current_epoch}  step {trainer.global_step}{of}  " + "  ".join(
            f"{name} {value}" for name, value in self.words().items()
        )

    def words(self) -> dict[str, str]:
        """The latest numbers as short text, for the progress bar."""
        words: dict[str, str] = {}
        if "loss" in self.latest:
            words["loss"] = f"{self.latest['loss']:.4f}"
        if self._key in self.latest:
            words[f"{self._unit}/s"] = f"{self.latest[self._key]:.3g}"
            words["data wait"] = f"{100 * self.latest['perf/data_wait']:.0f}%"
        if "perf/mfu" in self.latest:
            words["MFU"] = f"{100 * self.latest['perf/mfu']:.0f}%"
        memory = next((key for key in ("perf/gpu_gb", "perf/host_gb") if key in self.latest), None)
        if memory is not None:
            words["GiB"] = f"{self.latest[memory]:.1f}"
        if math.isfinite(self.latest.get("eta_s", math.nan)):
            words["ETA"] = str(timedelta(seconds=round(self.latest["eta_s"])))
        return words


class ProgressBar(RichProgressBar):
    """Lightning's bar with the run's own numbers: loss, pairs/s, data-wait share, time left of the whole run.

    Args:
        throughput: where the numbers come from.
        refresh_rate: batches between two updates.
    """

    def __init__(self, throughput: Throughput, refresh_rate: int = 5) -> None:
        super().__init__(refresh_rate=refresh_rate)
        self._throughput = throughput

    def get_metrics(self, trainer: L.Trainer, pl_module: L.LightningModule) -> dict[str, Any]:
        """The numbers shown; none of them is read from the device for the sake of the bar."""
        return dict(self._throughput.words())


def logging_interval(trainer: L.Trainer) -> int:
    """Optimiser steps between two logged ones (``trainer.log_every_n_steps``, which may be 0)."""
    return max(1, int(getattr(trainer, "log_every_n_steps", 1)))


def _peak(device: torch.device, precision: str) -> float | None:
    return peak_flops(torch.cuda.get_device_name(device), precision) if device.type == "cuda" else None


def _resident_peak() -> int | None:
    """Bytes; the system counts in KiB, but for macOS, which counts in bytes. Windows has no such count."""
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _unit_of(batch: Any) -> str:
    """What a batch holds, as the progress line calls it."""
    if hasattr(batch, "images"):  # all kinds of labelled ones
        return "images"
    if isinstance(batch, ActionBatch):
        return "clips"
    return "clips" if isinstance(batch, Clip) and batch.frames.shape[1] != 2 else "pairs"


def clips_in(batch: Any) -> int:
    """Number of clips in a batch: its length, or that of its first tensor."""
    if isinstance(batch, (list, tuple)) and batch:
        return clips_in(batch[0])
    if isinstance(batch, dict) and batch:
        return clips_in(next(iter(batch.values())))
    try:
        return len(batch)
    except TypeError:
        return 1

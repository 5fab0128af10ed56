"""When a run goes wrong: it stops at a clean point, says why, and leaves what is needed to go on.

* A loss that is not finite stops the run before the weights are touched, with a file that replays the batch.
* SIGTERM, SIGUSR1 (SLURM's warning) and Ctrl-C end the step that is running, then save and stop.
* Any other exception saves too, on rank 0; one on another rank alone ends the run without a new checkpoint.
"""

from __future__ import annotations

import atexit
import dataclasses
import logging
import os
import shutil
import signal
import subprocess
import threading
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch import Tensor, nn

from poodle_lightning.callbacks.checkpoints import write_atomically
from poodle_lightning.callbacks.throughput import logging_interval
from poodle_lightning.ops.geometry import Affine
from poodle_lightning.types import Clip, UserError

_log = logging.getLogger(__name__)
_SIGNALS = [getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGUSR1") if hasattr(signal, name)]
_LAST_WORD = getattr(signal, "SIGKILL", signal.SIGTERM)
INTERRUPTED = "interrupted.ckpt"
NONFINITE = "nonfinite.ckpt"  # never resumed from: its weights are not finite
REPLAY_FORMAT = 1


class NonFiniteLoss(UserError):
    """The loss became NaN or infinite."""


class Stopped(SIGTERMException):
    """The run was asked to stop by a signal, and did after a whole step.

    Args:
        signum: which signal; the process exits with 128 + signum.
    """

    def __init__(self, signum: int) -> None:
        super().__init__(128 + signum)
        self.signum = signum


class Faults(L.Callback):
    """Stops cleanly and leaves a checkpoint.

    All ranks agree after every backward pass, so that they stop at the same step and none waits for another
    that is gone; on one process nothing is exchanged, and on CUDA the host waits for the forward pass only.

    Args:
        save: write ``checkpoints/interrupted.ckpt`` when the run is cut short.
    """

    def __init__(self, save: bool = True) -> None:
        self.save = save
        self._handlers: dict[int, Any] = {}
        self._process = os.getpid()
        self._asked = 0  # the signal received by this process
        self._agreed = 0  # the signal that all ranks stop for
        self._training = False
        self._batch: Any = None
        self._finite: Tensor | None = None
        self._ready: torch.cuda.Event | None = None

    # ---- signals
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Takes over the signals (from Lightning, which would leave no checkpoint)."""
        self._training = True
        self._asked = signal.SIGTERM if trainer.received_sigterm else 0
        self._agreed = 0
        self._torn = False
        if threading.current_thread() is threading.main_thread():
            self._process = os.getpid()
            self._handlers = {number: signal.signal(number, self._on_signal) for number in _SIGNALS}

    def _on_signal(self, signum: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:
            _in_worker(signum)
            return
        if self._asked == signum:
            self._torn = True  # anywhere in a step: what is in memory now is not worth a checkpoint
            raise Stopped(signum)
        self._asked = signum
        name = signal.Signals(signum).name
        _log.warning("%s: stopping after this step; send it again to stop at once", name)

    def _release(self) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._handlers = {}
        self._training = False
        self._batch = None

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Gives the signals back."""
        self._release()

    # ---- every step
    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Keeps the batch in sight, for the replay file."""
        self._batch = batch

    def on_before_backward(self, trainer: L.Trainer, pl_module: L.LightningModule, loss: Tensor) -> None:
        """Looks at the loss without making the device wait."""
        finite = loss.detach().isfinite().all()
        if finite.is_cuda:
            host = torch.empty((), dtype=torch.bool, pin_memory=True)
            finite = host.copy_(finite, non_blocking=True)
            self._ready = torch.cuda.Event()
            self._ready.record()
        self._finite = finite

    def on_after_backward(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Decides, with all ranks, before the optimiser moves anything."""
        if self._ready is not None:
            self._ready.synchronize()
            self._ready = None
        bad = int(self._finite is not None and not bool(self._finite))
        found = [bad, int(self._asked)]
        if trainer.world_size > 1:
            word = torch.tensor(found, device=trainer.strategy.root_device)
            dist.all_reduce(word, op=dist.ReduceOp.MAX)
            found = word.tolist()
        self._agreed = found[1]
        if found[0]:
            self._stop_nonfinite(trainer, here=bool(bad))

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """The optimiser's step is whole: stops here if that was asked (not amid accumulated batches)."""
        self._batch = None
        asked = self._agreed if trainer.world_size > 1 else self._asked
        if asked and not trainer.fit_loop._should_accumulate():
            self._log_last_step(trainer)
            raise Stopped(asked)

    def _log_last_step(self, trainer: L.Trainer) -> None:
        """Lightning logs a step after the callbacks, which this one does not reach."""
        if trainer.global_step % logging_interval(trainer) == 0:
            values = {name: float(value) for name, value in trainer.callback_metrics.items()}
            values = {name: value for name, value in values.items() if name.startswith("train/")}
            for logger in trainer.loggers:
                logger.log_metrics({"epoch": trainer.current_epoch, **values}, step=trainer.global_step - 1)

    def on_validation_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:  # fmt: skip
        """A long validation does not hold up a stop; several ranks finish it, to stay together."""
        if self._training and self._asked and trainer.world_size == 1:
            raise Stopped(self._asked)

    # ---- the end
    def _stop_nonfinite(self, trainer: L.Trainer, here: bool) -> None:
        step = trainer.global_step
        if not here:
            raise NonFiniteLoss(f"step {step}: the loss is not finite on another rank; see its message")
        path = Path(trainer.default_root_dir) / f"replay_step{step}_rank{trainer.global_rank}.pt"
        save_replay(path, self._batch, step=step, epoch=trainer.current_epoch)
        raise NonFiniteLoss(
            f"step {step}: the loss is not finite; the weights are as before this step, "
            f"the batch is in {path}. Look at it, lower the learning rate or use --trainer.precision 32-true"
        )

    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        """Leaves a checkpoint of the last whole step, then tells the other processes."""
        training, together = self._training, isinstance(exception, (Stopped, NonFiniteLoss))
        self._release()
        if training and self.save and not self._torn and (trainer.is_global_zero or together):
            self._leave_checkpoint(trainer, pl_module, exception)
        if not trainer.is_global_zero:
            return
        kill = getattr(trainer.strategy.launcher, "kill", None)
        if trainer.world_size > 1 and not together and kill is not None:
            kill(signal.SIGTERM)
            # one that waits for this process hears nothing, and would wait for long or complain of the end
            atexit.register(kill, _LAST_WORD)
        if isinstance(exception, Stopped) and exception.signum == getattr(signal, "SIGUSR1", None):
            _requeue()

    def _leave_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        spoilt = isinstance(exception, NonFiniteLoss) and not _all_finite(pl_module)
        path = Path(trainer.default_root_dir) / "checkpoints" / (NONFINITE if spoilt else INTERRUPTED)
        try:
            if trainer.world_size == 1 or isinstance(exception, (Stopped, NonFiniteLoss)):
                trainer.save_checkpoint(path, weights_only=False)
            else:
                # save_checkpoint ends with a barrier, at which the other ranks will not arrive
                content = trainer._checkpoint_connector.dump_checkpoint(weights_only=False)
                trainer.strategy.save_checkpoint(content, path)
        except Exception as error:
            _log.error("no checkpoint could be left behind: %s", error)
            return
        if trainer.is_global_zero:
            advice = "its weights are not finite" if spoilt else "--ckpt_path last goes on from it"
            _log.warning("stopped at step %d; left %s (%s)", trainer.global_step, path, advice)


def _in_worker(signum: int) -> None:
    """A loader's worker inherits the handler: Ctrl-C is for the main process, a termination is for itself."""
    if signum == signal.SIGTERM:
        signal.signal(signum, signal.SIG_DFL)
        os.kill(os.getpid(), signum)


def _all_finite(module: nn.Module) -> bool:
    return all(
        bool(value.isfinite().all()) for value in module.state_dict().values() if isinstance(value, Tensor)
    )


def _requeue() -> None:
    """Under SLURM, hands the job back to the queue after its warning signal."""
    job, scontrol = os.environ.get("SLURM_JOB_ID"), shutil.which("scontrol")
    if job and job.isdigit() and scontrol:
        with suppress(OSError, subprocess.SubprocessError):
            subprocess.run([scontrol, "requeue", job], timeout=60, check=False)


# ---- the replay file
def save_replay(path: Path, batch: Any, **facts: Any) -> None:
    """Writes a batch as tensors and plain data (``torch.load(weights_only=True)`` reads it).

    Args:
        path: where.
        batch: a :class:`Clip`, or any nest of dataclasses, containers and tensors.
        facts: what else to note, e.g. ``step``.
    """
    content = {"format": REPLAY_FORMAT, **facts, "batch": _plain(batch)}
    write_atomically(path, lambda part: torch.save(content, part))


def load_replay(path: str | Path) -> tuple[Clip, dict[str, Any]]:
    """The clip of a replay file, and the facts noted with it (``step``, ``epoch``).

    Raises:
        UserError: the file is missing, torn or not a replay of a clip.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        fields = dict(content.pop("batch"))
        fields["window"] = Affine(fields["window"]["matrix"])
        fields["size"] = tuple(fields["size"])
        fields["skipped"] = ()
        return Clip(**fields), content
    except Exception as error:
        raise UserError(f"{path}: not a replay file of a clip ({error})") from error


def _plain(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().cpu()
    if value is None or isinstance(value, (str, int, float, bool)):
        return value
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {str(name): _plain(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return repr(value)

"""Checkpoints that are whole or absent: atomic writing, and telling a whole file from a torn one."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO
from torch import nn

from poodle_lightning.types import UserError


def write_atomically(path: Path, write: Callable[[Path], None]) -> None:
    """Puts a file in place in one step: write beside it, flush to disk, rename.

    A process that is killed at any moment leaves the old file or the new one, never half of one.

    Args:
        path: where the file shall be.
        write: writes the whole file at the path it is given.

    Raises:
        UserError: it cannot be written (disk full, read-only folder, ...); nothing is left behind.
    """
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(part)
        with part.open("rb") as file:
            os.fsync(file.fileno())
        part.replace(path)
        _sync_folder(path.parent)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as RuntimeError
        raise UserError(f"cannot write {path}: {error}; free space or choose another folder") from error
    finally:
        with suppress(OSError):
            part.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    """Makes the rename itself survive a power cut; some file systems cannot, which is no error."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


class AtomicCheckpointIO(TorchCheckpointIO):
    """Lightning's checkpoint files, written atomically and read as tensors and plain data only.

    Lightning's own writer holds the whole file in memory, moves it between disks, does not flush it, and
    takes a refused permission for success.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | os.PathLike[str], storage_options: Any | None = None
    ) -> None:
        """Writes ``checkpoint`` at ``path`` or raises :class:`UserError`."""
        close_epoch(checkpoint)
        write_atomically(Path(path), lambda part: torch.save(checkpoint, part))

    def load_checkpoint(
        self,
        path: str | os.PathLike[str],
        map_location: Any = "cpu",
        weights_only: bool | None = None,
    ) -> dict[str, Any]:
        """Reads a checkpoint; ``weights_only`` is always true, whatever is asked."""
        # a strategy that spawns processes brings its weights back in such a file, bare
        return read_checkpoint(Path(path), map_location, bare=True)


class TimedCheckpoint(ModelCheckpoint):
    """Saves by the clock, and asks rank 0 for the time at every 20th step only.

    Lightning's own asks at every step, which under DDP is a message that all devices wait for.
    """

    _STEPS = 20

    @property
    def state_key(self) -> str:
        """That of Lightning's own, so that a run goes on from a checkpoint of either."""
        return super().state_key.replace(type(self).__qualname__, ModelCheckpoint.__qualname__, 1)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Saves when it is time."""
        if trainer.global_step % self._STEPS == 0:
            super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)


def close_epoch(checkpoint: dict[str, Any]) -> None:
    """Makes a checkpoint that was taken when an epoch had ended say so; others stay as they are.

    Lightning saves there before it counts the epoch as complete. A run that is limited by steps then goes
    through that epoch once more without a batch and counts it twice, so its data would be those of the epoch
    after next. Where the limit of steps ended a run inside an epoch, the epoch is open still: a longer run
    goes on with the rest of it.
    """
    loop = checkpoint.get("loops", {}).get("fit_loop")
    if loop is None:
        return
    epochs, batches = loop["epoch_progress"], loop["epoch_loop.batch_progress"]
    total = epochs["total"]
    if not total["ready"] == total["started"] == total["processed"] == total["completed"] + 1:
        return
    if not batches["is_last_batch"]:
        for count in (total, epochs["current"]):
            count["processed"] = count["completed"]
        return
    for count in (total, epochs["current"]):
        count["completed"] = count["processed"]
    batches["current"] = dict.fromkeys(batches["current"], 0)
    batches["is_last_batch"] = False


def read_checkpoint(path: Path, map_location: Any = "cpu", bare: bool = False) -> dict[str, Any]:
    """The content of a checkpoint, restricted to tensors and plain data.

    Args:
        path: the file.
        map_location: see ``torch.load``.
        bare: weights alone will do as well.

    Raises:
        UserError: the file is missing, torn, or holds something else (code, for instance).
    """
    if not path.is_file():
        raise UserError(f"{path}: no such checkpoint")
    damage = damage_of(path)
    if damage is not None:
        raise UserError(f"{path}: {damage}; use another checkpoint")
    try:
        content = torch.load(path, map_location=map_location, weights_only=True)
    except Exception as error:
        reason = str(error).strip().splitlines()[0][:120]
        problem = f"not a checkpoint of tensors and plain data, refused ({reason})"
        raise UserError(f"{path}: {problem}") from error
    if not isinstance(content, dict) or not (bare or "state_dict" in content):
        raise UserError(f"{path}: not a checkpoint of a run (no state_dict in it)")
    return content


def check_fits(path: Path, module: nn.Module) -> None:
    """Compares names and shapes of a checkpoint with a model; reads no weights.

    Raises:
        UserError: the checkpoint is of another architecture.
    """
    there = torch.load(path, map_location="meta", weights_only=True)["state_dict"]
    here = module.state_dict()
    wrong = [name for name in {**here, **there} if _shape(here, name) != _shape(there, name)]
    if wrong:
        name, more = wrong[0], f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
        raise UserError(
            f"--ckpt_path {path}: the checkpoint is of another architecture: {name} is {_shape(there, name)}"
            f" there, {_shape(here, name)} in this model{more}; use the config.yaml of its run"
        )


def _shape(state: dict[str, Any], name: str) -> str:
    return "×".join(map(str, state[name].shape)) or "a number" if name in state else "missing"


def damage_of(path: Path) -> str | None:
    """What is wrong with the bytes of a checkpoint file, or None: its archive's checksums are verified."""
    try:
        if path.stat().st_size == 0:
            return "empty file"
        with zipfile.ZipFile(path) as archive:
            torn = archive.testzip()
    except zipfile.BadZipFile:
        return "truncated, or not a checkpoint"
    except (OSError, EOFError, ValueError, RuntimeError) as error:
        return f"cannot be read ({error})"
    return None if torn is None else f"damaged (checksum of {torn})"

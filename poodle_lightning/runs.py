"""Run folders: ``<root>/<name>/<YYYY-MM-DD_HH-MM-SS>/``, and finding what a run goes on from."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path

from poodle_lightning.callbacks.checkpoints import damage_of, read_checkpoint
from poodle_lightning.callbacks.faults import NONFINITE
from poodle_lightning.types import UserError

_log = logging.getLogger(__name__)
DEFAULT_ROOT = "runs"
LOG_NAME = "train.log"
TIME_FORMAT = "%Y-%m-%d_%H-%M-%S"
TIME_VARIABLE = "POODLE_RUN_TIME"
"""Environment variable with the run's time: processes of one run that are started apart share it."""


@dataclass(frozen=True)
class Run:
    """Where a run writes, and what it goes on from.

    Args:
        folder: the run's own folder.
        checkpoint: what it goes on from, or None.
        fresh: the folder is new, named by the time.
    """

    folder: Path
    checkpoint: Path | None = None
    fresh: bool = True


def plan(root: Path, name: str, verb: str, ckpt_path: str | None) -> Run:
    """Decides on folder and checkpoint; makes nothing.

    * no checkpoint, or an explicit path: a new folder ``<root>/<name>/<time>``;
    * ``last``: the newest run of that name with a usable checkpoint. ``fit`` goes on in its folder, the other
      verbs write to ``<folder>/<verb>``. ``fit`` starts anew where there is no earlier run, so that the same
      command serves the first start and every later one (a queue that restarts jobs).

    Args:
        root: folder of all runs.
        name: of the experiment.
        verb: fit, validate, test or predict.
        ckpt_path: a checkpoint, a run folder, ``last`` or None.

    Raises:
        UserError: the checkpoint is missing, torn or no checkpoint; ``last`` finds only damaged ones.
    """
    if ckpt_path is None:
        return Run(new_folder(root / name))
    if ckpt_path != "last":
        checkpoint = explicit(ckpt_path)
        read_checkpoint(checkpoint)
        return Run(new_folder(root / name), checkpoint)
    for folder in reversed(folders(root / name)):
        found = newest_checkpoint(folder)
        if found is not None:
            return Run(folder if verb == "fit" else folder / verb, found, fresh=False)
    if verb != "fit":
        raise UserError(
            f"--ckpt_path last: no run of {name!r} in {root} has a checkpoint; give a path, or --name"
        )
    _log.warning("--ckpt_path last: no run of %r in %s has a checkpoint; starting a new one", name, root)
    return Run(new_folder(root / name))


def explicit(ckpt_path: str) -> Path:
    """The checkpoint that a path means: itself, or the newest usable one of a run folder.

    Raises:
        UserError: there is none.
    """
    path = Path(ckpt_path)
    if path.is_dir():
        found = newest_checkpoint(path)
        if found is None:
            raise UserError(f"{path}: no checkpoint in this folder; give a .ckpt file or a run folder")
        return found
    if not path.is_file():
        raise UserError(
            f"{ckpt_path}: no such checkpoint; give a .ckpt file or a run folder (or --ckpt_path last)"
        )
    return path


def folders(root: Path) -> list[Path]:
    """The run folders of a name, oldest first."""
    if not root.is_dir():
        return []
    return sorted(path for path in root.iterdir() if path.is_dir() and _is_time(path.name))


def new_folder(root: Path) -> Path:
    """A folder named by the time, of this process's run or as agreed in the environment; not made yet.

    Two runs that start within a second get different seconds.
    """
    given = os.environ.get(TIME_VARIABLE)
    if given:
        if not _is_time(given):
            raise UserError(
                f"{TIME_VARIABLE}={given}: not a time like {datetime.now().strftime(TIME_FORMAT)}"
            )
        return root / given
    moment = datetime.now()
    while (root / moment.strftime(TIME_FORMAT)).exists():
        moment += timedelta(seconds=1)
    return root / moment.strftime(TIME_FORMAT)


@contextmanager
def shared_time(folder: Path) -> Iterator[None]:
    """Puts the run's time into the environment, for processes started from here, and takes it out again."""
    before = os.environ.get(TIME_VARIABLE)
    os.environ[TIME_VARIABLE] = folder.name
    try:
        yield
    finally:
        os.environ.pop(TIME_VARIABLE) if before is None else os.environ.update({TIME_VARIABLE: before})


def _is_time(text: str) -> bool:
    try:
        datetime.strptime(text, TIME_FORMAT)
    except ValueError:
        return False
    return True


def newest_checkpoint(folder: Path) -> Path | None:
    """The newest whole checkpoint of a run folder; passes over damaged ones with a warning.

    Args:
        folder: a run folder, or the ``checkpoints`` folder in it.

    Returns:
        Its path, or None where the run has no checkpoint at all.

    Raises:
        UserError: there are checkpoints, and all of them are damaged.
    """
    inside = folder / "checkpoints"
    candidates = _by_age(inside if inside.is_dir() else folder)
    for path in candidates:
        damage = damage_of(path)
        if damage is None:
            return path
        _log.warning("%s: %s; trying the one before", path, damage)
    if candidates:
        raise UserError(f"{folder}: none of its {len(candidates)} checkpoints is whole; start a new run")
    return None


def _by_age(folder: Path) -> list[Path]:
    """Newest first. ``last.ckpt`` may be a link: the file itself comes before a link to it."""
    found: dict[Path, Path] = {}
    for path in folder.glob("*.ckpt"):
        if not path.name.startswith(".") and path.name != NONFINITE and path.is_file():
            target = path.resolve()
            if target not in found or not path.is_symlink():
                found[target] = path
    return sorted(found.values(), key=lambda path: (path.stat().st_mtime_ns, path.name), reverse=True)


def clear_parts(folder: Path) -> None:
    """Removes what a killed process left half written."""
    for path in folder.rglob(".*.part"):
        path.unlink(missing_ok=True)


@contextmanager
def logged(folder: Path) -> Iterator[None]:
    """Copies messages and warnings of this package and of Lightning into ``<folder>/train.log``."""
    handler = logging.FileHandler(folder / LOG_NAME)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s", "%Y-%m-%d %H:%M:%S"))
    loggers = [logging.getLogger(name) for name in ("poodle_lightning", "lightning.pytorch")]
    for logger in loggers:
        logger.addHandler(handler)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeHandler(handler)
        handler.close()
        if [path.name for path in folder.iterdir()] == [LOG_NAME]:  # it failed before it began
            (folder / LOG_NAME).unlink()
            folder.rmdir()

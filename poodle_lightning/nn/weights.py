"""Reading weight files and putting them into modules, with errors a person can act on."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

from poodle_lightning.types import UserError

# Files from before PyTorch 1.6 do not list the classes they name; this is the one that they mostly hold.
_OLD_OBJECTS = ("argparse.Namespace",)


class LeftOut:
    """Stands where a file holds an object that is neither a tensor nor plain data; it is empty."""

    def __new__(cls, *arguments: object) -> Self:
        """Takes whatever the file would have made the object from, and drops it."""
        return super().__new__(cls)

    def __setstate__(self, state: object) -> None:
        """Drops the object's content."""


def read_file(path: str | Path, leave_out_objects: bool = False) -> dict[str, Any]:
    """The dictionary in a ``.safetensors`` file or in one that ``torch.save`` wrote, on the CPU.

    Files of ``torch.save`` are read with ``weights_only=True``: nothing in them is ever executed.

    Args:
        path: the file.
        leave_out_objects: checkpoints of other projects often hold their settings as objects
            (``argparse.Namespace``, omegaconf, NumPy scalars) beside the weights, which ``weights_only``
            refuses. True puts an empty :class:`LeftOut` in the place of each: no class of the file is
            imported, called or filled. False refuses the whole file.

    Raises:
        UserError: the file is missing, truncated, or holds something else than tensors and plain data.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path} is not a file: give the path of a checkpoint or of a weights file")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return dict(load_file(path))
        with safe_globals(_stand_ins(path) if leave_out_objects else []):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{path} is truncated, no checkpoint, or holds more than tensors and plain data, "
            "which is not loaded because it could run code: save the state dict alone"
        ) from error
    except (
        Exception
    ) as error:  # SafetensorError, RuntimeError, EOFError, OSError, ...: all say "not readable"
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise UserError(
            f"{path} is truncated or no checkpoint ({reason[0]}): copy or download it again"
        ) from error
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a {type(content).__name__}, not a dictionary: save a state dict")
    return content


def _stand_ins(path: Path) -> list[Any]:
    """For every class or function that the file names and PyTorch does not know: :class:`LeftOut`."""
    try:
        names = get_unsafe_globals_in_checkpoint(path)  # takes the pickle apart without running it
    except ValueError:
        names = list(_OLD_OBJECTS)
    return [(LeftOut, name) for name in names]


def read_state(path: str | Path) -> dict[str, Tensor]:
    """A bare state dict from a file, also from one that wraps it under ``"state_dict"`` or ``"model"``.

    Raises:
        UserError: see :func:`read_file`; or there are no tensors in it.
    """
    state = state_in(read_file(path))
    if not state:
        raise UserError(f"{path} holds no tensors: give a state dict")
    return state


def state_in(content: Mapping[str, Any]) -> dict[str, Tensor]:
    """The state dict in what :func:`read_file` returned, perhaps empty; see :func:`read_state`."""
    for wrapper in ("state_dict", "model"):
        if isinstance(content.get(wrapper), dict):
            content = content[wrapper]
            break
    return {key: value for key, value in content.items() if isinstance(value, Tensor)}


def load_state(module: nn.Module, state: Mapping[str, Tensor], source: str) -> None:
    """Fills a module from a state dict that has to fit it exactly.

    Only BatchNorm's ``num_batches_tracked`` may be missing (files older than PyTorch 0.4.1 lack it).

    Args:
        module: filled in place; untouched when an error is raised.
        state: names and tensors.
        source: where they are from, for messages.

    Raises:
        UserError: no name fits, a shape differs, or names are missing or left over.
    """
    expected = module.state_dict()
    common = expected.keys() & state.keys()
    if not common:
        raise UserError(
            f"{source}: no key matches the encoder; it expects names like {next(iter(expected), '?')!r}, "
            f"the file has {next(iter(state), '?')!r}: choose a file and an encoder that belong together"
        )
    for name in expected:
        if name in common and state[name].shape != expected[name].shape:
            wanted, got = tuple(expected[name].shape), tuple(state[name].shape)
            raise UserError(
                f"{source} is of another architecture: {name!r} should have the shape {wanted}, the file has "
                f"{got}: choose the encoder that the weights were made for"
            )
    missing = [name for name in expected if name not in common and not name.endswith("num_batches_tracked")]
    surplus = [name for name in state if name not in common]
    for names, what in ((missing, "lacks"), (surplus, "has in excess")):
        if names:
            raise UserError(
                f"{source} is of another architecture: it {what} {len(names)} keys, first {names[0]!r}: "
                "choose the encoder that the weights were made for"
            )
    module.load_state_dict(state, strict=False)

"""One file per verb that does not train. A verb is found by its file; it is imported only when it is called.

Such a file has ``NAME`` and ``HELP`` (plain strings: they are read without importing it),
``add_arguments(parser)`` and ``run(args, build) -> exit code``.
"""

from __future__ import annotations

import argparse
import ast
import importlib
import pkgutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

if TYPE_CHECKING:
    import lightning as L

Build = Callable[[list[str], list[str]], "tuple[L.LightningModule, L.LightningDataModule]"]
"""(config files, overrides such as ``--data.root=videos``) → (method, data module)."""


class Command(Protocol):
    """What a module in this folder offers."""

    NAME: str
    HELP: str

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Adds the verb's own arguments."""

    def run(self, args: argparse.Namespace, build: Build) -> int:
        """Does it; returns the exit code."""
        ...


def add_config_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds ``--config`` (may be repeated); any ``--data.…``, ``--model.…`` goes to ``args.overrides``."""
    parser.add_argument(
        "-c", "--config", action="append", default=[], metavar="FILE", help="configuration; may be repeated"
    )
    parser.set_defaults(overrides=[])


def names() -> dict[str, str]:
    """Verb → name of its module, sorted by verb."""
    found = {}
    for info in pkgutil.iter_modules(__path__):
        if not info.name.startswith("_"):
            found[_constants(info.name).get("NAME", info.name.replace("_", "-"))] = info.name
    return dict(sorted(found.items()))


def help_of(module: str) -> str:
    """The one-line help of a command module."""
    return _constants(module).get("HELP", "")


def load(module: str) -> Command:
    """Imports a command module."""
    return cast(Command, importlib.import_module(f"{__name__}.{module}"))


def _constants(module: str) -> dict[str, str]:
    """``NAME`` and ``HELP`` of a module, from its text."""
    path = Path(next(iter(__path__))) / f"{module}.py"
    found: dict[str, str] = {}
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, (ast.Assign, ast.AnnAssign)):
            target = node.targets[0] if isinstance(node, ast.Assign) else node.target
            value: Any = node.value
            if (
                isinstance(target, ast.Name)
                and isinstance(value, ast.Constant)
                and isinstance(value.value, str)
            ):
                found[target.id] = value.value
    return found

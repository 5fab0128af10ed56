"""``poodle-lightning list``: what there is to choose from, read from the source text in a blink."""

from __future__ import annotations

import argparse
import ast
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from poodle_lightning import recipes

if TYPE_CHECKING:
    from poodle_lightning.commands import Build

NAME = "list"
HELP = "methods, configurations, encoders, flow estimators that come with the package"
_PACKAGE = Path(__file__).resolve().parent.parent
_KINDS = ("methods", "configs", "encoders", "flow")


@dataclass(frozen=True)
class Found:
    """A class as its source shows it.

    Args:
        name: of the class.
        path: dotted path that a configuration names.
        bases: names of its bases.
        summary: first line of its docstring.
        about: first line of its file's docstring, which for a method names the paper.
    """

    name: str
    path: str
    bases: tuple[str, ...]
    summary: str
    about: str


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Which kind; all without one."""
    parser.add_argument("kind", nargs="?", choices=_KINDS, help="only these (default: all)")


def run(args: argparse.Namespace, build: Build) -> int:
    """Prints the lists."""
    makers = {
        "methods": lambda: _classes("methods", "Method"),
        "configs": _configs,
        "encoders": lambda: _classes("nn", "Encoder"),
        "flow": lambda: _classes("flow", "FlowEstimator", "Configured"),
    }
    blocks = [_block(kind, makers[kind]()) for kind in ([args.kind] if args.kind else _KINDS)]
    print("\n\n".join(blocks))
    return 0


def subclasses(folder: Path, *roots: str) -> list[Found]:
    """Public classes in the files of a folder that descend from one of ``roots``, by name."""
    found = {one.name: one for path in sorted(folder.glob("*.py")) for one in _read(path)}

    def descends(name: str) -> bool:
        return name in roots or (name in found and any(map(descends, found[name].bases)))

    chosen = [one for one in found.values() if one.name not in roots and any(map(descends, one.bases))]
    return sorted((one for one in chosen if not one.name.startswith("_")), key=lambda one: one.name)


def _read(path: Path) -> list[Found]:
    module = ".".join(path.relative_to(_PACKAGE.parent).with_suffix("").parts) if _inside(path) else path.stem
    found = []
    tree = ast.parse(path.read_text(encoding="utf-8"))
    about = _first_line(tree)
    for node in tree.body:
        if isinstance(node, ast.ClassDef):
            bases = tuple(ast.unparse(base).rsplit(".", 1)[-1] for base in node.bases)
            found.append(Found(node.name, f"{module}.{node.name}", bases, _first_line(node), about))
    return found


def _first_line(node: ast.Module | ast.ClassDef) -> str:
    return (ast.get_docstring(node) or "").split("\n")[0].replace("``", "").rstrip(".")


def _inside(path: Path) -> bool:
    return _PACKAGE in path.resolve().parents


def _classes(room: str, *roots: str) -> list[tuple[str, str]]:
    found = subclasses(_PACKAGE / room, *roots)
    return [(one.name, one.about if room == "methods" else one.summary) for one in found]


def _configs() -> list[tuple[str, str]]:
    return [(name, recipes.headline(path)) for name, path in recipes.shipped().items()]


def _block(kind: str, rows: Iterable[tuple[str, str]]) -> str:
    rows = list(rows)
    width = max((len(name) for name, _ in rows), default=0)
    return "\n".join([kind, *(f"  {name:<{width}}  {text}".rstrip() for name, text in rows)])

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
        functions: names of those that it writes itself.
    """

    name: str
    path: str
    bases: tuple[str, ...]
    summary: str
    about: str
    functions: frozenset[str]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Which kind; all without one."""
    parser.add_argument("kind", nargs="?", choices=_KINDS, help="only these (default: all)")


def run(args: argparse.Namespace, build: Build) -> int:
    """Prints the lists."""
    makers = {
        "methods": lambda: _classes("methods", "Method", writes="losses"),
        "configs": _configs,
        "encoders": lambda: _classes("nn", "Encoder"),
        "flow": lambda: _classes("flow", "FlowEstimator", "Configured"),
    }
    blocks = [_block(kind, makers[kind]()) for kind in ([args.kind] if args.kind else _KINDS)]
    print("\n\n".join(blocks))
    return 0


def subclasses(folder: Path, *roots: str, writes: str | None = None) -> list[Found]:
    """Public classes in the files of a folder that descend from one of ``roots``, by name.

    Args:
        folder: its files are read, none is imported.
        roots: names of the classes at the top, which are left out.
        writes: only classes that have this function from themselves or from a class between them and the
            root: the others are bases that do nothing alone.
    """
    found = {one.name: one for path in sorted(folder.glob("*.py")) for one in _read(path)}

    def descends(name: str) -> bool:
        return name in roots or (name in found and any(map(descends, found[name].bases)))

    def has(name: str) -> bool:
        if name in roots or name not in found:
            return False
        return writes in found[name].functions or any(map(has, found[name].bases))

    chosen = [one for one in found.values() if one.name not in roots and any(map(descends, one.bases))]
    chosen = [one for one in chosen if not one.name.startswith("_") and (writes is None or has(one.name))]
    return sorted(chosen, key=lambda one: one.name)


def _read(path: Path) -> list[Found]:
    module = ".".join(path.relative_to(_PACKAGE.parent).with_suffix("").parts) if _inside(path) else path.stem
    found = []
    tree = ast.parse(path.read_text(encoding="utf-8"))
    about = _first_line(tree)
    for node in tree.body:
        if isinstance(node, ast.ClassDef):
            bases = tuple(ast.unparse(base).rsplit(".", 1)[-1] for base in node.bases)
            functions = frozenset(part.name for part in node.body if isinstance(part, ast.FunctionDef))
            summary = _first_line(node)
            found.append(Found(node.name, f"{module}.{node.name}", bases, summary, about, functions))
    return found


def _first_line(node: ast.Module | ast.ClassDef) -> str:
    return (ast.get_docstring(node) or "").split("\n")[0].replace("``", "").rstrip(".")


def _inside(path: Path) -> bool:
    return _PACKAGE in path.resolve().parents


def _classes(room: str, *roots: str, writes: str | None = None) -> list[tuple[str, str]]:
    found = subclasses(_PACKAGE / room, *roots, writes=writes)
    return [(one.name, one.about if room == "methods" and not _named(one) else one.summary) for one in found]


def _named(one: Found) -> bool:
    """Whether a class names its own paper: one file holds a method and its variant."""
    return one.summary.startswith(f"{one.name}: ")


def _configs() -> list[tuple[str, str]]:
    return [(name, recipes.headline(path)) for name, path in recipes.shipped().items()]


def _block(kind: str, rows: Iterable[tuple[str, str]]) -> str:
    rows = list(rows)
    width = max((len(name) for name, _ in rows), default=0)
    return "\n".join([kind, *(f"  {name:<{width}}  {text}".rstrip() for name, text in rows)])

"""The configuration files that come with the package, and finding one by name. Imports nothing heavy."""

from __future__ import annotations

import difflib
from pathlib import Path

_HERE = Path(__file__).resolve().parent


def roots() -> list[Path]:
    """Where shipped files are: inside an installed package, or beside it in a checkout."""
    return [folder for folder in (_HERE / "configs", _HERE.parent / "configs") if folder.is_dir()]


def shipped(kind: str = "") -> dict[str, Path]:
    """Name (``experiment/quickstart.yaml``) → file, sorted.

    Args:
        kind: only those in this folder, e.g. ``experiment``.
    """
    found: dict[str, Path] = {}
    for root in roots():
        for path in sorted((root / kind).rglob("*.yaml")):
            found.setdefault(path.relative_to(root).as_posix(), path)
    return found


def find(name: str) -> Path:
    """The file that a name on the command line means.

    A path that exists, from the working folder, comes first; then a file of the package. ``.yaml`` and a
    leading ``configs/`` may be left out or given.

    Raises:
        UserError: there is none.
    """
    names = [name] if name.endswith((".yaml", ".yml", ".json")) else [name, f"{name}.yaml"]
    for candidate in names:
        if Path(candidate).is_file():
            return Path(candidate).resolve()
    for root in roots():
        for candidate in names:
            path = root / candidate.removeprefix("configs/")
            if path.is_file():
                return path
    from poodle_lightning.types import UserError

    raise UserError(
        f"{name}: no such configuration file{_near(name)} (`poodle-lightning list` shows the package's)"
    )


def headline(path: Path) -> str:
    """The first line of a file's header comment, without ``#``; empty where it has none."""
    with path.open(encoding="utf-8") as file:
        for line in file:
            text = line.strip()
            if text.startswith("#") and text.strip("# -="):
                return text.lstrip("#").strip()
            if text and not text.startswith("#"):
                break
    return ""


def _near(name: str) -> str:
    beside = [str(path) for path in Path(name).parent.glob("*.y*ml")]
    by_stem = {Path(path).stem: path for path in (*shipped(), *beside)}
    near = difflib.get_close_matches(Path(name).stem, list(by_stem), n=1, cutoff=0.65)
    return f": did you mean {by_stem[near[0]]}?" if near else ""

"""What a run folder holds, read without failing on what is missing or half written."""

from __future__ import annotations

import csv
import json
import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from poodle_lightning.draw.curves import Series


@dataclass(frozen=True)
class Skipped:
    """Sums of ``skipped.jsonl``.

    Args:
        refused: reason → videos refused before training.
        replaced: reason → requests that failed in training and were replaced.
        requested: training requests of all finished epochs.
        examples: reason → one path and detail.
    """

    refused: Counter[str]
    replaced: Counter[str]
    requested: int
    examples: dict[str, tuple[str, str]]

    def __bool__(self) -> bool:
        return bool(self.refused or self.replaced)


@dataclass(frozen=True)
class RunFiles:
    """A run folder.

    Args:
        folder: ``<root>/<name>/<time>``.
    """

    folder: Path

    @property
    def title(self) -> str:
        """Name and time of the run, as its folder says."""
        folder = self.folder.resolve()
        return f"{folder.parent.name} / {folder.name}"

    def metrics(self) -> dict[str, Series]:
        """Columns of ``metrics.csv`` as (steps, values), rows without a finite value left out."""
        path = self.folder / "metrics.csv"
        if not path.is_file():
            return {}
        found: dict[str, tuple[list[float], list[float]]] = {}
        with path.open(newline="", encoding="utf-8") as file:
            for row in csv.DictReader(file):
                step = _number(row.pop("step", None))
                for name, text in row.items():
                    value = _number(text)
                    if name and step is not None and value is not None:
                        steps, values = found.setdefault(name, ([], []))
                        steps.append(step)
                        values.append(value)
        return dict(sorted(found.items()))

    def skipped(self) -> Skipped:
        """Which videos could not be used, by reason."""
        summary = Skipped(Counter(), Counter(), 0, {})
        requested = 0
        path = self.folder / "skipped.jsonl"
        for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
            entry = _json(line)
            if entry.get("stage") == "epoch":
                requested += int(entry.get("requested", 0))
            elif "reason" in entry:
                counter = summary.refused if entry.get("stage") == "index" else summary.replaced
                counter[str(entry["reason"])] += 1
                example = (str(entry.get("path", "")), str(entry.get("detail", "")))
                summary.examples.setdefault(str(entry["reason"]), example)
        return Skipped(summary.refused, summary.replaced, requested, summary.examples)

    def environment(self) -> dict[str, str]:
        """``env.json`` as flat rows: nested keys joined by a dot."""
        path = self.folder / "env.json"
        return _flat(_json(path.read_text(encoding="utf-8"))) if path.is_file() else {}

    def config(self) -> str:
        """``config.yaml`` as it is, empty if there is none."""
        path = self.folder / "config.yaml"
        return path.read_text(encoding="utf-8") if path.is_file() else ""


def _number(text: Any) -> float | None:
    try:
        value = float(text)
    except (TypeError, ValueError):
        return None
    return value if math.isfinite(value) else None


def _json(text: str) -> dict[str, Any]:
    """An object; empty for the torn last line of a killed run."""
    try:
        entry = json.loads(text)
    except json.JSONDecodeError:
        return {}
    return entry if isinstance(entry, dict) else {}


def _flat(entry: dict[str, Any], prefix: str = "") -> dict[str, str]:
    rows: dict[str, str] = {}
    for key, value in entry.items():
        if isinstance(value, dict):
            rows |= _flat(value, f"{prefix}{key}.")
        elif isinstance(value, list):
            rows |= {prefix + key: ", ".join(map(str, value))} if value else {}
        elif value not in (None, ""):
            rows[prefix + key] = str(value)
    return rows

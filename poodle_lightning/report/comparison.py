"""Methods side by side: one table over seeds as Markdown and JSON, and what was equal and what was not."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

Kind = Literal["trained", "untrained", "position"]
Facts = Mapping[str, Mapping[str, Any]]
_HEADS = {"linear": "linear", "knn": "k-NN"}


@dataclass(frozen=True)
class Row:
    """A line of the table.

    Args:
        name: of the method, or of the control.
        kind: trained, the same network untrained, or the position alone.
        scores: measure (``linear_miou``, ``knn_miou_small``, …) → one fraction per seed.
        seconds: training time per seed; None where it is unknown.
        parameters: trainable, of the whole method.
        multiply_adds: of the network that is read, per image.
    """

    name: str
    kind: Kind
    scores: Mapping[str, Sequence[float]]
    seconds: Sequence[float | None] = ()
    parameters: int | None = None
    multiply_adds: int | None = None


@dataclass(frozen=True)
class Comparison:
    """What ``compare`` found.

    Args:
        rows: in the order of the table.
        equal: what all runs share.
        different: what methods do not share: name → method → value.
        seeds: of the runs.
        curves: method → measure → seed → (steps, values) of the probes.
        notes: sentences below the table.
    """

    rows: Sequence[Row]
    equal: Mapping[str, Any]
    different: Facts
    seeds: Sequence[int]
    curves: Mapping[str, Mapping[str, Mapping[int, tuple[Sequence[float], Sequence[float]]]]] = field(
        default_factory=dict
    )
    notes: Sequence[str] = ()


def split_facts(facts: Facts) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """What is the same everywhere, and what is not.

    Args:
        facts: method → name → value; a name that a method lacks counts as a value of its own.

    Returns:
        Name → value where all agree; name → method → value (None: has no such thing) where they do not.
    """
    names = list(dict.fromkeys(name for each in facts.values() for name in each))
    equal: dict[str, Any] = {}
    different: dict[str, dict[str, Any]] = {}
    for name in names:
        values = {method: each.get(name) for method, each in facts.items()}
        first = next(iter(values.values()))
        if all(value == first for value in values.values()):
            equal[name] = first
        else:
            different[name] = values
    return equal, different


def mean_and_spread(values: Sequence[float]) -> tuple[float, float]:
    """Mean, and standard deviation over n − 1: the seeds are a sample. NaN where there is too little."""
    finite = [value for value in values if math.isfinite(value)]
    if not finite:
        return math.nan, math.nan
    return statistics.fmean(finite), statistics.stdev(finite) if len(finite) > 1 else math.nan


def table(found: Comparison) -> str:
    """The table in Markdown, padded so that it reads well on a terminal too; scores in percent."""
    measures = list(found.rows[0].scores)
    head = ["", *map(_head, measures), "train s", "M param.", "G mult-adds"]
    rows = []
    for row in found.rows:
        cells = [_score(row.scores.get(measure, ())) for measure in measures]
        known = [second for second in row.seconds if second is not None]
        cells.append(f"{statistics.fmean(known):.0f}" if known else "–")
        cells.append("–" if row.parameters is None else f"{row.parameters / 1e6:.2f}")
        cells.append("–" if row.multiply_adds is None else f"{row.multiply_adds / 1e9:.2f}")
        rows.append([row.name, *cells])
    widths = [max(len(line[column]) for line in (head, *rows)) for column in range(len(head))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |"
        for line in (head, *rows)
    ]
    return "\n".join([lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]])


def explanation(found: Comparison) -> str:
    """What was equal, what was not, and the notes, as Markdown."""
    groups: dict[str, dict[str, Any]] = {}
    for name, value in found.equal.items():
        group, dot, rest = name.rpartition(".")
        groups.setdefault(group, {})[rest if dot else name] = value
    lines = [f"* equal{group and f', {group}'}: {_sentence(values)}" for group, values in groups.items()]
    lines += [f"* not equal: {name}: {_sentence(values)}" for name, values in found.different.items()]
    return "\n".join([*lines, "", *found.notes])


def write_comparison(folder: Path, found: Comparison) -> tuple[Path, Path]:
    """Write ``comparison.md`` and ``comparison.json``; returns their paths."""
    count = len(found.seeds)
    spread = f"mean ± standard deviation over {count} seeds" if count > 1 else "one seed, so no spread"
    text = f"# Comparison\n\nmIoU in %, {spread}.\n\n{table(found)}\n\n{explanation(found)}\n"
    summary = {
        row.name: {
            measure: dict(zip(("mean", "std"), mean_and_spread(values), strict=True))
            for measure, values in row.scores.items()
        }
        for row in found.rows
    }
    content = json.dumps(_plain({**asdict(found), "summary": summary}), indent=2) + "\n"
    paths = folder / "comparison.md", folder / "comparison.json"
    for path, what in zip(paths, (text, content), strict=True):
        part = path.with_name(f".{path.name}.part")
        part.write_text(what, encoding="utf-8")
        part.replace(path)
    return paths


def _head(measure: str) -> str:
    head, _, group = measure.partition("_miou")
    return f"{_HEADS[head]} {group.removeprefix('_') or 'all'}"


def _score(values: Sequence[float]) -> str:
    mean, spread = mean_and_spread(values)
    if math.isnan(mean):
        return "–"
    return f"{100 * mean:.1f}" + ("" if math.isnan(spread) else f" ± {100 * spread:.1f}")


def _sentence(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {'–' if value is None else value}" for name, value in values.items())


def _plain(value: Any) -> Any:
    """JSON has no NaN: what was not measured is null."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value

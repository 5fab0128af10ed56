"""The final runs as a table and as one record."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from benchmarks.record import table
from benchmarks.street.readouts import GROUPS
from benchmarks.street.runs import Line

TITLES = {
    "poodle": "PooDLe",
    "flowe": "FlowE",
    "sdm_only": "SDM only",
    "pooled_only": "pooled only",
    "supervised": "supervised",
    "random poodle": "untrained, with SDM",
    "random flowe": "untrained, dilated",
    "position": "position alone",
}


def by_row(lines: Sequence[Line]) -> dict[str, list[Line]]:
    """The runs of each row of the table, in the table's order."""
    found = {title: [x for x in lines if x["method"] == name] for name, title in TITLES.items()}
    return {title: runs for title, runs in found.items() if runs}


def final_table(lines: Sequence[Line]) -> str:
    """Means over seeds, smallest and largest behind them; cost beside."""
    rows = [
        [title, *(_spread([x[group] for x in runs]) for group in GROUPS), *_costs(runs)]
        for title, runs in by_row(lines).items()
    ]
    head = ["mIoU in % (lowest to highest seed)", *GROUPS, "GMAC/pair", "CPU s", "wall s"]
    return table(head, rows)


def encoders_table(lines: Sequence[Line]) -> str:
    """What the encoder alone gives, dilated, where a decoder was trained with it."""
    rows = [
        [title, *(_spread([x["encoder_alone"][group] for x in runs]) for group in GROUPS)]
        for title, runs in by_row([x for x in lines if "encoder_alone" in x]).items()
    ]
    return table(["encoder without its decoder", *GROUPS], rows)


def curve_table(lines: Sequence[Line], curve: Sequence[Line]) -> str:
    """The methods that were also trained for longer, at every budget; TMAC counts a whole training."""
    methods = {x["method"] for x in curve}
    rows = []
    for title, runs in by_row([x for x in [*lines, *curve] if x["method"] in methods]).items():
        for steps in sorted({x["setting"]["steps"] for x in runs}):
            same = [x for x in runs if x["setting"]["steps"] == steps]
            pairs = steps * same[0]["setting"]["batch"]
            compute = pairs * same[0]["training_gmac_per_pair"] / 1e3
            scored = [_spread([x[group] for x in same]) for group in GROUPS]
            rows.append([title, f"{pairs:,}", f"{compute:.1f}", len(same), *scored])
    return table(["", "pairs", "TMAC", "seeds", *GROUPS], rows)


def gains(lines: Sequence[Line], over: str, of: str = "poodle") -> dict[str, dict[str, Any]]:
    """By how much one method is ahead of another, seed by seed."""
    first = {x["seed"]: x for x in lines if x["method"] == of}
    second = {x["seed"]: x for x in lines if x["method"] == over}
    seeds = sorted(set(first) & set(second))
    found = {}
    for group in GROUPS:
        each = [round(first[seed][group] - second[seed][group], 2) for seed in seeds]
        found[group] = {"seeds": each, "mean": round(statistics.mean(each), 2)} if each else {}
    return found


def _spread(values: Sequence[float]) -> str:
    mean = statistics.mean(values)
    return f"{mean:.1f}" + (f" ({min(values):.1f}–{max(values):.1f})" if len(values) > 1 else "")


def _costs(runs: Sequence[Line]) -> list[str]:
    if "training_gmac_per_pair" not in runs[0]:
        return ["-", "-", "-"]
    means = [statistics.mean(x[key] for x in runs) for key in ("cpu_seconds", "wall_seconds")]
    return [f"{runs[0]['training_gmac_per_pair']:.2f}", *(f"{mean:.0f}" for mean in means)]

"""Plots of methods side by side, with the spread over seeds."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from poodle_lightning.draw.canvas import LIGHT, Theme, colour, figure
from poodle_lightning.draw.curves import Series

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def over_seeds(runs: Sequence[Series]) -> tuple[list[float], list[float], list[float], list[float]]:
    """Steps, mean, smallest and largest value of several runs, at the steps that all of them have."""
    if not runs:
        return [], [], [], []
    found = [dict(zip(steps, values, strict=True)) for steps, values in runs]
    steps = sorted(set(found[0]).intersection(*found[1:]))
    columns = [[run[step] for run in found] for step in steps]
    means = [sum(column) / len(column) for column in columns]
    return steps, means, [min(column) for column in columns], [max(column) for column in columns]


def seed_curves(
    runs: Mapping[str, Sequence[Series]],
    theme: Theme = LIGHT,
    *,
    marks: Mapping[str, float] | None = None,
    label: str = "mIoU in %",
) -> Figure:
    """A learning curve per method: the mean over seeds, and a band from the smallest to the largest value.

    Args:
        runs: method → one (steps, values) per seed, values as fractions.
        theme: colours.
        marks: name → height of a dashed horizontal line, as a fraction.
        label: of the vertical axis.
    """
    from matplotlib.ticker import MaxNLocator

    drawn, axes = figure(6.4, 3.6, theme)
    for number, (name, seeds) in enumerate(runs.items()):
        steps, means, low, high = over_seeds(seeds)
        shade = colour(number)
        axes.fill_between(steps, _percent(low), _percent(high), color=shade, alpha=0.2, linewidth=0)
        axes.plot(steps, _percent(means), color=shade, linewidth=1.8, marker="o", markersize=3, label=name)
    for name, height in (marks or {}).items():
        axes.axhline(100 * height, color=theme.muted, linestyle="--", linewidth=1.0, label=name)
    axes.set_xlabel("step", color=theme.muted, fontsize=8)
    axes.set_ylabel(label, color=theme.muted, fontsize=8)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    _legend(axes, theme)
    return drawn


def seed_bars(
    names: Sequence[str],
    values: Mapping[str, Sequence[Sequence[float]]],
    theme: Theme = LIGHT,
    *,
    label: str = "mIoU in %",
) -> Figure:
    """Horizontal bars: one group per row, one bar per measure (the mean), one dot per seed.

    Args:
        names: rows, top to bottom.
        values: measure → per row the values of its seeds, as fractions; NaN and an empty row have no bar.
        theme: colours.
        label: of the horizontal axis.
    """
    drawn, axes = figure(6.4, 0.9 + 0.24 * len(names) * max(2, len(values)), theme)
    thick = 0.8 / max(1, len(values))
    for number, (measure, rows) in enumerate(values.items()):
        places = [row + (number - (len(values) - 1) / 2) * thick for row in range(len(names))]
        kept = [[value for value in seeds if math.isfinite(value)] for seeds in rows]
        means = [100 * sum(seeds) / len(seeds) if seeds else 0.0 for seeds in kept]
        axes.barh(places, means, height=thick * 0.9, color=colour(number), label=measure)
        dots = [(100 * value, place) for place, seeds in zip(places, kept, strict=True) for value in seeds]
        axes.scatter([x for x, _ in dots], [y for _, y in dots], s=7, color=theme.text, zorder=3)
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.grid(visible=False, axis="y")
    axes.set_xlim(left=0.0)
    axes.set_xlabel(label, color=theme.muted, fontsize=8)
    _legend(axes, theme)
    return drawn


def _percent(values: Sequence[float]) -> list[float]:
    return [100 * value for value in values]


def _legend(axes: Axes, theme: Theme) -> None:
    legend = axes.legend(loc="lower left", bbox_to_anchor=(0.0, 1.0), ncols=4, fontsize=8, frameon=False)
    for text in legend.get_texts():
        text.set_color(theme.text)

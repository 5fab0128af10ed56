"""Plots of numbers over steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from poodle_lightning.draw.canvas import LIGHT, Theme, colour, figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Series = tuple[Sequence[float], Sequence[float]]


def smooth(values: Sequence[float], window: int) -> list[float]:
    """Running mean over the last ``window`` values (fewer at the start); the length stays."""
    total, means = 0.0, []
    for i, value in enumerate(values):
        total += value - (values[i - window] if i >= window else 0.0)
        means.append(total / min(i + 1, window))
    return means


def curves(
    series: Mapping[str, Series],
    theme: Theme = LIGHT,
    *,
    size: tuple[float, float] = (6.4, 2.8),
    floor: float | None = None,
    marks: Mapping[str, float] | None = None,
) -> Figure:
    """Named curves over steps; long ones are drawn faint with their running mean on top.

    Args:
        series: name → (steps, values).
        theme: colours.
        size: width and height in inches.
        floor: lower end of the vertical axis; None lets the values decide.
        marks: name → height of a dashed horizontal line (an alarm's threshold).
    """
    from matplotlib.ticker import MaxNLocator

    drawn, axes = figure(*size, theme)
    for number, (name, (steps, values)) in enumerate(series.items()):
        shade = colour(number)
        if len(values) > 60:
            axes.plot(steps, values, color=shade, alpha=0.25, linewidth=0.8)
            axes.plot(steps, smooth(values, len(values) // 30), color=shade, linewidth=1.8, label=name)
        else:
            marker = "o" if len(values) < 20 else None
            axes.plot(steps, values, color=shade, linewidth=1.6, marker=marker, markersize=3, label=name)
    for name, height in (marks or {}).items():
        axes.axhline(height, color=theme.muted, linestyle="--", linewidth=1.0, label=name)
    if floor is not None:
        axes.set_ylim(bottom=floor)
    axes.set_xlabel("step", color=theme.muted, fontsize=8)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    legend = axes.legend(loc="lower left", bbox_to_anchor=(0.0, 1.0), ncols=4, fontsize=8, frameon=False)
    for text in legend.get_texts():
        text.set_color(theme.text)
    return drawn

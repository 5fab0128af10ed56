"""What videos are like, side by side: the four panels of DoRA's Figure 2."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from poodle_lightning.draw.canvas import LIGHT, PALETTE, Theme, colour
from poodle_lightning.draw.curves import Series, smooth

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Longer series are drawn faint, with their running mean on top.
_DENSE = 90
# Numbers of which one is so many times another are drawn on a logarithmic axis.
_FAR_APART = 20
_UNITS = ((3 * 3600, "h", 3600), (180, "min", 60), (0, "s", 1))


def stats_figure(
    lightness: Mapping[str, Series],
    objects: Mapping[str, Series] | None = None,
    classes: Mapping[str, Sequence[int]] | None = None,
    shots: Mapping[str, int] | None = None,
    theme: Theme = LIGHT,
) -> Figure:
    """Lightness, objects and classes, and shots of videos; a panel without data is left out.

    A video has one colour in all panels. There are eight; with more videos all have the same one and no name.

    Args:
        lightness: video → (seconds, mean L* in 0 … 100).
        objects: video → (seconds, different classes in that frame).
        classes: video → in how many frames each class occurs, at least one each.
        shots: video → number of shots, at least one each.
        theme: colours.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    names = list(dict.fromkeys([*lightness, *(objects or {}), *(classes or {}), *(shots or {})]))
    few = len(names) <= len(PALETTE)
    shades = {name: colour(number if few else 5) for number, name in enumerate(names)}
    panels: list[Callable[[Axes], None]] = [lambda axes: _lightness(axes, lightness, shades, theme)]
    if objects:
        panels.append(lambda axes: _lines(axes, objects, shades, "classes per frame", theme))
    if classes:
        panels.append(lambda axes: _frequencies(axes, classes, shades, theme))
    if shots:
        panels.append(lambda axes: _bars(axes, shots, shades, theme, named=few))
    columns = min(2, len(panels))
    rows = -(-len(panels) // columns)
    drawn = Figure(figsize=(5.2 * columns, 2.9 * rows + 0.3), layout="constrained", facecolor=theme.ground)
    FigureCanvasAgg(drawn)
    for number, paint in enumerate(panels):
        axes = drawn.add_subplot(rows, columns, number + 1, facecolor=theme.ground)
        axes.grid(visible=True, color=theme.grid, linewidth=0.8)
        axes.set_axisbelow(True)
        axes.tick_params(which="both", colors=theme.muted, labelsize=8, length=0)
        for side in axes.spines.values():
            side.set_visible(False)
        paint(axes)
    if few:
        handles, labels = drawn.axes[0].get_legend_handles_labels()
        legend = drawn.legend(handles, labels, loc="outside upper left", ncols=3, fontsize=8, frameon=False)
        for text in legend.get_texts():
            text.set_color(theme.text)
    return drawn


def _lightness(
    axes: Axes, series: Mapping[str, Series], shades: Mapping[str, tuple[float, ...]], theme: Theme
) -> None:
    _lines(axes, series, shades, "lightness (mean L*)", theme)
    axes.set_ylim(0, 100)


def _lines(
    axes: Axes,
    series: Mapping[str, Series],
    shades: Mapping[str, tuple[float, ...]],
    label: str,
    theme: Theme,
) -> None:
    """Series over time, in the unit that suits the longest."""
    longest = max((max(times, default=0.0) for times, _ in series.values()), default=0.0)
    unit, seconds = next((unit, size) for least, unit, size in _UNITS if longest >= least)
    for name, (times, values) in series.items():
        x = [time / seconds for time in times]
        if len(values) > _DENSE:
            axes.plot(x, values, color=shades[name], alpha=0.25, linewidth=0.7)
            axes.plot(x, smooth(values, len(values) // 45), color=shades[name], linewidth=1.6, label=name)
        else:
            marker = "o" if len(values) < 20 else None
            axes.plot(x, values, color=shades[name], linewidth=1.6, marker=marker, markersize=3, label=name)
    axes.set_ylim(bottom=0.0)
    _label(axes, f"time in {unit}", label, theme)


def _frequencies(
    axes: Axes,
    classes: Mapping[str, Sequence[int]],
    shades: Mapping[str, tuple[float, ...]],
    theme: Theme,
) -> None:
    """Frames with a class, classes sorted by it; logarithmic where they differ much."""
    from matplotlib.ticker import MaxNLocator

    for name, counts in classes.items():
        ordered = sorted(counts, reverse=True)
        marker = "o" if len(ordered) < 20 else None
        axes.plot(
            range(1, len(ordered) + 1),
            ordered,
            color=shades[name],
            linewidth=1.6,
            marker=marker,
            markersize=3,
        )
    heights = [count for counts in classes.values() for count in counts]
    if max(heights) > _FAR_APART * min(heights):
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")
    else:
        axes.set_ylim(bottom=0.0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    _label(axes, "classes, the most frequent first", "frames with the class", theme)


def _bars(
    axes: Axes,
    shots: Mapping[str, int],
    shades: Mapping[str, tuple[float, ...]],
    theme: Theme,
    named: bool,
) -> None:
    """Shots of each video, from top to bottom in their order; logarithmic where they differ much."""
    from matplotlib.ticker import MaxNLocator

    places = range(len(shots))
    axes.barh(places, list(shots.values()), color=[shades[name] for name in shots], height=0.7)
    axes.set_yticks([])  # the colours say which is which
    axes.set_ylim(max(len(shots), 4) - 0.5, -0.5)  # few bars stay slim
    if max(shots.values()) > _FAR_APART * min(shots.values()):
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter("{x:g}")
        axes.set_xlim(left=0.5)
    else:
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if named:
        for place, count in enumerate(shots.values()):
            axes.text(count, place, f" {count}", va="center", fontsize=8, color=theme.text)
    _label(axes, "shots", "", theme)


def _label(axes: Axes, horizontal: str, vertical: str, theme: Theme) -> None:
    axes.set_xlabel(horizontal, color=theme.muted, fontsize=8)
    axes.set_ylabel(vertical, color=theme.muted, fontsize=8)

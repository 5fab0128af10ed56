"""The benchmark's one picture: a dot per seed, a line at the mean, for every method and group of classes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks.street.readouts import GROUPS
from poodle_lightning.draw.canvas import LIGHT, colour, figure_png

SHOWN = ("all", "small", "large", "rare", "common")


def write(scores: Mapping[str, Sequence[Mapping[str, float]]], path: Path, title: str) -> Path:
    """Draw and write a PNG.

    Args:
        scores: row of the table → its runs' scores in percent, by group.
        path: of the PNG.
        title: one line.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    assert set(SHOWN) <= set(GROUPS)
    drawn = Figure(figsize=(9.2, 0.9 + 0.3 * len(scores)), layout="constrained", facecolor=LIGHT.ground)
    FigureCanvasAgg(drawn)
    panels = drawn.subplots(1, len(SHOWN), sharey=True)
    for panel, group in zip(panels, SHOWN, strict=True):
        panel.set_facecolor(LIGHT.ground)
        for row, (name, lines) in enumerate(scores.items()):
            values = [line[group] for line in lines]
            tone = colour(row) if name in _trained(scores) else LIGHT.muted
            mean = sum(values) / len(values)
            panel.plot([0, mean], [row, row], color=tone, alpha=0.25, linewidth=7, solid_capstyle="butt")
            panel.plot([mean, mean], [row - 0.32, row + 0.32], color=tone, linewidth=2)
            panel.scatter(values, [row] * len(values), s=16, color=tone, zorder=3)
            panel.annotate(
                f"{mean:.1f}", (max(values), row), (5, 0), textcoords="offset points", va="center", fontsize=7
            )
        panel.set_title(group, fontsize=9, color=LIGHT.text)
        panel.set_xlim(0, 1.22 * max(line[group] for lines in scores.values() for line in lines) + 0.1)
        panel.grid(visible=True, axis="x", color=LIGHT.grid, linewidth=0.8)
        panel.set_axisbelow(True)
        panel.tick_params(colors=LIGHT.muted, labelsize=7, length=0)
        for side in panel.spines.values():
            side.set_visible(False)
    panels[0].set_yticks(range(len(scores)), list(scores), fontsize=8, color=LIGHT.text)
    panels[0].invert_yaxis()
    drawn.suptitle(title, fontsize=9, color=LIGHT.text)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(figure_png(drawn))
    return path


def _trained(scores: Mapping[str, object]) -> list[str]:
    return [name for name in scores if "untrained" not in name and "position" not in name]

"""Pictures of label maps, and bars per class."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from poodle_lightning.draw.canvas import LIGHT, Theme, colour, figure
from poodle_lightning.draw.flow import hsv_to_rgb
from poodle_lightning.types import IGNORE

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# The colours of Cityscapes and BDD100K, which readers of street scenes know.
STREET_COLOURS = {
    "road": (128, 64, 128), "sidewalk": (244, 35, 232), "building": (70, 70, 70), "wall": (102, 102, 156),
    "fence": (190, 153, 153), "pole": (153, 153, 153), "vegetation": (107, 142, 35),
    "terrain": (152, 251, 152), "traffic light": (250, 170, 30), "traffic sign": (220, 220, 0),
    "sky": (70, 130, 180), "person": (220, 20, 60), "rider": (255, 0, 0), "car": (0, 0, 142),
    "truck": (0, 0, 70), "bus": (0, 60, 100), "train": (0, 80, 100), "motorcycle": (0, 0, 230),
    "bicycle": (119, 11, 32),
}  # fmt: skip
IGNORE_COLOUR = (0.0, 0.0, 0.0)
_SHORT = {"light": "traffic light", "sign": "traffic sign"}


def palette(names: Sequence[str]) -> Tensor:
    """One colour per label value, ``(256, 3)`` in [0, 1]: the street colours by name, else spread hues.

    Values without a class, 255 among them, are black.
    """
    colours = torch.tensor(IGNORE_COLOUR).repeat(256, 1)
    for number, name in enumerate(names):
        known = STREET_COLOURS.get(_SHORT.get(name, name))
        if known is not None:
            colours[number] = torch.tensor(known) / 255.0
        else:
            # the golden ratio spreads any number of hues without neighbours alike
            hue = torch.full((1, 1), (number * (math.sqrt(5) - 1) / 2) % 1.0)
            colours[number] = hsv_to_rgb(hue, torch.full((1, 1), 0.65), torch.full((1, 1), 0.85)).flatten()
    return colours


def colour_labels(labels: Tensor, colours: Tensor) -> Tensor:
    """Label maps ``(B, H, W)`` as pictures ``(B, 3, H, W)`` in [0, 1]; ``colours`` from ``palette``."""
    return colours[labels.detach().cpu().long()].movedim(-1, 1)


def errors(truth: Tensor, guess: Tensor) -> Tensor:
    """Where a prediction is wrong: red; right: light grey; not judged: black.

    Args:
        truth: ``(B, H, W)`` label values, 255 = ignore.
        guess: ``(B, H, W)`` classes.

    Returns:
        ``(B, 3, H, W)`` in [0, 1].
    """
    shades = torch.tensor([(0.88, 0.88, 0.88), (0.85, 0.1, 0.1), IGNORE_COLOUR])
    kind = torch.where(truth == IGNORE, 2, (truth.long() != guess.long()).long())
    return shades[kind.cpu()].movedim(-1, 1)


def class_bars(
    names: Sequence[str],
    values: Mapping[str, Sequence[float]],
    theme: Theme = LIGHT,
    *,
    label: str = "IoU in %",
    width: float = 6.4,
) -> Figure:
    """Horizontal bars: one group per class, one bar per series.

    Args:
        names: classes, top to bottom.
        values: series name → value per class, as fractions; NaN (class absent) has no bar.
        theme: colours.
        label: of the horizontal axis.
        width: of the figure in inches.
    """
    drawn, axes = figure(width, 0.9 + 0.3 * len(names), theme)
    thick = 0.8 / len(values)
    for number, (series, heights) in enumerate(values.items()):
        places = [row + (number - (len(values) - 1) / 2) * thick for row in range(len(names))]
        percent = [0.0 if math.isnan(h) else 100.0 * h for h in heights]
        axes.barh(places, percent, height=thick * 0.9, color=colour(number), label=series)
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.grid(visible=False, axis="y")
    axes.set_xlim(left=0.0)
    axes.set_xlabel(label, color=theme.muted, fontsize=8)
    legend = axes.legend(loc="lower left", bbox_to_anchor=(0.0, 1.0), ncols=4, fontsize=8, frameon=False)
    for text in legend.get_texts():
        text.set_color(theme.text)
    return drawn

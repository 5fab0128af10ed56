"""Parts of the page for contrast of points and of pooled views: point pairs, tracks, pooling weights."""

from __future__ import annotations

import torch
from torch import Tensor

from poodle_lightning.draw.attention import attention_overlay
from poodle_lightning.draw.canvas import fit
from poodle_lightning.draw.points import dots, place_colours, trails
from poodle_lightning.report.page import Section, grid, picture
from poodle_lightning.report.patches import cell, strip
from poodle_lightning.types import Look

_WIDTH = 480
# Of more points a picture shows one thing only: that there are many.
_MOST = 60


def pairs(look: Look | None) -> Section | None:
    """Points that belong together, in the frames of each clip."""
    if look is None or look.points is None:
        return None
    cells, count = [], look.points.shape[2]
    for i, (frames, points) in enumerate(zip(look.frames, look.points, strict=True)):
        kept = _spaced(points[points.isfinite().all(dim=-1).any(dim=1)])
        colours = place_colours(kept[:, 0])
        for t, image in enumerate(fit(frames, _WIDTH)):
            caption = f"clip {i + 1}, frame {t + 1}: {len(kept)} of its points"
            cells.append(picture(dots(image, kept[:, t], colours), caption))
    if not cells:
        return None
    sentence = (
        "The same colour is the same point: positives of the loss. All others of the queue are negatives."
    )
    return Section("Point pairs", sentence, grid(cells, count, count))


def tracks(look: Look | None, ways: tuple[Tensor, ...]) -> Section | None:
    """The ways of the tracks that are active on the first frame of each clip."""
    if look is None or not ways:
        return None
    cells = []
    for i, (frames, way) in enumerate(zip(look.frames, ways, strict=False)):
        shown = _spaced(way)
        here, there = (_known(shown, end) for end in (0, -1))
        colours = place_colours(here)
        first = trails(fit(frames[:1], _WIDTH)[0], shown, colours)
        cells.append(
            picture(dots(first, there, colours, 2.0), f"clip {i + 1}: {len(shown)} of {len(way)} tracks")
        )
    sentence = (
        "Tracks that are active on the first frame, followed to where they end; the dot is the end. Lines "
        "that leave what they belong to are mistakes of the flow."
    )
    return Section("Tracks", sentence, grid(cells, 2, 2))


def pooling(look: Look | None) -> Section | None:
    """Where the pooling of each view looks, layer by layer."""
    if look is None or look.large is None or look.pooling is None:
        return None
    body, views = "", look.large.shape[1]
    for i, large in enumerate(look.large):
        images = fit(large, cell(views))
        rows = [strip(list(images), f"clip {i + 1}, views")]
        for layer, weights in look.pooling.items():
            rows.append(strip(list(attention_overlay(images, weights[i])), f"weights of {layer}"))
        body += f'<div style="max-width:{14 * views}rem;margin-bottom:1.5rem">{"".join(rows)}</div>'
    sentence = (
        "With which weights the places of each view are pooled. Each view is looked at for itself: what gets "
        "weight is what should be found again in another view. Each picture has its own range."
    )
    return Section("Attention pooling", sentence, body)


def _spaced(rows: Tensor) -> Tensor:
    """At most so many rows, spread evenly over all."""
    if len(rows) <= _MOST:
        return rows
    return rows[torch.linspace(0, len(rows) - 1, _MOST).round().long()]


def _known(ways: Tensor, end: int) -> Tensor:
    """The first (0) or last (-1) known place of each way ``(P, F, 2)``, ``(P, 2)``."""
    places = [way[way.isfinite().all(dim=-1)][end] for way in ways]
    return torch.stack(places) if places else ways.new_empty(0, 2)

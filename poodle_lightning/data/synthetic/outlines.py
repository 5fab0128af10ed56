"""Which points of a patch's rectangle belong to it.

One function per outline, of ``(u, v)`` in metres, the patch's size and its ``form``. All arguments may be one
patch's numbers with many points, or arrays with one entry per point: the renderer uses the first, the
visibility test the second.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import numpy as np

from poodle_lightning.data.synthetic.textures import Array, noise

Outline = Callable[[Array, Array, Array, Array, Array], Array]

RECT: Final = 0
CROWN: Final = 1
HEDGE: Final = 2
BARS: Final = 3
PLATE: Final = 4
BODY: Final = 5
CABIN: Final = 6
FLANK: Final = 7
BICYCLE: Final = 8
END: Final = 9

DISC, TRIANGLE, DIAMOND, BOARD = 0, 1, 2, 3  # form[0] of a PLATE


def covers(kind: int, u: Array, v: Array, size: Array, form: Array) -> Array:
    """Which points are inside an outline.

    Args:
        kind: one of the outlines, all points the same.
        u: metres along the patch, any shape.
        v: metres across.
        size: ``(2,)`` or ``(2, N)``.
        form: ``(6,)`` or ``(6, N)``.

    Returns:
        bool, shape of ``u``; the rectangle itself is not tested.
    """
    return _OUTLINES[kind](u, v, size[0], size[1], form)


def _crown(u: Array, v: Array, width: Array, height: Array, form: Array) -> Array:
    """A tree's crown: an ellipse with a ragged border. form: offset (u, v)."""
    du, dv = u * (2.0 / width) - 1.0, v * (2.0 / height) - 1.0
    edge = np.sqrt(du * du + dv * dv)
    edge += 0.7 * noise(u * 1.3 + form[0], v * 1.3 + form[1]) + 0.4 * noise(
        u * 4.1 + form[0], v * 4.1 + form[1]
    )
    return edge < 0.85


def _hedge(u: Array, v: Array, width: Array, height: Array, form: Array) -> Array:
    """A hedge or a row of trees with an uneven top. form: offset (u, v), height of the unevenness in m."""
    top = height - form[2] * (0.5 - noise(u * 0.7 + form[0], v * 0.7 + form[1]))
    return np.asarray(v < top - 0.3 * form[2] * (0.5 - noise(u * 3.1 + form[0], v * 3.1 + form[1])))


def _bars(u: Array, v: Array, width: Array, height: Array, form: Array) -> Array:
    """A fence: bars and two rails. form: period in m, share of the period that is a bar."""
    rest = u / form[0]
    rest = rest - np.floor(rest)
    return np.asarray(
        (rest < form[1]) | (np.abs(v - 0.9 * height) < 0.06) | (np.abs(v - 0.15 * height) < 0.06)
    )


def _plate(u: Array, v: Array, width: Array, height: Array, form: Array) -> Array:
    """A traffic sign's plate. form[0]: disc, triangle, diamond or board."""
    du, dv = np.abs(u * (2.0 / width) - 1.0), v * (2.0 / height) - 1.0
    kind = np.broadcast_to(form[0], u.shape)
    inside = np.ones(u.shape, bool)
    inside[kind == DISC] = (du * du + dv * dv < 1.0)[kind == DISC]
    inside[kind == TRIANGLE] = (du < 0.5 * (1.0 - dv))[kind == TRIANGLE]
    inside[kind == DIAMOND] = (du + np.abs(dv) < 1.0)[kind == DIAMOND]
    return inside


def _body(u: Array, v: Array, width: Array, height: Array, form: Array) -> Array:
    """Head, torso and arms of a person. form: width of the shoulders (share), spread of the arms."""
    du, q = np.abs(u / width - 0.5), v / height
    head = (du * width) ** 2 + ((q - 0.86) * height) ** 2 < (0.125 * height) ** 2
    torso = (q < 0.74) & (du < form[0] * (0.85 + 0.3 * q) * np.minimum(1.0, 6.0 * (0.78 - q)))
    arm = (q > 0.05) & (q < 0.72) & (np.abs(du - form[0] - 0.03 - form[1] * (0.72 - q)) < 0.07)
    return np.asarray(head | torso | arm)


def _cabin(u: Array, v: Array, width: Array, height: Array, form: Array) -> Array:
    """A trapezoid. form: how far the left and the right border lean in at the top (share of the width)."""
    q = v / height
    return np.asarray((u > form[0] * width * q) & (u < width * (1.0 - form[1] * q)))


def _flank(u: Array, v: Array, width: Array, height: Array, form: Array) -> Array:
    """The side of a car's body with its wheels. form: place of the wheels (share), their radius in m."""
    sill = v > form[2] * 0.75
    wheels = _disc(u, v, form[0] * width, form[2], form[2]) | _disc(u, v, form[1] * width, form[2], form[2])
    return np.asarray(sill | wheels)


def _end(u: Array, v: Array, width: Array, height: Array, form: Array) -> Array:
    """A car's front or rear: body, tyres and the dark gap below it. form[0]: ground clearance in m."""
    du = np.abs(u - 0.5 * width)
    tyres, gap = np.abs(du - 0.4 * width) < 0.09 * width, (v > 0.5 * form[0]) & (du < 0.45 * width)
    return np.asarray((v > form[0]) | tyres | gap)


def _bicycle(u: Array, v: Array, width: Array, height: Array, form: Array) -> Array:
    """A bicycle from its side: two wheels, a frame, a saddle and a handlebar."""
    radius = 0.31 * height
    left, right = np.hypot(u - radius, v - radius), np.hypot(u - width + radius, v - radius)
    wheels = (np.abs(left - 0.9 * radius) < 0.045) | (np.abs(right - 0.9 * radius) < 0.045)
    along = (u - radius) / (width - 2.0 * radius)
    inside = (along > 0.0) & (along < 1.0)
    frame = inside & (np.abs(v - radius - 0.75 * radius * np.minimum(3.0 * along, 1.0)) < 0.05)
    frame |= inside & (np.abs(v - radius - 1.5 * radius * np.abs(along - 0.45)) < 0.045)
    posts = (np.abs(along - 0.3) < 0.05) & (v > radius) & (v < 0.93 * height)
    posts |= (np.abs(along - 0.93) < 0.05) & (v > radius)
    saddle = (np.abs(v - 0.9 * height) < 0.045) & (np.abs(along - 0.3) < 0.16)
    return np.asarray(wheels | frame | posts | saddle)


def _disc(u: Array, v: Array, cu: Array, cv: Array, radius: Array) -> Array:
    return np.asarray((u - cu) ** 2 + (v - cv) ** 2 < radius * radius)


def _rect(u: Array, v: Array, width: Array, height: Array, form: Array) -> Array:
    return np.ones(u.shape, bool)


_OUTLINES: Final[tuple[Outline, ...]] = (
    *(_rect, _crown, _hedge, _bars, _plate, _body, _cabin, _flank, _bicycle, _end),
)

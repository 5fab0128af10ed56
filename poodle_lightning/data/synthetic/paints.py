"""Patterns on surfaces: lane marks, paving, windows, wheels, signs.

A paint receives all samples of one kind at once, whichever patches they are on, with the patch's numbers
gathered per sample; so a frame costs one call per kind. Fine patterns fade out with the footprint of the
sample.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import numpy as np

from poodle_lightning.data.synthetic.dice import Colour
from poodle_lightning.data.synthetic.textures import Array, noise

PLAIN: Final = 0
ROAD: Final = 1
PAVING: Final = 2
FACADE: Final = 3
LEAVES: Final = 4
ROUND: Final = 5
SIGN: Final = 6
LIGHT: Final = 7
PERSON: Final = 8
FLANK: Final = 9
END: Final = 10
GLASS: Final = 11
COACH: Final = 12
GROUND: Final = 13

_RUBBER: Final[Colour] = (0.035, 0.035, 0.04)
_STEEL: Final[Colour] = (0.45, 0.45, 0.46)
_PLATE: Final[Colour] = (0.75, 0.75, 0.7)


@dataclass
class Samples:
    """Samples of one kind of paint.

    Args:
        u: ``(N,)`` metres along the patch.
        v: ``(N,)`` metres across.
        footprint: ``(N,)`` metres of surface that a sample covers.
        rgb: ``(N, 3)`` the patch's first colour with its noise; paints change it in place.
        rough: ``(N,)`` the noise, amplitude included.
        colours: ``(3, N, 3)`` the patch's colours.
        size: ``(2, N)`` metres.
        form: ``(6, N)``.
    """

    u: Array
    v: Array
    footprint: Array
    rgb: Array
    rough: Array
    colours: Array
    size: Array
    form: Array

    def blend(self, where: Array, colour: Array | Colour, share: Array | float = 1.0) -> None:
        """Lay a colour ``(3,)`` or ``(N, 3)`` over the samples where a mask ``(N,)`` is true."""
        at = np.flatnonzero(where)
        part = np.asarray(share, np.float32)
        part = part[at, None] if part.ndim else part
        new = np.asarray(colour, np.float32)
        new = new[at] if new.ndim == 2 else new
        old = self.rgb[at]
        self.rgb[at] = old + (new - old) * part

    def scale(self, where: Array, factor: Array | float) -> None:
        """Multiply by a factor (a number or ``(N,)``) where a mask is true."""
        at = np.flatnonzero(where)
        self.rgb[at] *= factor[at, None] if isinstance(factor, np.ndarray) else np.float32(factor)

    def fade(self, width: float) -> Array:
        """How far a detail of a width in metres is seen: 1 near, 0 far; ``(N,)``."""
        return np.minimum(np.float32(width) / self.footprint, np.float32(1.0))


def paint(kind: int, samples: Samples) -> None:
    """Draw a pattern on samples, in place."""
    drawn = _PAINTS.get(kind)
    if drawn is not None:
        drawn(samples)


def _rest(x: Array, period: Array | float) -> Array:
    """``x`` modulo a period, as a share of it."""
    share = x / period
    return share - np.floor(share)


def _blotches(s: Samples, x: Array, z: Array) -> None:
    """Shadows of clouds and trees on the ground; colours[2, 0] is how deep they are."""
    shadow = noise(x * 0.21 + 13.0, z * 0.17) + 0.5 * noise(x * 0.9, z * 0.8 + 7.0)
    s.scale(shadow > 0.1, 1.0 - s.colours[2, :, 0])


def _road(s: Samples) -> None:
    """form: half width, lane width, dash, period and phase of crossings, solid centre line (0 or 1)."""
    x, half, lane = s.u - 0.5 * s.size[0], s.form[0], s.form[1]
    ax = np.abs(x)
    from_line = np.abs(x - np.round(x / lane) * lane)
    centre = ax < 0.5 * lane
    dashed = _rest(s.v, 2.0 * s.form[2]) < 0.5
    line = (from_line < 0.08) & (ax < half - 1.0) & (dashed | (centre & (s.form[5] > 0.5)))
    line |= np.abs(ax - (half - 0.3)) < 0.07
    s.blend(line, s.colours[1], 0.85 * s.fade(0.3))
    crossing = _rest(s.v + s.form[4], s.form[3]) * s.form[3] < 3.0
    s.blend(crossing & (_rest(x, 1.2) < 0.5) & (ax < half - 0.2), s.colours[1], 0.9 * s.fade(0.6))
    _blotches(s, x, s.v)


def _paving(s: Samples) -> None:
    """form: size of a slab in m, depth of the joints."""
    joint = (_rest(s.u, s.form[0]) < 0.07) | (_rest(s.v, s.form[0]) < 0.07)
    s.scale(joint, 1.0 - s.form[1] * s.fade(0.12))
    _blotches(s, s.u, s.v)


def _ground(s: Samples) -> None:
    _blotches(s, s.u, s.v)


def _facade(s: Samples) -> None:
    """form: pitch across and up, window's share across and up, height of the shops, seed of the windows."""
    cu, cv = s.u / s.form[0], s.v / s.form[1]
    iu, iv = np.floor(cu), np.floor(cv)
    inner_u, inner_v = (1.0 - s.form[2]) / 2.0, (1.0 - s.form[3]) * 0.6
    fu, fv = cu - iu, cv - iv
    brick = (_rest(s.v, 0.3) < 0.18) | (_rest(s.u + 0.4 * np.floor(s.v / 0.3), 0.8) < 0.07)
    s.scale(brick & (s.form[5] > 50.0), 1.0 - 0.22 * s.fade(0.1))
    window = (
        (np.abs(fu - 0.5) < 0.5 - inner_u) & (fv > inner_v) & (fv < inner_v + s.form[3]) & (s.v > s.form[4])
    )
    each = noise(iu * 7.3 + s.form[5], iv * 5.1 + s.form[5])
    glass = s.colours[1] * (1.0 + 1.3 * each + 0.5 * s.rough)[:, None]
    s.blend(window, glass, s.fade(1.2))
    sill = (np.abs(fv - inner_v + 0.03) < 0.03) & (s.v > s.form[4])
    s.scale(sill, 1.0 + 0.25 * s.fade(0.2))
    shop = (s.v < 0.8 * s.form[4]) & (s.v > 0.4) & (_rest(s.u, 1.6 * s.form[0]) < 0.8)
    s.blend(shop, s.colours[2] * (1.0 + 1.2 * noise(s.u * 1.5 + s.form[5], s.v * 1.5))[:, None])
    s.scale(s.v > s.size[1] - 0.4, 0.75)


def _leaves(s: Samples) -> None:
    """Darker below and inside, lighter on top."""
    s.rgb *= (0.62 + 0.6 * s.v / s.size[1])[:, None]


def _round(s: Samples) -> None:
    """A cylinder: bright in the middle, dark at its borders."""
    across = s.u / s.size[0] - 0.4
    s.rgb *= (1.15 - 2.4 * across * across)[:, None]


def _sign(s: Samples) -> None:
    """Border, field and symbol. form: kind of plate, kind of symbol, seed."""
    du, dv = s.u * (2.0 / s.size[0]) - 1.0, s.v * (2.0 / s.size[1]) - 1.0
    adu, adv = np.abs(du), np.abs(dv)
    kind = s.form[0]
    reach = np.where(
        kind == 0, du * du + dv * dv, np.where(kind == 2, (adu + adv) ** 2, np.maximum(adu, adv) ** 2)
    )
    field = np.where(kind == 1, (dv > -0.75) & (adu < 0.36 * (0.75 - dv)), reach < 0.6)
    s.blend(field, s.colours[1])
    bar = np.where(s.form[1] < 1.0, adv < 0.17, adu < 0.17)
    spot = noise(du * 3.0 + s.form[2], dv * 3.0) > 0.02
    s.blend(field & (adu < 0.5) & (adv < 0.5) & np.where(s.form[1] < 2.0, bar, spot), s.colours[2])


def _light(s: Samples) -> None:
    """Three lamps, one lit. form[0]: which (0 top … 2 bottom); colours[1]: the lit lamp."""
    third = s.v / s.size[1] * 3.0
    number = np.minimum(np.floor(third), 2.0)
    radius = np.hypot((s.u - 0.5 * s.size[0]) / s.size[1] * 3.0, third - number - 0.5)
    lamp = radius < 0.4
    lit = number == 2.0 - s.form[0]
    s.blend(lamp & ~lit, s.colours[0] * 0.5 + s.colours[1] * 0.1)
    s.blend(lamp & lit, s.colours[1])


def _person(s: Samples) -> None:
    """Clothes, with head and hair. colours: clothes, skin, hair. form[2]: lower end of the shirt (share)."""
    q = s.v / s.size[1]
    s.blend(q > 0.74, s.colours[1])
    s.blend(q > 0.9, s.colours[2])
    s.blend((np.abs(s.u / s.size[0] - 0.5) > s.form[0]) & (q < 0.16), s.colours[1])
    s.blend((q < s.form[2]) & (np.abs(s.u / s.size[0] - 0.5) < s.form[0] + 0.03), s.colours[2])


def _wheels(s: Samples, left: Array, right: Array, radius: Array) -> None:
    for place in (left, right):
        away = np.hypot(s.u - place * s.size[0], s.v - radius)
        s.blend(away < radius, _RUBBER)
        s.blend(away < 0.55 * radius, _STEEL)


def _flank(s: Samples) -> None:
    """Side of a body. form: places of the wheels (share), radius, seam's place (share)."""
    q = s.v / s.size[1]
    s.rgb *= (0.75 + 0.35 * q)[:, None]
    s.scale(np.abs(s.u / s.size[0] - s.form[3]) * s.size[0] < 0.03, 1.0 - 0.5 * s.fade(0.06))
    s.scale(q < 0.3, 0.45)
    _wheels(s, s.form[0], s.form[1], s.form[2])


def _end(s: Samples) -> None:
    """Front or rear of a body. form: clearance, then whether it is a front; colours[1]: lamps."""
    du, q = np.abs(s.u / s.size[0] - 0.5), s.v / s.size[1]
    s.rgb *= (0.75 + 0.35 * q)[:, None]
    s.blend((q > 0.55) & (q < 0.85) & (du > 0.33) & (du < 0.47), s.colours[1])
    s.scale((q > 0.58) & (q < 0.82) & (du < 0.28) & (s.form[1] > 0.5), 0.35)
    s.blend((q > 0.4) & (q < 0.55) & (du < 0.14), _PLATE, s.fade(0.15))
    s.scale(np.abs(q - 0.36) < 0.04, 0.6)
    s.blend(s.v < s.form[0], _RUBBER)


def _glass(s: Samples) -> None:
    """Windows of a cabin: colours[1] inside a frame of colours[0]. form: lean left, lean right, posts."""
    q = s.v / s.size[1]
    along = (s.u / s.size[0] - s.form[0] * q) / np.maximum(1.0 - (s.form[0] + s.form[1]) * q, 0.1)
    pane = (np.abs(along - 0.5) < 0.44) & (q > 0.08) & (q < 0.86)
    pane &= (s.form[2] < 0.5) | (np.abs(along - 0.52) > 0.03)
    s.blend(pane, s.colours[1] * (0.8 + 0.5 * q + 0.4 * noise(s.u * 1.9, s.v * 1.7 + s.u))[:, None])


def _coach(s: Samples) -> None:
    """A bus or a truck. form: lower and upper end of the band of windows (share), pitch, lamps (0 or 1)."""
    q = s.v / s.size[1]
    band = (q > s.form[0]) & (q < s.form[1]) & (_rest(s.u + 0.1, s.form[2]) < 0.9) & (s.u > 0.12)
    s.blend(band & (s.u < s.size[0] - 0.12), s.colours[1] * (0.8 + noise(s.u, s.v))[:, None])
    s.blend(np.abs(q - 0.3) < 0.03, s.colours[2])
    s.blend(
        (q > 0.17) & (q < 0.23) & (np.abs(s.u / s.size[0] - 0.5) > 0.36) & (s.form[3] > 0.5), s.colours[2]
    )
    s.blend(s.v < 0.35, _RUBBER)


_PAINTS: Final[dict[int, Callable[[Samples], None]]] = {
    ROAD: _road,
    PAVING: _paving,
    FACADE: _facade,
    LEAVES: _leaves,
    ROUND: _round,
    SIGN: _sign,
    LIGHT: _light,
    PERSON: _person,
    FLANK: _flank,
    END: _end,
    GLASS: _glass,
    COACH: _coach,
    GROUND: _ground,
}

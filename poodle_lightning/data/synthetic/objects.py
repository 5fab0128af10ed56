"""Things that stand, walk and drive in the street, built of patches."""

from __future__ import annotations

import math

from poodle_lightning.data.synthetic import outlines as cut
from poodle_lightning.data.synthetic import paints
from poodle_lightning.data.synthetic.classes import CLASSES
from poodle_lightning.data.synthetic.dice import Colour, Dice, hsv
from poodle_lightning.data.synthetic.patches import AHEAD, RIGHT, UP, Look, PatchList, Vector

_LABEL = {name: number for number, name in enumerate(CLASSES)}
_FACING = (RIGHT, UP)  # a patch that looks along the street
_ALONG = (AHEAD, UP)  # a patch beside the street
_FLAT = (RIGHT, AHEAD)
_BLACK: Colour = (0.05, 0.05, 0.06)


def _skin(dice: Dice) -> Colour:
    return hsv(dice.real(0.03, 0.1), dice.real(0.2, 0.7), dice.real(0.25, 0.95))


def _textured(dice: Dice, wavelength: float, amplitude: float) -> tuple[float, float, float, float]:
    return wavelength, amplitude, *dice.offset()


def pole(to: PatchList, dice: Dice, x: float, z: float, height: float, width: float) -> Colour:
    """A post; returns its colour, so that what hangs on it can match."""
    colour = dice.colour((0.0, 0.25), (0.12, 0.8))
    look = Look((colour,), paints.ROUND, noise=_textured(dice, 0.6, 0.2))
    to.add(_LABEL["pole"], (x - width / 2, 0.0, z), _FACING, (width, height), look)
    return colour


def sign(to: PatchList, dice: Dice, x: float, z: float) -> None:
    """A traffic sign on its post."""
    height, radius = dice.real(2.0, 3.1), dice.real(0.28, 0.5)
    pole(to, dice, x, z + 0.06, height + radius, dice.real(0.07, 0.12))
    colours = (
        dice.colour((0.3, 1.0), (0.3, 0.95)),
        dice.colour((0.0, 0.6), (0.3, 1.0)),
        dice.colour((0.0, 1.0), (0.05, 0.9)),
    )
    form = (float(dice.whole(4)), float(dice.whole(3)), dice.real(0, 90))
    look = Look(colours, paints.SIGN, cut.PLATE, form, _textured(dice, 0.5, 0.1))
    origin = (x - radius, height - radius, z)
    to.add(_LABEL["traffic sign"], origin, _FACING, (2 * radius, 2 * radius), look, to.new_object())


def traffic_light(to: PatchList, dice: Dice, x: float, z: float, side: int) -> None:
    """A post with a traffic light, sometimes with an arm over the road."""
    height = dice.real(3.2, 5.2)
    colour = pole(to, dice, x, z + 0.06, height, dice.real(0.12, 0.2))
    arm = dice.real(1.2, 3.5) if dice.chance(0.6) else 0.0
    if arm:
        origin = (min(x, x - side * arm), height - 0.14, z + 0.05)
        to.add(_LABEL["pole"], origin, _FACING, (arm, 0.13), Look((colour,)))
    width, tall = dice.real(0.3, 0.42), dice.real(0.85, 1.15)
    case = dice.colour((0.0, 0.6), (0.04, 0.4))
    lamp = dice.whole(3)
    look = Look((case, hsv((0.0, 0.12, 0.4)[lamp], 0.9, 1.0)), paints.LIGHT, form=(float(lamp),))
    for place in {x - side * arm, x} if dice.chance(0.5) else {x - side * arm}:
        origin = (place - width / 2, height - tall, z)
        to.add(_LABEL["traffic light"], origin, _FACING, (width, tall), look, to.new_object())


def person(to: PatchList, dice: Dice, x: float, z: float, *, across: bool, child: float = 0.12) -> None:
    """Somebody walking: a rigid upper body and two swinging legs.

    Args:
        to: receives the patches.
        dice: draws.
        x: metres.
        z: metres.
        across: walks along x, seen from the side; else along z.
        child: probability of a small person.
    """
    height = dice.real(1.0, 1.4) if dice.chance(child) else dice.real(1.55, 1.92)
    shirt, trousers = dice.colour((0.0, 0.8), (0.06, 0.95)), dice.colour((0.0, 0.6), (0.06, 0.7))
    width, who = 0.34 * height, to.new_object()
    form = (dice.real(0.26, 0.34), dice.real(0.0, 0.16))
    look = Look(
        (shirt, _skin(dice), trousers), paints.PERSON, cut.BODY, (*form, 0.1), _textured(dice, 0.3, 0.45)
    )
    label, hip = _LABEL["person"], 0.48 * height
    to.add(label, (x - width / 2, hip - 0.03, z), _FACING, (width, height - hip + 0.03), look, who)
    rate, phase, thick = dice.real(5.0, 7.0), dice.real(0.0, 6.28), 0.105 * height
    leg = Look((trousers,), paints.ROUND, noise=look.noise)
    hinge = (0.0, 0.0, 1.0) if across else RIGHT
    for side in (-1, 1):
        place = x - thick / 2 + side * (0.03 if across else 0.075) * height
        # hung from the hip, so that it swings about it: v runs down
        origin = (place, hip, z + 0.02)
        swing = ((0.45, rate, phase + (math.pi if side > 0 else 0.0)), hinge)
        to.add(label, origin, (RIGHT, (0.0, -1.0, 0.0)), (thick, hip), leg, who, swing)


def bicycle(to: PatchList, dice: Dice, x: float, z: float, *, across: bool) -> None:
    """A bicycle, from its side (``across``) or along the street."""
    look = Look(
        (dice.colour((0.0, 0.9), (0.05, 0.75)),), outline=cut.BICYCLE, noise=_textured(dice, 0.4, 0.3)
    )
    who, label = to.new_object(), _LABEL["bicycle"]
    if across:
        to.add(label, (x - 0.85, 0.0, z), _FACING, (1.7, 1.05), look, who)
        return
    to.add(label, (x, 0.0, z), _ALONG, (1.7, 1.05), look, who)
    to.add(label, (x - 0.04, 0.0, z), _FACING, (0.08, 0.8), Look(look.colours), who)
    to.add(label, (x - 0.28, 0.98, z + 1.2), _FACING, (0.56, 0.07), Look(look.colours), who)


def rider(to: PatchList, dice: Dice, x: float, z: float, *, across: bool) -> None:
    """A person on a bicycle; the bicycle is an object of its own."""
    bicycle(to, dice, x, z, across=across)
    shirt, trousers = dice.colour((0.0, 0.9), (0.06, 0.95)), dice.colour((0.0, 0.7), (0.06, 0.7))
    who, label = to.new_object(), _LABEL["rider"]
    deep = z - 0.03 if across else z + 0.5
    form = (dice.real(0.24, 0.32), dice.real(0.02, 0.14), 0.12)
    look = Look((shirt, _skin(dice), trousers), paints.PERSON, cut.BODY, form, _textured(dice, 0.3, 0.4))
    to.add(label, (x - 0.32, 0.82, deep), _FACING, (0.6, dice.real(0.85, 1.0)), look, who)
    rate, phase = dice.real(4.0, 7.0), dice.real(0.0, 6.28)
    for side in (-1, 1):
        origin = (x - 0.09 + (0.0 if across else 0.14 * side), 0.9, deep - 0.02 - 0.01 * side)
        swing = ((0.4, rate, phase + (math.pi if side > 0 else 0.0)), (0.0, 0.0, 1.0) if across else RIGHT)
        axes = (RIGHT, (0.0, -1.0, 0.0))
        to.add(label, origin, axes, (0.16, 0.62), Look((trousers,), paints.ROUND), who, swing)


def car(to: PatchList, dice: Dice, x: float, z: float, *, front: bool, seen_from: float) -> None:
    """A car that stands along the street with its near end at z.

    Args:
        to: receives the patches.
        dice: draws.
        x: middle, metres.
        z: near end, metres.
        front: its front (else its rear) looks at the camera.
        seen_from: x of the camera; only the side facing it is built.
    """
    if dice.chance(0.05):
        coach(to, dice, x, z, front=front, seen_from=seen_from)
        return
    scale = dice.real(0.9, 1.15)
    width, length = 1.75 * scale, dice.real(3.9, 4.7) * scale
    belt, height = 0.88 * scale, dice.real(1.42, 1.8) * scale
    body, glass = dice.colour((0.0, 0.85), (0.06, 0.95)), dice.colour((0.0, 0.3), (0.06, 0.4))
    lamp = (
        hsv(dice.real(0.08, 0.16), 0.15, 1.0)
        if front
        else hsv(dice.real(-0.02, 0.03) % 1.0, 0.9, dice.real(0.5, 1))
    )
    who, label, rough = to.new_object(), _LABEL["car"], _textured(dice, 1.2, 0.12)
    clear, wheel = 0.26 * scale, 0.33 * scale
    end = Look((body, lamp), paints.END, cut.END, (clear, float(front)), rough)
    to.add(label, (x - width / 2, 0.0, z), _FACING, (width, belt), end, who)
    near = 0.28 if front else dice.real(0.02, 0.16)  # where the cabin starts and ends, shares of the length
    far = 0.95 if front else dice.real(0.7, 0.78)
    slant = 0.1 if not front else 0.14
    side = x + math.copysign(width / 2, seen_from - x)
    flank = Look((body,), paints.FLANK, cut.FLANK, (0.19, 0.8, wheel, 0.52), rough)
    to.add(label, (side, 0.0, z), _ALONG, (length, belt), flank, who)
    cabin, inset = (far - near) * length, 0.06 * width
    panes = Look((body, glass), paints.GLASS, cut.CABIN, (slant * length / cabin, 0.16, 1.0), rough)
    place = side + math.copysign(inset, x - seen_from)
    to.add(label, (place, belt, z + near * length), _ALONG, (cabin, height - belt), panes, who)
    rise, run = height - belt, slant * length
    sloped = math.hypot(rise, run)
    up: Vector = (0.0, rise / sloped, run / sloped)
    window = Look((body, glass), paints.GLASS, form=(0.0, 0.0, 0.0), noise=rough)
    origin = (x - width / 2 + inset, belt, z + near * length)
    to.add(label, origin, (RIGHT, up), (width - 2 * inset, sloped), window, who)
    deck = Look((body,), noise=rough)
    to.add(label, (x - width / 2, belt, z), _FLAT, (width, length), deck, who)
    roof = (x - width / 2 + inset, height, z + near * length + run)
    to.add(label, roof, _FLAT, (width - 2 * inset, 0.84 * cabin - run), deck, who)


def coach(to: PatchList, dice: Dice, x: float, z: float, *, front: bool, seen_from: float) -> None:
    """A bus or a truck: a box with or without windows."""
    bus = dice.chance(0.4)
    width, length, height = dice.real(2.1, 2.5), dice.real(6.0, 10.0), dice.real(2.5, 3.4)
    colours = (dice.colour((0.0, 0.8), (0.1, 0.95)), dice.colour((0.0, 0.3), (0.05, 0.4)), dice.colour())
    who, label, rough = to.new_object(), _LABEL["bus" if bus else "truck"], _textured(dice, 1.5, 0.2)
    band = (0.42, 0.82) if bus or front else (2.0, 2.0)
    end = Look(colours, paints.COACH, form=(*band, 9.0, 1.0), noise=rough)
    to.add(label, (x - width / 2, 0.0, z), _FACING, (width, height), end, who)
    side = x + math.copysign(width / 2, seen_from - x)
    flank = Look(colours, paints.COACH, form=((0.42, 0.8) if bus else (2.0, 2.0)) + (1.4,), noise=rough)
    to.add(label, (side, 0.25, z), _ALONG, (length, height - 0.25), flank, who)

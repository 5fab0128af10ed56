"""What is fixed beside the street: ground, buildings, trees, hedges, fences, and what stands at the kerb."""

from __future__ import annotations

from poodle_lightning.data.synthetic import objects, paints
from poodle_lightning.data.synthetic import outlines as cut
from poodle_lightning.data.synthetic.classes import CLASSES
from poodle_lightning.data.synthetic.dice import Colour, Dice
from poodle_lightning.data.synthetic.patches import AHEAD, RIGHT, UP, Look, PatchList
from poodle_lightning.data.synthetic.plan import Plan

_LABEL = {name: number for number, name in enumerate(CLASSES)}
_FACING, _ALONG, _FLAT = (RIGHT, UP), (AHEAD, UP), (RIGHT, AHEAD)
_START, _LENGTH = -50.0, 30_000.0  # the ground reaches beyond any video, metres
_KERB = 0.12


def ground(to: PatchList, plan: Plan) -> None:
    """Carriageway, kerbs, pavements and the ground beyond them."""
    asphalt, pavement, earth, marks = plan.colours
    dark: Colour = (plan.shade, 0.0, 0.0)
    period, phase = plan.crossing
    form = (plan.road, plan.lane, plan.dash, period, phase, float(plan.solid))
    look = Look((asphalt, marks, dark), paints.ROAD, form=form, noise=(1.1, plan.roughness[0], 3.0, 5.0))
    to.add(_LABEL["road"], (-plan.road, 0.0, _START), _FLAT, (2 * plan.road, _LENGTH), look)
    slabs = Look(
        (pavement, pavement, dark),
        paints.PAVING,
        form=(plan.slab, 0.35),
        noise=(0.8, plan.roughness[1], 7.0, 2.0),
    )
    edge = Look(((0.8 * pavement[0] + 0.15, 0.8 * pavement[1] + 0.15, 0.8 * pavement[2] + 0.15),))
    soil = Look((earth, earth, dark), paints.GROUND, noise=(0.8, plan.roughness[2], 1.0, 9.0))
    width = 120.0
    for side in (-1, 1):
        kerb, end = side * plan.road, side * (plan.road + plan.walk)
        to.add(_LABEL["sidewalk"], (kerb, 0.0, _START), _ALONG, (_LENGTH, _KERB), edge)
        to.add(_LABEL["sidewalk"], (min(kerb, end), _KERB, _START), _FLAT, (plan.walk, _LENGTH), slabs)
        far = end if side > 0 else end - width
        to.add(_LABEL["terrain"], (far, _KERB - 0.01, _START), _FLAT, (width, _LENGTH), soil)


def lots(to: PatchList, dice: Dice, plan: Plan, side: int, z: float, length: float) -> None:
    """Fill one side of a cell with buildings, hedges, trees, fences and walls."""
    end = z + length
    while z < end - 4.0:
        width = min(dice.real(8.0, 20.0), end - z)
        if end - z - width < 4.0:
            width = end - z
        x = plan.road + plan.walk + plan.setback
        if dice.chance(0.02 + 0.8 * (1.0 - plan.green)):
            _building(to, dice, side, x + dice.real(0.0, 1.5), z, width)
        else:
            _open(to, dice, plan, side, x, z, width)
        z += width


def _building(to: PatchList, dice: Dice, side: int, x: float, z: float, length: float) -> None:
    height, gap = dice.real(4.0, 9.0) * dice.real(0.9, 2.0), dice.real(0.0, 2.5) if dice.chance(0.4) else 0.0
    wall = dice.colour((0.0, 0.5), (0.25, 0.9), (0.0, 0.15))
    colours = (wall, dice.colour((0.0, 0.4), (0.05, 0.7), (0.5, 0.65)), dice.colour())
    shops = dice.real(2.5, 4.0) if dice.chance(0.45) else 0.0
    form = (
        *(dice.real(1.6, 4.2), dice.real(2.6, 3.8), dice.real(0.3, 0.75), dice.real(0.3, 0.65)),
        *(shops, dice.real(0.0, 100.0)),
    )
    look = Look(
        colours, paints.FACADE, form=form, noise=(dice.real(0.4, 3.0), dice.real(0.1, 0.45), *dice.offset())
    )
    to.add(_LABEL["building"], (side * x, 0.0, z + gap), _ALONG, (length - gap, height), look)
    deep = 14.0
    to.add(
        _LABEL["building"],
        (side * x - (deep if side < 0 else 0.0), 0.0, z + gap),
        _FACING,
        (deep, height),
        look,
    )


def _open(to: PatchList, dice: Dice, plan: Plan, side: int, x: float, z: float, length: float) -> None:
    if dice.chance(0.85):
        hedge(to, dice, side * (x + dice.real(0.0, 5.0)), z, length, dice.real(3.0, 10.0))
    edge = side * (plan.road + plan.walk + 0.15)
    if dice.chance(0.45):
        _fence(to, dice, edge, z, length)
    elif dice.chance(0.3):
        hedge(to, dice, edge, z, length, dice.real(0.7, 1.5))
    for _ in range(dice.count(2.2)):
        tree(to, dice, side * (x + dice.real(-0.5, 5.0)), z + dice.real(0.0, length), dice.real(4.0, 11.0))


def _fence(to: PatchList, dice: Dice, x: float, z: float, length: float) -> None:
    height, colour = dice.real(0.9, 2.0), dice.colour((0.0, 0.5), (0.15, 0.85), (0.0, 0.15))
    rough = (0.6, dice.real(0.2, 0.6), *dice.offset())
    if dice.chance(0.3):
        look = Look((colour,), paints.PAVING, form=(dice.real(0.4, 1.2), 0.3), noise=rough)
        to.add(_LABEL["wall"], (x, 0.0, z), _ALONG, (length, height), look)
    else:
        form = (dice.real(0.15, 0.6), dice.real(0.3, 0.8))
        to.add(
            _LABEL["fence"], (x, 0.0, z), _ALONG, (length, height), Look((colour,), 0, cut.BARS, form, rough)
        )


def _foliage(dice: Dice) -> tuple[Colour, tuple[float, float, float, float]]:
    colour = dice.colour((0.15, 0.7), (0.2, 0.65), (0.14, 0.38), free=0.35)
    return colour, (dice.real(0.7, 1.6), dice.real(0.9, 1.7), *dice.offset())


def hedge(to: PatchList, dice: Dice, x: float, z: float, length: float, height: float) -> None:
    """A hedge or a row of trees along the street."""
    colour, rough = _foliage(dice)
    look = Look((colour,), paints.LEAVES, cut.HEDGE, (*dice.offset(), 0.45 * height), rough)
    to.add(_LABEL["vegetation"], (x, 0.0, z), _ALONG, (length, height), look)


def tree(to: PatchList, dice: Dice, x: float, z: float, height: float) -> None:
    """A trunk and a crown of two crossed patches."""
    colour, rough = _foliage(dice)
    trunk, wide = dice.real(0.2, 0.4), dice.real(0.5, 0.75) * height
    bark = Look(
        (dice.colour((0.1, 0.4), (0.12, 0.5), (0.03, 0.1)),), paints.ROUND, noise=(0.4, 0.6, *dice.offset())
    )
    to.add(_LABEL["vegetation"], (x - trunk / 2, 0.0, z), _FACING, (trunk, 0.5 * height), bark)
    low, tall = dice.real(0.25, 0.35) * height, 0.72 * height
    for origin, axes in (((x - wide / 2, low, z - 0.02), _FACING), ((x, low, z - wide / 2), _ALONG)):
        crown = Look((colour,), paints.LEAVES, cut.CROWN, dice.offset(), rough)
        to.add(_LABEL["vegetation"], origin, axes, (wide, tall), crown)


def kerb(to: PatchList, dice: Dice, plan: Plan, side: int, z: float, length: float) -> None:
    """Poles, signs, lights, trees, parked cars and bicycles at one kerb of a cell."""

    def place() -> tuple[float, float]:
        return side * (plan.road + dice.real(0.2, 0.7)), z + dice.real(0.0, length)

    for _ in range(dice.count(plan.poles * length)):
        objects.pole(to, dice, *place(), dice.real(3.5, 8.0), dice.real(0.09, 0.18))
    for _ in range(dice.count(plan.signs * length)):
        objects.sign(to, dice, *place())
    for _ in range(dice.count(plan.lights * length)):
        objects.traffic_light(to, dice, *place(), side)
    if dice.chance(0.35 + 0.4 * plan.green):
        x, where = place()
        tree(to, dice, x + side * 0.6 * plan.walk, where, dice.real(3.5, 7.5))
    if dice.chance(6.0 * plan.riders):
        x, where = place()
        objects.bicycle(to, dice, x + side * 0.5, where, across=dice.chance(0.5))
    if plan.parked[(side + 1) // 2]:
        where = z + dice.real(0.0, 3.0)
        while where < z + length - 5.0:
            if dice.chance(0.65):
                x = side * (plan.road - 1.05)
                objects.car(to, dice, x, where, front=side < 0 and dice.chance(0.7), seen_from=plan.camera_x)
            where += dice.real(5.5, 8.5)

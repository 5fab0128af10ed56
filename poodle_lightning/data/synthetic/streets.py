"""What a street looks like: widths, light, the camera's way, and what stands in each of its cells.

The street has no end: it is cut into cells, and the content of a cell is drawn from a key of its own
when the camera comes near. Traffic lives in lanes that move as a whole, each with cells in its own
coordinate; so the scene at a time depends on the seed and the time only.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np

from poodle_lightning.data.synthetic import blocks, objects
from poodle_lightning.data.synthetic.dice import Colour, Dice
from poodle_lightning.data.synthetic.patches import STILL, Array, Motion, PatchList
from poodle_lightning.data.synthetic.plan import Plan, draw_plan
from poodle_lightning.ops.random import key_of

Difficulty = Literal["easy", "hard"]

VIEW = 140.0  # metres in front of the camera that are surely filled
_BEHIND = 8.0  # metres behind it
_FIXED, _MOVING = 24.0, 75.0  # length of a cell of what stands and of a lane, metres
_GROUND = 15  # lane number of the ground
_CELLS = 4096  # cells per lane with a number of their own
_KEPT = 1024  # cells in memory; they are drawn again when needed
_NUMBERS = 256  # patches and objects per cell with a number of their own


@dataclass(frozen=True)
class Lane:
    """A strip in which everything moves alike.

    Args:
        number: in the numbering of patches, below 15.
        kind: what it carries.
        x: middle, metres.
        motion: of all that is in it.
    """

    number: int
    kind: Literal["fixed", "ego", "same", "oncoming", "walkers", "riders"]
    x: float = 0.0
    motion: Motion = STILL

    @property
    def cell(self) -> float:
        """Length of a cell in metres."""
        return _FIXED if self.kind == "fixed" else _MOVING


@dataclass(frozen=True)
class Light:
    """How a video is lit and recorded.

    Args:
        sun: ``(3,)`` unit vector towards the sun.
        contrast: 0 = no shading by direction, 1 = full.
        fog: per metre.
        zenith: colour of the sky above; ``horizon``: near the horizon and of the fog.
        clouds: strength.
        skyline: colour, mean height above the horizon (tangent) and class of what closes the view.
        cast: ``(3,)`` factors of the camera's colour balance and exposure.
        gamma: exponent.
        grain: standard deviation of the sensor's noise, of 1.
        offset: of the clouds in the noise table.
    """

    sun: Array
    contrast: float
    fog: float
    zenith: Colour
    horizon: Colour
    clouds: float
    skyline: tuple[Colour, float, int]
    cast: Array
    gamma: float
    grain: float
    offset: tuple[float, float]


class Layout:
    """The content of one street: a pure function of seed and difficulty, built cell by cell.

    Args:
        seed: of the street.
        difficulty: "easy" has more and nearer small things, slower motion and milder light; "hard" has about
            the class shares of BDD100K.
    """

    def __init__(self, seed: int, difficulty: Difficulty) -> None:
        self.dice = Dice(key_of(seed, "street", difficulty))
        self.plan: Plan = draw_plan(self.dice.fork("plan"), easy=difficulty == "easy")
        self.light = _light(self.dice.fork("light"), easy=difficulty == "easy")
        self.lanes = _lanes(self.plan, self.dice.fork("lanes"))
        self._cells: dict[tuple[int, int], Array] = {}
        ground = PatchList(_GROUND * _CELLS * _NUMBERS)
        blocks.ground(ground, self.plan)
        self._ground = ground.array()

    def patches(self, time: float) -> Array:
        """All patches near the camera at a time in seconds; ``(N,)`` of dtype ``PATCH``."""
        way = self.plan.way(time)
        parts = [self._ground]
        for lane in self.lanes:
            here = way - lane.motion.velocity[2] * time - lane.motion.follow * way
            first, last = math.floor((here - _BEHIND) / lane.cell), math.floor((here + VIEW) / lane.cell)
            parts += [self._cell(lane, number) for number in range(first, last + 1)]
        return np.concatenate(parts)

    def _cell(self, lane: Lane, number: int) -> Array:
        at = (lane.number, number)
        if at not in self._cells:
            if len(self._cells) >= _KEPT:
                self._cells.clear()
            code = (lane.number * _CELLS + (number + _CELLS // 2) % _CELLS) * _NUMBERS
            cell = PatchList(code, lane.motion)
            self._fill(cell, lane, number * lane.cell, self.dice.fork(lane.number, number))
            self._cells[at] = cell.array()
        return self._cells[at]

    def _fill(self, to: PatchList, lane: Lane, z: float, dice: Dice) -> None:
        plan = self.plan
        if lane.kind == "fixed":
            for side in (-1, 1):
                blocks.lots(to, dice, plan, side, z, lane.cell)
                blocks.kerb(to, dice, plan, side, z, lane.cell)
            self._crossers(to, dice, z, lane.cell)
        elif lane.kind == "walkers":
            for _ in range(dice.count(plan.walkers * lane.cell / 3.0)):
                x = lane.x + dice.real(-0.3, 0.3)
                objects.person(to, dice, x, z + dice.real(0.0, lane.cell), across=False)
        elif lane.kind == "riders":
            for _ in range(dice.count(plan.riders * lane.cell)):
                objects.rider(to, dice, lane.x, z + dice.real(4.0, lane.cell), across=False)
        else:
            self._traffic(to, lane, z, dice)

    def _traffic(self, to: PatchList, lane: Lane, z: float, dice: Dice) -> None:
        plan, place = self.plan, z + dice.real(0.0, 8.0)
        if lane.kind == "ego":
            place = max(place, plan.gap)  # cells behind it hold nothing: the first car ahead is there
        while place < z + lane.cell - 11.0:
            if dice.chance(plan.traffic):
                x = lane.x + dice.real(-0.25, 0.25)
                objects.car(to, dice, x, place, front=lane.kind == "oncoming", seen_from=plan.camera_x)
            place += dice.real(12.0, 20.0)

    def _crossers(self, to: PatchList, dice: Dice, z: float, length: float) -> None:
        """People and riders who cross the road, each at a kerb when the camera passes."""
        plan, walking = self.plan, to.motion
        for _ in range(dice.count(plan.crossers * length)):
            place, rides = z + dice.real(0.0, length), dice.chance(plan.crossing_riders)
            rate = dice.real(0.35, 0.6) * (1.5 if rides else 1.0)
            phase = -rate * plan.passing(place) + (math.pi if dice.chance(0.5) else 0.0)
            to.motion = Motion(sway=(plan.road + 0.8, 0.0, 0.0), beat=(rate, phase))
            if rides:
                objects.rider(to, dice, 0.0, place, across=True)
            else:
                objects.person(to, dice, 0.0, place, across=True)
        to.motion = walking


def _lanes(plan: Plan, dice: Dice) -> tuple[Lane, ...]:
    """Everything fixed, the lanes of cars, and strips of people on both pavements."""
    drift = Motion(
        follow=1.0, sway=(0.0, 0.0, dice.real(0.3, 1.2)), beat=(dice.real(0.2, 0.5), dice.real(0, 6.28))
    )
    lanes = [Lane(0, "fixed"), Lane(1, "ego", plan.camera_x, drift)]
    number = 2
    for index in range(plan.lanes):
        x = (index + 0.5) * plan.lane
        lanes.append(Lane(number, "oncoming", -x, Motion((0.0, 0.0, -dice.real(0.6, 1.3) * plan.speed))))
        number += 1
        if abs(x - plan.camera_x) > 0.5 * plan.lane:
            lanes.append(Lane(number, "same", x, Motion((0.0, 0.0, dice.real(0.5, 1.4) * plan.speed))))
            number += 1
    for side in (-1, 1):
        for share, pace in ((0.3, -1), (0.7, 1)):
            x = side * (plan.road + share * plan.walk)
            lanes.append(Lane(number, "walkers", x, Motion((0.0, 0.0, pace * dice.real(0.7, 1.6)))))
            number += 1
        motion = Motion((0.0, 0.0, side * dice.real(2.0, 5.0)))  # everybody keeps to the right
        lanes.append(Lane(number, "riders", side * (plan.road - 0.6), motion))
        number += 1
    return tuple(lanes)


def _light(dice: Dice, *, easy: bool) -> Light:
    height, turn = dice.real(0.3, 1.2), dice.real(0.0, 6.28)
    sun = np.array([math.cos(height) * math.sin(turn), math.sin(height), math.cos(height) * math.cos(turn)])
    zenith = dice.colour((0.05, 0.55), (0.3, 0.95), (0.53, 0.65), free=0.3)
    horizon = dice.colour((0.0, 0.3), (0.5, 1.0), (0.05, 0.65), free=0.3)
    skyline = (dice.colour((0.05, 0.4), (0.2, 0.6)), dice.real(0.0, 0.07), (2, 8)[dice.whole(2)])
    exposure = math.exp(dice.real(-0.3, 0.25) if easy else dice.real(-0.6, 0.35))
    spread = 0.1 if easy else 0.22
    return Light(
        sun=sun,
        contrast=dice.real(0.15, 0.75),
        fog=dice.real(0.0, 0.006 if easy else 0.015),
        zenith=zenith,
        horizon=horizon,
        clouds=dice.real(0.0, 0.8),
        skyline=skyline,
        cast=np.array([exposure * dice.real(1 - spread, 1 + spread) for _ in range(3)], np.float32),
        gamma=dice.real(0.85, 1.15) if easy else dice.real(0.75, 1.35),
        grain=dice.real(0.003, 0.012) if easy else dice.real(0.004, 0.028),
        offset=dice.offset(),
    )

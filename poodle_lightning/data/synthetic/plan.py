"""The numbers that hold for a whole street, and the way of the camera along it."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from poodle_lightning.data.synthetic.dice import Colour, Dice
from poodle_lightning.data.synthetic.patches import Array, Pose

Wave = tuple[float, float, float]  # amplitude, rate in rad/s, phase


@dataclass(frozen=True)
class Plan:
    """A street's measures in metres and seconds, and how often what is in it (per metre of one side).

    Args:
        lanes: per direction.
        lane: width of a lane.
        road: half width of the carriageway, parking included.
        walk: width of a pavement.
        setback: from the pavement to the first building.
        green: 0 = only buildings beside the street, 1 = only trees, hedges and open ground.
        parked: whether cars stand at the left and the right kerb.
        colours: of road, pavement, ground and marks.
        roughness: of road, pavement and ground.
        shade: depth of the shadows on the ground.
        slab: of the pavement.
        dash: of the lane marks.
        crossing: distance between two crossings, and where the first is.
        solid: whether the centre line is solid.
        poles, signs, lights, walkers, riders, crossers: per metre.
        crossing_riders: share of riders among those who cross.
        traffic: probability that a place in a lane is taken.
        gap: to the car ahead.
        speed: mean, of the camera.
        focal: focal length in widths of the image.
        camera_x, camera_y: mean place of the camera.
        surge, weave, bob: waves of its place along, across and up.
        yaw, pitch, roll: waves of its direction in rad.
        aim: mean yaw and pitch.
    """

    lanes: int
    lane: float
    road: float
    walk: float
    setback: float
    green: float
    parked: tuple[bool, bool]
    colours: tuple[Colour, Colour, Colour, Colour]
    roughness: tuple[float, float, float]
    shade: float
    slab: float
    dash: float
    crossing: tuple[float, float]
    solid: bool
    poles: float
    signs: float
    lights: float
    walkers: float
    riders: float
    crossers: float
    crossing_riders: float
    traffic: float
    gap: float
    speed: float
    focal: float
    camera_x: float
    camera_y: float
    surge: Wave
    weave: Wave
    bob: Wave
    yaw: Wave
    pitch: Wave
    roll: Wave
    aim: tuple[float, float]

    def way(self, time: float) -> float:
        """Metres gone along the street at a time; grows steadily."""
        amplitude, rate, phase = self.surge
        return self.speed * time + amplitude * (math.sin(rate * time + phase) - math.sin(phase))

    def passing(self, z: float) -> float:
        """The time at which the camera passes a place, to a centimetre or so (fixed-point iteration)."""
        time = z / self.speed
        for _ in range(6):
            time -= (self.way(time) - z) / self.speed
        return time

    def pose(self, time: float, size: tuple[int, int]) -> Pose:
        """The camera at a time in seconds, for images of (height, width)."""
        height, width = size
        focal = self.focal * width
        intrinsics = np.array([[focal, 0, (width - 1) / 2], [0, focal, (height - 1) / 2], [0, 0, 1]])
        way = self.way(time)
        centre = np.array(
            [self.camera_x + _wave(self.weave, time), self.camera_y + _wave(self.bob, time), way]
        )
        yaw, pitch = self.aim[0] + _wave(self.yaw, time), self.aim[1] + _wave(self.pitch, time)
        return Pose(time, way, centre, turned(yaw, pitch, _wave(self.roll, time)), intrinsics)


def turned(yaw: float, pitch: float, roll: float) -> Array:
    """Rotation from world axes (x right, y up, z ahead) to camera axes (y down instead); ``(3, 3)``.

    Args:
        yaw: rad, to the right.
        pitch: rad, up.
        roll: rad, clockwise.
    """
    cy, sy, cp, sp, cr, sr = (f(a) for a in (yaw, pitch, roll) for f in (math.cos, math.sin))
    about_y = np.array([[cy, 0, -sy], [0, 1, 0], [sy, 0, cy]])
    about_x = np.array([[1, 0, 0], [0, cp, -sp], [0, sp, cp]])
    about_z = np.array([[cr, -sr, 0], [sr, cr, 0], [0, 0, 1]])
    return np.asarray(np.diag([1.0, -1.0, 1.0]) @ about_z @ about_x @ about_y)


def draw_plan(dice: Dice, *, easy: bool) -> Plan:
    """Draw a street."""
    lanes = 1 if dice.chance(0.8 if easy else 0.55) else 2
    lane = dice.real(2.7, 3.2)
    parked = (dice.chance(0.35), dice.chance(0.45))
    road = lanes * lane + (2.1 if any(parked) else dice.real(0.3, 0.8))
    speed = dice.real(1.2, 4.0) if easy else dice.real(3.0, 11.0)
    more = 1.0 if easy else 0.25  # small things
    own = dice.whole(lanes)
    surge = dice.real(0.2, 0.5)
    asphalt = dice.colour((0.0, 0.2), (0.2, 0.65))
    pavement = dice.colour((0.0, 0.3), (0.25, 0.85))
    earth = dice.colour((0.1, 0.6), (0.2, 0.7), (0.08, 0.35))
    marks = (
        dice.colour((0.0, 0.1), (0.75, 1.0))
        if dice.chance(0.65)
        else dice.colour((0.5, 0.9), (0.8, 0.95), (0.1, 0.16), 0)
    )

    def wave(amplitude: float, slowest: float = 0.4, fastest: float = 1.0) -> Wave:
        return dice.real(0.3, 1.0) * amplitude, dice.real(slowest, fastest), dice.real(0.0, 6.28)

    return Plan(
        lanes=lanes,
        lane=lane,
        road=road,
        walk=dice.real(1.6, 3.6),
        setback=dice.real(0.3, 7.0),
        green=dice.real(),
        parked=parked,
        colours=(asphalt, pavement, earth, marks),
        roughness=(dice.real(0.1, 0.5), dice.real(0.1, 0.6), dice.real(0.5, 1.3)),
        shade=dice.real(0.0, 0.55),
        slab=dice.real(0.5, 1.6),
        dash=dice.real(2.0, 5.0),
        crossing=(dice.real(45.0, 140.0), dice.real(0.0, 140.0)),
        solid=dice.chance(0.5),
        poles=dice.real(0.02, 0.07) * (1.0 if easy else 0.5),
        signs=dice.real(0.03, 0.1) * more,
        lights=dice.real(0.02, 0.07) * more,
        walkers=dice.real(0.0, 0.3) * more,
        riders=dice.real(0.0, 0.06) * more,
        crossers=dice.real(0.0, 0.2) * more,
        crossing_riders=0.35,
        traffic=dice.real(0.05, 0.7),
        gap=dice.real(8.0, 30.0),
        speed=speed,
        focal=dice.real(0.7, 1.0),
        camera_x=(own + 0.5) * lane + dice.real(-0.3, 0.3),
        camera_y=dice.real(1.25, 1.8),
        surge=(surge * speed / 0.6, 0.6, dice.real(0.0, 6.28)),
        weave=wave(0.25),
        bob=wave(0.03, 3.0, 7.0),
        yaw=wave(0.05),
        pitch=wave(0.01, 1.0, 4.0),
        roll=wave(0.01),
        aim=(dice.real(-0.05, 0.05), dice.real(-0.06, 0.06)),
    )


def _wave(wave: Wave, time: float) -> float:
    amplitude, rate, phase = wave
    return amplitude * math.sin(rate * time + phase)

"""Planar patches in space: what a scene is made of, where they are at a time, and their homographies.

World axes: x right, y up, z along the street, metres. Camera axes: x right, y down, z forward. Pixel
coordinates: the centre of the first pixel is (0, 0).

A patch is the set of points ``origin + a·u + b·v`` with 0 ≤ a ≤ size[0], 0 ≤ b ≤ size[1] (u, v orthonormal),
cut out by its outline. As patches move rigidly, the motion between two frames is one 3×3 homography per
patch: exact flow, with nothing estimated.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

Array = np.ndarray
Vector = tuple[float, float, float]

FORMS = 6  # numbers that describe the shape and the pattern of a patch
RIGHT: Vector = (1.0, 0.0, 0.0)
UP: Vector = (0.0, 1.0, 0.0)
AHEAD: Vector = (0.0, 0.0, 1.0)

PATCH = np.dtype(
    [
        ("uid", "i8"),  # the same patch has the same number in every frame
        ("label", "u1"),
        ("instance", "i4"),  # object number, 0 for stuff
        ("origin", "f8", 3),
        ("u", "f8", 3),
        ("v", "f8", 3),
        ("size", "f8", 2),
        ("outline", "u1"),
        ("paint", "u1"),
        ("colour", "f4", (3, 3)),
        ("noise", "f4", 4),  # wavelength in m, amplitude, offset (u, v)
        ("form", "f4", FORMS),
        ("velocity", "f8", 3),
        ("follow", "f8"),  # share of the camera's own way that the patch goes along
        ("sway", "f8", 3),
        ("beat", "f8", 2),  # sway: rate in rad/s, phase
        ("swing", "f8", 3),  # rotation about the origin: amplitude in rad, rate in rad/s, phase
        ("hinge", "f8", 3),  # axis of the swing
    ]
)


@dataclass(frozen=True)
class Motion:
    """How the patches of an object move; the default stands still.

    Args:
        velocity: metres per second.
        follow: 1 = goes along with the camera (a car ahead in the same lane).
        sway: metres; the displacement ``sway · cos(rate · t + phase)`` is added.
        beat: rate in rad/s and phase of the sway.
    """

    velocity: Vector = (0.0, 0.0, 0.0)
    follow: float = 0.0
    sway: Vector = (0.0, 0.0, 0.0)
    beat: tuple[float, float] = (0.0, 0.0)


@dataclass(frozen=True)
class Look:
    """What a patch looks like.

    Args:
        colours: up to three RGB colours in [0, 1].
        paint: one of ``paints``.
        outline: one of ``outlines``.
        form: up to six numbers read by the paint and the outline.
        noise: wavelength in m, amplitude, offset (u, v) of the surface's texture.
    """

    colours: tuple[Vector, ...]
    paint: int = 0
    outline: int = 0
    form: tuple[float, ...] = ()
    noise: tuple[float, float, float, float] = (1.0, 0.2, 0.0, 0.0)


STILL = Motion()


@dataclass
class PatchList:
    """Patches of one cell of the street, collected one by one.

    Args:
        code: base of the patch and object numbers of this cell.
        motion: of the patches added from now on.
    """

    code: int
    motion: Motion = STILL
    rows: list[tuple] = field(default_factory=list)
    _objects: int = 0

    def new_object(self) -> int:
        """The number of another object."""
        self._objects += 1
        return self.code + self._objects

    def add(
        self,
        label: int,
        origin: Vector,
        axes: tuple[Vector, Vector],
        size: tuple[float, float],
        look: Look,
        instance: int = 0,
        swing: tuple[Vector, Vector] = ((0.0, 0.0, 0.0), RIGHT),
    ) -> None:
        """Add a patch.

        Args:
            label: class.
            origin: corner, metres.
            axes: the orthonormal directions u and v.
            size: metres along u and v.
            look: texture and outline.
            instance: object number, 0 for stuff.
            swing: (amplitude, rate, phase) of a rotation about the origin, and its axis.
        """
        colours = (look.colours * 3)[:3]
        form = (*look.form, *(0.0,) * (FORMS - len(look.form)))
        m = self.motion
        self.rows.append(
            (
                *(self.code + len(self.rows), label, instance, origin, *axes, size, look.outline, look.paint),
                *(colours, look.noise, form, m.velocity, m.follow, m.sway, m.beat, *swing),
            )
        )

    def array(self) -> Array:
        """All patches, ``(N,)`` of dtype ``PATCH``."""
        return np.array(self.rows, dtype=PATCH)


@dataclass(frozen=True)
class Pose:
    """Where the camera is at a time.

    Args:
        time: seconds.
        way: metres that the camera has gone along the street.
        centre: ``(3,)`` world position, metres.
        rotation: ``(3, 3)`` world → camera axes.
        intrinsics: ``(3, 3)``, camera → pixels.
    """

    time: float
    way: float
    centre: Array
    rotation: Array
    intrinsics: Array


def placed(patches: Array, pose: Pose) -> tuple[Array, Array, Array]:
    """Origin, u and v of patches at the time of a pose, each ``(N, 3)`` float64 in world axes."""
    beat = patches["beat"]
    sway = np.cos(beat[:, 0] * pose.time + beat[:, 1])
    origin = patches["origin"] + patches["velocity"] * pose.time + patches["sway"] * sway[:, None]
    origin[:, 2] += patches["follow"] * pose.way
    u, v = patches["u"], patches["v"]
    moving = np.flatnonzero(patches["swing"][:, 0])
    if len(moving):
        amplitude, rate, phase = patches["swing"][moving].T
        angle, axis = amplitude * np.sin(rate * pose.time + phase), patches["hinge"][moving]
        u, v = u.copy(), v.copy()
        u[moving], v[moving] = _turned(u[moving], axis, angle), _turned(v[moving], axis, angle)
    return origin, u, v


def _turned(x: Array, axis: Array, angle: Array) -> Array:
    """Rotation about an axis (Rodrigues)."""
    cos, sin = np.cos(angle)[:, None], np.sin(angle)[:, None]
    along = (axis * x).sum(1, keepdims=True) * axis
    return np.asarray(x * cos + np.cross(axis, x) * sin + along * (1 - cos))


def to_pixels(patches: Array, pose: Pose) -> Array:
    """Homographies M of patches: ``M (a, b, 1) = depth · (x, y, 1)``; ``(N, 3, 3)`` float64."""
    origin, u, v = placed(patches, pose)
    camera = pose.intrinsics @ pose.rotation
    return np.stack([u @ camera.T, v @ camera.T, (origin - pose.centre) @ camera.T], axis=2)


def inverted(homographies: Array) -> tuple[Array, Array]:
    """Inverses of homographies, and which have one (a plane through the camera's centre has none).

    Returns:
        ``(N, 3, 3)`` (zero where there is none) and bool ``(N,)``.
    """
    scale = np.linalg.norm(homographies, axis=1).prod(axis=1)
    there = np.abs(np.linalg.det(homographies)) > 1e-9 * scale
    inverse = np.zeros_like(homographies)
    inverse[there] = np.linalg.inv(homographies[there])
    return inverse, there

"""From what is seen at each sample to an image: texture, light, haze, sky, filter, sensor."""

from __future__ import annotations

from functools import cache

import cv2
import numpy as np

from poodle_lightning.data.synthetic import paints
from poodle_lightning.data.synthetic.dice import Colour
from poodle_lightning.data.synthetic.patches import Array, Pose, placed
from poodle_lightning.data.synthetic.raster import SKY, Raster
from poodle_lightning.data.synthetic.streets import Light
from poodle_lightning.data.synthetic.textures import fbm, noise
from poodle_lightning.ops.random import key_of, normal, randint

_GRAIN = 256  # the sensor's noise repeats after so many pixels
_ANISOTROPY = 0.35  # share of the long axis of a slanted footprint that counts


def shade(raster: Raster, light: Light, seed: int) -> Array:
    """The image of a raster.

    Args:
        raster: what is seen.
        light: of the street.
        seed: of the street; the sensor's noise depends on it, on the time and on the pixel only.

    Returns:
        ``(H, W, 3)`` uint8 RGB of the raster's box.
    """
    rgb = np.empty((*raster.seen.shape, 3), np.float32)
    flat, seen = rgb.reshape(-1, 3), raster.seen.reshape(-1)
    sky = np.flatnonzero(seen == SKY)
    if len(sky):
        flat[sky] = _sky(raster, light, sky)
    solid = np.flatnonzero(seen != SKY)
    if len(solid):
        flat[solid] = _surfaces(raster, light, solid)
    image = _tent(rgb, raster.supersample)
    image *= light.cast
    np.clip(image, 0.0, 1.0, out=image)
    image = cv2.pow(image, light.gamma)
    image += light.grain * _grain(seed, raster)
    return np.asarray(np.clip(image * 255.0 + 0.5, 0.0, 255.0).astype(np.uint8))


def _surfaces(raster: Raster, light: Light, at: Array) -> Array:
    """Colours of the samples ``at`` (numbers in the flat raster), all on patches; ``(N, 3)`` float32."""
    patches, number = raster.patches, raster.seen.reshape(-1)[at]
    kinds = patches["paint"][number]
    order = np.argsort(kinds, kind="stable")  # by paint, so that each kind is one slice below
    at, number, kinds = at[order], number[order], kinds[order]
    width = len(raster.x)
    x, y = raster.x[at % width].astype(np.float32), raster.y[at // width].astype(np.float32)
    plane = raster.unproject.astype(np.float32)
    u, v = (_affine(plane[:, row], number, x, y) for row in (0, 1))
    depth = 1.0 / raster.nearness.reshape(-1)[at]
    u, v = u * depth, v * depth
    footprint = _footprint(raster, number, depth)
    wave = patches["noise"][number]
    rough = fbm(u + wave[:, 2], v + wave[:, 3], footprint, wave[:, 0]) * wave[:, 1]
    rgb = np.clip(1.0 + rough, 0.1, 2.5)[:, None] * patches["colour"][:, 0].take(number, axis=0)
    edges = np.flatnonzero(np.diff(kinds)) + 1
    for start, stop in zip([0, *edges.tolist()], [*edges.tolist(), len(kinds)], strict=True):
        part, rows = slice(start, stop), number[start:stop]
        samples = paints.Samples(
            u=u[part],
            v=v[part],
            footprint=footprint[part],
            rgb=rgb[part],
            rough=rough[part],
            colours=patches["colour"][rows].transpose(1, 0, 2),
            size=patches["size"].astype(np.float32)[rows].T,
            form=patches["form"][rows].T,
        )
        paints.paint(int(kinds[start]), samples)
    rgb *= _sunlight(raster, light)[number][:, None]
    clear = np.exp(-light.fog * depth)[:, None]
    rgb = np.clip(rgb, 0.0, 1.5) * clear + _rgb(light.horizon) * (1.0 - clear)
    back = np.empty_like(rgb)
    back[order] = rgb
    return np.asarray(back)


def _rgb(colour: Colour) -> Array:
    return np.array(colour, np.float32)


def _affine(plane: Array, number: Array, x: Array, y: Array) -> Array:
    """``plane[number] · (x, y, 1)``: an affine field of each sample's own patch; ``(N,)``."""
    return np.asarray(plane[:, 0].take(number) * x + plane[:, 1].take(number) * y + plane[:, 2].take(number))


def _footprint(raster: Raster, number: Array, depth: Array) -> Array:
    """Metres of surface that a sample covers.

    The homography's Jacobian has determinant |det unproject| · depth³; a surface seen face on covers
    depth / focal, and what is left over is the long axis of a slanted one.
    """
    focal = np.float32(raster.pose.intrinsics[0, 0])
    bent = (np.abs(np.linalg.det(raster.unproject)) * focal * _ANISOTROPY).astype(np.float32)
    pixel = np.maximum(depth / focal, bent.take(number) * depth * depth)
    return np.asarray(pixel, np.float32)


def _sunlight(raster: Raster, light: Light) -> Array:
    """Brightness of each patch by its direction; ``(N,)`` float32."""
    origin, u, v = placed(raster.patches, raster.pose)
    normals = np.cross(u, v)
    facing = np.sign(((raster.pose.centre - origin) * normals).sum(1))
    direct = np.maximum(facing * (normals @ light.sun), 0.0)
    return np.asarray((1.0 + light.contrast * (direct - 0.45)).astype(np.float32))


def _sky(raster: Raster, light: Light, at: Array) -> Array:
    """Colours of samples of the sky and of the skyline in front of it; ``(N, 3)`` float32."""
    width = len(raster.x)
    direction = directions(raster.pose, raster.x[at % width], raster.y[at // width]).astype(np.float32)
    height = np.clip(direction[:, 1], 0.0, 0.7)[:, None] / 0.7
    height = height ** np.float32(0.7)
    above = 1.0 / (np.maximum(direction[:, 1], 0.0) + 0.12)
    u, v = direction[:, 0] * above * 1.3 + light.offset[0], direction[:, 2] * above * 1.3 + light.offset[1]
    cloud = np.clip(fbm(u, v, 0.01 * above, np.full_like(u, 1.3)) + 0.1, -0.3, 1.0)[:, None]
    rgb = _rgb(light.horizon) * (1.0 - height) + _rgb(light.zenith) * height
    rgb *= 1.0 + light.clouds * cloud
    far = behind(light, direction)
    rgb[far] = 0.5 * _rgb(light.skyline[0]) + 0.5 * _rgb(light.horizon)
    return np.asarray(rgb)


def directions(pose: Pose, x: Array, y: Array) -> Array:
    """Unit vectors in world axes towards pixels ``x``, ``y`` ``(N,)``; ``(N, 3)`` float64."""
    rays = np.stack([x, y, np.ones_like(x)], axis=1) @ (np.linalg.inv(pose.intrinsics).T @ pose.rotation)
    return np.asarray(rays / np.linalg.norm(rays, axis=1, keepdims=True))


def behind(light: Light, direction: Array) -> Array:
    """Which directions ``(N, 3)`` at infinity show the skyline, not the sky; bool ``(N,)``."""
    turn = np.arctan2(direction[:, 0], direction[:, 2]).astype(np.float32)
    steps = noise(np.floor(turn * 40.0) * 1.7 + light.offset[0], np.full_like(turn, 3.3))
    if light.skyline[2] == 8:  # trees: a soft outline instead of roofs
        steps = noise(turn * 25.0 + light.offset[0], np.full_like(turn, 3.3))
        steps += 0.3 * noise(turn * 160.0, np.full_like(turn, 9.1))
    return direction[:, 1] < light.skyline[1] * (1.0 + 1.3 * steps)


def _tent(rgb: Array, supersample: int) -> Array:
    """Average samples with a tent of one pixel's reach: symmetric about each pixel's centre."""
    s = supersample
    if s == 1:
        return rgb
    weights = (s - np.abs(np.arange(2 * s - 1) - (s - 1))) / s**2
    for axis in (0, 1):
        count = (rgb.shape[axis] - 2 * (s - 1) - 1) // s + 1
        moved = rgb if axis == 0 else rgb.transpose(1, 0, 2)
        total = sum(np.float32(w) * moved[k : k + s * (count - 1) + 1 : s] for k, w in enumerate(weights))
        assert isinstance(total, np.ndarray)
        rgb = total if axis == 0 else total.transpose(1, 0, 2)
    return np.ascontiguousarray(rgb)


@cache
def _grain_table() -> Array:
    drawn = normal(key_of(0, "grain").reshape(1), _GRAIN * _GRAIN * 3)
    return drawn.numpy().reshape(_GRAIN, _GRAIN, 3)


def _grain(seed: int, raster: Raster) -> Array:
    """Sensor noise of unit deviation, a function of seed, time and pixel; ``(H, W, 3)`` float32."""
    microseconds = round(raster.pose.time * 1e6)
    dy, dx = randint(key_of(seed, "grain", microseconds).reshape(1), _GRAIN, 2)[0].tolist()
    rows, columns = np.rint(raster.rows).astype(int) + dy, np.rint(raster.columns).astype(int) + dx
    return np.asarray(_grain_table()[rows[:, None] % _GRAIN, columns % _GRAIN])

"""Band-limited noise: value noise looked up in a periodic table, summed over octaves.

An octave finer than the footprint of the pixel fades out, so surfaces neither shimmer nor alias however far
away they are, and two frames of one surface agree up to resampling.
"""

from __future__ import annotations

from functools import cache

import cv2
import numpy as np

from poodle_lightning.ops.random import key_of, uniform

Array = np.ndarray
_CELLS = 128  # lattice cells until the noise repeats
_TEXELS = 4  # table entries per cell; linear interpolation between them is then invisible
_ROW = 256  # cv2.remap takes at most 32,767 columns, so flat lists are folded into rows
_OCTAVES = 5
_LACUNARITY = 2.1
_GAIN = 0.78


@cache
def _table() -> Array:
    """Smooth value noise in [−0.5, 0.5], ``(513, 513)`` float32: the last row and column repeat the first."""
    lattice = (
        uniform(key_of(0, "value noise").reshape(1), _CELLS * _CELLS, -0.5, 0.5)
        .numpy()
        .reshape(_CELLS, _CELLS)
    )
    step = np.arange(_TEXELS) / _TEXELS
    smooth = (step * step * (3.0 - 2.0 * step)).astype(np.float32)

    def refine(rows: Array) -> Array:
        steps = (np.roll(rows, -1, 0) - rows)[:, None] * smooth[:, None]
        return np.asarray(rows[:, None] + steps).reshape(-1, rows.shape[1])

    fine = refine(refine(lattice).T).T
    return np.ascontiguousarray(np.pad(fine, ((0, 1), (0, 1)), mode="wrap"))


def noise(u: Array, v: Array) -> Array:
    """Smooth noise with lattice distance 1.

    Args:
        u: coordinates, one- or two-dimensional float32.
        v: the other coordinate, of the same shape.

    Returns:
        Values in [−0.5, 0.5] of the same shape, float32.
    """
    size = np.float32(_CELLS * _TEXELS)
    maps = []
    for x in (u, v):
        x = np.multiply(x, np.float32(1.0 / _CELLS), dtype=np.float32)
        x = (x - np.floor(x)) * size
        if x.ndim == 1:
            rows = np.zeros((-(-len(x) // _ROW), _ROW), np.float32)
            rows.reshape(-1)[: len(x)] = x
            x = rows
        maps.append(x)
    values = cv2.remap(_table(), maps[0], maps[1], cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
    return np.asarray(values.reshape(-1)[: u.size].reshape(u.shape))


def fbm(u: Array, v: Array, footprint: Array, wavelength: Array) -> Array:
    """Sum of octaves of noise, without those finer than a pixel sees.

    Args:
        u: ``(N,)`` float32 metres on the surface, offset included.
        v: ``(N,)`` the other coordinate.
        footprint: ``(N,)`` metres of surface that a sample covers.
        wavelength: ``(N,)`` metres of the coarsest octave.

    Returns:
        ``(N,)`` float32, roughly within [−1, 1].
    """
    total = np.zeros(u.shape, np.float32)
    index: Array | None = None
    amplitude, scale = 1.0, 1.0
    resolved = wavelength / (2.0 * footprint)
    for octave in range(_OCTAVES):
        weight = np.clip(resolved * np.float32(scale) - np.float32(0.5), 0.0, 1.0)
        kept = np.flatnonzero(weight > 0)
        if len(kept) == 0:
            break
        if len(kept) < 0.7 * len(weight):  # finer octaves live near the camera only
            u, v, wavelength, resolved, weight = (x[kept] for x in (u, v, wavelength, resolved, weight))
            index = kept if index is None else index[kept]
        rate = np.float32(1.0 / scale) / wavelength
        values = noise(u * rate + np.float32(37 * octave), v * rate + np.float32(91 * octave))
        values *= weight * np.float32(amplitude)
        if index is None:
            total += values
        else:
            total[index] += values
        amplitude *= _GAIN
        scale /= _LACUNARITY
    return total

"""Flow as bytes: the stored values to 1/16 px, as 16-bit numbers of 1/8 px, differences along rows, zlib."""

from __future__ import annotations

import zlib

import numpy as np

from poodle_lightning.data.flow_planes import Part, stored_planes
from poodle_lightning.data.pixels import Box
from poodle_lightning.ops.geometry import Size

REACH = 4095.0
"""Px; what 16 bits hold."""

_UNIT = 8  # steps per pixel
_LARGEST = 2**15 - 1


def encode(flow: np.ndarray, step: int) -> bytes:
    """Pack a flow.

    Args:
        flow: ``(2, 2, H, W)`` px, there and back, less than 4095.
        step: 2 stores half the resolution, see ``data.flow_planes``; 1 stores every pixel.
    """
    steps = np.rint(stored_planes(flow, step) * _UNIT)
    # at half resolution a value may be 2.3 times the flow that it is made of, more than 16 bits hold
    values = np.clip(steps, -_LARGEST, _LARGEST).astype("<i2")
    values[..., 1:] -= values[..., :-1].copy()  # wraps around, and back when it is summed up
    return zlib.compress(values.tobytes(), level=6)


def decode(data: bytes, size: Size, step: int, box: Box | None = None) -> np.ndarray:
    """Unpack a flow, or a box of it.

    Args:
        data: from :func:`encode`.
        size: height and width of the frame.
        step: as it was packed.
        box: ``(x0, y0, x1, y1)`` in pixels of the frame; None is the whole.

    Returns:
        ``(2, 2, h, w)`` float32 px.

    Raises:
        ValueError: the bytes are not such a flow, or the box is not inside the frame.
    """
    part = Part(size, step, box)
    expected = 4 * part.stored[0] * part.stored[1] * 2
    try:
        raw = zlib.decompressobj().decompress(data, expected)
    except zlib.error as error:
        raise ValueError(str(error)) from error
    if len(raw) != expected:
        raise ValueError(f"{len(raw)} bytes in place of {expected}")
    values = np.frombuffer(raw, "<i2").reshape(4, *part.stored)[:, part.rows, : part.columns.stop]
    planes = np.cumsum(values, axis=2, dtype=np.int16)[..., part.columns]
    return part.flow(planes * np.float32(1 / _UNIT))

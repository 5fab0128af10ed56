"""Flow as bytes in PiCo's way: each component scaled to its own range as a grey JPEG. Small, and approximate.

"PiCo: Pixel-level Correspondence" keeps its flow so, after Simonyan and Zisserman 2014, "Two-Stream
Convolutional Networks for Action Recognition in Videos": a component is mapped linearly from its range to
0…255 and compressed, and mapped back when it is read. The range taken here is from the component's minimum to
its maximum in this one field; both are kept beside the image. With r = maximum − minimum, rounding to
bytes costs at most r / 510 px, and JPEG's own rounding comes on top: a wide range makes everything coarse,
and quality below 100 blurs motion borders. ``python -m benchmarks.flow_cache`` measures the error beside that
of ``data.flow_delta``, which is bounded in pixels whatever the range.
"""

from __future__ import annotations

import struct

import numpy as np

from poodle_lightning.data.flow_planes import Part, stored_planes
from poodle_lightning.data.pixels import Box
from poodle_lightning.ops.geometry import Size

_PLANE = struct.Struct("<ffI")  # minimum and maximum in px, bytes of the JPEG
_FRAME_HEADERS = (0xC0, 0xC1, 0xC2)  # baseline, extended, progressive
_LARGEST_SIDE = 65500  # of a JPEG
_SMALLEST_RANGE = 1e-30  # px; less is taken as constant, as 255 / range would not be a float32


def encode(flow: np.ndarray, quality: int = 95, step: int = 1) -> bytes:
    """Pack a flow.

    Args:
        flow: ``(2, 2, H, W)`` px, there and back.
        quality: JPEG's, 1 to 100.
        step: 1 stores every pixel, as PiCo does; 2 half the resolution, see ``data.flow_planes``.

    Raises:
        ValueError: the quality is out of range, or the flow is larger than a JPEG can be.
    """
    import cv2

    if not 1 <= quality <= 100:
        raise ValueError(f"JPEG quality goes from 1 to 100, not {quality}")
    planes = stored_planes(flow, step)
    if max(planes.shape[1:]) > _LARGEST_SIDE:
        raise ValueError(f"a JPEG has at most {_LARGEST_SIDE} px a side, not {planes.shape[1:]}")
    packed = []
    for plane in planes:
        low, high = float(plane.min()), float(plane.max())
        scale = 255.0 / (high - low) if high - low > _SMALLEST_RANGE else 0.0
        grey = np.rint((plane - np.float32(low)) * np.float32(scale)).astype(np.uint8)
        _, image = cv2.imencode(".jpg", grey, [cv2.IMWRITE_JPEG_QUALITY, quality])
        data = image.tobytes()
        packed.append(_PLANE.pack(low, high, len(data)) + data)
    return b"".join(packed)


def decode(data: bytes, size: Size, step: int = 1, box: Box | None = None) -> np.ndarray:
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
    planes, place = [], 0
    for _ in range(4):
        if len(data) < place + _PLANE.size:
            raise ValueError("ends too early")
        low, high, length = _PLANE.unpack_from(data, place)
        place += _PLANE.size
        grey = _image(data[place : place + length], part.stored)[part.rows, part.columns]
        planes.append(grey * np.float32((high - low) / 255.0) + np.float32(low))
        place += length
    return part.flow(np.stack(planes))


def _image(data: bytes, size: Size) -> np.ndarray:
    """A grey JPEG of known size; another one is not even decoded."""
    import cv2

    if _announced(data) != size:
        raise ValueError(f"not a JPEG of {size[0]} x {size[1]}")
    flags = cv2.IMREAD_GRAYSCALE | cv2.IMREAD_IGNORE_ORIENTATION
    image = cv2.imdecode(np.frombuffer(data, np.uint8), flags)
    if image is None or image.shape != size:
        raise ValueError("a damaged JPEG")
    return image


def _announced(data: bytes) -> Size | None:
    """Height and width in a JPEG's frame header (ITU-T T.81, B.2.2)."""
    at = 2  # after the start of the image
    while at + 9 <= len(data) and data[at] == 0xFF:
        if data[at + 1] in _FRAME_HEADERS:
            return int.from_bytes(data[at + 5 : at + 7], "big"), int.from_bytes(data[at + 7 : at + 9], "big")
        at += 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    return None

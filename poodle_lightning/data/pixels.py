"""From a decoded frame to RGB, limited to a box: only the box's planes are copied and converted.

The converter of FFmpeg works on blocks, stretches chroma when a side is odd, and picks another algorithm for
odd heights, so converting a crop is not in itself cropping the conversion. Here every conversion, that of a
whole frame too, sees a region with even sides that starts on a block and reaches past the box on every side
(at the border of an odd frame its last row or column is repeated). Then the two are bit-equal. Chroma is
taken from the nearest sample for every format: FFmpeg does so for 8 bits, and for more bits would interpolate
by a siting that a copied region does not carry.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import numpy as np

Box = tuple[int, int, int, int]

# Blocks of the converter's vector code, and a margin of as much again for chroma interpolation.
_BLOCK_X, _BLOCK_Y = 16, 8


def rgb(frame: Any, box: Box | None, rotation: int) -> np.ndarray:
    """A box of the rotated frame.

    Args:
        frame: a decoded frame of any pixel format; untagged colours are taken as BT.601, as FFmpeg does.
        box: ``(x0, y0, x1, y1)`` in pixels of the rotated frame; None is all of it.
        rotation: degrees counter-clockwise, a multiple of 90.

    Returns:
        ``(y1 − y0, x1 − x0, 3)`` uint8.

    Raises:
        ValueError: the box is not inside the frame.
    """
    turns = rotation // 90 % 4
    size = (frame.width, frame.height) if turns % 2 == 0 else (frame.height, frame.width)
    x0, y0, x1, y1 = box or (0, 0, *size)
    if not (0 <= x0 < x1 <= size[0] and 0 <= y0 < y1 <= size[1]):
        raise ValueError(f"box {(x0, y0, x1, y1)} is not inside the frame of {size[0]}×{size[1]}")
    stored = _unrotate((x0, y0, x1, y1), turns, frame.width, frame.height)
    return np.ascontiguousarray(np.rot90(_convert(frame, stored), turns))


def rotation_of(frame: Any) -> int:
    """Degrees counter-clockwise to turn a frame for display, to the nearest quarter turn: 0 to 270."""
    return int(round(frame.rotation / 90) % 4 * 90)


def one_box_each(box: Box | Sequence[Box] | None, count: int) -> list[Box | None]:
    """``count`` boxes from one for all, one each, or None.

    Raises:
        ValueError: another number of boxes, or boxes of different sizes.
    """
    if box is None:
        return [None] * count
    if not isinstance(box[0], (tuple, list)):
        return [cast(Box, tuple(box))] * count
    boxes = [cast(Box, tuple(b)) for b in cast(Sequence[Box], box)]
    if len(boxes) != count:
        raise ValueError(f"{len(boxes)} boxes for {count} times")
    if len({(x1 - x0, y1 - y0) for x0, y0, x1, y1 in boxes}) > 1:
        raise ValueError("all boxes of a read must be of one size")
    return list(boxes)


def _unrotate(box: Box, turns: int, width: int, height: int) -> Box:
    """The box in the stored frame that becomes ``box`` after ``turns`` quarter turns counter-clockwise."""
    x0, y0, x1, y1 = box
    if turns == 1:
        return width - y1, x0, width - y0, x1
    if turns == 2:
        return width - x1, height - y1, width - x0, height - y0
    if turns == 3:
        return y0, height - x1, y1, height - x0
    return box


def _convert(frame: Any, box: Box) -> np.ndarray:
    x0, y0, x1, y1 = box
    form = frame.format
    separate = form.is_planar or len(form.components) == 1
    if not separate or form.has_palette or form.is_bit_stream:
        return _to_rgb(frame)[y0:y1, x0:x1]
    step_x, step_y = 1024 // form.chroma_width(1024), 1024 // form.chroma_height(1024)
    left, right = _region(x0, x1, frame.width, _BLOCK_X, max(2, step_x))
    top, bottom = _region(y0, y1, frame.height, _BLOCK_Y, max(2, step_y))
    part = type(frame)(right - left, bottom - top, form.name)
    part.colorspace, part.color_range = frame.colorspace, frame.color_range
    for number, (source, target) in enumerate(zip(frame.planes, part.planes, strict=True)):
        parts = [c for c in form.components if c.plane == number]
        depth = sum((c.bits + 7) // 8 for c in parts)
        dx, dy = (step_x, step_y) if any(c.is_chroma for c in parts) and not form.is_rgb else (1, 1)
        _copy(_plane(source, depth), _plane(target, depth), left // dx, top // dy)
    whole = _to_rgb(part)
    return whole[y0 - top : y1 - top, x0 - left : x1 - left]


def _region(low: int, high: int, length: int, block: int, even: int) -> tuple[int, int]:
    """An interval on blocks around ``[low, high)`` with a margin, ending at ``length`` made even at most."""
    start = max(0, low - block) // block * block
    return start, min(-(-length // even) * even, -(-(high + block) // block) * block)


def _plane(plane: Any, depth: int) -> np.ndarray:
    """A writable view ``(height, width, depth)`` in bytes of a plane of a frame."""
    rows = np.frombuffer(plane, np.uint8).reshape(-1, plane.line_size)
    return rows[: plane.height, : plane.width * depth].reshape(plane.height, plane.width, depth)


def _copy(source: np.ndarray, target: np.ndarray, left: int, top: int) -> None:
    """Fill ``target`` from ``source`` at an offset; beyond its end the last row and column are repeated."""
    part = source[top : top + target.shape[0], left : left + target.shape[1]]
    height, width = part.shape[:2]
    target[:height, :width] = part
    target[:height, width:] = part[:, -1:]
    target[height:] = target[height - 1]


def _to_rgb(frame: Any) -> np.ndarray:
    """All pixels of a frame, ``(H, W, 3)`` uint8."""
    return _plane(frame.reformat(format="rgb24", interpolation="POINT", threads=1).planes[0], 3)

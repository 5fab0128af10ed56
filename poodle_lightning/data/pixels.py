"""From a decoded frame to RGB or to its own planes, limited to a box: nothing else is copied or converted.

The converter of FFmpeg works on blocks, stretches chroma when a side is odd, and picks another algorithm for
odd heights, so converting a crop is not in itself cropping the conversion. Here every conversion, that of a
whole frame too, sees a region with even sides that starts on a block and reaches past the box on every side
(at the border of an odd frame its last row or column is repeated). Then the two are bit-equal. Chroma is
taken from the nearest sample for every format: FFmpeg does so for 8 bits, and for more bits would interpolate
by a siting that a copied region does not carry.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, cast

import numpy as np

Box = tuple[int, int, int, int]

# Blocks of the converter's vector code, and a margin of as much again for chroma interpolation.
_BLOCK_X, _BLOCK_Y = 16, 8
# What is handed over as planes: 8 bits, chroma for 2x2 pixels; the second is the full range's own name.
_PLANAR = {"yuv420p", "yuvj420p"}
_FULL_RANGE = 2
# Shares of red and blue in the luma by FFmpeg's number of the colour space: ITU-R BT.709-6, BT.601-7 (also
# what has no tag, as in FFmpeg), BT.2020-2 with non-constant luminance.
_LUMA = {
    1: (0.2126, 0.0722),
    2: (0.299, 0.114),
    5: (0.299, 0.114),
    6: (0.299, 0.114),
    9: (0.2627, 0.0593),
}


@dataclass(frozen=True)
class Piece:
    """A box of one frame.

    Args:
        pixels: ``(h, w, 3)`` uint8 RGB; or planes, ``(h·3/2, w)`` uint8: h rows of Y, then U, then V (I420).
        time: the frame's own time, seconds.
        box: what ``pixels`` show, pixels of the rotated frame. Of planes its sides are even, and it may reach
            one pixel over the right and bottom border, which is repeated there.
        matrix: of planes, ``(3, 4)`` float32 from (Y, U, V, 1) in bytes to RGB in 0…255; None of RGB.
    """

    pixels: np.ndarray
    time: float
    box: Box
    matrix: np.ndarray | None = None


def piece(frame: Any, box: Box | None, rotation: int, time: float, planes: bool) -> Piece:
    """A box of a rotated frame, as planes if they are wanted and the frame has them upright.

    Args:
        frame: a decoded frame.
        box: ``(x0, y0, x1, y1)`` in pixels of the rotated frame; None is all of it. Planes hold it widened to
            even coordinates.
        rotation: degrees counter-clockwise, a multiple of 90.
        time: of the frame, seconds.
        planes: hand over YUV 4:2:0; other formats, colour spaces and rotated frames come as RGB all the same.

    Raises:
        ValueError: the box is not inside the frame.
    """
    turns = rotation // 90 % 4
    x0, y0, x1, y1 = whole = _checked(box, frame, turns)
    space = int(frame.colorspace)
    if not planes or turns or frame.format.name not in _PLANAR or space not in _LUMA:
        return Piece(_rgb(frame, whole, turns), time, whole)
    left, top, right, bottom = even = (x0 & ~1, y0 & ~1, x1 + x1 % 2, y1 + y1 % 2)
    height, width = bottom - top, right - left
    pixels = np.empty((height * 3 // 2, width), np.uint8)
    chroma = pixels[height:].reshape(2, height // 2, width // 2, 1)
    for source, target, half in zip(
        frame.planes, (pixels[:height, :, None], chroma[0], chroma[1]), (1, 2, 2), strict=True
    ):
        _copy(_plane(source, 1), target, left // half, top // half)
    full = frame.format.name == "yuvj420p" or int(frame.color_range) == _FULL_RANGE
    return Piece(pixels, time, even, _as_converted(cast(Hashable, type(frame)), space, full))


def yuv_matrix(space: int, full: bool) -> np.ndarray:
    """From (Y, U, V, 1) in bytes to RGB in 0…255, ``(3, 4)`` float64, as the standards define it.

    Args:
        space: FFmpeg's number of the colour space: 1 BT.709, 2, 5 and 6 BT.601, 9 BT.2020.
        full: bytes use the range 0…255 in place of 16…235 and 16…240.
    """
    red, blue = _LUMA[space]
    green = 1.0 - red - blue
    luma, chroma, black = (1.0, 1.0, 0.0) if full else (255 / 219, 255 / 224, 16.0)
    matrix = np.array(
        [
            [1.0, 0.0, 2 * (1 - red)],
            [1.0, -2 * (1 - blue) * blue / green, -2 * (1 - red) * red / green],
            [1.0, 2 * (1 - blue), 0.0],
        ]
    ) * [luma, chroma, chroma]
    return np.column_stack([matrix, -matrix @ [black, 128.0, 128.0]])


@cache
def _as_converted(kind: Any, space: int, full: bool) -> np.ndarray:
    """The standard's matrix, moved by what FFmpeg's converter is off on the mean: ``(3, 4)`` float32.

    Its vector code cuts off every product, half a level each, and is 1 to 1.5 levels too dark; other builds
    are not. The converter at hand is asked once, on samples that nothing clips, so that planes and RGB agree.
    """
    u, v = np.mgrid[104:152, 104:152]
    samples = np.stack([96 + (5 * u + 7 * v) % 64, u, v, np.ones_like(u)], axis=-1)
    frame = kind(2 * u.shape[1], 2 * u.shape[0], "yuv420p")
    frame.colorspace, frame.color_range = space, _FULL_RANGE if full else 1
    for number, plane in enumerate(frame.planes):
        values = samples[..., number] if number else samples[..., 0].repeat(2, 0).repeat(2, 1)
        _plane(plane, 1)[..., 0] = values
    matrix = yuv_matrix(space, full)
    matrix[:, 3] += (_to_rgb(frame)[::2, ::2] - samples @ matrix.T).mean((0, 1))
    return matrix.astype(np.float32)


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
    return _rgb(frame, _checked(box, frame, turns), turns)


def _rgb(frame: Any, box: Box, turns: int) -> np.ndarray:
    stored = _unrotate(box, turns, frame.width, frame.height)
    return np.ascontiguousarray(np.rot90(_convert(frame, stored), turns))


def _checked(box: Box | None, frame: Any, turns: int) -> Box:
    """The box, or all of the rotated frame."""
    size = (frame.width, frame.height) if turns % 2 == 0 else (frame.height, frame.width)
    x0, y0, x1, y1 = box or (0, 0, *size)
    if not (0 <= x0 < x1 <= size[0] and 0 <= y0 < y1 <= size[1]):
        raise ValueError(f"box {(x0, y0, x1, y1)} is not inside the frame of {size[0]}×{size[1]}")
    return x0, y0, x1, y1


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

"""A street as a video that can be seen at any time, with everything that is known about it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import numpy as np

from poodle_lightning.data.synthetic.classes import CLASSES
from poodle_lightning.data.synthetic.motion import motion
from poodle_lightning.data.synthetic.patches import Array
from poodle_lightning.data.synthetic.raster import SKY, Box, Raster, rasterise
from poodle_lightning.data.synthetic.shade import behind, directions, shade
from poodle_lightning.data.synthetic.streets import Difficulty, Layout
from poodle_lightning.types import UserError

Size = tuple[int, int]
InstanceBox = tuple[str, int, int, int, int, int]
_SKY_LABEL = CLASSES.index("sky")
_RASTERS = 4  # kept per street: a pair's two frames, asked for pixels, flow and labels in turn


@dataclass(frozen=True)
class Frame:
    """A street at one time, for one box of the frame.

    Args:
        image: ``(H, W, 3)`` uint8 RGB.
        labels: ``(H, W)`` uint8, see ``CLASSES``; the class at the pixel's centre.
        instances: ``(H, W)`` int32, number of the object at the pixel's centre, the same in all frames; 0 =
            no object (everything but people, riders, vehicles, bicycles, lights and signs).
        depth: ``(H, W)`` float32 metres along the optical axis; infinite for the sky.
        time: seconds.
    """

    image: Array
    labels: Array
    instances: Array
    depth: Array
    time: float

    @cached_property
    def boxes(self) -> list[InstanceBox]:
        """The visible part of each object: ``(class, x0, y0, x1, y1, instance)``.

        Pixels, upper ends excluded, sorted by instance.
        """
        rows, columns = np.nonzero(self.instances)
        numbers, labels = self.instances[rows, columns], self.labels[rows, columns]
        found: list[InstanceBox] = []
        for number in np.unique(numbers).tolist():
            at = numbers == number
            x, y = columns[at], rows[at]
            box = (int(x.min()), int(y.min()), int(x.max()) + 1, int(y.max()) + 1)
            found.append((CLASSES[labels[at][0]], *box, number))
        return found


@dataclass(frozen=True)
class Pair:
    """Two frames and the motion between them.

    Args:
        first: the frame at the first time.
        second: the frame at the second time.
        flow_forward: ``(2, H, W)`` float32 pixels, first → second, on the first frame's grid.
        flow_backward: ``(2, H, W)``, second → first, on the second frame's grid.
        visible_forward: ``(H, W)`` bool: the pixel of the first frame is inside the second and not hidden.
        visible_backward: the same for the second frame's pixels.
    """

    first: Frame
    second: Frame
    flow_forward: Array
    flow_backward: Array
    visible_forward: Array
    visible_backward: Array


@dataclass(frozen=True)
class Scene:
    """A few frames of one street and all that is known about them.

    Args:
        frames: ``(T, H, W, 3)`` uint8 RGB.
        flow_forward: ``(T−1, 2, H, W)`` float32 pixels, from each frame to the next.
        flow_backward: ``(T−1, 2, H, W)``, from each next frame back, on its own grid.
        visible_forward: ``(T−1, H, W)`` bool: inside the next frame and not hidden there.
        visible_backward: ``(T−1, H, W)`` bool.
        labels: ``(T, H, W)`` uint8.
        instances: ``(T, H, W)`` int32, 0 = no object.
        boxes: for each frame, ``(class, x0, y0, x1, y1, instance)`` of its visible objects.
        depth: ``(T, H, W)`` float32 metres, infinite for the sky.
        times: ``(T,)`` float64 seconds.
    """

    frames: Array
    flow_forward: Array
    flow_backward: Array
    visible_forward: Array
    visible_backward: Array
    labels: Array
    instances: Array
    boxes: list[list[InstanceBox]]
    depth: Array
    times: Array


class Street:
    """A street that is driven along; may be looked at at any time from 0 s on.

    What is seen at a time depends on the arguments and the time only. Works as a video reader: ``read``
    takes times and a box as a reader of files does.

    Args:
        seed: of the street.
        size: height and width of a frame in pixels.
        difficulty: "easy" (small things more frequent, slower motion, milder light) or "hard".
        supersample: samples per pixel and direction; 1 is fast and jagged.

    Raises:
        UserError: an argument is out of range.
    """

    def __init__(
        self, seed: int, size: Size = (96, 192), difficulty: Difficulty = "easy", supersample: int = 2
    ) -> None:
        if min(size) < 8:
            raise UserError(f"synthetic: size {tuple(size)} is too small; give at least 8 pixels each way")
        if difficulty not in ("easy", "hard"):
            raise UserError(f'synthetic: difficulty {difficulty!r} is unknown; give "easy" or "hard"')
        if supersample < 1:
            raise UserError(f"synthetic: supersample must be 1 or more, not {supersample}")
        self.seed, self.size, self.difficulty, self.supersample = seed, size, difficulty, supersample
        self.layout = Layout(seed, difficulty)
        self._rasters: dict[tuple[float, Box], Raster] = {}

    def __reduce__(self) -> tuple[type[Street], tuple[int, Size, Difficulty, int]]:
        """Pickled by its arguments: all else follows from them."""
        return Street, (self.seed, self.size, self.difficulty, self.supersample)

    def read(self, times: Sequence[float], box: Box | Sequence[Box] | None = None) -> tuple[Array, Array]:
        """Frames at some times.

        Args:
            times: seconds, any order.
            box: ``(x0, y0, x1, y1)`` pixels for all frames, or one for each; None = whole frames.

        Returns:
            ``(T, h, w, 3)`` uint8 and the times ``(T,)`` float64.
        """
        boxes = _per_time(box, len(times))
        frames = [
            shade(self._raster(t, b), self.layout.light, self.seed) for t, b in zip(times, boxes, strict=True)
        ]
        return np.stack(frames), np.asarray(times, np.float64)

    def flow(self, t_a: float, t_b: float, box: Box | None = None) -> tuple[Array, Array]:
        """Exact motion of the pixels at one time to another.

        Args:
            t_a: seconds; the flow is on this frame's grid.
            t_b: seconds.
            box: pixels, the same in both frames; None = whole frames.

        Returns:
            ``(2, h, w)`` float32 pixels (x, y), and bool ``(h, w)``: inside the other box and not hidden.
        """
        return motion(self._raster(t_a, box), self._raster(t_b, box))

    def labels(self, time: float, box: Box | None = None) -> Array:
        """Classes of the pixels at a time, ``(h, w)`` uint8."""
        return self._labels(self._raster(time, box))

    def frame(self, time: float, box: Box | None = None) -> Frame:
        """Everything about one time."""
        raster = self._raster(time, box)
        seen, nearness = raster.centres(raster.seen), raster.centres(raster.nearness)
        depth = np.full(seen.shape, np.inf, np.float32)
        np.divide(1.0, nearness, out=depth, where=seen != SKY)
        instances = np.append(raster.patches["instance"], np.int32(0))[seen]
        image = shade(raster, self.layout.light, self.seed)
        return Frame(image, self._labels(raster), instances, depth, float(time))

    def pair(self, t_a: float, t_b: float, box: Box | None = None) -> Pair:
        """Two frames with the motion between them, both ways."""
        forward, seen_forward = self.flow(t_a, t_b, box)
        backward, seen_backward = self.flow(t_b, t_a, box)
        return Pair(
            self.frame(t_a, box), self.frame(t_b, box), forward, backward, seen_forward, seen_backward
        )

    def _labels(self, raster: Raster) -> Array:
        seen = raster.centres(raster.seen)
        labels = np.append(raster.patches["label"], np.uint8(_SKY_LABEL))[seen]
        rows, columns = np.nonzero(seen == SKY)
        if len(rows):
            far = directions(raster.pose, raster.columns[columns], raster.rows[rows])
            hidden = behind(self.layout.light, far.astype(np.float32))
            labels[rows[hidden], columns[hidden]] = self.layout.light.skyline[2]
        return np.asarray(labels)

    def _raster(self, time: float, box: Box | None) -> Raster:
        height, width = self.size
        box = (0, 0, width, height) if box is None else (box[0], box[1], box[2], box[3])
        if time < 0:
            raise UserError(f"synthetic: a street begins at 0 s; {time} s was asked for")
        if not (0 <= box[0] < box[2] <= width and 0 <= box[1] < box[3] <= height):
            raise UserError(f"synthetic: box {box} is not inside the frame of {height}x{width} pixels")
        key = (float(time), box)
        if key not in self._rasters:
            if len(self._rasters) >= _RASTERS:
                del self._rasters[next(iter(self._rasters))]
            pose = self.layout.plan.pose(key[0], self.size)
            self._rasters[key] = rasterise(self.layout.patches(key[0]), pose, box, self.supersample)
        return self._rasters[key]


def _per_time(box: Box | Sequence[Box] | None, count: int) -> Sequence[Box | None]:
    if box is None:
        return [None] * count
    table = np.asarray(box, int).reshape(-1, 4).tolist()
    boxes = [(x0, y0, x1, y1) for x0, y0, x1, y1 in table]
    if len(boxes) not in (1, count):
        raise UserError(
            f"synthetic: {len(boxes)} boxes for {count} times; give one box, or one for each time"
        )
    return boxes * count if len(boxes) == 1 else boxes


def render(
    seed: int,
    size: Size = (96, 192),
    times: Sequence[float] = (0.0, 0.5),
    difficulty: Difficulty = "easy",
    supersample: int = 2,
) -> Scene:
    """Frames of one street with flow, visibility, labels, instances and depth.

    Args:
        seed: of the street.
        size: height and width in pixels.
        times: seconds, at least one; the flow is between consecutive ones.
        difficulty: "easy" or "hard".
        supersample: samples per pixel and direction.

    Returns:
        The scene; a frame does not depend on which other times are asked for.

    Raises:
        UserError: an argument is out of range.
    """
    if len(times) == 0:
        raise UserError("synthetic: no time was asked for; give at least one")
    street = Street(seed, size, difficulty, supersample)
    frames = [street.frame(times[0])]
    forward, backward = [], []
    for before, after in pairwise(times):
        forward.append(street.flow(before, after))
        backward.append(street.flow(after, before))
        frames.append(street.frame(after))
    flows = np.zeros((0, 2, *size), np.float32), np.zeros((0, *size), bool)

    def stacked(motions: list[tuple[Array, Array]]) -> tuple[Array, Array]:
        return (np.stack([m[0] for m in motions]), np.stack([m[1] for m in motions])) if motions else flows

    flow_forward, visible_forward = stacked(forward)
    flow_backward, visible_backward = stacked(backward)
    return Scene(
        frames=np.stack([f.image for f in frames]),
        flow_forward=flow_forward,
        flow_backward=flow_backward,
        visible_forward=visible_forward,
        visible_backward=visible_backward,
        labels=np.stack([f.labels for f in frames]),
        instances=np.stack([f.instances for f in frames]),
        boxes=[f.boxes for f in frames],
        depth=np.stack([f.depth for f in frames]),
        times=np.asarray(times, np.float64),
    )


def flow_between(
    seed: int, t_a: float, t_b: float, size: Size = (96, 192), difficulty: Difficulty = "easy"
) -> tuple[Array, Array]:
    """Exact flow of a street's pixels from one time to another.

    Returns:
        ``(2, H, W)`` float32 pixels and the visibility ``(H, W)`` bool, see ``Street.flow``.
    """
    return Street(seed, size, difficulty).flow(t_a, t_b)

"""Which patch each sample of a frame sees: exact ray casting by homographies and a depth buffer.

Along a patch's plane, 1/depth, a/depth and b/depth (a, b: metres on the patch) are affine in pixel
coordinates. So the test of a patch is three affine fields over its bounding box, and no ray is ever formed.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from poodle_lightning.data.synthetic import outlines
from poodle_lightning.data.synthetic.patches import Array, Pose, inverted, to_pixels

Box = tuple[int, int, int, int]

NEAR, FAR = 0.3, 500.0  # metres
SKY = -1  # in the map of patches


@dataclass(frozen=True)
class Raster:
    """What is seen at the samples of a frame.

    Samples lie at pixel coordinates ``x[j], y[i]``. They include the centres of all pixels of the box:
    ``[margin::step]`` with ``margin = supersample − 1`` and ``step = supersample``.

    Args:
        patches: ``(N,)`` the scene at this time.
        pose: the camera.
        project: ``(N, 3, 3)`` patch → pixels, see ``patches.to_pixels``.
        unproject: ``(N, 3, 3)`` its inverse.
        x: ``(w,)`` pixel columns of the samples, float64.
        y: ``(h,)`` pixel rows.
        seen: ``(h, w)`` int32, number of the patch in ``patches``, or ``SKY``.
        nearness: ``(h, w)`` float32, 1/depth in 1/m; 0 for the sky.
        supersample: samples per pixel and direction.
    """

    patches: Array
    pose: Pose
    project: Array
    unproject: Array
    x: Array
    y: Array
    seen: Array
    nearness: Array
    supersample: int

    def centres(self, field: Array) -> Array:
        """The entries at the pixels' centres of a field over the samples, ``(h, w)`` → ``(H, W)``."""
        return field[self._inner(0), self._inner(1)]

    @property
    def rows(self) -> Array:
        """``(H,)`` pixel rows of the box, float64."""
        return self.y[self._inner(0)]

    @property
    def columns(self) -> Array:
        """``(W,)`` pixel columns of the box, float64."""
        return self.x[self._inner(1)]

    def _inner(self, axis: int) -> slice:
        margin = self.supersample - 1
        return slice(margin, self.seen.shape[axis] - margin, self.supersample)


def sample_axis(start: int, stop: int, supersample: int) -> Array:
    """Sample coordinates along one axis for the pixels ``start … stop − 1``; float64."""
    s = supersample
    return start + (np.arange(s * (stop - start - 1) + 1 + 2 * (s - 1)) - (s - 1)) / s


def rasterise(patches: Array, pose: Pose, box: Box, supersample: int) -> Raster:
    """Find the nearest patch at every sample of a box of the frame.

    Args:
        patches: ``(N,)`` of dtype ``PATCH``.
        pose: the camera.
        box: ``(x0, y0, x1, y1)`` pixels.
        supersample: samples per pixel and direction.
    """
    project = to_pixels(patches, pose)
    unproject, there = inverted(project)
    x, y = sample_axis(box[0], box[2], supersample), sample_axis(box[1], box[3], supersample)
    low, high, near = _bounds(project, patches["size"])
    columns = np.searchsorted(x, np.stack([low[:, 0], high[:, 0]]))
    rows = np.searchsorted(y, np.stack([low[:, 1], high[:, 1]]))
    some = there & (columns[0] < columns[1]) & (rows[0] < rows[1]) & (near < FAR)
    order = np.flatnonzero(some)
    order = order[np.argsort(near[order], kind="stable")]  # near ones first: they hide the rest early
    seen = np.full((len(y), len(x)), SKY, np.int32)
    nearness = np.full(seen.shape, 1.0 / FAR, np.float32)
    xs, ys = x.astype(np.float32), y.astype(np.float32)
    plane = unproject.astype(np.float32)
    sizes, forms = patches["size"].astype(np.float32), patches["form"]
    kinds, boxes = patches["outline"].tolist(), np.concatenate([rows, columns]).T.tolist()
    for n in order.tolist():
        r0, r1, c0, c1 = boxes[n]
        view = (slice(r0, r1), slice(c0, c1))
        _draw(
            n, kinds[n], plane[n], sizes[n], forms[n], xs[c0:c1], ys[r0:r1, None], seen[view], nearness[view]
        )
    nearness[seen == SKY] = 0.0
    return Raster(patches, pose, project, unproject, x, y, seen, nearness, supersample)


def _draw(
    number: int,
    kind: int,
    plane: Array,
    size: Array,
    form: Array,
    x: Array,
    y: Array,
    seen: Array,
    nearness: Array,
) -> None:
    """Test one patch over its bounding box and keep it where it is the nearest, in place."""
    (a0, a1, a2), (b0, b1, b2), (w0, w1, w2) = plane
    w = w0 * x + (w1 * y + w2)
    hit = w > nearness
    if not hit.any():
        return
    a = a0 * x + (a1 * y + a2)
    b = b0 * x + (b1 * y + b2)
    hit &= w < np.float32(1.0 / NEAR)
    hit &= a >= 0.0
    hit &= b >= 0.0
    hit &= a <= size[0] * w
    hit &= b <= size[1] * w
    if kind != outlines.RECT:
        rows, columns = np.nonzero(hit)
        if len(rows) == 0:
            return
        at = w[rows, columns]
        inside = outlines.covers(kind, a[rows, columns] / at, b[rows, columns] / at, size, form)
        hit[rows[~inside], columns[~inside]] = False
    np.copyto(nearness, w, where=hit)
    np.copyto(seen, np.int32(number), where=hit)


def _bounds(project: Array, size: Array) -> tuple[Array, Array, Array]:
    """Bounding boxes of patches in the frame, cut at the near plane.

    Returns:
        ``(N, 2)`` lower and ``(N, 2)`` upper pixel bounds (upper < lower where nothing is in front of the
        camera) and ``(N,)`` the smallest depth in metres.
    """
    corner = np.array([[0, 0], [1, 0], [1, 1], [0, 1]], float)
    on = np.concatenate([corner * size[:, None], np.ones((len(size), 4, 1))], axis=2)
    point = on @ project.transpose(0, 2, 1)
    after = np.roll(point, -1, axis=1)
    z, z_after = point[..., 2], after[..., 2]
    crosses = (z < NEAR) != (z_after < NEAR)
    share = (NEAR - z) / np.where(crosses, z_after - z, 1.0)
    cut = point + (after - point) * share[..., None]
    points = np.concatenate([point, cut], axis=1)
    valid = np.concatenate([z >= NEAR, crosses], axis=1)
    depth = np.where(valid, np.maximum(points[..., 2], 0.5 * NEAR), 1.0)
    pixel = points[..., :2] / depth[..., None]
    low = np.where(valid[..., None], pixel, np.inf).min(axis=1) - 1e-3
    high = np.where(valid[..., None], pixel, -np.inf).max(axis=1) + 1e-3
    return low, high, np.where(valid, depth, np.inf).min(axis=1)

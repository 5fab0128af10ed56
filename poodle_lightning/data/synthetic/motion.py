"""Exact motion between two frames: each patch's homography, and an exact depth test at the target."""

from __future__ import annotations

import numpy as np

from poodle_lightning.data.synthetic import outlines
from poodle_lightning.data.synthetic.patches import Array, to_pixels
from poodle_lightning.data.synthetic.raster import FAR, NEAR, SKY, Raster

_TOLERANCE = 1e-3  # relative nearness by which another surface must be in front


def motion(first: Raster, second: Raster) -> tuple[Array, Array]:
    """Where the pixels of one frame are in another, and whether they are seen there.

    Args:
        first: the frame whose pixels are followed.
        second: the other frame, of the same street, size and box.

    Returns:
        ``(2, H, W)`` float32, displacement (x, y) in pixels, and bool ``(H, W)``: inside the other frame's
        box and not hidden there. A point that goes behind the camera keeps a finite displacement that leads
        out of the frame.
    """
    seen = first.centres(first.seen)
    height, width = seen.shape
    x, y = (c.reshape(-1) for c in np.meshgrid(first.columns, first.rows))
    number = seen.reshape(-1)
    there = _transfer(first, second)[number]  # the last row is the sky's, so SKY = −1 finds it
    point = np.stack([x, y, np.ones_like(x)], axis=1)
    target = (there @ point[..., None])[..., 0]
    # one unit of depth here: the third entry is depth there / depth here; for the sky, of directions
    nearness_here = first.centres(first.nearness).reshape(-1).astype(np.float64)
    ratio = target[:, 2]
    front = ratio > np.where(number == SKY, 1e-6, NEAR * nearness_here)
    safe = np.where(front, ratio, 1.0)
    tx, ty = target[:, 0] / safe, target[:, 1] / safe
    away = 4.0 * (width + height)
    tx, ty = np.where(front, tx, x + np.sign(x - x.mean() + 0.5) * away), np.where(front, ty, y + away)
    x0, y0 = second.columns[0], second.rows[0]
    inside = (tx >= x0 - 0.5) & (tx < x0 + width - 0.5) & (ty >= y0 - 0.5) & (ty < y0 + height - 0.5)
    nearness = np.where(number == SKY, 0.0, nearness_here / safe)
    uids = _uids(first.patches)
    drawn = np.isin(uids, _uids(second.patches))[number] & ((nearness > 1.0 / FAR) | (number == SKY))
    visible = front & inside & drawn
    at = np.flatnonzero(visible)
    visible[at] = ~_hidden(second, tx[at], ty[at], nearness[at], uids[number[at]])
    flow = np.stack([tx - x, ty - y]).reshape(2, height, width).astype(np.float32)
    return flow, visible.reshape(height, width)


def _transfer(first: Raster, second: Raster) -> Array:
    """Homographies pixel → pixel of all patches of the first frame; last row: points at infinity."""
    patches = to_pixels(first.patches, second.pose) @ first.unproject
    here, there = first.pose, second.pose
    turn = there.intrinsics @ there.rotation @ here.rotation.T @ np.linalg.inv(here.intrinsics)
    return np.concatenate([patches, turn[None]])


def _uids(patches: Array) -> Array:
    return np.append(patches["uid"], SKY)


def _hidden(frame: Raster, x: Array, y: Array, nearness: Array, uid: Array) -> Array:
    """Which points are hidden in a frame; bool ``(N,)``.

    The four samples around a point name the patches that may be there; each is then tested at the point
    itself, not at the sample: is it there, and nearer?
    """
    step = 1.0 / frame.supersample
    column = np.clip(((x - frame.x[0]) / step).astype(int), 0, len(frame.x) - 2)
    row = np.clip(((y - frame.y[0]) / step).astype(int), 0, len(frame.y) - 2)
    around = np.stack([frame.seen[row + i, column + j] for i in (0, 1) for j in (0, 1)])
    own = _uids(frame.patches)[around] == uid
    hidden = np.zeros(len(x), bool)
    mixed = np.flatnonzero(~own.all(axis=0))
    for candidate in around[:, mixed]:
        other = np.flatnonzero(candidate != SKY)
        at, patch = mixed[other], candidate[other]
        there = _covered(frame, patch, x[at], y[at], nearness[at] * (1.0 + _TOLERANCE))
        hidden[at] |= there & (frame.patches["uid"][patch] != uid[at])
    return hidden


def _covered(frame: Raster, patch: Array, x: Array, y: Array, nearness: Array) -> Array:
    """Which points lie on the given patch of a frame, in front of a given nearness; bool ``(N,)``."""
    plane = frame.unproject[patch]
    a, b, w = (plane @ np.stack([x, y, np.ones_like(x)], axis=1)[..., None])[..., 0].T
    size = frame.patches["size"][patch]
    front = (w > np.maximum(nearness, 1.0 / FAR)) & (w < 1.0 / NEAR)
    front &= (a >= 0) & (b >= 0) & (a <= size[:, 0] * w) & (b <= size[:, 1] * w)
    kinds = frame.patches["outline"][patch]
    for kind in np.unique(kinds[front]).tolist():
        if kind == outlines.RECT:
            continue
        at = np.flatnonzero(front & (kinds == kind))
        u, v = ((c[at] / w[at]).astype(np.float32) for c in (a, b))
        form = frame.patches["form"][patch[at]].T
        front[at] = outlines.covers(kind, u, v, size[at].T.astype(np.float32), form)
    return np.asarray(front)

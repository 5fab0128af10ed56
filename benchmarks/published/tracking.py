"""Points followed one at a time, as PiCo §3.2 describes it: a loop over points, and over frames in it.

``p' = p + w`` with w the bilinear flow at p; the point stops where it leaves the frame or where
``|w + ŵ|² ≥ γ (|w|² + |ŵ|²) + δ`` with ŵ the bilinear flow back at p' (Sundaram et al. 2010, eq. 5). In
pixels, plain float64 on the CPU.
"""

from __future__ import annotations

import numpy as np


def at(flow: np.ndarray, x: float, y: float) -> tuple[float, float]:
    """Bilinear flow ``(2, H, W)`` at a point in pixels; beyond the last pixel centres that of the border."""
    height, width = flow.shape[1:]
    x, y = min(max(x, 0.0), width - 1.0), min(max(y, 0.0), height - 1.0)
    left, top = min(int(x), width - 2), min(int(y), height - 2)
    a, b = x - left, y - top
    corners = flow[:, top : top + 2, left : left + 2]
    weights = np.array([[(1 - a) * (1 - b), a * (1 - b)], [(1 - a) * b, a * b]])
    u, v = (corners * weights).sum(axis=(1, 2))
    return float(u), float(v)


def follow_each(
    forward: np.ndarray,
    backward: np.ndarray,
    points: np.ndarray,
    first: np.ndarray,
    gamma: float,
    delta: float,
) -> list[np.ndarray]:
    """The places of every point, ``(frames, 2)`` px.

    Args:
        forward: ``(n − 1, 2, H, W)`` px.
        backward: ``(n − 1, 2, H, W)`` px.
        points: ``(P, 2)`` px.
        first: ``(P,)`` frames on which they start.
        gamma: γ.
        delta: δ, squared pixels.
    """
    height, width = forward.shape[2:]
    found = []
    for (x, y), start in zip(points.tolist(), first.tolist(), strict=True):
        places = [(x, y)]
        for frame in range(start, len(forward)):
            u, v = at(forward[frame], x, y)
            x, y = x + u, y + v
            if not (-0.5 <= x <= width - 0.5 and -0.5 <= y <= height - 0.5):
                break
            s, t = at(backward[frame], x, y)
            apart = (u + s) ** 2 + (v + t) ** 2
            if apart >= gamma * (u * u + v * v + s * s + t * t) + delta:
                break
            places.append((x, y))
        found.append(np.array(places))
    return found

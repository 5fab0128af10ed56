"""Points followed through a video: all of a frame at once against one after the other, and what tracks weigh.

The flow is there already, DIS of generated streets both ways, so only following is timed, in process CPU
seconds on one thread. Both must leave the same tracks: how many differ in length is counted (a point on the
border, or a consistency at δ, may fall either way), and how far the places of the others are apart.

The second table is of the tracks that were followed: bytes of an hour of such video, and how far a place is
moved by being written down.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from itertools import pairwise

from benchmarks import record

import cv2  # isort: skip  (after record, which fixes the number of threads)
import numpy as np
import torch

from benchmarks.published.tracking import follow_each
from poodle_lightning.data.synthetic import Street
from poodle_lightning.flow.dis import DIS
from poodle_lightning.ops.geometry import Flow, Size, extent_to_pixels, pixels_to_extent
from poodle_lightning.ops.random import key_of
from poodle_lightning.ops.tracks import DELTA, GAMMA, Tracks, follow, starts


def flows(seed: int, size: Size, frames: int, rate: float, preset: str) -> tuple[np.ndarray, np.ndarray]:
    """DIS flow from frame to frame and back, each ``(frames − 1, 2, H, W)`` px."""
    images, _ = Street(seed, size, "hard", 1).read([1.0 + k / rate for k in range(frames)])
    estimator = DIS(preset)
    both = np.stack([estimator.pixels(a, b) for a, b in pairwise(images)])
    return both[:, 0], both[:, 1]


def differences(tracks: Tracks, places: list[np.ndarray], size: Size) -> tuple[float, float]:
    """Share of the tracks of other lengths, and px by which places of the others are apart at most."""
    found = extent_to_pixels(torch.from_numpy(tracks.places / 32767.0), size).numpy()
    parts = np.split(found, tracks.offsets[1:-1])
    alike = [(a, b) for a, b in zip(parts, places, strict=True) if len(a) == len(b)]
    return 1 - len(alike) / len(parts), max(float(np.abs(a - b).max()) for a, b in alike)


def formats(tracks: Tracks, places: list[np.ndarray], size: Size, seconds: float) -> dict[str, dict]:
    """Bytes and errors of ways to write places down; consistencies take two bytes in each.

    Args:
        tracks: that are written.
        places: in float64, px, from which errors are measured.
        size: of the frames.
        seconds: of the video.
    """
    exact = torch.from_numpy(np.concatenate(places))
    extent = pixels_to_extent(exact, size)
    ways: dict[str, tuple[int, Callable[[torch.Tensor], torch.Tensor]]] = {
        "float32": (4, lambda x: x.float().double()),
        "float16": (2, lambda x: x.half().double()),
        "int16 of the extent (here)": (2, lambda x: (x * 32767).round().clamp(-32767, 32767) / 32767),
    }
    found = {}
    for name, (wide, way) in ways.items():
        error = (extent_to_pixels(way(extent), size) - exact).norm(dim=1).numpy()
        size_of_all = len(tracks.places) * (2 * wide + 2) + 8 * len(tracks) + 8 * tracks.frames
        found[name] = {
            "mb_per_hour": size_of_all / seconds * 3600 / 1e6,
            "error_px": float(error.mean()),
            "error_max_px": float(error.max()),
        }
    return found


def main(words: list[str] | None = None) -> dict[str, object]:
    parser = record.arguments(__doc__, rounds=5)
    parser.add_argument("--points", type=int, default=1000, help="that are followed")
    parser.add_argument("--frames", type=int, default=60, help="of the video")
    parser.add_argument("--rate", type=float, default=30.0, help="frames per second")
    parser.add_argument("--h", type=int, default=256, help="height of the frames, px")
    parser.add_argument("--w", type=int, default=340, help="width of the frames, px")
    parser.add_argument("--preset", default="medium", help="of DIS")
    parser.add_argument("--seed", type=int, default=3, help="of the street")
    args = parser.parse_args(words)
    cv2.setNumThreads(1)
    size = (args.h, args.w)
    there, back = flows(args.seed, size, args.frames, args.rate, args.preset)
    points, first = starts(key_of(args.seed), args.points, args.frames)
    pixels = extent_to_pixels(points.double(), size).numpy()
    ways = Flow.from_pixels(torch.from_numpy(there)), Flow.from_pixels(torch.from_numpy(back))
    forms: dict[str, Callable[[], object]] = {
        "here": lambda: follow(*ways, points, first, GAMMA, limit=DELTA),
        "one point after the other": lambda: follow_each(there, back, pixels, first.numpy(), GAMMA, DELTA),
    }
    tracks = follow(*ways, points, first, GAMMA, limit=DELTA)
    places = follow_each(there, back, pixels, first.numpy(), GAMMA, DELTA)
    other, apart = differences(tracks, places, size)
    kept = formats(tracks, places, size, args.frames / args.rate)
    results: dict[str, object] = {
        "points_frames": len(tracks.places),
        "share_of_other_lengths": other,
        "largest_difference_px": apart,
        "formats": kept,
    }
    rows = [("places", len(tracks.places)), ("tracks of another length", f"{100 * other:.2f} %")]
    rows += [("largest difference of the others, px", f"{apart:.3f}")]
    if args.rounds:
        seconds = measure(forms, args.rounds)
        rates = {name: [len(tracks.places) / one for one in taken] for name, taken in seconds.items()}
        results["points_frames_per_s"] = {name: record.spread(values) for name, values in rates.items()}
        results["times_faster"] = record.ratio(*reversed(seconds.values()))
        rows += [(f"points*frames/s, {n}", record.shown(record.spread(v), 0)) for n, v in rates.items()]
        rows += [("times faster", record.shown(results["times_faster"], 1))]
    path = record.save("tracking", args, results)
    print(record.table(("following", "value (min / median / max)"), rows) + "\n")
    head = ("places as", "MB per hour of video", "error px: mean", "largest")
    shown = [
        (name, f"{one['mb_per_hour']:.0f}", f"{one['error_px']:.4f}", f"{one['error_max_px']:.4f}")
        for name, one in kept.items()
    ]
    print(record.table(head, shown))
    print(f"written to {path}")
    return results


def measure(forms: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """CPU seconds of every form in every round."""
    seconds: dict[str, list[float]] = {name: [] for name in forms}
    for _ in range(rounds):
        for name, act in forms.items():
            began = time.process_time()
            act()
            seconds[name].append(time.process_time() - began)
    return seconds


if __name__ == "__main__":
    main()

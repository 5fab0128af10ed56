"""Ways to keep optical flow on disk: bytes, error and time, of DIS flow of streets or of a film.

Everything is per ordered pair (one direction); the cache keeps both in one block, so its numbers are halved.
The frames are generated streets unless a film is named. Times are CPU milliseconds on one thread of what a
format adds: from the array to bytes, and from bytes to a float32 array of the whole frame.

An hour of video is flow from every frame to the next and back, ``--rate`` frames per second, as tracking
needs it; ``--gap 0.0333 --rate 30`` measures that flow rather than that of the pairs that training draws.

The goal is for DIS ``medium``. The faster presets give rougher flow, of which half resolution loses more:
``--preset fast`` shows how much.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from benchmarks import record

import cv2  # isort: skip  (after record, which fixes the number of threads)
import numpy as np

from poodle_lightning.data import flow_delta, flow_jpeg
from poodle_lightning.data.decode import VideoReader, probe
from poodle_lightning.data.synthetic import Street
from poodle_lightning.flow.dis import DIS

PAIRS = 70_000  # of BDD100K, one a video
GAP = 0.66  # seconds, of the pairs that training draws
GOAL = "delta, half resolution"
GOAL_KB, GOAL_PX, GOAL_MS = 200, 0.15, 5


@dataclass(frozen=True)
class Format:
    """A way to keep flow ``(2, 2, H, W)`` px."""

    encode: Callable[[np.ndarray], bytes]
    decode: Callable[[bytes, tuple[int, int]], np.ndarray]


def formats() -> dict[str, Format]:
    """By name."""

    def delta(step: int) -> Format:
        return Format(
            lambda flow: flow_delta.encode(flow, step), lambda data, size: flow_delta.decode(data, size, step)
        )

    def jpeg(quality: int, step: int) -> Format:
        return Format(
            lambda flow: flow_jpeg.encode(flow, quality, step),
            lambda data, size: flow_jpeg.decode(data, size, step),
        )

    return {
        "float16": Format(
            lambda flow: flow.astype(np.float16).tobytes(),
            lambda data, size: np.frombuffer(data, np.float16).reshape(2, 2, *size).astype(np.float32),
        ),
        "delta": delta(1),
        GOAL: delta(2),
        "JPEG 95": jpeg(95, 1),
        "JPEG 75": jpeg(75, 1),
        "JPEG 95, half resolution": jpeg(95, 2),
    }


def flows(args: argparse.Namespace) -> list[np.ndarray]:
    """DIS flow both ways of pairs of frames."""
    size, estimator, found = (args.h, args.w), DIS(args.preset), []
    for number in range(args.pairs):
        if args.video is None:
            frames = Street(args.seed + number, size, "hard", 1).read([1.0, 1.0 + args.gap])[0]
        else:
            last = probe(args.video).duration - args.gap
            with VideoReader(args.video) as reader:
                start = last * (number + 0.5) / args.pairs
                raw = reader.read([start, start + args.gap])[0]
            frames = [cv2.resize(frame, size[::-1], interpolation=cv2.INTER_AREA) for frame in raw]
        found.append(estimator.pixels(*frames))
    return found


def measure(kept: list[np.ndarray], rounds: int, rate: float) -> dict[str, dict]:
    """Of every format: KB, error and its 99th percentile in px; with rounds also CPU ms there and back.

    Args:
        kept: flow of pairs of frames.
        rounds: of timing.
        rate: frames per second of the hour of video.
    """
    ways, results = formats(), {}
    for name, way in ways.items():
        packed = [way.encode(flow) for flow in kept]
        errors = [
            np.linalg.norm(way.decode(data, flow.shape[2:]) - flow, axis=1)
            for data, flow in zip(packed, kept, strict=True)
        ]
        kb = float(np.mean([len(data) for data in packed])) / 2e3
        results[name] = {
            "kb": kb,
            "error_px": float(np.mean(errors)),
            "error_p99_px": float(np.mean([np.percentile(error, 99) for error in errors])),
            "gb_of_70k_pairs_both_ways": 2 * kb * PAIRS / 1e6,
            "gb_per_hour_both_ways": 2 * kb * 3600 * rate / 1e6,
        }
    spent: dict[str, dict[str, list[float]]] = {name: {"encode": [], "decode": []} for name in ways}
    for _ in range(rounds):
        for flow in kept:
            for name, way in ways.items():
                began = time.process_time()
                data = way.encode(flow)
                between = time.process_time()
                way.decode(data, flow.shape[2:])
                ended = time.process_time()
                spent[name]["encode"].append(1e3 * (between - began) / 2)
                spent[name]["decode"].append(1e3 * (ended - between) / 2)
    for name, both in spent.items():
        results[name] |= {f"{act}_ms": record.spread(values) for act, values in both.items() if values}
    return results


def main(words: list[str] | None = None) -> dict[str, object]:
    parser = record.arguments(__doc__, rounds=5)
    parser.add_argument("--video", type=Path, help="a film in place of generated streets")
    parser.add_argument("--pairs", type=int, default=4, help="pairs of frames")
    parser.add_argument("--gap", type=float, default=GAP, help="seconds between the frames of a pair")
    parser.add_argument("--rate", type=float, default=30.0, help="frames per second, of the hour of video")
    parser.add_argument("--h", type=int, default=512, help="height of the frames, px")
    parser.add_argument("--w", type=int, default=1024, help="width of the frames, px")
    parser.add_argument("--preset", default="medium", help="of DIS")
    parser.add_argument("--seed", type=int, default=3, help="of the first street")
    args = parser.parse_args(words)
    cv2.setNumThreads(1)
    kept = flows(args)
    found = measure(kept, args.rounds, args.rate)
    motion = float(np.mean([np.linalg.norm(flow, axis=1).mean() for flow in kept]))
    results = {"mean_motion_px": motion, "formats": found}
    name = "flow_cache" if args.video is None else f"flow_cache_{args.video.stem}"
    name += "" if args.gap == GAP else f"_{args.gap:g}s"
    name += "" if (args.h, args.w) == (512, 1024) else f"_{args.h}x{args.w}"
    args.video = None if args.video is None else args.video.name
    path = record.save(name, args, results)
    print(f"{len(kept)} pairs of {args.h} x {args.w}, {motion:.1f} px of motion on average\n")
    print(_report(found, args.preset))
    print(f"written to {path}")
    return results


def _report(found: dict[str, dict], preset: str) -> str:
    head = ("format", "KB", "error px: mean", "99 %", "encode ms", "decode ms", "GB of 70k pairs, both ways")
    head += ("GB per hour of video, both ways",)
    rows = []
    for name, one in found.items():
        times = [record.shown(one[key], 1) if key in one else "" for key in ("encode_ms", "decode_ms")]
        errors = (f"{one['error_px']:.3f}", f"{one['error_p99_px']:.2f}")
        sizes = (f"{one['gb_of_70k_pairs_both_ways']:.0f}", f"{one['gb_per_hour_both_ways']:.1f}")
        rows.append((name, f"{one['kb']:.0f}", *errors, *times, *sizes))
    goal = (
        f"goal of {GOAL!r}, for DIS medium (here: {preset}): at most {GOAL_KB} KB, {GOAL_PX} px, "
        f"{GOAL_MS} ms to decode"
    )
    return record.table(head, rows) + f"\n\n{goal}"


if __name__ == "__main__":
    main()

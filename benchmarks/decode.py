"""Pairs of frames per CPU-second: the package's reader against a seek and a full conversion per frame.

Three ways to get the same pairs of the same videos, in turns: ``VideoReader`` with the crop's box, opened
once per pair as the data set does; a seek per frame with the whole frame converted; and decoding in sequence
without any conversion, which is the price of the frames that a pair needs: from the key frame before it to
its second frame, or from both key frames where one lies between. The reader can beat that price, since
frames that nothing is built on are not decoded unless they are asked for.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from bisect import bisect_right
from collections.abc import Callable, Iterator
from pathlib import Path

import av
import numpy as np

from benchmarks import record
from poodle_lightning.data.decode import VideoReader
from poodle_lightning.data.encode import write_video
from poodle_lightning.data.pixels import Box

FPS = 30
CRF = 23
HEIGHT, WIDTH = 720, 1280
# The share of a 1080 px high frame that a 512 × 1024 crop takes, on these 720 lines.
CROP = (512 * HEIGHT // 1080, 1024 * HEIGHT // 1080)
Pairs = list[tuple[int, int, Box]]
Frames = list[np.ndarray]


# ---- videos
def film(seconds: float, seed: int = 0) -> Iterator[np.ndarray]:
    """A textured plane under a moving camera, a brighter patch moving against it, and grain."""
    draw = np.random.default_rng(seed)
    canvas = _texture(draw, HEIGHT + 400, WIDTH + 800)
    patch = _texture(draw, 180, 260)
    grain = draw.normal(0, 3.0, (HEIGHT + 64, WIDTH + 64, 1))
    for number in range(round(seconds * FPS)):
        angle = number / FPS
        top, left = round(200 + 150 * np.sin(0.7 * angle)), round(400 + 350 * np.sin(0.5 * angle))
        frame = canvas[top : top + HEIGHT, left : left + WIDTH].copy()
        x = round(500 + 400 * np.sin(0.9 * angle + 1))
        frame[300 : 300 + patch.shape[0], x : x + patch.shape[1]] = patch
        dy, dx = draw.integers(0, 64, 2)  # grain is new in every frame; drawing it anew would take long
        yield np.clip(frame + grain[dy : dy + HEIGHT, dx : dx + WIDTH], 0, 255).astype(np.uint8)


def _texture(draw: np.random.Generator, height: int, width: int) -> np.ndarray:
    """Smooth noise of several sizes, ``(height, width, 3)`` float32 in 0–255."""
    import cv2

    total = np.zeros((height, width, 3), np.float32)
    for cell, weight in ((160, 1.0), (40, 0.6), (10, 0.35), (4, 0.15)):
        knots = draw.normal(0, weight, (height // cell + 2, width // cell + 2, 3)).astype(np.float32)
        total += cv2.resize(knots, (width, height), interpolation=cv2.INTER_CUBIC)
    return np.clip(128 + 50 * total, 0, 255)


def make_video(folder: Path, gop: int, seconds: float) -> Path:
    """The film with a key frame every ``gop`` frames; made once."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{WIDTH}x{HEIGHT}_{seconds:g}s_crf{CRF}_gop{gop}.mp4"
    if not path.is_file():
        write_video(path, film(seconds), FPS, crf=CRF, gop=gop)
    return path


def draw_pairs(count: int, frames: int, seed: int) -> Pairs:
    """Frames 0.5 to 1 s apart, and a box at random, the same in both."""
    draw = np.random.default_rng(seed)
    pairs: Pairs = []
    for _ in range(count):
        gap = int(draw.integers(FPS // 2, FPS + 1))
        first = int(draw.integers(0, frames - gap))
        y, x = int(draw.integers(0, HEIGHT - CROP[0] + 1)), int(draw.integers(0, WIDTH - CROP[1] + 1))
        pairs.append((first, first + gap, (x, y, x + CROP[1], y + CROP[0])))
    return pairs


# ---- three ways
def by_reader(path: Path, pairs: Pairs) -> Frames:
    """The package's: one reader per pair, only the box is converted."""
    found: Frames = []
    for first, second, box in pairs:
        with VideoReader(path) as reader:
            pieces = reader.pieces([first / FPS, second / FPS], [box, box])
            found.extend(piece.pixels for piece in pieces)
    return found


def by_seeking(path: Path, pairs: Pairs) -> Frames:
    """One seek per frame, forward until it is reached, the whole frame converted, then cut."""
    found: Frames = []
    for first, second, (x0, y0, x1, y1) in pairs:
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            stream.thread_type = "NONE"
            for number in (first, second):
                start = stream.start_time or 0
                wanted = start + round(number / FPS / stream.time_base)
                container.seek(wanted, stream=stream, backward=True)
                frame = next(f for f in container.decode(stream) if f.pts >= wanted)
                found.append(frame.to_ndarray(format="rgb24")[y0:y1, x0:x1].copy())
    return found


def in_sequence(path: Path, keep: dict[int, list[Box]] | None = None) -> dict[tuple[int, Box], np.ndarray]:
    """Decode the whole file; convert only the frames that are kept."""
    found: dict[tuple[int, Box], np.ndarray] = {}
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        stream.thread_type = "NONE"
        for number, frame in enumerate(container.decode(stream)):
            for box in (keep or {}).get(number, []):
                x0, y0, x1, y1 = box
                found[number, box] = frame.to_ndarray(format="rgb24")[y0:y1, x0:x1].copy()
    return found


def key_frames(path: Path) -> list[int]:
    """Numbers of the key frames."""
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        start = stream.start_time or 0
        return [
            round((packet.pts - start) * stream.time_base * FPS)
            for packet in container.demux(stream)
            if packet.is_keyframe and packet.pts is not None
        ]


def frames_needed(pairs: Pairs, keys: list[int]) -> int:
    """Frames in sequence that must be decoded for the pairs, each of which starts anew."""
    total = 0
    for first, second, _ in pairs:
        before_first, before_second = (keys[bisect_right(keys, number) - 1] for number in (first, second))
        total += first - before_first + 1
        total += second - max(first, before_second - 1)
    return total


# ---- measuring
def measure(path: Path, pairs: Pairs, rounds: int) -> dict[str, object]:
    """One video: pairs per CPU-second of each way, ratios, and whether all frames are the same."""
    wanted: dict[int, list[Box]] = {}
    for first, second, box in pairs:
        wanted.setdefault(first, []).append(box)
        wanted.setdefault(second, []).append(box)
    right = in_sequence(path, wanted)
    reference = [right[number, box] for first, second, box in pairs for number in (first, second)]
    keys = key_frames(path)
    length = sum(1 for _ in _packets(path))
    share = frames_needed(pairs, keys) / length  # of the file, in decoding work
    seconds: dict[str, list[float]] = {"reader": [], "seeking": [], "sequence": []}
    same = {}
    for _ in range(rounds):
        spent, frames = _timed(by_reader, path, pairs)
        seconds["reader"].append(spent)
        same["reader"] = _equal(frames, reference)
        spent, frames = _timed(by_seeking, path, pairs)
        seconds["seeking"].append(spent)
        same["seeking"] = _equal(frames, reference)
        began = time.process_time()
        in_sequence(path)
        seconds["sequence"].append((time.process_time() - began) * share)
    return {
        "megabit_per_s": path.stat().st_size * 8e-6 * FPS / length,
        "frames_needed_per_pair": share * length / len(pairs),
        "pairs_per_cpu_s": {
            way: record.spread(len(pairs) / spent for spent in values) for way, values in seconds.items()
        },
        "times_faster_than_seeking": record.ratio(seconds["seeking"], seconds["reader"]),
        "share_of_sequence": record.ratio(seconds["sequence"], seconds["reader"]),
        "identical": same,
    }


def _packets(path: Path) -> Iterator[object]:
    with av.open(str(path)) as container:
        yield from (packet for packet in container.demux(video=0) if packet.pts is not None)


def _timed(way: Callable[[Path, Pairs], Frames], path: Path, pairs: Pairs) -> tuple[float, Frames]:
    began = time.process_time()
    frames = way(path, pairs)
    return time.process_time() - began, frames


def _equal(found: Frames, reference: Frames) -> bool:
    return len(found) == len(reference) and all(map(np.array_equal, found, reference))


def main(words: list[str] | None = None) -> int:
    parser = record.arguments(__doc__, rounds=5)
    parser.add_argument("--gops", type=int, nargs="+", default=[12, 30, 250], help="frames per key frame")
    parser.add_argument("--pairs", type=int, default=12, help="pairs per video and round")
    parser.add_argument("--seconds", type=float, default=10.0, help="length of the videos")
    parser.add_argument(
        "--videos",
        type=Path,
        default=Path(tempfile.gettempdir()) / "poodle-lightning-benchmarks",
        help="where generated videos are kept",
    )
    args = parser.parse_args(words)
    results: dict[str, dict] = {}
    for gop in args.gops:
        path = make_video(args.videos, gop, args.seconds)
        pairs = draw_pairs(args.pairs, round(args.seconds * FPS), seed=gop)
        results[f"gop{gop}"] = measure(path, pairs, args.rounds)
    written = _save(args, results)
    print(_report(results))
    print(f"written to {written}")
    wrong = [name for name, found in results.items() if not all(found["identical"].values())]
    if wrong:
        print(f"frames differ from decoding in sequence: {', '.join(wrong)}", file=sys.stderr)
    return int(bool(wrong))


def _save(args: argparse.Namespace, results: dict[str, dict]) -> Path:
    kept = argparse.Namespace(**{key: value for key, value in vars(args).items() if key != "videos"})
    return record.save("decode", kept, results)


def _report(results: dict[str, dict]) -> str:
    head = [
        "video",
        "reader, pairs/CPU-s",
        "seeking",
        "in sequence",
        "reader ÷ seeking",
        "÷ sequence",
        "same",
    ]
    rows = [
        [
            name,
            *(record.shown(found["pairs_per_cpu_s"][way], 1) for way in ("reader", "seeking", "sequence")),
            record.shown(found["times_faster_than_seeking"]),
            record.shown(found["share_of_sequence"]),
            "yes" if all(found["identical"].values()) else "NO",
        ]
        for name, found in results.items()
    ]
    return record.table(head, rows)


if __name__ == "__main__":
    sys.exit(main())

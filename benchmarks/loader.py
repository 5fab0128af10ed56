"""Pairs per CPU-second of the whole loader: the package's against the published order of operations.

From a file to what the worker hands over: ``ClipDataset`` and ``collate`` with raw crops as RGB, as YUV
planes, and with 2 or 4 pairs that begin within half a second (``spread``); and the published order, where
whole frames are resized and augmented on the host (``benchmarks.published.loader``), at the same moments. The
package leaves resize and colour to the device; ``benchmarks.augment`` measures those.

Two prices of decoding alone, of the same pairs, the container kept open, no conversion, no check:

* *decoding*: a seek to the key frame before each frame (before both where no key frame lies between), all
  packets up to the wanted one, other frames that nothing is built on left out, and the decoder emptied then:
  what cannot be saved from pair to pair;
* *in sequence*: the mean price of a frame when the film is decoded through, times the frames from those key
  frames to the wanted ones.

Every frame of the package is compared with a sequential decode, RGB and planes bit by bit.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import av
import numpy as np

from benchmarks import record
from benchmarks.decode import FPS, film
from poodle_lightning.data.encode import write_video

CRF = 20  # of a film with a key frame per second: 4 Mb/s, as dash cameras write at this size
SIZE, SCALE, GAP = (512, 1024), (0.75, 1.25), (0.5, 1.0)
BATCH = 4
SPREAD = 0.5
# name → pixels, pairs from one decoded stretch
WAYS = {"rgb": ("rgb", 1), "yuv": ("yuv", 1), "yuv, R=2": ("yuv", 2), "yuv, R=4": ("yuv", 4)}
PUBLISHED_BYTES = 4 * 3 * SIZE[0] * SIZE[1] * 4


# ---- films
def make_film(folder: Path, gop: int, seconds: float) -> Path:
    """A 1280 × 720 film with a key frame every ``gop`` frames, alone in its folder; made once."""
    path = folder / f"loader_{seconds:g}s_crf{CRF}_gop{gop}" / "film.mp4"
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_video(path, film(seconds), FPS, crf=CRF, gop=gop)
    return path


@dataclass(frozen=True)
class Packets:
    """The packets of a film in decoding order.

    Args:
        stamps: when each is shown, ticks.
        keys: places of the key frames.
        shown: timestamps in order.
        clock: seconds per tick.
    """

    stamps: list[int]
    keys: list[int]
    shown: list[int]
    clock: float

    @classmethod
    def of(cls, path: Path) -> Packets:
        """Read a film's packets; nothing is decoded."""
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            packets = [p for p in container.demux(stream) if p.size]
            stamps = [int(p.pts) for p in packets]
            keys = [i for i, p in enumerate(packets) if p.is_keyframe]
            return cls(stamps, keys, sorted(stamps), float(stream.time_base))

    def key_of(self, stamp: int) -> int:
        """Place of the key frame from which the frame shown then is decoded."""
        return self.keys[bisect_right([self.stamps[key] for key in self.keys], stamp) - 1]

    def at(self, seconds: float) -> int:
        """Timestamp of the frame at this time of the film."""
        return min(self.shown, key=lambda stamp: abs((stamp - self.shown[0]) * self.clock - seconds))

    def needed(self, first: int, second: int) -> int:
        """Frames from the key frames to the two wanted, in order of time."""
        place, keys = self.shown.index, [self.shown.index(self.stamps[key]) for key in self.keys]
        a, b = place(first), place(second)
        key_a, key_b = (keys[bisect_right(keys, number) - 1] for number in (a, b))
        return a - key_a + 1 + b - max(a, key_b - 1)


# ---- ways
def dataset(path: Path, pixels: str, repeats: int, length: int) -> Any:
    """The package's data set of one film, seen ``length`` times."""
    from poodle_lightning.data.clips import ClipDataset
    from poodle_lightning.data.order import Order
    from poodle_lightning.data.sampling import PairSampler
    from poodle_lightning.data.sources import FolderSource
    from poodle_lightning.data.windows import WindowRule

    source = FolderSource(path.parent, keep=lambda found: found.name == path.name)
    spread = None if repeats == 1 else SPREAD
    sampler = PairSampler(GAP, pairs_per_video=repeats, spread=spread)
    rule = WindowRule(SIZE, scale=SCALE)
    order = Order(1, length, length, 1, seed=1)
    return ClipDataset(source, source.entries, order, sampler, rule, seed=1, repeats=repeats, pixels=pixels)


def by_package(data: Any, start: int, pairs: int) -> list[Any]:
    """Batches of 4 pairs."""
    from poodle_lightning.data.batches import collate

    step = BATCH // data.repeats
    positions = range(start, start + pairs // data.repeats)
    return [
        collate([data[(0, i)] for i in positions[k : k + step]], SIZE) for k in range(0, len(positions), step)
    ]


def decoding_alone(path: Path, packets: Packets, moments: Sequence[tuple[int, int]]) -> None:
    """Send the packets that the pairs need, and nothing else."""
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        stream.thread_type = "NONE"
        for first, second in moments:
            together = packets.key_of(first) == packets.key_of(second)
            for wanted in [{first, second}] if together else [{first}, {second}]:
                _send(container, stream, packets, wanted)


def _send(container: Any, stream: Any, packets: Packets, wanted: set[int]) -> None:
    missing = set(wanted)
    container.seek(packets.stamps[packets.key_of(min(wanted))], stream=stream, backward=True)
    for packet in container.demux(stream):
        stream.codec_context.skip_frame = "DEFAULT" if packet.pts in wanted else "NONREF"
        packet.decode()
        missing.discard(packet.pts)
        if not missing:
            break
    stream.codec_context.decode(None)


def in_sequence(path: Path) -> int:
    """Decode the whole film; the number of frames."""
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        stream.thread_type = "NONE"
        return sum(1 for _ in container.decode(stream))


# ---- checking
def is_identical(path: Path, data: Any, clips: Sequence[Any]) -> bool:
    """Whether what was handed over are the pixels of a sequential decode, bit by bit."""
    packets = Packets.of(path)
    wanted: dict[int, list[tuple[Any, int, int]]] = {}
    for clip in clips:
        for row, times in enumerate(clip.times.tolist()):
            for number, at in enumerate(times):
                wanted.setdefault(packets.at(at), []).append((clip, row, number))
    right = 0
    with av.open(str(path)) as container:
        for frame in container.decode(video=0):
            right += sum(_is_equal(frame, data, *place) for place in wanted.get(frame.pts, []))
    return right == sum(map(len, wanted.values()))


def _is_equal(frame: Any, data: Any, clip: Any, row: int, number: int) -> bool:
    outer = data.rule.draw(frame.width, frame.height, clip.key[row]).outer
    x0, y0 = max(outer[0], 0), max(outer[1], 0)
    x1, y1 = min(outer[2], frame.width), min(outer[3], frame.height)
    if clip.yuv is None:
        dx, dy = x0 - outer[0], y0 - outer[1]
        stored = clip.frames[row, number].permute(1, 2, 0).numpy()
        expected = frame.to_ndarray(format="rgb24")[y0:y1, x0:x1]
        return np.array_equal(stored[dy : dy + y1 - y0, dx : dx + x1 - x0], expected)
    from poodle_lightning.ops.planes import split_planes

    pixels = frame.to_ndarray(format="yuv420p").reshape(-1)
    left, top, right, bottom = x0 // 2, y0 // 2, -(-x1 // 2), -(-y1 // 2)
    area = frame.width * frame.height
    chroma = pixels[area:].reshape(2, frame.height // 2, frame.width // 2)
    luma = pixels[:area].reshape(frame.height, frame.width)
    expected = (luma[2 * top : 2 * bottom, 2 * left : 2 * right], *chroma[:, top:bottom, left:right])
    return all(
        np.array_equal(stored.numpy()[: plane.shape[0], : plane.shape[1]], plane)
        for stored, plane in zip(split_planes(clip.frames[row, number]), expected, strict=True)
    )


# ---- measuring
def measure(path: Path, pairs: int, rounds: int) -> dict[str, object]:
    """One film: CPU seconds of every way round by round, ratios, bytes, and whether all frames are right."""
    import torch

    torch.manual_seed(0)
    packets = Packets.of(path)
    sets = {
        name: dataset(path, pixels, repeats, (rounds + 1) * pairs) for name, (pixels, repeats) in WAYS.items()
    }
    for data in sets.values():
        by_package(data, 0, BATCH)  # opens the film
    seconds: dict[str, list[float]] = {name: [] for name in (*WAYS, "published", "decoding", "in sequence")}
    sizes: dict[str, list[float]] = {name: [] for name in WAYS}
    right = dict.fromkeys(WAYS, True)
    needed = []
    for number in range(rounds):
        clips: dict[str, list[Any]] = {}
        for name, data in sets.items():
            start = (number * pairs + BATCH) // data.repeats
            spent, clips[name] = _timed(by_package, data, start, pairs)
            seconds[name].append(spent)
            sizes[name].append(sum(clip.frames.numel() for clip in clips[name]) / pairs / 1e6)
        times = [row for clip in clips["rgb"] for row in clip.times.tolist()]
        moments = [(packets.at(a), packets.at(b)) for a, b in times]
        needed.append(sum(packets.needed(a, b) for a, b in moments) / pairs)
        seconds["decoding"].append(_timed(decoding_alone, path, packets, moments)[0])
        spent, count = _timed(in_sequence, path)
        seconds["in sequence"].append(spent / count * needed[-1] * pairs)
        seconds["published"].append(_timed(_published, path, times)[0])
        for name, data in sets.items():
            right[name] = right[name] and is_identical(path, data, clips[name])
    return {
        "megabit_per_s": path.stat().st_size * 8e-6 / ((len(packets.shown) - 1) / FPS),
        "frames_needed_per_pair": record.spread(needed),
        "pairs_per_cpu_s": {name: record.spread(pairs / s for s in spent) for name, spent in seconds.items()},
        "times_faster_than_published": {
            name: record.ratio(seconds["published"], seconds[name]) for name in WAYS
        },
        "share_of_decoding": {name: record.ratio(seconds["decoding"], seconds[name]) for name in WAYS},
        "share_of_sequence": {name: record.ratio(seconds["in sequence"], seconds[name]) for name in WAYS},
        "megabytes_per_pair": {name: record.spread(values) for name, values in sizes.items()}
        | {"published": PUBLISHED_BYTES / 1e6},
        "identical": right,
    }


def _published(path: Path, times: Sequence[Sequence[float]]) -> None:
    from benchmarks.published.loader import pair

    for seconds in times:
        pair(path, seconds)


def _timed(act: Callable[..., Any], *args: Any) -> tuple[float, Any]:
    began = time.process_time()
    found = act(*args)
    return time.process_time() - began, found


def main(words: list[str] | None = None) -> int:
    parser = record.arguments(__doc__, rounds=5)
    parser.add_argument("file", type=Path, nargs="?", help="a video to measure in place of generated ones")
    parser.add_argument("--gops", type=int, nargs="+", default=[12, 30, 250], help="frames per key frame")
    parser.add_argument("--pairs", type=int, default=12, help="pairs per round, a multiple of 4")
    parser.add_argument("--seconds", type=float, default=20.0, help="length of generated films")
    parser.add_argument(
        "--videos",
        type=Path,
        default=Path(tempfile.gettempdir()) / "poodle-lightning-benchmarks",
        help="where generated films are kept",
    )
    args = parser.parse_args(words)
    if args.pairs < BATCH or args.pairs % BATCH:
        parser.error(f"--pairs {args.pairs}: give a multiple of {BATCH}")
    with tempfile.TemporaryDirectory() as cache:  # the index of the films is no one else's business
        os.environ["POODLE_CACHE"] = cache
        if args.file is not None:
            results = {args.file.name: measure(args.file.absolute(), args.pairs, args.rounds)}
        else:
            films = {f"gop{gop}": make_film(args.videos, gop, args.seconds) for gop in args.gops}
            results = {name: measure(path, args.pairs, args.rounds) for name, path in films.items()}
    kept = argparse.Namespace(**{key: value for key, value in vars(args).items() if key != "videos"})
    kept.file = None if args.file is None else args.file.name
    written = record.save("loader", kept, results)
    print(_report(results))
    print(f"written to {written}")
    wrong = [name for name, found in results.items() if not all(found["identical"].values())]
    if wrong:
        print(f"frames differ from decoding in sequence: {', '.join(wrong)}", file=sys.stderr)
    return int(bool(wrong))


def _report(results: dict[str, Any]) -> str:
    head = ["film", "way", "pairs/CPU-s", "÷ published", "÷ decoding", "÷ sequence", "MB/pair", "same"]
    rows = []
    for film_name, found in results.items():
        for way, speed in found["pairs_per_cpu_s"].items():
            own = way in WAYS
            size = found["megabytes_per_pair"].get(way)
            rows.append(
                [
                    film_name,
                    way,
                    record.shown(speed, 1),
                    *(
                        record.shown(found[key][way]) if own else ""
                        for key in ("times_faster_than_published", "share_of_decoding", "share_of_sequence")
                    ),
                    "" if size is None else f"{size['median'] if own else size:.2f}",
                    ("yes" if found["identical"][way] else "NO") if own else "",
                ]
            )
    return record.table(head, rows)


if __name__ == "__main__":
    sys.exit(main())

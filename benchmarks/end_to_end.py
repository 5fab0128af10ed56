"""From files to updated weights: PooDLe on a CPU, the package against the published formulation.

One film of 1280 × 720, GOP 30, its flow in a cache; crops of 256 × 512 as in the paper's ablations (no affine
views), ResNet-50 with the SDM, one pair per step. *published* is the order of operations of the published
code with the same networks and flow: ``benchmarks.published``; its flow is read from the package's cache, for
it kept none. The package reads, augments and steps in float32 and again with bfloat16 networks. All start
from the same weights and see the same pairs of moments. CPU seconds of the process, in turns.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import record

import torch  # isort: skip  (after record, which fixes the number of threads)
from torch import Tensor

from benchmarks.loader import make_film
from benchmarks.published import loader as published
from benchmarks.published.step import PublishedStep
from benchmarks.step import Loop
from poodle_lightning.data.batches import collate
from poodle_lightning.data.cached_flow import CachedFlow, FixedPairs, video_of
from poodle_lightning.data.clips import ClipDataset
from poodle_lightning.data.flow_cache import FlowCache
from poodle_lightning.data.order import Order
from poodle_lightning.data.sources import FolderSource
from poodle_lightning.data.windows import WindowRule
from poodle_lightning.flow.dis import DIS
from poodle_lightning.flow.given import Given
from poodle_lightning.methods.poodle import PooDLe
from poodle_lightning.nn.resnet import ResNet
from poodle_lightning.nn.sdm import SDM
from poodle_lightning.ops.crops import SubcropRecipe
from poodle_lightning.ops.random import fold, key_of
from poodle_lightning.types import Clip

PAIRS = FixedPairs(gap=(0.5, 1.0), fixed=4)
Timed = dict[str, float]


def fill_cache(film: Path, folder: Path, duration: float) -> FlowCache:
    """Flow of all fixed pairs of the film, by DIS."""
    source = FolderSource(film.parent, keep=lambda found: found.name == film.name)
    estimator = DIS("fast")
    cache = FlowCache(folder, estimator.fingerprint)
    video = video_of(str(film))
    assert video is not None
    lacking = cache.lacking(video, PAIRS.pairs(duration))
    reader = source.open(source.entries[0])
    for first, second in lacking:
        frames, _ = reader.read([first, second])
        cache.put(video, first, second, estimator.pixels(frames[0], frames[1]))
    reader.close()
    return cache


def method(args: argparse.Namespace, *, commute: bool) -> PooDLe:
    """The same weights every time."""
    torch.manual_seed(0)
    subcrops = SubcropRecipe(count=6 if not args.tiny else 2, size=(192, 192) if not args.tiny else (32, 32))
    encoder = ResNet(10, width=16) if args.tiny else ResNet(50)
    decoder = SDM(encoder.channels, dims=32 if args.tiny else 2048)
    heads = {"hidden": 32, "out": 16} if args.tiny else {}
    return PooDLe(encoder, decoder, Given(), view=None, subcrops=subcrops, commute=commute, **heads)


class Package:
    """Reads and steps as training does, without workers."""

    def __init__(self, args: argparse.Namespace, film: Path, folder: Path, bf16: bool) -> None:
        source = FolderSource(film.parent, keep=lambda found: found.name == film.name)
        rule = WindowRule((args.h, args.w), scale=published.SCALE, reference=published.REFERENCE)
        order = Order(1, 64, 64, 1, seed=0)
        flow = CachedFlow(str(folder))
        self.data = ClipDataset(source, source.entries, order, PAIRS, rule, flow=flow, pixels="yuv")
        self.loop = Loop(method(args, commute=True), 1, bf16=bf16)
        self.size = (args.h, args.w)

    def __call__(self, number: int) -> Timed:
        """One pair, one step."""
        began = time.process_time()
        clip = collate([self.data[(0, number)]], self.size)
        read = time.process_time()
        assert isinstance(clip, Clip)
        assert clip.present is not None
        assert bool(clip.present.all())
        began_step = time.process_time()
        self.loop(clip)
        return {"read": read - began, "step": time.process_time() - began_step}

    def moments(self, number: int) -> tuple[float, float]:
        """What the item asks of its reader, seconds."""
        entry = self.data.entries[0]
        first, second = PAIRS.times(
            entry.duration, fold(key_of(0, 0, self.data.order.item(0, number)), "time")
        )
        return first, second


class Published:
    """The published order: everything on images in the loader, then the step."""

    def __init__(self, args: argparse.Namespace, film: Path, cache: FlowCache, like: Package) -> None:
        self.film, self.cache, self.moments = film, cache, like.moments
        self.step = PublishedStep(method(args, commute=False), 1)
        self.size = (args.h, args.w)

    def __call__(self, number: int) -> Timed:
        """One pair, one step."""
        moments = self.moments(number)
        began = time.process_time()
        crops, where = published.pair(self.film, moments, self.size)
        flow = self._flow(moments, where)
        read = time.process_time()
        frames = torch.stack(crops[:2])[None]
        # the encoder of this package normalises by itself
        mean, std = (torch.tensor(v).reshape(1, 1, 3, 1, 1) for v in (published.MEAN, published.STD))
        frames = frames * std + mean
        began_step = time.process_time()
        self.step(frames, flow, key_of(0, number).reshape(1))
        return {"read": read - began, "step": time.process_time() - began_step}

    def _flow(self, moments: tuple[float, float], where: published.Where) -> Tensor:
        """``(2, 2, h, w)`` px of the crop: the whole flow, resized and cut as the frames were."""
        video = video_of(str(self.film))
        assert video is not None
        whole = self.cache.get(video, *moments)
        assert whole is not None
        flow = torch.from_numpy(whole)
        scale = torch.tensor([where.width / flow.shape[-1], where.height / flow.shape[-2]])
        resized = torch.nn.functional.interpolate(flow, (where.height, where.width), mode="bilinear")
        cut = resized[..., where.top : where.top + self.size[0], where.left : where.left + self.size[1]]
        return cut * scale.reshape(1, 2, 1, 1)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """All ways in turns, on the same pairs of moments; one step of each before does not count."""
    duration = args.seconds - 1 / 30
    film = make_film(args.videos, 30, args.seconds)
    folder = args.videos / "flow"
    cache = fill_cache(film, folder, duration)
    package = Package(args, film, folder, bf16=False)
    ways: dict[str, Callable[[int], Timed]] = {
        "published": Published(args, film, cache, package),
        "package": package,
        "package, bfloat16": Package(args, film, folder, bf16=True),
    }
    torch.manual_seed(0)
    spent: dict[str, list[Timed]] = {name: [] for name in ways}
    for number in range(args.rounds + 1):
        for name, way in ways.items():
            found = way(number)
            if number:
                spent[name].append(found)
    totals = {name: [sum(one.values()) for one in found] for name, found in spent.items()}
    return {
        name: {
            "read_s": record.spread(one["read"] for one in found),
            "step_s": record.spread(one["step"] for one in found),
            "pair_s": record.spread(totals[name]),
            "times_faster": record.ratio(totals["published"], totals[name]),
        }
        for name, found in spent.items()
    }


def report(results: dict[str, Any]) -> str:
    """The table as Markdown."""
    rows = [
        (name, *(record.shown(found[key], 2) for key in ("read_s", "step_s", "pair_s", "times_faster")))
        for name, found in results.items()
    ]
    return record.table(("CPU s per pair", "read", "step", "together", "times published"), rows)


def main(words: list[str] | None = None) -> dict[str, Any]:
    parser = record.arguments(__doc__, rounds=5)
    parser.add_argument("--h", type=int, default=256)
    parser.add_argument("--w", type=int, default=512)
    parser.add_argument("--seconds", type=float, default=10.0, help="length of the film")
    parser.add_argument("--tiny", action="store_true", help="small networks: to try the program itself")
    parser.add_argument(
        "--videos",
        type=Path,
        default=Path(tempfile.gettempdir()) / "poodle-lightning-benchmarks",
        help="where the film and its flow are kept",
    )
    args = parser.parse_args(words)
    results = run(args)
    kept = argparse.Namespace(**{key: value for key, value in vars(args).items() if key != "videos"})
    path = record.save("end_to_end", kept, results)
    print(f"{report(results)}\nwritten to {path}")
    return results


if __name__ == "__main__":
    main()

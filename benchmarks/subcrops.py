"""Drawing and cutting of subcrops: operations, reads and time, against the published loop.

One step of N pairs: both directions, K pairs of subcrops each. Operations are what torch dispatches, views
and draws on the host included. A read is an operation whose value Python asks for; reads of anything
computed from the flow or the frames would make a GPU wait and are counted apart. Times are CPU seconds.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any
from unittest.mock import patch

from benchmarks import record

import torch  # isort: skip  (after record, which fixes the number of threads)
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.published import subcrops as published
from poodle_lightning.methods.poodle import PooDLe
from poodle_lightning.nn.resnet import ResNet
from poodle_lightning.ops.geometry import Flow
from poodle_lightning.ops.random import key_of

GOAL_OPERATIONS = 400
_READS = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "_unique2", "unique_dim", "is_nonzero"}


class Counter(TorchDispatchMode):
    """Counts operations and reads.

    Args:
        on_device: tensors that training has on the device; so is all that is computed from them.

    Attributes:
        operations: what was dispatched.
        reads: operations whose value or size the host had to know.
        waits: the reads among them, and copies to the host, of something on the device.
    """

    def __init__(self, on_device: Iterable[Tensor]) -> None:
        super().__init__()
        self.operations = self.reads = self.waits = 0
        self._kept: list[Any] = []  # alive, so that no address comes back
        self._places: set[int] = set()
        self._mark(on_device)

    def _mark(self, values: Any) -> None:
        for value in tree_leaves(values):
            if isinstance(value, Tensor):
                storage = value.untyped_storage()
                self._places.add(storage._cdata)
                self._kept.append(storage)

    def _on_device(self, values: Any) -> bool:
        tensors = (value for value in tree_leaves(values) if isinstance(value, Tensor))
        return any(value.untyped_storage()._cdata in self._places for value in tensors)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        touched = self._on_device((args, kwargs))
        self.operations += 1
        if name in _READS or (name == "index" and _by_mask(args[1])):
            self.reads += 1
            self.waits += touched
        out = func(*args, **(kwargs or {}))
        if touched:
            self._mark(out)
        return out

    def count(self, work: Callable[[], object]) -> dict[str, int]:
        """Do some work and return the three numbers."""
        with (
            self,
            patch.multiple(Tensor, **{name: self._watched(name) for name in ("numpy", "tolist", "cpu")}),
        ):
            work()
        return {"operations": self.operations, "reads": self.reads, "waits": self.waits}

    def _watched(self, name: str) -> Callable[..., Any]:
        """These look at the memory itself, past the dispatcher."""
        original = getattr(Tensor, name)

        def call(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
            self.waits += self._on_device(tensor)
            return original(tensor, *args, **kwargs)

        return call


def _by_mask(indices: Sequence[Tensor | None]) -> bool:
    return any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in indices)


# ---- the two ways
class Step:
    """The subcrops of one training step.

    Args:
        pairs: N, pairs of frames.
        size: height and width of the frames.
    """

    def __init__(self, pairs: int, size: tuple[int, int]) -> None:
        draw = torch.Generator().manual_seed(0)
        coarse = torch.randn(2 * pairs, 2, 8, 16, generator=draw)
        self.pixels = 20.0 * F.interpolate(coarse, size, mode="bicubic", align_corners=False)
        self.flow = Flow.from_pixels(self.pixels)
        self.u, self.v = torch.rand(2, 2 * pairs, 3, *size, generator=draw)
        self.key = torch.stack([key_of(0, row) for row in range(pairs)])
        # only its way to draw and to cut is used
        self.method = PooDLe(ResNet(10, width=8), decoder=None, dense_weight=0.0, hidden=8, out=8)

    @property
    def on_device(self) -> list[Tensor]:
        """What training has on the device."""
        return [self.pixels, self.flow.displacement, self.u, self.v, *self.method.buffers()]

    def ours(self) -> tuple[Tensor, Tensor]:
        """The package: all images, crops and tries at once."""
        return self.method.cut(self.u, self.v, self.method.pairs(self.flow, self.key))

    def loop(self) -> tuple[Tensor, Tensor]:
        """The published way."""
        pairs = published.draw(self.pixels, self.method.subcrops)
        return published.cut(self.u, self.v, pairs, self.method.subcrops.size)

    def parts(self) -> dict[str, dict[str, Callable[[], object]]]:
        """Drawing and cutting by themselves, of both ways."""
        method, looped = self.method, published.draw(self.pixels, self.method.subcrops)
        drawn = method.pairs(self.flow, self.key)
        return {
            "draw": {
                "published": lambda: published.draw(self.pixels, method.subcrops),
                "ours": lambda: method.pairs(self.flow, self.key),
            },
            "cut": {
                "published": lambda: published.cut(self.u, self.v, looped, method.subcrops.size),
                "ours": lambda: method.cut(self.u, self.v, drawn),
            },
            "both": {"published": self.loop, "ours": self.ours},
        }


def run(args: argparse.Namespace) -> dict[str, Any]:
    """All results."""
    torch.manual_seed(0)  # the published way draws from the global generator
    step = Step(args.pairs, (args.h, args.w))
    results: dict[str, Any] = {}
    for part, ways in step.parts().items():
        counts = {name: Counter(step.on_device).count(way) for name, way in ways.items()}
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        for number in range(args.rounds + 1):
            for name, way in ways.items():
                began = time.process_time()
                way()
                if number:
                    seconds[name].append(time.process_time() - began)
        results[part] = {"counts": counts}
        if args.rounds:
            results[part] |= {
                "ms": {n: record.spread(1e3 * s for s in values) for n, values in seconds.items()},
                "times_faster": record.ratio(seconds["published"], seconds["ours"]),
            }
    return results


def main(words: list[str] | None = None) -> dict[str, Any]:
    parser = record.arguments(__doc__, rounds=7)
    parser.add_argument("--h", type=int, default=512, help="height of the frames, px")
    parser.add_argument("--w", type=int, default=1024, help="width of the frames, px")
    parser.add_argument("--pairs", type=int, default=4, help="pairs of frames in a step")
    args = parser.parse_args(words)
    results = run(args)
    path = record.save("subcrops", args, results)
    print(_report(results))
    print(f"written to {path}")
    return results


def _report(results: dict[str, Any]) -> str:
    rows = []
    for part, found in results.items():
        for name, counts in found["counts"].items():
            timed = [record.shown(found["ms"][name], 1)] if "ms" in found else ["–"]
            faster = [record.shown(found["times_faster"], 1) if name == "ours" and "ms" in found else ""]
            rows.append((part, name, counts["operations"], counts["reads"], counts["waits"], *timed, *faster))
    head = ("part", "form", "operations", "reads", "of device tensors", "CPU ms", "times faster")
    return record.table(head, rows)


if __name__ == "__main__":
    main()

"""What probes cost as a share of training, in one run: steps and probes take turns.

Every few steps the callback probes with its defaults; two clocks around it tell its time from that of the
steps. Clips are in memory, so a step has no reading in it and the share comes out larger than in a real run.
The share is that of one probe in ``every_n_steps`` (default 500) steps. Times are CPU seconds of the process.
"""

from __future__ import annotations

import logging
import time
import warnings
from typing import Any

from benchmarks import record

import lightning as L  # isort: skip  (after record, which fixes the number of threads)
import torch
from torch.utils.data import DataLoader

from poodle_lightning import cli
from poodle_lightning.callbacks.probes import Probes
from poodle_lightning.commands._pretraining import fast_precision
from poodle_lightning.data.label_streets import StreetLabels
from poodle_lightning.data.labelled import LabelledDataModule
from poodle_lightning.data.streets import StreetSet
from poodle_lightning.data.video import VideoDataModule
from poodle_lightning.methods.base import Method
from poodle_lightning.types import Clip

GOAL = 0.05
# Method, crop, pairs per step: those of the demo and of the quickstart; BYOL has the cheapest steps.
SETTINGS = {
    "byol_tiny": ((64, 128), 16),
    "poodle_tiny": ((64, 128), 16),
    "poodle_small": ((128, 256), 8),
}


class Clock(L.Callback):
    """Notes when a batch begins and ends.

    Args:
        spent: CPU seconds from the batch's begin to this callback's place at its end are added here.
    """

    def __init__(self, spent: list[float]) -> None:
        self.spent = spent
        self.began = 0.0

    def on_train_batch_start(self, *_: Any) -> None:
        """Begin."""
        self.began = time.process_time()

    def on_train_batch_end(self, *_: Any) -> None:
        """End."""
        self.spent.append(time.process_time() - self.began)


class Preloaded(L.LightningDataModule):
    """Clips in memory, again and again."""

    def __init__(self, clips: list[Clip], size: tuple[int, int]) -> None:
        super().__init__()
        self.clips, self.size, self.batch_size = clips, size, len(clips[0])

    def train_dataloader(self) -> DataLoader[Clip]:
        """The clips."""
        return DataLoader(self.clips, batch_size=None, collate_fn=_same)  # type: ignore[arg-type]


def _same(clip: Clip) -> Clip:
    return clip


def make_method(name: str) -> Method:
    torch.manual_seed(0)
    words = ["--model", str(record.ROOT / f"configs/method/{name}.yaml"), "--data.init_args.root", "."]
    method, _ = cli.build([], words)
    assert isinstance(method, Method)
    return method


def make_clips(size: tuple[int, int], batch: int) -> list[Clip]:
    """Two batches of generated pairs with their exact flow."""
    frames = (size[0] * 3 // 2, size[1] * 3 // 2)
    data = VideoDataModule(
        "synthetic",
        synthetic=StreetSet(videos=2 * batch, seconds=2.0, size=frames, supersample=1),
        size=size,
        area=(0.4, 0.7),
        batch_size=batch,
        num_workers=0,
        val_fraction=0.0,
    )
    data.setup("fit")
    return list(data.train_dataloader())


def measure(name: str, args: Any) -> dict[str, Any]:
    """CPU seconds of steps and probes, and the share of one probe in so many steps."""
    size, batch = SETTINGS[name]
    streets = StreetLabels(train=96, val=48, supersample=1)
    probes = Probes(LabelledDataModule("synthetic", synthetic=streets, num_workers=0))
    every, probes.every_n_steps = probes.every_n_steps, args.block
    alone: list[float] = []
    both: list[float] = []
    trainer = L.Trainer(
        accelerator="cpu",
        devices=1,
        precision=args.precision,
        max_steps=args.block * (args.rounds + 1),
        callbacks=[Clock(alone), probes, Clock(both)],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(make_method(name), datamodule=Preloaded(make_clips(size, batch), size))
    # the first block warms up
    steps = [
        sum(alone[number : number + args.block]) / args.block
        for number in range(args.block, len(alone), args.block)
    ]
    costs = [both[number] - alone[number] for number in range(2 * args.block - 1, len(both), args.block)]
    shares = [cost / (cost + every * step) for cost, step in zip(costs, steps, strict=True)]
    return {
        "pairs_per_step": batch,
        "crop": size,
        "every_n_steps": every,
        "step_cpu_s": record.spread(steps),
        "probe_cpu_s": record.spread(costs),
        "probe_in_steps": record.ratio(costs, steps),
        "share": record.spread(shares),
    }


def main(words: list[str] | None = None) -> dict[str, Any]:
    parser = record.arguments(__doc__, rounds=3)
    parser.add_argument("--settings", nargs="+", choices=list(SETTINGS), default=list(SETTINGS))
    parser.add_argument("--block", type=int, default=3, help="steps before each probe")
    parser.add_argument("--precision", default=fast_precision(on_cpu=True), help="of training")
    args = parser.parse_args(words)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")
    results = {name: measure(name, args) for name in args.settings}
    path = record.save("probes", args, results)
    print(_report(results))
    print(f"written to {path}")
    return results


def _report(results: dict[str, Any]) -> str:
    head = ["min / median / max", "step, CPU s", "probe, CPU s", "probe in steps", "share of 500 steps, %"]
    rows = [
        [
            name,
            record.shown(found["step_cpu_s"]),
            record.shown(found["probe_cpu_s"]),
            record.shown(found["probe_in_steps"], 1),
            record.shown({key: 100 * value for key, value in found["share"].items()}),
            "yes" if found["share"]["median"] <= GOAL else "NO",
        ]
        for name, found in results.items()
    ]
    return record.table([*head, f"median ≤ {GOAL:.0%}"], rows)


if __name__ == "__main__":
    main()

"""What Lightning and the package's callbacks cost on top of the same steps written by hand.

Two copies of one method take the same steps on the same clips: one in ``Trainer.fit``, one in a loop that
calls ``losses``, ``backward``, the optimiser and the EMA. The loop's blocks of steps run inside the trainer's
data iterator, between two blocks of the trainer's own, in the same thread: both are warm, and whatever else
the machine does falls on both. In the end the weights of the two must be equal bit by bit, or the
comparison would be of different work.
"""

from __future__ import annotations

import copy
import logging
import math
import tempfile
import time
import warnings
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

from benchmarks import record

import lightning as L  # isort: skip  (after record, which fixes the number of threads)
import torch

from poodle_lightning import cli
from poodle_lightning.callbacks.checkpoints import AtomicCheckpointIO
from poodle_lightning.callbacks.faults import Faults
from poodle_lightning.callbacks.health import Health
from poodle_lightning.callbacks.metrics_file import MetricsFile
from poodle_lightning.callbacks.record import Record
from poodle_lightning.callbacks.throughput import Throughput
from poodle_lightning.data.streets import StreetSet
from poodle_lightning.data.video import VideoDataModule
from poodle_lightning.methods.base import Method
from poodle_lightning.nn.optim import Schedule, build_optimizer
from poodle_lightning.training import CheckpointPlan
from poodle_lightning.types import Clip

GOAL = 1.05
Clocks = tuple[float, float]


class HandLoop:
    """The same work without Lightning."""

    def __init__(self, method: Method, batch: int) -> None:
        self.method = method.train()
        method.setup("fit")
        self.optimizer = build_optimizer(method.recipe, method, batch)
        self.schedule = Schedule.from_recipe(method.recipe, 1, batch)
        self.steps = 0

    def step(self, clip: Clip) -> None:
        """One optimiser step."""
        self.optimizer.zero_grad()
        torch.stack(list(self.method.losses(clip).values())).sum().backward()
        for group in self.optimizer.param_groups:
            group["lr"] = self.schedule.lr(self.steps)
        self.optimizer.step()
        assert self.method.target is not None
        self.method.target.update(self.method.online, self.schedule.momentum(self.steps))
        self.steps += 1


class Alternation:
    """The trainer's loader: its batches, and between its blocks the hand loop's on the same batches.

    Args:
        clips: gone through again and again.
        hand: takes the steps that the trainer has just taken.
        block: steps per block.
        rounds: blocks of each that count; one of each before does not.
    """

    def __init__(self, clips: list[Clip], hand: HandLoop, block: int, rounds: int) -> None:
        self.clips, self.hand, self.block, self.rounds = clips, hand, block, rounds
        self.trainer_spent: list[Clocks] = []
        self.hand_spent: list[Clocks] = []

    def __len__(self) -> int:
        # Asked for the batch after the last one of a block, the block is over: hence one batch more.
        return self.block * (self.rounds + 1) + 1

    def __iter__(self) -> Iterator[Clip]:
        began = _clocks()
        for number in range(len(self)):
            if number and number % self.block == 0:
                self.trainer_spent.append(_since(began))
                began = _clocks()
                for step in range(number - self.block, number):
                    self.hand.step(self._clip(step))
                self.hand_spent.append(_since(began))
                began = _clocks()
            yield self._clip(number)

    def _clip(self, number: int) -> Clip:
        return self.clips[number % len(self.clips)]


class Preloaded(L.LightningDataModule):
    """Clips in memory, with the batch size that a method's schedule asks for."""

    def __init__(self, loader: Alternation, batch_size: int) -> None:
        super().__init__()
        self.loader, self.batch_size = loader, batch_size

    def train_dataloader(self) -> Alternation:
        """The alternation."""
        return self.loader


def _clocks() -> Clocks:
    return time.process_time(), time.perf_counter()


def _since(began: Clocks) -> Clocks:
    now = _clocks()
    return now[0] - began[0], now[1] - began[1]


# ---- the two trainers
def bare(folder: Path) -> dict[str, Any]:
    """Lightning alone: no callbacks, no logger."""
    return {"logger": False, "enable_checkpointing": False, "callbacks": []}


def defaults(folder: Path) -> dict[str, Any]:
    """What a run of the command line has where there is no terminal."""
    callbacks = [
        Record(["benchmark"]),
        Throughput(print_every=10.0),
        Faults(),
        *CheckpointPlan().callbacks(),
        Health(),
    ]
    return {
        "logger": [MetricsFile(folder)],
        "callbacks": callbacks,
        "plugins": [AtomicCheckpointIO()],
        "log_every_n_steps": 10,
    }


def compare(method: Method, clips: list[Clip], settings: dict[str, Any], args: Any) -> dict[str, Any]:
    """Ratios of the trainer's time to the hand loop's, by CPU time and by the clock."""
    batch = len(clips[0])
    hand = HandLoop(copy.deepcopy(method), batch)
    method = copy.deepcopy(method)
    loader = Alternation(clips, hand, args.block, args.rounds)
    trainer = L.Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=1,
        enable_progress_bar=False,
        enable_model_summary=False,
        **settings,
    )
    trainer.fit(method, datamodule=Preloaded(loader, batch))
    hand.step(loader._clip(hand.steps))  # the trainer's one batch more
    pairs = zip(method.state_dict().items(), hand.method.state_dict().values(), strict=True)
    different = [name for (name, mine), theirs in pairs if not torch.equal(mine, theirs)]
    found: dict[str, Any] = {"same_weights": not different, "steps": hand.steps}
    for number, clock in enumerate(("cpu", "wall")):
        ours, by_hand = (
            [spent[number] for spent in part] for part in (loader.trainer_spent, loader.hand_spent)
        )
        # against the mean of the hand loop's blocks before and after: a slow drift of the machine cancels
        around = [(before + after) / 2 for before, after in pairwise(by_hand)]
        found[f"hand_{clock}_ms_per_step"] = record.spread(1e3 * s / args.block for s in around)
        found[f"{clock}_ratio"] = record.ratio(ours[1:], around)
        found[f"{clock}_ratio_of_totals"] = math.fsum(ours[1:]) / math.fsum(around)
        found[f"{clock}_ratio_hand_to_hand"] = record.ratio(by_hand[1:], by_hand[:-1])
    return found


# ---- the work
def make_method(config: str) -> Method:
    """The method of a configuration."""
    torch.manual_seed(0)
    words = ["--model", str(record.ROOT / "configs/method" / config), "--data.init_args.root", "."]
    method, _ = cli.build([], words)
    assert isinstance(method, Method)
    return method


def make_clips(count: int, batch: int) -> list[Clip]:
    """Batches of generated pairs with their exact flow, 64 × 128."""
    data = VideoDataModule(
        "synthetic",
        synthetic=StreetSet(videos=count * batch, seconds=2.0, supersample=1),
        size=(64, 128),
        area=(0.4, 0.7),
        batch_size=batch,
        num_workers=0,
        val_fraction=0.0,
    )
    data.setup("fit")
    return list(data.train_dataloader())


def main(words: list[str] | None = None) -> dict[str, Any]:
    parser = record.arguments(__doc__, rounds=24)
    parser.add_argument("--method", default="poodle_tiny.yaml", help="file of configs/method")
    parser.add_argument("--batch", type=int, default=4, help="pairs per step")
    parser.add_argument("--block", type=int, default=5, help="steps in a row of the trainer, then by hand")
    args = parser.parse_args(words)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")
    method, clips = make_method(args.method), make_clips(8, args.batch)
    results: dict[str, Any] = {}
    for name, settings in (("lightning", bare), ("lightning + default callbacks", defaults)):
        with tempfile.TemporaryDirectory() as folder:
            kept = {"default_root_dir": folder, **settings(Path(folder))}
            results[name] = compare(method, clips, kept, args)
    path = record.save("overhead", args, results)
    print(_report(results))
    print(f"written to {path}")
    return results


def _report(results: dict[str, Any]) -> str:
    head = ["over a hand loop", "hand, CPU ms/step", "CPU ratio", "of totals", "wall ratio", "hand to hand"]
    rows = [
        [
            name,
            record.shown(found["hand_cpu_ms_per_step"], 0),
            record.shown(found["cpu_ratio"], 3),
            f"{found['cpu_ratio_of_totals']:.3f}",
            record.shown(found["wall_ratio"], 3),
            record.shown(found["cpu_ratio_hand_to_hand"], 3),
            "yes" if found["cpu_ratio"]["median"] <= GOAL else "NO",
            "yes" if found["same_weights"] else "NO",
        ]
        for name, found in results.items()
    ]
    return record.table([*head, f"median ≤ {GOAL}", "same weights"], rows)


if __name__ == "__main__":
    main()

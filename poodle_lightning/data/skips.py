"""Which videos could not be used, counted by reason and written down.

``skipped.jsonl`` in the run's folder holds one JSON object per line:

* ``{"stage": "index", "path", "reason", "detail"}``: refused before training; in no count.
* ``{"stage": "train" | "val", "epoch", "step", "rank", "path", "reason", "detail", "time"}``: a request that
  failed and was replaced.
* ``{"stage": "stop", "rank", "path", …}``: what failed before the run stopped with nothing left to try.
* ``{"stage": "epoch", "epoch", "rank", "requested", "used", "skipped": {reason: count}}``: the sum of an
  epoch; ``requested = used + Σ skipped``. A run that goes on writes the epoch it broke off in again, with
  all of its requests: the last line of an epoch and rank counts. (A checkpoint holds rank 0's counts.)

A *request* is one video opened for training, however many clips are taken from it. The limit
``max_skip_fraction`` is of all training requests of the run so far, on one device. It is not judged before
``1 / max_skip_fraction`` requests (100 with the default of 0.01), because one bad video among the first few
says nothing about a fraction that small; when every video fails, the run stops at once.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from poodle_lightning.types import Skip, UserError

FILE_NAME = "skipped.jsonl"


class TooManySkipped(UserError):
    """More of the videos asked for could not be used than the run allows."""


@dataclass(frozen=True)
class _Counts:
    batches: int = 0
    used: int = 0
    skipped: dict[str, int] = field(default_factory=dict)
    epoch: int | None = None
    epoch_used: int = 0
    epoch_skipped: dict[str, int] = field(default_factory=dict)

    def plus(self, used: int, reasons: Counter[str], epoch: int) -> _Counts:
        return _Counts(
            batches=self.batches + 1,
            used=self.used + used,
            skipped=dict(Counter(self.skipped) + reasons),
            epoch=epoch,
            epoch_used=self.epoch_used + used,
            epoch_skipped=dict(Counter(self.epoch_skipped) + reasons),
        )


class Ledger:
    """Counts requests and writes down what was skipped, on one device.

    Args:
        max_skip_fraction: largest share of training requests that may fail; 0 allows none, 1 any.

    Raises:
        UserError: not a share.
    """

    def __init__(self, max_skip_fraction: float = 0.01) -> None:
        if not 0 <= max_skip_fraction <= 1:
            raise UserError(f"max_skip_fraction {max_skip_fraction}: give a share between 0 and 1")
        self.max_skip_fraction = max_skip_fraction
        self.path: Path | None = None
        self.rank = 0
        self._now = _Counts()
        self._before = self._now

    @property
    def requested(self) -> int:
        """Training requests so far: ``used + Σ skipped``."""
        return self._now.used + self.skipped.total()

    @property
    def skipped(self) -> Counter[str]:
        """Failed training requests so far, by reason."""
        return Counter(self._now.skipped)

    def open(self, folder: str | Path, rank: int = 0) -> None:
        """Write to ``skipped.jsonl`` of a folder from now on, behind what is there."""
        self.path, self.rank = Path(folder) / FILE_NAME, rank
        before = self.path.read_bytes() if self.path.is_file() else b""
        if rank == 0 and before and not before.endswith(b"\n"):
            self._append("\n")  # a killed run tore its last line

    def refused(self, skips: Sequence[Skip]) -> None:
        """List what was refused before training; once per file, also when a run goes on in its folder."""
        if self.rank != 0 or not skips:
            return
        known = {(line["path"], line["reason"]) for line in self._lines() if line.get("stage") == "index"}
        fresh = [skip for skip in skips if (skip.path, skip.reason) not in known]
        self._write([{"stage": "index", **asdict(skip)} for skip in fresh])

    def train(self, used: int, skips: Sequence[Skip], epoch: int, step: int) -> None:
        """Count a training batch.

        Args:
            used: requests that gave clips.
            skips: requests that failed.
            epoch: current epoch.
            step: current optimiser step.

        Raises:
            TooManySkipped: more failed than allowed.
        """
        reasons = Counter(skip.reason for skip in skips)
        if self._now.epoch not in (None, epoch):
            self.sum_up()
            self._now = replace(self._now, epoch_used=0, epoch_skipped={})
        self._before = self._now
        self._now = self._now.plus(used, reasons, epoch)
        self._note("train", skips, epoch, step)
        limit, failed = self.max_skip_fraction, self.skipped.total()
        judged = limit == 0 or self.requested * limit >= 1
        if judged and failed > limit * self.requested:
            raise TooManySkipped(self._verdict())

    def held_out(self, skips: Sequence[Skip], epoch: int, step: int) -> None:
        """Write down what failed among held-out clips; in no count."""
        self._note("val", skips, epoch, step)

    def exhausted(self, skips: Sequence[Skip]) -> TooManySkipped:
        """The error for a request for which every video that was tried failed."""
        self._write([{"stage": "stop", "rank": self.rank, **asdict(skip)} for skip in skips])
        reasons = listed(Counter(skip.reason for skip in skips))
        last = skips[-1]
        return TooManySkipped(
            f"{len(skips)} videos in a row could not be used ({reasons}; the last: {last.path}:"
            f" {last.detail}); check the disk and the settings{self._where()}"
        )

    def sum_up(self) -> None:
        """Write the sums of the current epoch."""
        now = self._now
        if now.epoch is None:
            return
        requested = now.epoch_used + sum(now.epoch_skipped.values())
        sums = {
            "requested": requested,
            "used": now.epoch_used,
            "skipped": dict(sorted(now.epoch_skipped.items())),
        }
        self._write([{"stage": "epoch", "epoch": now.epoch, "rank": self.rank, **sums}])

    def state_dict(self, processed: int | None = None) -> dict[str, Any]:
        """Counts, as plain data.

        Args:
            processed: training batches that the run has finished. A batch that was counted but did not get
                through its step is left out, because a run that goes on takes it again.
        """
        unfinished = processed is not None and self._now.batches > processed
        return asdict(self._before if unfinished else self._now)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on counting."""
        self._now = self._before = _Counts(**state)

    def _note(self, stage: str, skips: Sequence[Skip], epoch: int, step: int) -> None:
        place = {"stage": stage, "epoch": epoch, "step": step, "rank": self.rank}
        self._write([{**place, **asdict(skip)} for skip in skips])

    def _write(self, lines: Sequence[dict[str, Any]]) -> None:
        """Append with one write each, so that devices of one machine never mix their lines."""
        if self.path is None or not lines:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        for line in lines:
            self._append(json.dumps(line) + "\n")

    def _append(self, text: str) -> None:
        assert self.path is not None
        descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            os.write(descriptor, text.encode())
        finally:
            os.close(descriptor)

    def _lines(self) -> list[dict[str, Any]]:
        if self.path is None or not self.path.is_file():
            return []
        lines = []
        for text in self.path.read_text(encoding="utf-8").splitlines():
            try:
                lines.append(json.loads(text))
            except json.JSONDecodeError:  # the last line of a killed run
                continue
        return lines

    def _verdict(self) -> str:
        failed = self.skipped.total()
        return (
            f"{failed} of {self.requested} requests could not be used ({listed(self.skipped)}):"
            f" more than max_skip_fraction {self.max_skip_fraction:g}{self._where()};"
            " mend or remove them, or raise it"
        )

    def _where(self) -> str:
        return "" if self.path is None else f", see {self.path}"


def listed(reasons: Counter[str]) -> str:
    """Reasons and how often, in words: ``empty 1, truncated 2``."""
    return ", ".join(f"{reason} {count}" for reason, count in sorted(reasons.items()))

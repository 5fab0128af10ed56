"""Pretraining runs started as processes of their own, some side by side; for the verbs that train several."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_PAUSE = 0.1


@dataclass(frozen=True)
class Start:
    """A run to be started.

    Args:
        name: of the run, for messages.
        words: after ``poodle-lightning fit``.
        log: file that takes its messages; None shows them.
    """

    name: str
    words: Sequence[str]
    log: Path | None = None


def fast_precision(on_cpu: bool = False) -> str:
    """``trainer.precision`` for this machine: bfloat16 where it is multiplied natively, else float32.

    Args:
        on_cpu: the run does not use a GPU, even if there is one.
    """
    import torch

    if torch.cuda.is_available() and not on_cpu:
        return "bf16-mixed" if torch.cuda.is_bf16_supported() else "32-true"
    # bfloat16 halves the time where the CPU multiplies it, and is slow where it does not
    fast = hasattr(torch.cpu, "_is_avx512_bf16_supported") and torch.cpu._is_avx512_bf16_supported()
    return "bf16-mixed" if fast else "32-true"


def threads_each(jobs: int) -> int:
    """CPU threads of each of so many runs: the cores over the runs, ``OMP_NUM_THREADS`` at most."""
    share = max(1, (os.cpu_count() or 1) // jobs)
    given = os.environ.get("OMP_NUM_THREADS", "")
    return min(share, int(given)) if given.isdecimal() and int(given) else share


def launch(start: Start, threads: int) -> subprocess.Popen[bytes]:
    """Start one run with so many threads of computation."""
    output: Any = None
    if start.log is not None:
        start.log.parent.mkdir(parents=True, exist_ok=True)
        output = start.log.open("ab")
    command = [sys.executable, "-m", "poodle_lightning", "fit", *start.words]
    try:
        return subprocess.Popen(
            command, env=os.environ | {"OMP_NUM_THREADS": str(threads)}, stdout=output, stderr=output
        )
    finally:
        if output is not None:
            output.close()  # the process has its own handle


def side_by_side(
    starts: Sequence[Start],
    threads: int,
    at_once: int | None = None,
    ended: Callable[[Start, bool], None] | None = None,
) -> list[Start]:
    """Run them all and wait.

    Args:
        starts: in this order.
        threads: of each.
        at_once: most that run at the same time; None is all.
        ended: told of each run that has ended, and whether it went well.

    Returns:
        Those that failed. One failure stops no other run; an interruption stops all.
    """
    waiting, failed = list(starts), []
    running: list[tuple[Start, subprocess.Popen[bytes]]] = []
    try:
        while waiting or running:
            while waiting and len(running) < (at_once or len(starts)):
                start = waiting.pop(0)
                running.append((start, launch(start, threads)))
            for start, process in [one for one in running if one[1].poll() is not None]:
                running.remove((start, process))
                well = process.returncode == 0
                failed += [] if well else [start]
                if ended is not None:
                    ended(start, well)
            if running:
                time.sleep(_PAUSE)
    finally:
        for _, process in running:
            process.terminate()
        for _, process in running:
            process.wait()  # it leaves a checkpoint behind
    return failed

"""What every benchmark shares: how spreads are taken, what is written down, how it is shown."""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

# One thread, so that ratios do not depend on what else runs; set before torch is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results"


def arguments(module_doc: str | None, rounds: int) -> argparse.ArgumentParser:
    """A parser with ``--rounds`` and ``--out``; the first line of the module's text describes it."""
    parser = argparse.ArgumentParser(
        description=(module_doc or "").splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=rounds, help="interleaved repetitions that count")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the JSON file")
    return parser


def spread(values: Iterable[float]) -> dict[str, float]:
    """Smallest, middle and largest of some values."""
    kept = sorted(values)
    return {"min": kept[0], "median": statistics.median(kept), "max": kept[-1]}


def ratio(above: Sequence[float], below: Sequence[float]) -> dict[str, float]:
    """Spread of the quotients round by round: the two were measured one after the other in each round."""
    return spread(a / b for a, b in zip(above, below, strict=True))


def shown(found: Mapping[str, float], digits: int = 2) -> str:
    """A spread as ``min / median / max``."""
    return " / ".join(f"{found[key]:.{digits}f}" for key in ("min", "median", "max"))


def save(name: str, args: argparse.Namespace, results: Mapping[str, Any]) -> Path:
    """Write ``NAME.json``: results, and everything needed to judge them."""
    import torch

    from poodle_lightning.callbacks.record import git_state, versions

    content = {
        "benchmark": name,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "git": git_state(ROOT),
        "cpu": _cpu(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "versions": versions(),
        "arguments": {key: value for key, value in vars(args).items() if key != "out"},
        "results": results,
    }
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / f"{name}.json"
    path.write_text(json.dumps(content, indent=2, default=str) + "\n", encoding="utf-8")
    return path


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A Markdown table, padded so that it reads well on a terminal too."""
    lines = [[str(cell) for cell in row] for row in (head, *rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
    text = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |"
        for line in lines
    ]
    return "\n".join([text[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *text[1:]])


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()

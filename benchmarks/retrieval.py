"""Dense nearest-neighbour search as the memory bank grows: blocks under a budget against one whole matrix.

Per size of the memory, in turn in every round: ``poodle_lightning.ops.knn.nearest`` at its budget, and the
plain search, ``(queries @ memory.T).topk(k)``, which holds all products at once. Both get vectors of length
1. The share of places on which they agree is reported: rounding decides between products that are as good as
equal. Memory is what a fresh process's resident peak rises by during the search alone.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import time
from pathlib import Path

from benchmarks import record

import torch  # isort: skip  # record sets the number of threads first
import torch.nn.functional as F

from poodle_lightning.ops.knn import nearest

MIB = 2**20


def vectors(count: int, width: int, seed: int) -> torch.Tensor:
    """Rows of length 1 around 64 centres, so that there are near and far ones."""
    draw = torch.Generator().manual_seed(seed)
    centres = torch.randn(64, width, generator=torch.Generator().manual_seed(0))
    homes = torch.randint(0, 64, (count,), generator=draw)
    return F.normalize(centres[homes] + torch.randn(count, width, generator=draw), dim=1)


def search(form: str, queries: torch.Tensor, memory: torch.Tensor, args: argparse.Namespace) -> torch.Tensor:
    """Places of the neighbours, ``(Q, k)``."""
    if form == "blocks":
        return nearest(queries, memory, args.k, args.budget_mib * MIB)[1]
    return (queries @ memory.T).topk(args.k, dim=1).indices


FORMS = ("blocks", "plain")


def measure_time(size: int, args: argparse.Namespace) -> dict[str, object]:
    """Seconds of CPU of every round, the forms in turn; one round before does not count."""
    queries, memory = vectors(args.queries, args.width, 1), vectors(size, args.width, 2)
    seconds: dict[str, list[float]] = {form: [] for form in FORMS}
    found = {}
    for number in range(args.rounds + 1):
        for form in FORMS:
            began = time.process_time()
            found[form] = search(form, queries, memory, args)
            if number:
                seconds[form].append(time.process_time() - began)
    same = found["blocks"].sort(dim=1).values == found["plain"].sort(dim=1).values
    return {
        "seconds": {form: record.spread(values) for form, values in seconds.items()},
        "plain_over_blocks": record.ratio(seconds["plain"], seconds["blocks"]),
        "share_of_equal_places": float(same.double().mean()),
    }


def measure_memory(form: str, size: int, args: argparse.Namespace) -> float:
    """MiB by which the resident peak of a fresh process rises; NaN where the system does not tell."""
    if not Path("/proc/self/status").is_file():
        return math.nan
    given = ["--queries", args.queries, "--width", args.width, "--k", args.k, "--budget-mib", args.budget_mib]
    words = [sys.executable, "-m", "benchmarks.retrieval", "--peak-of", form, "--sizes", size, *given]
    done = subprocess.run(list(map(str, words)), cwd=record.ROOT, check=True, capture_output=True, text=True)
    return float(json.loads(done.stdout))


def _peak_here(form: str, size: int, args: argparse.Namespace) -> float:
    queries, memory = vectors(args.queries, args.width, 1), vectors(size, args.width, 2)
    search(form, queries[:32], memory[:256], args)  # loads what a first call loads
    # making the vectors has raised the peak already: from here on it is counted anew
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    before = _status("VmRSS")
    search(form, queries, memory, args)
    return (_status("VmHWM") - before) / MIB


def _status(field: str) -> float:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(float(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":"))


def run(args: argparse.Namespace) -> dict[str, object]:
    """Results by size of the memory."""
    results: dict[str, object] = {}
    for size in args.sizes:
        results[str(size)] = measure_time(size, args)
        if not args.no_memory:
            results[str(size)] |= {"peak_mib": {form: measure_memory(form, size, args) for form in FORMS}}
    return results


def main(words: list[str] | None = None) -> dict[str, object]:
    parser = record.arguments(__doc__, rounds=3)
    parser.add_argument(
        "--sizes", type=int, nargs="+", default=[4096, 16384, 65536], help="rows of the memory"
    )
    parser.add_argument("--queries", type=int, default=2048, help="patches that are looked up")
    parser.add_argument("--width", type=int, default=384, help="channels")
    parser.add_argument("--k", type=int, default=30, help="neighbours")
    parser.add_argument("--budget-mib", type=int, default=64, help="of the blocks")
    parser.add_argument("--no-memory", action="store_true", help="start no further processes")
    parser.add_argument("--peak-of", choices=FORMS, help=argparse.SUPPRESS)
    args = parser.parse_args(words)
    if args.peak_of:
        print(json.dumps(_peak_here(args.peak_of, args.sizes[0], args)))
        return {}
    results = run(args)
    del args.peak_of
    path = record.save("retrieval", args, results)
    print(_report(results))
    print(f"written to {path}")
    return results


def _report(results: dict) -> str:
    rows = []
    for size, found in results.items():
        seconds = [record.shown(found["seconds"][form]) for form in FORMS]
        peaks = [f"{found['peak_mib'][form]:.0f}" if "peak_mib" in found else "-" for form in FORMS]
        rows.append((f"{int(size):,}", *seconds, record.shown(found["plain_over_blocks"]), *peaks))
    head = ("memory rows", "blocks s", "plain s", "plain / blocks", "blocks MiB", "plain MiB")
    return record.table(head, rows)


if __name__ == "__main__":
    main()

"""Does the paper's order of methods appear on generated streets? Linear readouts after equal pairs.

``--size cpu`` runs the frozen comparison from nothing: streets, every method and seed, controls, table.
``--try name=value …`` is one run of the search: the frozen numbers with some changed. It is scored on the
validation split and only listed. A run that is in the folder ``--out`` is not repeated, so an
interrupted benchmark goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from benchmarks import record

import torch  # isort: skip  (after record, which fixes the number of threads)

from benchmarks.street import picture, report, runs
from benchmarks.street.readouts import GROUPS
from benchmarks.street.settings import CURVE, METHODS, SEARCH_SEED, SEEDS, SIZES, Setting

CONTROLS = ("position", "random poodle", "random flowe")
ORDER = (("poodle", "flowe"), ("sdm_only", "pooled_only"), ("supervised",))
"""All seeds of the methods in question come first, so that an interrupted benchmark has them."""


def final_jobs(setting: Setting, seeds: int) -> list[runs.Job]:
    """The frozen comparison, on the test split."""
    wanted = [("position", 0)] + [(name, seed) for name in CONTROLS[1:] for seed in range(seeds)]
    wanted += [(name, seed) for names in ORDER for seed in range(seeds) for name in names]
    return [runs.Job(name, setting, seed, "test", "final") for name, seed in wanted]


def curve_jobs(setting: Setting, most: int) -> list[runs.Job]:
    """Other budgets, on the test split."""
    return [
        runs.Job(name, setting.longer(factor), seed, "test", f"budget x{factor:g}")
        for seed in range(most)
        for name, (factor, seeds) in CURVE.items()
        if seed < seeds
    ]


def summary(lines: list[runs.Line], curve: list[runs.Line]) -> dict[str, Any]:
    """The tables' numbers, and by how much PooDLe is ahead of each other method."""
    rows = report.by_row(lines)
    return {
        "scores": {
            row: {group: [x[group] for x in found] for group in GROUPS} for row, found in rows.items()
        },
        "poodle_minus": {
            name: report.gains(lines, name) for name in METHODS if name not in ("poodle", "supervised")
        },
        "poodle_minus_at_longer_budgets": {
            name: report.gains(curve, name) for name in ("flowe", "sdm_only") if curve
        },
        # about equal multiply-adds: FlowE's dilated network takes 2.2 times PooDLe's per pair
        "poodle_at_twice_the_pairs_minus_flowe": report.gains(
            [x for x in curve if x["method"] == "poodle"] + [x for x in lines if x["method"] == "flowe"],
            "flowe",
        ),
        "budgets": [
            {key: x[key] for key in ("method", "seed", "note", *GROUPS, "training_gmac_per_pair")}
            for x in curve
        ],
    }


def earlier(path: Path) -> list[runs.Line]:
    """The runs that a results file lists already, the search's among them."""
    if not path.exists():
        return []
    listed: list[runs.Line] = json.loads(path.read_text(encoding="utf-8"))["results"]["runs"]
    return listed


def main(argv: list[str] | None = None) -> None:
    args = _arguments(argv)
    torch.set_num_threads(1)
    setting = SIZES[args.size].changed(dict(text.split("=", 1) for text in args.changes or []))
    if args.searching:
        jobs = [runs.Job(name, setting, args.seed, "val", args.note) for name in args.methods]
        runs.run_all(jobs, args.out, args.jobs, args.device)
        return
    lines = runs.run_all(final_jobs(setting, args.seeds), args.out, args.jobs, args.device)
    longer = curve_jobs(setting, args.seeds) if args.curve else []
    curve = runs.run_all(longer, args.out, args.jobs, args.device)
    name = f"street_readout_{args.size}"
    every = {
        x["name"]: x for x in [*earlier(args.results / f"{name}.json"), *runs.finished(args.out).values()]
    }
    results = {"setting": setting.plain(), **summary(lines, curve), "runs": list(every.values())}
    told = {key: getattr(args, key) for key in ("size", "seeds", "jobs", "device", "curve")}
    path = record.save(name, argparse.Namespace(out=args.results, **told), results)
    title = (
        f"Linear readout on generated streets, mIoU in %; {setting.steps * setting.batch:,} pairs, test split"
    )
    picture.write(report.by_row(lines), args.results / f"{name}.png", title)
    print("\n" + report.final_table(lines) + "\n\n" + report.encoders_table(lines))
    if curve:
        print("\n" + report.curve_table(lines, curve))
    print(f"\n{path}")


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--size", choices=sorted(SIZES), default="cpu", help="which frozen setting")
    parser.add_argument("--out", type=Path, default=record.ROOT / "runs/street_readout", help="data and runs")
    parser.add_argument("--results", type=Path, default=record.RESULTS, help="folder of JSON and picture")
    parser.add_argument("--seeds", type=int, default=SEEDS, help="of every method")
    parser.add_argument("--jobs", type=int, default=None, help="runs at a time; default 2, on a GPU 1")
    parser.add_argument("--device", default=None, help="default: cpu or cuda, as the size says")
    parser.add_argument("--no-curve", dest="curve", action="store_false", help="leave other budgets out")
    parser.add_argument(
        "--try", dest="changes", nargs="*", metavar="NAME=VALUE", help="one run of the search instead"
    )
    parser.add_argument("--methods", nargs="+", default=list(METHODS), help="with --try")
    parser.add_argument("--seed", type=int, default=SEARCH_SEED, help="with --try")
    parser.add_argument("--note", default="", help="with --try: why the run is made")
    args = parser.parse_args(argv)
    on_gpu = args.size == "gpu"
    args.device = args.device or ("cuda" if on_gpu else "cpu")
    args.jobs = args.jobs or (1 if on_gpu else 2)
    args.searching = args.changes is not None
    return args


if __name__ == "__main__":
    main()

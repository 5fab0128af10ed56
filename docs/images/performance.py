"""Draws ``performance.png`` from ``benchmarks/results``. Run ``python docs/images/performance.py``."""

import json
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

HERE = Path(__file__).parent
RESULTS = HERE.parents[1] / "benchmarks" / "results"
OURS, OTHER = "#2a6f97", "#a9b4bd"


def results(name: str) -> Any:
    """What a benchmark wrote."""
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))["results"]


def bars() -> list[tuple[str, float, str]]:
    """Name, how many times less than published, and what is compared."""
    dense = results("dense_loss_512x1024x256")["cells"]
    macs, kept = results("step_macs"), results("saved_bytes")
    films, augment, end = results("loader"), results("augment"), results("end_to_end")
    handed = films["gop30"]["megabytes_per_pair"]
    found = [
        ("dense loss: time", dense["times_faster"]["median"], "512×1024, CPU time"),
        ("dense loss: memory", dense["times_less_memory"], "peak of a fresh process"),
        ("dense loss: bytes moved", dense["times_fewer_bytes"], "counted"),
        ("colour and blur", augment["recipe"]["times_faster"]["exact"]["median"], "per image, CPU time"),
        *(
            (f"loader, {name}", film["times_faster_than_published"]["yuv"]["median"], "pairs per CPU-second")
            for name, film in films.items()
        ),
        ("bytes to the device", handed["published"] / handed["yuv"]["median"], "YUV planes"),
        ("kept for backward", 1 / kept["ratio"]["package"], "network and loss, per image"),
        ("arithmetic of the networks", 1 / macs["commuted / plain"], "multiply-adds per pair"),
        ("end to end, float32", end["package"]["times_faster"]["median"], "256×512, CPU time"),
        ("end to end, bfloat16", end["package, bfloat16"]["times_faster"]["median"], "256×512, CPU time"),
    ]
    return found[::-1]


def main() -> None:
    """One bar per part, on a logarithmic scale."""
    rows = bars()
    figure = Figure(figsize=(9, 0.36 * len(rows) + 1.0), layout="constrained")
    axes = figure.subplots()
    colours = [OURS if name.startswith("end") else OTHER for name, _, _ in rows]
    axes.barh(range(len(rows)), [value for _, value, _ in rows], color=colours)
    for place, (_, value, what) in enumerate(rows):
        axes.text(value * 1.06, place, f"{value:.3g}×  {what}", va="center", fontsize=8.5)
    axes.set_yticks(range(len(rows)), [name.replace("gop", "GOP ") for name, _, _ in rows], fontsize=9)
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_xlim(1, 6 * max(value for _, value, _ in rows))
    axes.set_xlabel("times less than the published formulation (one CPU thread)")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(HERE / "performance.png", dpi=110)


if __name__ == "__main__":
    main()

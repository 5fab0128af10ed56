"""The parts of the report that speak of labels: the result of an evaluation, probes during pretraining."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from html import escape
from typing import Any

from poodle_lightning.data.davis import voc_colours
from poodle_lightning.draw.curves import Series, curves
from poodle_lightning.draw.segmentation import class_bars, palette
from poodle_lightning.report.files import RunFiles
from poodle_lightning.report.page import Section, chips, data_url, grid, plot, table
from poodle_lightning.report.results import PICTURES, read_result, shown, words_of

_WORST = " Pictures: image, truth, prediction, errors (red) of the worst images of the worst classes."
# What the pictures of a protocol show, where it is not the worst images.
_SHOWN = {
    "object discovery": (
        " Pictures: boxes that are there (green) and the one found (magenta), attention, the mask that it "
        "gives, and the true objects."
    ),
    "DAVIS 2017 label propagation": (
        " Pictures: frames of a sequence from the first to the last; below them the true masks, then those "
        "that were found from the first mask alone. Each object has its colour of PASCAL VOC."
    ),
}


def result(files: RunFiles) -> Section | None:
    """What ``evaluate`` found: scores, bars per class, the worst images of the worst classes."""
    content = read_result(files.folder)
    if content is None:
        return None
    scores = {name: value for name, value in content["scores"].items() if value is not None}
    rows = [[words_of(name), shown(name, value, digits=2, unit=" %")] for name, value in scores.items()]
    rows += [[name.replace("_", " "), f"{number:,}"] for name, number in content["counts"].items()]
    body = table(["", ""], rows)
    measures = content["per_class"]
    if measures:
        measure, values = next(iter(measures.items()))
        names = [name for name, value in values.items() if value is not None]
        heights = {words_of(measure): [values[name] for name in names]}
        bars = plot(partial(class_bars, names, heights, label=f"{words_of(measure)} in %"), "per class")
        body += f'<div style="max-width:40rem">{bars}</div>'
    cells = []
    for path in sorted((files.folder / PICTURES).glob("*.png")):
        caption = escape(path.stem)
        cells.append(
            f'<figure><img alt="{caption}" src="{data_url(path.read_bytes())}">'
            f"<figcaption>{caption}</figcaption></figure>"
        )
    if cells:
        body += grid(cells, 1, 1) + chips(_key(content))
    sentence = f"{content['protocol']} on the encoder {content['encoder']}, seed {content['seed']}."
    if cells:
        sentence += _SHOWN.get(content["protocol"], _WORST)
    return Section("Evaluation", sentence, body)


def _key(content: Mapping[str, Any]) -> dict[str, Sequence[float]]:
    """What the colours of the pictures mean: classes, or the numbers of the objects of a sequence."""
    names = list(next(iter(content["per_class"].values()), {}))
    if content["protocol"] == "DAVIS 2017 label propagation":  # <sequence>_<number>
        most = max(int(name.rpartition("_")[2]) for name in names) if names else 0
        shades = voc_colours() / 255.0
        return {f"object {number}": shades[number].tolist() for number in range(1, most + 1)}
    colours = palette(names)
    return {name: colours[place].tolist() for place, name in enumerate(names)}


def probes(metrics: dict[str, Series]) -> Section | None:
    """Scores on labelled images while pretraining went on."""
    plots = []
    for name in sorted({key.split("/")[1] for key in metrics if key.startswith("probe/")}):
        for kind, word in (("linear", "linear readout"), ("knn", "dense k-NN")):
            start = f"probe/{name}/{kind}_miou"
            lines = {
                key.removeprefix(start).removeprefix("_") or "all": (steps, [100 * value for value in values])
                for key, (steps, values) in metrics.items()
                if key.startswith(start)
            }
            if lines:
                plots.append(plot(partial(curves, lines), f"{name}, {word}: mIoU in %"))
    if not plots:
        return None
    sentence = "Readouts of the network on labelled images, which training never sees, as training went on."
    return Section("Probes", sentence, grid(plots, 2, 1))

"""What an evaluation found, on disk: one JSON, one row and a table in Markdown, pictures of what went wrong.

=================  ==================================================================================
``result.json``    every number, with the encoder, the protocol and the seed
``result.md``      the row for a table of many encoders, then the scores per class
``pictures/``      the worst images of the worst classes: image, truth, prediction, errors
=================  ==================================================================================
"""

from __future__ import annotations

import json
import logging
import math
import shutil
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from poodle_lightning.draw.canvas import fit, png, sheet
from poodle_lightning.draw.segmentation import colour_labels, errors, palette
from poodle_lightning.types import ClassSet, LabelledBatch

if TYPE_CHECKING:
    import lightning as L

    from poodle_lightning.evaluation.base import Evaluation, Scores

_log = logging.getLogger(__name__)

FILE_NAME = "result.json"
PICTURES = "pictures"
_WIDTH = 480
_WORDS = {
    "miou": "mIoU",
    "iou": "IoU",
    "miou_present": "mIoU (classes present)",
    "pixel_accuracy": "pixel accuracy",
    "mean_class_accuracy": "mean class accuracy",
    "fwiou": "fwIoU",
    "corloc": "CorLoc",
    "jaccard": "Jaccard, per image",
    "jaccard_object": "Jaccard, per object",
    "jaccard_object_image": "Jaccard, per object, mean of images",
    "j_and_f": "J&F",
    "j": "J",
    "f": "F",
    **{f"{name}_{what}": f"{name.upper()} {what}" for name in "jf" for what in ("mean", "recall", "decay")},
    "top1": "top-1",
    "top5": "top-5",
    "top1_best": "top-1, best epoch",
    "top5_best": "top-5, best epoch",
    "rmse": "RMSE [m]",
    "rmse_image": "RMSE, mean of images [m]",
    "abs_rel": "AbsRel",
    "sq_rel": "SqRel [m]",
    "rmse_log": "RMSE of logs",
    "log10": "log10",
    "delta1": "δ < 1.25",
    "delta2": "δ < 1.25²",
    "delta3": "δ < 1.25³",
    **{
        f"{kind}_ap{end}": f"{kind} AP{word}"
        for kind in ("box", "mask")
        for end, word in {
            "": "",
            "50": "50",
            "75": "75",
            "_small": " S",
            "_medium": " M",
            "_large": " L",
            "_rare": " r",
            "_common": " c",
            "_frequent": " f",
        }.items()
    },
}

# errors of depth, which are no shares of anything
_AS_THEY_ARE = ("rmse", "rmse_image", "abs_rel", "sq_rel", "rmse_log", "log10")


@runtime_checkable
class Segmenter(Protocol):
    """What predicts a class per pixel."""

    def predict_labels(self, batch: LabelledBatch) -> Tensor:
        """Classes ``(B, h, w)`` on the host, at the labels' resolution."""
        ...


@runtime_checkable
class Labelled(Protocol):
    """Where single labelled images come from."""

    @property
    def classes(self) -> ClassSet:
        """Names of the label values."""
        ...

    def item(self, split: str, number: int) -> LabelledBatch:
        """One image of a split as evaluation sees it."""
        ...


def write_result(folder: Path, scores: Scores, about: Mapping[str, Any]) -> dict[str, Any]:
    """Write ``result.json`` and ``result.md``.

    Args:
        folder: of the run.
        scores: what was found.
        about: plain data beside it: ``encoder``, ``seed``, ``step``.

    Returns:
        The content of the JSON.
    """
    found = asdict(scores)
    content: dict[str, Any] = {**about, **found, "value": scores.scores[scores.headline]}
    folder.mkdir(parents=True, exist_ok=True)
    _write(folder / FILE_NAME, json.dumps(_plain(content), indent=2) + "\n")
    _write(folder / "result.md", markdown(content))
    return content


def write_summary(folder: Path, contents: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Write ``runs.json`` and ``runs.md``: mean and standard deviation over runs that differ in their seed.

    Args:
        folder: where they go.
        contents: what :func:`write_result` returned, at least one.
    """
    first = contents[0]
    values = {name: [float(one["scores"][name]) for one in contents] for name in first["scores"]}
    scores = {name: statistics.fmean(found) for name, found in values.items()}
    spread = {name: _deviation(found) for name, found in values.items()}
    summary = {
        "protocol": first["protocol"],
        "encoder": first["encoder"],
        "headline": first["headline"],
        "seeds": [one["seed"] for one in contents],
        "mean": scores,
        "std": spread,
        "runs": values,
    }
    _write(folder / "runs.json", json.dumps(_plain(summary), indent=2) + "\n")
    head = ["encoder", "protocol", "runs", *map(words_of, scores)]
    row = [str(first["encoder"]), str(first["protocol"]), str(len(contents))]
    row += [f"{shown(name, scores[name])} ± {shown(name, spread[name])}" for name in scores]
    _write(folder / "runs.md", _table(head, [row]))
    return summary


def _deviation(found: Sequence[float]) -> float:
    """Over n − 1: runs are a sample of all seeds. NaN of one run, or where a run measured nothing."""
    return statistics.stdev(found) if len(found) > 1 and all(map(math.isfinite, found)) else math.nan


def markdown(content: Mapping[str, Any]) -> str:
    """One row of all scores, then one row per class."""
    scores, per_class = content["scores"], content["per_class"]
    head = ["encoder", "protocol", *map(words_of, scores)]
    row = [str(content["encoder"]), str(content["protocol"]), *(shown(*score) for score in scores.items())]
    text = _table(head, [row])
    if per_class:
        names = list(next(iter(per_class.values())))
        rows = [
            [name, *(shown(measure, per_class[measure][name]) for measure in per_class)] for name in names
        ]
        text += "\n" + _table(["class", *map(words_of, per_class)], rows)
    counts = ", ".join(f"{number:,} {name.replace('_', ' ')}" for name, number in content["counts"].items())
    units = "\nScores in %" + ("; errors as they are.\n" if set(scores) & set(_AS_THEY_ARE) else ".\n")
    return text + (f"\n{counts}\n" if counts else "") + units


def draw_worst(folder: Path, scores: Scores, segmenter: Segmenter, data: Labelled) -> list[Path]:
    """Write the pictures of ``scores.worst`` into ``<folder>/pictures``, in place of earlier ones.

    Returns:
        The files: image, truth, prediction and errors side by side, named by class and image.
    """
    target = folder / PICTURES
    shutil.rmtree(target, ignore_errors=True)
    written = []
    for number, (name, place) in enumerate(scores.worst):
        batch = data.item("val", place)
        guess = segmenter.predict_labels(batch)
        drawn = comparison(batch.images[0].float() / 255, batch.labels[0], guess[0], data.classes)
        target.mkdir(parents=True, exist_ok=True)
        stem = Path(batch.names[0]).stem
        path = target / f"{number + 1:02d}_{_file_name(name)}_{_file_name(stem)}.png"
        path.write_bytes(png(drawn))
        written.append(path)
    return written


def comparison(image: Tensor, truth: Tensor, guess: Tensor, classes: ClassSet) -> Tensor:
    """Image, truth, prediction and errors side by side.

    Args:
        image: ``(3, H, W)`` in [0, 1].
        truth: ``(h, w)`` label values, 255 = ignore.
        guess: ``(h, w)`` classes.
        classes: for the colours.

    Returns:
        ``(3, h', w')`` in [0, 1].
    """
    colours = palette(classes.names)
    maps = [colour_labels(labels[None], colours) for labels in (truth, guess)]
    cells = [fit(part, _WIDTH)[0] for part in (image[None], *maps, errors(truth[None], guess[None]))]
    return sheet(cells, columns=2, paper=1.0)


def report_result(
    trainer: L.Trainer, model: Evaluation, data: L.LightningDataModule, about: dict[str, Any]
) -> dict[str, Any] | None:
    """Writes what an evaluation found into the run folder; on rank 0, which alone returns it."""
    scores = model.scores()
    if not trainer.is_global_zero:
        return None
    folder = Path(trainer.default_root_dir)
    content = write_result(folder, scores, {**about, "step": trainer.global_step})
    if scores.worst and isinstance(data, Labelled) and isinstance(model, Segmenter):
        model.to(trainer.strategy.root_device)  # from where validation's end has taken it
        draw_worst(folder, scores, model, data)
    value = content["value"]
    found = shown(scores.headline, value, digits=2, unit=" %")
    _log.info("%s: %s %s  (%s)", scores.protocol, found, scores.headline, folder / "result.md")
    return content


def read_result(folder: Path) -> dict[str, Any] | None:
    """The content of a run's ``result.json``, or None where there is none that can be read."""
    try:
        content = json.loads((folder / FILE_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) and "scores" in content else None


def words_of(measure: str) -> str:
    """A score's name as people write it."""
    if measure.startswith("miou_") and measure not in _WORDS:
        return f"mIoU, {measure.removeprefix('miou_')}"
    return _WORDS.get(measure, measure.replace("_", " "))


def shown(measure: str, value: float | None, digits: int = 1, unit: str = "") -> str:
    """A score as tables print it: a share in percent, an error as it is.

    Args:
        measure: its key.
        value: None or not finite: there is none.
        digits: of a percentage.
        unit: behind a percentage.
    """
    if value is None or not math.isfinite(value):
        return "–"
    return f"{value:.3f}" if measure in _AS_THEY_ARE else f"{100 * value:.{digits}f}{unit}"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [list(head), ["---"] * len(head), *map(list, rows)]
    return "".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |\n" for line in lines)


def _file_name(text: str) -> str:
    return "".join(letter if letter.isalnum() else "-" for letter in text)[:60]


def _plain(value: Any) -> Any:
    """JSON has no NaN: what was not measured is null."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value.item() if isinstance(value, torch.Tensor) else value


def _write(path: Path, text: str) -> None:
    part = path.with_name(f".{path.name}.part")
    part.write_text(text, encoding="utf-8")
    part.replace(path)

"""Average precision of boxes and masks, as COCO and LVIS count it.

The counting is faster-coco-eval's (``COCOeval`` in C++, imported only where it is needed). The means are made
here, from its precision at every overlap, recall, class and size. LVIS is federated: a detection of
a class counts only in images in which that class has been judged.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from poodle_lightning.data.coco_objects import mask_api
from poodle_lightning.data.label_files import Array

Kind = Literal["bbox", "segm"]
_SIZES = ("", "_small", "_medium", "_large")  # all, below 32² px, below 96² px, above
_FREQUENCIES = {"r": "rare", "c": "common", "f": "frequent"}
_AT = {"50": 0.5, "75": 0.75}


@dataclass(frozen=True)
class Precision:
    """Average precision, as fractions; NaN where nothing of the kind is there to be found.

    Args:
        means: ``ap`` (mean over overlaps 0.5, 0.55 … 0.95 and classes), ``ap50``, ``ap75``, ``ap_small``,
            ``ap_medium``, ``ap_large``; federated also ``ap_rare``, ``ap_common``, ``ap_frequent``.
        classes: ``ap`` of each class, in the order of their ids.
    """

    means: dict[str, float]
    classes: list[float]


def average_precision(
    truth: Mapping[str, Any],
    found: Sequence[Mapping[str, Any]],
    kind: Kind = "bbox",
    *,
    federated: bool = False,
    limit: int = 100,
) -> Precision:
    """Average precision of detections.

    Args:
        truth: COCO's or LVIS's plain data: ``images``, ``annotations``, ``categories``; left as it is.
        found: detections: ``image_id``, ``category_id``, ``score``, ``bbox`` (left, top, width, height) and
            for ``segm`` ``segmentation`` (run lengths).
        kind: boxes or masks.
        federated: LVIS's way.
        limit: detections that count per image and class, the best first; COCO 100, LVIS 300.

    Raises:
        UserError: faster-coco-eval is not installed.
    """
    mask_api()
    from faster_coco_eval import COCO, COCOeval_faster

    content = {name: [dict(one) for one in truth[name]] for name in ("images", "annotations", "categories")}
    for one in content["annotations"]:
        one.setdefault("iscrowd", 0)
    with contextlib.redirect_stdout(io.StringIO()):
        gold = COCO(content)
        guessed = _guesses(gold, found, kind)
        run = COCOeval_faster(
            gold, guessed, kind, lvis_style=federated, print_function=_silent, separate_eval=True
        )
        run.params.maxDets = [limit]
        run.evaluate()
        run.accumulate()
    # (overlaps, recalls, classes, sizes, limits); -1 where a class has no object of a size
    precision = np.asarray(run.eval["precision"], np.float64)[..., -1]
    precision = np.where(precision < 0, np.nan, precision)
    overlaps = np.asarray(run.params.iouThrs)
    means = {f"ap{name}": _mean(precision[..., number]) for number, name in enumerate(_SIZES)}
    for name, overlap in _AT.items():
        means[f"ap{name}"] = _mean(precision[np.isclose(overlaps, overlap), ..., 0])
    categories = sorted(content["categories"], key=lambda one: one["id"])
    if federated:
        for letter, name in _FREQUENCIES.items():
            of_kind = [number for number, one in enumerate(categories) if one["frequency"] == letter]
            means[f"ap_{name}"] = _mean(precision[:, :, of_kind, 0])
    order = ["ap", "ap50", "ap75", *(name for name in means if name not in ("ap", "ap50", "ap75"))]
    return Precision(
        {name: means[name] for name in order},
        [_mean(precision[:, :, number, 0]) for number in range(len(categories))],
    )


def _guesses(gold: Any, found: Sequence[Mapping[str, Any]], kind: Kind) -> Any:
    """Detections as the library wants them; the area of a mask is that of its pixels."""
    from faster_coco_eval import COCO

    rows = []
    for number, one in enumerate(found, start=1):
        row = {**one, "id": number, "iscrowd": 0}
        box = one["bbox"]
        row["area"] = (
            float(mask_api().area(one["segmentation"])) if kind == "segm" else float(box[2] * box[3])
        )
        rows.append(row)
    return COCO(
        {"images": gold.dataset["images"], "categories": gold.dataset["categories"], "annotations": rows}
    )


def _mean(values: Array) -> float:
    judged = values[~np.isnan(values)]
    return float(judged.mean()) if judged.size else float("nan")


def _silent(*_: Any) -> None:
    """The library says a line at every step."""

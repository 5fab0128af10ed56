"""The parts of the report. Each returns nothing when it has nothing to show."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F

from poodle_lightning.draw.boxes import frame_crops, outline
from poodle_lightning.draw.canvas import fit as fit_width
from poodle_lightning.draw.canvas import sheet
from poodle_lightning.draw.curves import Series, curves
from poodle_lightning.draw.flow import arrows, flow_colours, longest_of, visibility, wheel
from poodle_lightning.draw.pairs import Warped, difference, warp_pairs
from poodle_lightning.draw.pca import fit as fit_directions
from poodle_lightning.draw.segmentation import class_bars, colour_labels, palette
from poodle_lightning.report import evaluations, patches, points
from poodle_lightning.report.files import RunFiles, Skipped
from poodle_lightning.report.material import FeatureMaps, LabelReadout, Material
from poodle_lightning.report.page import (
    Section,
    beside,
    chips,
    facts,
    folded,
    grid,
    notice,
    page,
    picture,
    plot,
    table,
)
from poodle_lightning.types import Look

_HEALTH = {
    "std": ("spread (std·√d): 1 is spread out, 0 is one point", {"alarm below": 0.2}),
    "rankme": ("effective rank: directions in use", {}),
    "cosine": ("mean cosine between different features: 1 is one direction", {"alarm above": 0.95}),
}


def write_report(run: str | Path, material: Material | None = None, out: str | Path | None = None) -> Path:
    """Write the page of a run.

    Args:
        run: the run folder; missing files leave their parts out.
        material: pictures and readouts (``gather``); None shows the files alone.
        out: where the page goes; None is ``<run>/report/index.html``.

    Returns:
        The path of the page.
    """
    files, shown = RunFiles(Path(run)), material or Material()
    metrics = files.metrics()
    parts = (
        evaluations.result(files),
        loss(metrics),
        health(metrics),
        evaluations.probes(metrics),
        frames(shown.look, shown.held_out),
        *motion(shown.look),
        views(shown.look),
        subcrops(shown.look),
        points.pairs(shown.look),
        points.tracks(shown.look, shown.tracks),
        patches.crops(shown.look),
        points.pooling(shown.look),
        patches.hidden(shown.look),
        *patches.objects(shown.look),
        patches.attention(shown.attention),
        features(shown.features),
        readout(shown.readout),
        skipped(files.skipped()),
        speed(metrics),
        environment(files),
    )
    target = Path(out) if out is not None else files.folder / "report" / "index.html"
    target.parent.mkdir(parents=True, exist_ok=True)
    text = page(files.title, facts(summary(metrics, shown)), [part for part in parts if part is not None])
    partial_file = target.with_name(target.name + ".part")
    partial_file.write_text(text, encoding="utf-8")
    partial_file.replace(target)
    return target


def summary(metrics: dict[str, Series], shown: Material) -> dict[str, str]:
    """The few numbers at the top."""
    numbers: dict[str, str] = {}
    if shown.method:
        numbers["method"] = shown.method
    steps = [int(series[0][-1]) + 1 for series in metrics.values()]
    if shown.step is not None or steps:
        numbers["steps"] = f"{max(steps) if shown.step is None else shown.step:,}"
    for key, word in (("train/loss", "training loss"), ("val/loss", "held-out loss")):
        if key in metrics:
            numbers[word] = f"{metrics[key][1][-1]:.4g}"
    if shown.readout is not None:
        numbers["mIoU (untrained)"] = (
            f"{100 * shown.readout.trained.confusion.miou():.1f} % "
            f"({100 * shown.readout.untrained.confusion.miou():.1f} %)"
        )
    return numbers


def loss(metrics: dict[str, Series]) -> Section | None:
    """Loss curves, in total and by term."""
    plots = []
    for stage, word in (("train", "training clips"), ("val", "held-out clips")):
        terms = {
            key.removeprefix(f"{stage}/loss_"): series
            for key, series in metrics.items()
            if key.startswith(f"{stage}/loss_")
        }
        # the total of a single term is that term
        total = {"total": metrics[f"{stage}/loss"]} if f"{stage}/loss" in metrics and len(terms) != 1 else {}
        if series := total | terms:
            plots.append(plot(partial(curves, series), f"Loss on {word}"))
    if not plots:
        return None
    return Section("Loss", "How the loss and its terms moved during training.", grid(plots, 2, 1))


def health(metrics: dict[str, Series]) -> Section | None:
    """Whether the features stayed alive."""
    plots = []
    for measure, (caption, marks) in _HEALTH.items():
        ends = {key.split("/")[1]: series for key, series in metrics.items() if _is_health(key, measure)}
        if ends:
            plots.append(plot(partial(curves, ends, floor=0.0, marks=marks, size=(4.6, 2.8)), caption))
    if not plots:
        return None
    steps, collapsed = metrics.get("health/collapsed", ((), ()))
    alarms = [int(step) + 1 for step, value in zip(steps, collapsed, strict=True) if value]
    warning = notice(f"The features had collapsed by step {alarms[0]:,}.") if alarms else ""
    sentence = (
        "Whether the features stay spread out; a collapsed network gives the same feature for everything."
    )
    return Section("Health", sentence, warning + grid(plots, 3, 1))


def _is_health(key: str, measure: str) -> bool:
    parts = key.split("/")
    return len(parts) == 3 and parts[0] == "health" and parts[2] == measure


def frames(look: Look | None, held_out: bool = True) -> Section | None:
    """The pairs as they are, or clips of another length as rows."""
    if look is None:
        return None
    kind, length = "Held-out" if held_out else "Training", look.frames.shape[1]
    if length != 2:
        body = ""
        across = length if length > 1 else min(len(look.frames), 4)
        shown = fit_width(look.frames.flatten(0, 1), patches.cell(across)).unflatten(0, look.frames.shape[:2])
        for i, clip in enumerate(shown if length > 1 else shown[:, 0][None]):
            caption = f"clip {i + 1}, {length} frames" if length > 1 else f"{len(clip)} clips of one frame"
            body += patches.strip(list(clip), caption, across)
        sentence = f"{kind} clips, cut at the same place in all their frames, as the method gets them."
        return Section("Clips", sentence, body)
    cells = []
    for i, (first, second) in enumerate(look.frames):
        cells += [
            picture(first, f"pair {i + 1}, first frame"),
            picture(second, f"pair {i + 1}, second frame"),
        ]
    sentence = f"{kind} pairs of frames, cut at the same place, as the method gets them."
    return Section("Frame pairs", sentence, grid(cells, 2, 2))


def motion(look: Look | None) -> list[Section | None]:
    """Flow, and the second frame pulled onto the first by it."""
    if look is None or look.flow is None:
        return [None]
    count = len(look.frames)
    pixels = look.flow.to_pixels()[:count]
    longest = longest_of(pixels)
    step = max(8, look.flow.size[1] // 16)
    scale = max(1, 512 // look.flow.size[1])
    key = f"The hue is the direction; full colour is {longest:.1f} px or more, white stands still."
    cells = []
    for i, colours in enumerate(flow_colours(pixels, longest)):
        drawn = arrows(look.frames[i, 0], pixels[i], step, scale)
        cells += [
            picture(drawn, f"pair {i + 1}, motion to the second frame"),
            picture(colours, "the same as colours"),
        ]
    disc = beside(picture(wheel(160), ""), key)
    sentence = "Where every point of the first frame goes, as the optical flow says."
    moved = Section("Motion", sentence, grid(cells, 2, 2) + disc)
    return [moved, _warped(look, warp_pairs(look.frames, look.flow, look.visible))]


def _warped(look: Look, warped: Warped) -> Section:
    count = len(look.frames)
    hidden = visibility(warped.here, warped.seen)
    before = difference(warped.here, warped.there, warped.seen)
    after = difference(warped.here, warped.rebuilt, warped.seen)
    cells = []
    for i in range(count):
        share = 1.0 - float(warped.seen[i].float().mean())
        cells += [
            picture(hidden[i], f"pair {i + 1}, first frame; magenta: {share:.0%} not seen in the second"),
            picture(warped.rebuilt[i], "second frame pulled onto the first"),
            picture(before[i], "difference of the two frames"),
            picture(after[i], "difference after the warp"),
        ]
    raw, left = (255 * error for error in warped.error())
    sentence = (
        f"If the flow is right, the warped frame looks like the first one: over visible pixels the "
        f"difference falls from {raw:.1f} to {left:.1f} of 255, both directions."
    )
    return Section("Warped pairs", sentence, grid(cells, 4, 2))


def views(look: Look | None) -> Section | None:
    """The augmented images that the networks get."""
    if look is None or look.views is None:
        return None
    online, target = look.views
    cells = []
    for i in range(min(len(online.image), len(look.frames))):
        cells += [
            picture(online.image[i], f"pair {i + 1}, online view"),
            picture(target.image[i], "target view"),
        ]
    sentence = "What the two networks get after colour and geometry were changed at random."
    return Section("Augmented views", sentence, grid(cells, 2, 2))


def subcrops(look: Look | None) -> Section | None:
    """Subcrop pairs of the direction first → second."""
    if look is None or look.boxes is None:
        return None
    count = len(look.frames)
    per_image = len(look.boxes[0]) // (2 * count)
    rows = slice(0, count * per_image)
    scale = max(1, 512 // look.frames.shape[-1])
    same = torch.zeros(len(look.boxes[0]), dtype=torch.bool) if look.same is None else look.same
    here = outline(look.frames[:, 0], look.boxes[0][rows], scale)
    here = outline(here, look.boxes[1][rows], thickness=1, only=same[rows])
    there = outline(look.frames[:, 1], look.boxes[1][rows], scale, only=~same[rows])
    body = ""
    for i in range(count):
        cells = [picture(here[i], f"pair {i + 1}, first frame"), picture(there[i], "second frame")]
        body += grid(cells, 2, 2)
        if look.crops is not None:
            own = slice(i * per_image, (i + 1) * per_image)
            framed = [crop for side in look.crops for crop in frame_crops(fit_width(side[own], 96))]
            crops = picture(
                sheet(framed, per_image), "above: crops of the first frame; below: their partners", 1200
            )
            body += f'<div style="max-width:{7 * per_image}rem;margin-bottom:1.5rem">{crops}</div>'
    sentence = (
        "Small crops that should show the same thing in both frames; a pair has one colour. Where the motion "
        "leads out of the frame, both are cut from the first one (thin line)."
    )
    return Section("Subcrop pairs", sentence, body)


def features(maps: FeatureMaps | None, most: int = 4) -> Section | None:
    """Principal components of the deepest maps, trained beside untrained."""
    if maps is None:
        return None
    cells = []
    # by direction only, as the losses compare them: a few long features would else take the whole range
    directions = (F.normalize(found, dim=1) for found in (maps.trained, maps.untrained))
    colours = [fit_directions(found, cut=0.02).rgb(found) for found in directions]
    for image, trained, untrained in zip(maps.images[:most], *colours, strict=False):
        cells += [
            picture(image, "frame"),
            picture(trained, "trained"),
            picture(untrained, "same architecture, untrained"),
        ]
    sentence = (
        "The first three principal components of the deepest feature map as red, green and blue, fitted over "
        "all frames: what has one colour looks alike to the network."
    )
    return Section("Features", sentence, grid(cells, 3, 3))


def readout(found: LabelReadout | None) -> Section | None:
    """Scores of a linear readout, per class and in pictures."""
    if found is None:
        return None
    classes = found.trained.classes
    columns = {
        "trained": found.trained.confusion,
        "untrained": found.untrained.confusion,
        "position alone": found.prior,
    }
    rows = []
    scores = {name: confusion.summary(classes.numbered()) for name, confusion in columns.items()}
    words = {"miou": "mIoU", "miou_present": "mIoU, classes present", "pixel_accuracy": "pixel accuracy"}
    words |= {f"miou_{group}": f"mIoU, {group} classes" for group in classes.groups}
    for key, word in words.items():
        rows.append([word, *(_percent(score[key]) for score in scores.values())])
    present = [i for i, seen in enumerate(found.trained.confusion.truth) if seen]
    names = [classes.names[i] for i in present]
    values = {name: confusion.iou()[present].tolist() for name, confusion in columns.items()}
    bars = plot(partial(class_bars, names, values), "IoU per class that occurs in the test frames")
    colours = palette(classes.names)
    cells = []
    for image, truth, guess in zip(
        found.images,
        colour_labels(found.labels, colours),
        colour_labels(found.predictions, colours),
        strict=True,
    ):
        cells += [
            picture(image, "frame"),
            picture(truth, "labels"),
            picture(guess, "read from trained features"),
        ]
    sentence = (
        "How well one linear layer reads the labels from the frozen features, beside an untrained network of "
        "the same architecture and beside guessing from the position in the image "
        f"({found.trained.confusion.images} test frames)."
    )
    body = table(["", *columns], rows) + f'<div style="max-width:40rem">{bars}</div>' + grid(cells, 3, 3)
    body += chips({name: colours[i].tolist() for i, name in zip(present, names, strict=True)})
    return Section("Linear readout", sentence, body)


def _percent(value: float) -> str:
    return "–" if math.isnan(value) else f"{100 * value:.1f} %"


def skipped(found: Skipped) -> Section | None:
    """Videos that could not be used."""
    if not found:
        return None
    rows = []
    for reason in sorted(found.refused | found.replaced):
        path, detail = found.examples[reason]
        rows.append([reason, str(found.refused[reason]), str(found.replaced[reason]), path, detail])
    asked = f", of {found.requested:,} asked for" if found.requested else ""
    sentence = f"Videos that could not be used; {found.replaced.total():,} were replaced in training{asked}."
    head = ["reason", "refused before training", "replaced in training", "for example", "why"]
    return Section("Skipped videos", sentence, table(head, rows))


def speed(metrics: dict[str, Series]) -> Section | None:
    """Medians of what was measured."""
    rows = []
    for key, (_, values) in metrics.items():
        if key.startswith("perf/"):
            ordered = torch.tensor(values, dtype=torch.float64)
            rows.append(
                [key.removeprefix("perf/"), f"{float(ordered.median()):.4g}", f"{float(ordered.max()):.4g}"]
            )
    if not rows:
        return None
    return Section("Speed", "What was measured while training.", table(["", "median", "largest"], rows))


def environment(files: RunFiles) -> Section | None:
    """Versions, machine, and the configuration."""
    rows, config = files.environment(), files.config()
    if not rows and not config:
        return None
    body = table(["", ""], rows.items()) if rows else ""
    body += folded("config.yaml", config) if config else ""
    return Section("Environment", "With what this run was made, and how to make it again.", body)

"""``poodle-lightning compare``: methods trained alike on the same videos, read out alike, in one table."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import logging
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import poodle_lightning
from poodle_lightning.commands import _pretraining
from poodle_lightning.commands._pretraining import Start
from poodle_lightning.types import UserError

if TYPE_CHECKING:
    import lightning as L

    from poodle_lightning.commands import Build
    from poodle_lightning.commands._readings import Readings
    from poodle_lightning.commands._trials import Entrant, Plan, Trial
    from poodle_lightning.data.labelled import LabelledDataModule
    from poodle_lightning.methods.base import Method
    from poodle_lightning.report.comparison import Comparison, Row

NAME = "compare"
HELP = "train several methods alike on your videos, read them out alike, print one table"

_STEPS = {"tiny": 700, "small": 5000}
_TAKEN = {
    "--trainer.max_steps": "--steps",
    "--trainer.default_root_dir": "--out",
    "--trainer.callbacks": "nothing: the probes go there",
    "--seed_everything": "--seeds",
    "--model": "--methods",
    "--data": "--data.… for single settings",
}
_NOTES = (
    "Losses, views and heads are each method's own. Times depend on what else the machine does.",
    "Encoders without a decoder are dilated for the readout; multiply-adds are those of the trained network.",
    "Untrained: the same network with fresh weights. Position alone: the class most frequent at each pixel.",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command; any ``--data.…``, ``--model.…``, ``--trainer.…`` is for every run."""
    parser.set_defaults(overrides=[])
    parser.epilog = (
        "--data.root DIR, the folder of videos (or --data.source synthetic), is needed; any --data.…, "
        "--model.…, --trainer.… is for every run. Example: poodle-lightning compare --methods poodle,flowe "
        "--data.root my_videos/ --labelled my_labels/"
    )
    parser.add_argument(
        "--methods",
        default="poodle,flowe,byol",
        help="names by comma, also pooled and sdm; NAME+PATCH adds patch/PATCH.yaml (default: %(default)s)",
    )
    parser.add_argument(
        "--labelled",
        metavar="DIR|FILE",
        help="labelled images: a folder of images and masks, or a YAML such as data/labelled_cityscapes.yaml "
        "(default: generated streets)",
    )
    parser.add_argument("--labelled-root", metavar="DIR", help="the folder of the YAML's data set")
    parser.add_argument(
        "--labelled-images", type=int, default=300, help="most to learn readouts from (default: %(default)s)"
    )
    parser.add_argument("--size", choices=list(_STEPS), default="tiny", help="of networks and crops")
    parser.add_argument("--steps", type=int, help="optimiser steps per run (default: 700 tiny, 5000 small)")
    parser.add_argument("--seeds", type=int, default=3, help="runs per method (default: %(default)s)")
    parser.add_argument("--out", default="compare", help="folder of everything (default: %(default)s)")
    parser.add_argument("--jobs", type=int, default=1, help="runs side by side (default: %(default)s)")
    parser.add_argument("--threads", type=int, help="CPU threads per run (default: all, over the jobs)")


def run(args: argparse.Namespace, build: Build) -> int:
    """Train what is not trained, read out what is not read out, print the table.

    Raises:
        UserError: a method, folder or option does not exist, or a run failed; its log is named.
    """
    from poodle_lightning.commands._readings import Readings
    from poodle_lightning.commands._trials import Trial, digest, entrants, folder_content
    from poodle_lightning.report.comparison import explanation, table, write_comparison

    began = time.monotonic()
    logging.getLogger("lightning.fabric").setLevel(logging.WARNING)  # a line per seed and network
    _check(args)
    chosen = entrants(args.methods, args.size)
    plan = _plan(args)
    labels = _labels(plan, chosen[0], build)
    first = {entrant.name: Trial(plan, entrant, 0) for entrant in chosen}
    built = {name: build(trial.write_config(), args.overrides) for name, trial in first.items()}
    videos = next(iter(built.values()))[1]
    videos.prepare_data()
    videos.setup("fit")
    content = folder_content(getattr(videos, "root", None))
    trials = [Trial(plan, entrant, seed, content) for seed in range(args.seeds) for entrant in chosen]
    _say(began, f"labelled images: {args.labelled or 'generated streets, since --labelled is not given'}")
    _train(trials, args, began)
    device = _device()
    # other labels (a mask may change without its size), or another version, are other readouts
    marks = folder_content(labels.root, times=True)
    key = digest([plan.labels_key, labels.classes, marks, poodle_lightning.__version__])
    readings = Readings(
        plan.out / "readouts.json", key, labels, plan.resolution, args.labelled_images, device
    )
    methods = {name: method for name, (method, _) in built.items()}
    found = _gather(trials, methods, videos, readings, args)
    if readings.made:
        _say(began, f"read out {readings.made} networks and controls")
    pictures = _draw(plan.out, found)
    paths = write_comparison(plan.out, found)
    count = f"mean ± standard deviation over {args.seeds} seeds" if args.seeds > 1 else "one seed"
    print(f"\nmIoU in %, {plan.steps} steps, {count}\n\n{table(found)}\n\n{explanation(found)}\n")
    print("\n".join(str(path) for path in (*paths, *pictures)))
    return 0


# ---- before
def _check(args: argparse.Namespace) -> None:
    for name in ("seeds", "jobs", "labelled_images"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} {getattr(args, name)}: give 1 or more")
    for name in ("steps", "threads"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise UserError(f"--{name} {getattr(args, name)}: give 1 or more")
    known = [f"--{name.replace('_', '-')}" for name in vars(args) if name != "overrides"]
    for word in args.overrides:
        flag = word.partition("=")[0]
        if flag in _TAKEN:
            raise UserError(f"{flag} is the same for all runs and set by compare: use {_TAKEN[flag]}")
        if word.startswith("-") and not flag.startswith(("--data.", "--model.", "--trainer.")):
            near = difflib.get_close_matches(flag, known, n=1, cutoff=0.6)
            raise UserError(
                f"compare: no such option: {flag}" + (f": did you mean {near[0]}?" if near else "")
            )
    given = [word.partition("=")[0] for word in args.overrides]
    if "--data.root" not in given and "--data.source" not in given:
        raise UserError("compare needs videos: --data.root DIR (or --data.source synthetic)")


def _plan(args: argparse.Namespace) -> Plan:
    from poodle_lightning.commands._trials import SCALES, Plan, labelled_data

    scale = SCALES[args.size]
    few = max(1, args.labelled_images // 2)
    size = scale.resolution
    labelled = labelled_data(args.labelled, args.labelled_root, args.labelled_images, few, size)
    return Plan(
        out=Path(args.out),
        steps=args.steps or _STEPS[args.size],
        scale=scale,
        precision=_pretraining.fast_precision(),
        labelled=labelled,
        resolution=size,
        overrides=tuple(args.overrides),
    )


def _labels(plan: Plan, entrant: Entrant, build: Build) -> LabelledDataModule:
    """The labelled data, made by the same parser as in the runs.

    Raises:
        UserError: it is not there, or not as it should be.
    """
    import yaml

    from poodle_lightning.data.labelled import LabelledDataModule

    path = plan.out / "configs" / "labelled.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {"model": str(entrant.model), "data": dict(plan.labelled)}
    path.write_text("# Written by poodle-lightning compare.\n" + yaml.safe_dump(content), encoding="utf-8")
    try:
        _, labels = build([str(path)], [])
        labels.setup("fit")
    except UserError as error:
        # here the data module is not the one that --data is about
        raise UserError(str(error).replace("--data.root", "--labelled-root")) from error
    assert isinstance(labels, LabelledDataModule)
    return labels


def _device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


# ---- training
def _train(trials: Sequence[Trial], args: argparse.Namespace, began: float) -> None:
    missing = [trial for trial in trials if trial.finished() is None]
    done = len(trials) - len(missing)
    _say(
        began,
        f"{len(trials)} runs: {done} finished, {len(missing)} to train, {trials[0].plan.steps} steps each",
    )
    shown = args.jobs == 1
    starts = [
        Start(trial.name, trial.words(), None if shown else trial.plan.out / "logs" / f"{trial.name}.log")
        for trial in missing
    ]
    threads = args.threads or _pretraining.threads_each(args.jobs)

    def ended(start: Start, well: bool) -> None:
        _say(began, f"{start.name}: {'done' if well else 'failed'}")

    failed = _pretraining.side_by_side(starts, threads, args.jobs, ended)
    if failed:
        where = failed[0].log or "the messages above"
        others = f" (and {len(failed) - 1} others)" if len(failed) > 1 else ""
        raise UserError(
            f"training {failed[0].name} failed{others}: see {where}; the same command goes on from there"
        )


# ---- after
def _gather(
    trials: Sequence[Trial],
    methods: Mapping[str, L.LightningModule],
    videos: L.LightningDataModule,
    readings: Readings,
    args: argparse.Namespace,
) -> Comparison:
    from poodle_lightning.report.comparison import Comparison, Row, split_facts

    plan = trials[0].plan
    by_name = {name: [trial for trial in trials if trial.entrant.name == name] for name in methods}
    rows = [_trained(name, by_name[name], methods[name], readings, videos) for name in methods]
    rows += _untrained(methods, readings, plan, args.seeds)
    prior = {measure: [value] for measure, value in readings.of_position().items()}
    rows.append(Row("position alone", "position", prior))
    facts = {name: _facts(method) for name, method in methods.items()}
    equal, different = split_facts(facts)
    curves = {
        name: {measure: {trial.seed: trial.curve(measure) for trial in own} for measure in readings.measures}
        for name, own in by_name.items()
    }
    return Comparison(
        rows=rows,
        equal=_shared(plan, videos) | equal,
        different=different,
        seeds=list(range(args.seeds)),
        curves=curves,
        notes=_NOTES,
    )


def _trained(
    name: str, trials: Sequence[Trial], method: Any, readings: Readings, videos: L.LightningDataModule
) -> Row:
    from poodle_lightning.analysis.flops import trainable_parameters
    from poodle_lightning.hub import from_pretrained
    from poodle_lightning.report.comparison import Row

    found = []
    for trial in trials:
        checkpoint = trial.finished()
        if checkpoint is None:
            raise UserError(f"{trial.name} ended before its last step: see {trial.folder}/train.log")
        found.append(readings.of(trial.name, partial(from_pretrained, checkpoint)))
    return Row(
        name,
        "trained",
        {measure: [scores[measure] for scores in found] for measure in readings.measures},
        [trial.seconds(getattr(videos, "batch_size", 1)) for trial in trials],
        trainable_parameters(method),
        _cost(method, trials[0].plan),
    )


def _cost(method: Method, plan: Plan) -> int:
    from poodle_lightning.analysis.flops import multiply_adds

    return multiply_adds(method.backbone().eval(), 1, 3, *plan.resolution)


def _untrained(methods: Mapping[str, Any], readings: Readings, plan: Plan, seeds: int) -> list[Row]:
    """A control per architecture; methods with the same one share it."""
    from poodle_lightning.commands._trials import digest
    from poodle_lightning.configured import spec
    from poodle_lightning.evaluation.linear_readout import same_architecture_random
    from poodle_lightning.report.comparison import Row

    alike: dict[str, list[str]] = {}
    for name, method in methods.items():
        alike.setdefault(digest(spec(method.backbone())), []).append(name)
    rows = []
    for kind, names in alike.items():
        found = []
        for seed in range(seeds):
            make = partial(same_architecture_random, methods[names[0]].backbone(), seed)
            found.append(readings.of(f"untrained {kind} seed {seed}", make))
        scores = {measure: [one[measure] for one in found] for measure in readings.measures}
        cost = _cost(methods[names[0]], plan)
        rows.append(Row(f"untrained, as {', '.join(names)}", "untrained", scores, multiply_adds=cost))
    return rows


def _facts(method: Any) -> dict[str, Any]:
    """What of a method may be equal to that of another."""
    from poodle_lightning.commands._readings import as_read
    from poodle_lightning.configured import spec

    encoder, backbone = method.online.encoder, as_read(method.backbone())
    layer = next(reversed(backbone.channels))
    decoder = method.online.decoder
    facts = {f"recipe.{key}": value for key, value in dataclasses.asdict(method.recipe).items()}
    facts |= {f"encoder.{key}": value for key, value in spec(encoder)["init_args"].items()}
    facts |= {
        "encoder": type(encoder).__name__,
        "decoder": None if decoder is None else type(decoder).__name__,
        "map that is read": layer,
        "its channels": backbone.channels[layer],
        "its stride": backbone.strides[layer],
    }
    return facts


def _shared(plan: Plan, videos: Any) -> dict[str, Any]:
    """What is the same for all runs by construction."""
    height, width = getattr(videos, "size", ("?", "?"))
    count, place = len(getattr(videos, "train_entries", [])), getattr(videos, "root", None)
    facts = {
        "videos": f"{count} of {place or 'generated streets'}",
        "clips and their order": "by the seed",
        "crops": f"{height}×{width}",
        "pairs per step": getattr(videos, "batch_size", "?"),
        "steps": plan.steps,
        "labelled images of": f"{plan.resolution[0]}×{plan.resolution[1]}",
        "precision": plan.precision,
    }
    return facts | ({"options": " ".join(plan.overrides)} if plan.overrides else {})


def _draw(folder: Path, found: Comparison) -> list[Path]:
    """Bars of the scores; learning curves where every run has two probes or more."""
    from poodle_lightning.draw.canvas import figure_png
    from poodle_lightning.draw.comparison import seed_bars, seed_curves

    names = [row.name for row in found.rows]
    measures = {"linear readout": "linear_miou", "dense k-NN": "knn_miou"}
    values = {word: [row.scores.get(key, ()) for row in found.rows] for word, key in measures.items()}
    drawn = {"comparison.png": seed_bars(names, values)}
    runs = {name: list(each["linear_miou"].values()) for name, each in found.curves.items()}
    (folder / "curves.png").unlink(missing_ok=True)
    if all(len(steps) > 1 for seeds in runs.values() for steps, _ in seeds):
        drawn["curves.png"] = seed_curves(runs, label="probe, linear readout, mIoU in %")
    for name, picture in drawn.items():
        (folder / name).write_bytes(figure_png(picture))
    return [folder / name for name in drawn]


def _say(began: float, text: str) -> None:
    print(f"[{time.monotonic() - began:4.0f} s] {text}", flush=True)

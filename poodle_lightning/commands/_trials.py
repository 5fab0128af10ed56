"""What ``compare`` trains: methods by name, with patches, once per seed; and how far each run has come."""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

import poodle_lightning
from poodle_lightning import recipes, runs
from poodle_lightning.callbacks.checkpoints import read_checkpoint, write_atomically
from poodle_lightning.ops.geometry import Size
from poodle_lightning.report import RunFiles
from poodle_lightning.types import UserError

ALIASES = {"pooled": "poodle+pooled_alone", "sdm": "poodle+row5_dense_sdm"}
"""Short names of variants."""
_LABELLED = "poodle_lightning.data.labelled.LabelledDataModule"


@dataclass(frozen=True)
class Scale:
    """A size of networks and images that goes with a set of method files.

    Args:
        data: the file of the videos' settings.
        resolution: of the labelled images.
        repeats: passes over the videos per epoch, so that few videos do not make epochs of one batch.
    """

    data: str
    resolution: Size
    repeats: int


SCALES = {
    "tiny": Scale("data/demo.yaml", (96, 192), 50),
    "small": Scale("data/folder.yaml", (192, 384), 50),
}


@dataclass(frozen=True)
class Entrant:
    """A method in the comparison.

    Args:
        name: as the user gave it.
        model: the method's file.
        patches: files on top of it.
    """

    name: str
    model: Path
    patches: tuple[Path, ...] = ()


def entrants(names: str, size: str) -> list[Entrant]:
    """The methods of ``poodle,flowe+patch,…``.

    Args:
        names: separated by commas; ``NAME+PATCH`` is a method with ``patch/PATCH.yaml`` on top.
        size: ``tiny`` or ``small``.

    Raises:
        UserError: there is no such method or patch, or one is named twice.
    """
    given = [name.strip() for name in names.split(",") if name.strip()]
    if not given:
        raise UserError("--methods: name at least one, e.g. --methods poodle,flowe,byol")
    if len(set(given)) < len(given):
        raise UserError(f"--methods {names}: each method once")
    return [_entrant(name, size) for name in given]


def _entrant(name: str, size: str) -> Entrant:
    method, *patches = ALIASES.get(name, name).split("+")
    ending = f"_{size}.yaml"
    files = recipes.shipped("method")
    known = {Path(key).name.removesuffix(ending): path for key, path in files.items() if key.endswith(ending)}
    if method not in known:
        words = sorted({*known, *ALIASES})
        near = difflib.get_close_matches(method, words, n=1, cutoff=0.6)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(words)}"
        raise UserError(f"--methods: no method {method!r} of size {size}: {hint}")
    return Entrant(name, known[method], tuple(recipes.find(f"patch/{patch}.yaml") for patch in patches))


@dataclass(frozen=True)
class Plan:
    """What is the same for all runs of a comparison.

    Args:
        out: folder of everything.
        steps: optimiser steps of each run.
        scale: of the networks.
        precision: ``trainer.precision``.
        labelled: the labelled data as ``{"class_path", "init_args"}``.
        resolution: height and width of the labelled images.
        overrides: words of the user for all runs.
    """

    out: Path
    steps: int
    scale: Scale
    precision: str
    labelled: Mapping[str, Any]
    resolution: Size
    overrides: Sequence[str] = ()

    @property
    def root(self) -> Path:
        """Folder of the runs."""
        return self.out / "runs"

    def experiment(self, entrant: Entrant, seed: int) -> dict[str, Any]:
        """The configuration of a run, but for its probes and the folder it writes to."""
        steps = self.steps
        model = yaml.safe_load(entrant.model.read_text(encoding="utf-8"))
        # every method's schedule is that of this comparison, whatever its own file says
        warmup = min(model["init_args"]["recipe"].get("warmup_steps") or 0, steps // 10)
        model["init_args"]["recipe"] |= {"horizon_steps": steps, "warmup_steps": warmup}
        data = yaml.safe_load(recipes.find(self.scale.data).read_text(encoding="utf-8"))
        data["init_args"]["repeats"] = self.scale.repeats
        trainer = {
            "accelerator": "auto",
            "devices": 1,
            "max_steps": steps,
            "precision": self.precision,
            "log_every_n_steps": max(1, min(10, steps // 20)),
            "limit_val_batches": 0,  # nothing is chosen by the loss on held-out clips
        }
        checkpoint = {"every_n_steps": max(1, min(500, steps // 2))}
        return {
            "seed_everything": seed,
            "model": model,
            "data": data,
            "trainer": trainer,
            "checkpoint": checkpoint,
        }

    def probes(self) -> dict[str, Any]:
        """The probes of every run, as an entry of ``trainer.callbacks``."""
        arguments = {
            "labels": dict(self.labelled),
            "name": self.probe,
            "every_n_steps": -(-self.steps // 4),
            "size": list(self.resolution),
            "train_images": 64,
            "test_images": 32,
        }
        return {"class_path": "poodle_lightning.callbacks.probes.Probes", "init_args": arguments}

    @property
    def labels_key(self) -> str:
        """Names the labelled images in the notes: other images, other readouts."""
        return digest([self.labelled, self.resolution])

    @property
    def probe(self) -> str:
        """Name of the probes in the logs: curves on other labels are other curves."""
        return f"labels_{self.labels_key}"


@dataclass(frozen=True)
class Trial:
    """A run of one method with one seed.

    Args:
        plan: of the comparison.
        entrant: which method.
        seed: of weights, order and draws.
        content: of the videos' folder, so that other videos are another run.
    """

    plan: Plan
    entrant: Entrant
    seed: int
    content: str = ""
    name: str = field(init=False)

    def __post_init__(self) -> None:
        patches = [path.read_text(encoding="utf-8") for path in self.entrant.patches]
        parts = [self.plan.experiment(self.entrant, self.seed), patches, list(self.plan.overrides)]
        identity = digest([*parts, self.content, poodle_lightning.__version__])
        # the name says what was trained: what is changed starts anew and leaves what there is
        object.__setattr__(self, "name", f"{self.entrant.name}_seed{self.seed}_{identity}")

    @property
    def config(self) -> Path:
        """The configuration file of the run."""
        return self.plan.out / "configs" / f"{self.name}.yaml"

    def write_config(self) -> list[str]:
        """Write the configuration; returns the configuration files of the run, in order."""
        content = self.plan.experiment(self.entrant, self.seed)
        content["name"] = self.name
        content["trainer"] |= {
            "default_root_dir": str(self.plan.root),
            "callbacks": [self.plan.probes()],
        }
        text = "# Written by poodle-lightning compare.\n" + yaml.safe_dump(content, sort_keys=False)
        write_atomically(self.config, lambda part: _write(part, text))
        return [str(self.config), *map(str, self.entrant.patches)]

    def words(self) -> list[str]:
        """Words after ``poodle-lightning fit``; a run that broke off goes on."""
        configs = [word for path in self.write_config() for word in ("--config", path)]
        go_on = ["--ckpt_path", "last"] if self.folder is not None else []
        return [*configs, *self.plan.overrides, *go_on]

    @property
    def folder(self) -> Path | None:
        """The newest folder of the run, or None where it was never started."""
        found = runs.folders(self.plan.root / self.name)
        return found[-1] if found else None

    def finished(self) -> Path | None:
        """The checkpoint of the last step, or None while the run is not at its end."""
        found = None if self.folder is None else runs.newest_checkpoint(self.folder)
        if found is None or int(read_checkpoint(found).get("global_step", 0)) < self.plan.steps:
            return None
        return found

    def curve(self, measure: str) -> tuple[list[float], list[float]]:
        """Steps and values of a probe, e.g. ``linear_miou``."""
        if self.folder is None:
            return [], []
        steps, values = RunFiles(self.folder).metrics().get(f"probe/{self.plan.probe}/{measure}", ((), ()))
        return [step + 1 for step in steps], list(values)  # logs count steps from 0

    def seconds(self, batch: int) -> float | None:
        """Time of all steps at the run's median speed: starting, probing and interruptions are left out."""
        metrics = {} if self.folder is None else RunFiles(self.folder).metrics()
        speeds = sorted(metrics.get("perf/pairs_per_s", ((), ()))[1])
        return self.plan.steps * batch / speeds[len(speeds) // 2] if speeds else None


def labelled_data(given: str | None, root: str | None, train: int, test: int, size: Size) -> dict[str, Any]:
    """The labelled data that ``--labelled`` means, as ``{"class_path", "init_args"}``.

    Args:
        given: a folder, a configuration file of labelled data, or None for generated streets.
        root: replaces ``root`` in the configuration file.
        train: generated streets to learn from.
        test: generated streets to score.
        size: of generated streets.

    Raises:
        UserError: neither a folder nor a configuration of labelled data.
    """
    if given is None:
        streets = {"train": train, "val": test, "size": list(size)}
        return {"class_path": _LABELLED, "init_args": {"source": "synthetic", "synthetic": streets}}
    if not given.endswith((".yaml", ".yml")):
        if not Path(given).is_dir():
            raise UserError(f"--labelled {given}: no such folder (nor a .yaml file of labelled data)")
        return {"class_path": _LABELLED, "init_args": {"source": "folder", "root": given}}
    path = recipes.find(given)
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    if not isinstance(content, dict) or not str(content.get("class_path", "")).endswith("LabelledDataModule"):
        raise UserError(f"--labelled {given}: not labelled data (class_path: {_LABELLED})")
    arguments = dict(content.get("init_args") or {}) | ({"root": root} if root else {})
    if arguments.get("root") is None and arguments.get("source", "folder") != "synthetic":
        raise UserError(f"--labelled {given} names no folder: give --labelled-root DIR")
    return {"class_path": _LABELLED, "init_args": arguments}


def digest(content: Any) -> str:
    """Eight letters that stand for plain data."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()[:8]


def folder_content(root: str | None, times: bool = False) -> str:
    """Stands for the names and sizes of a folder's files, with ``times`` also for when they were changed."""
    if root is None or not Path(root).is_dir():
        return ""
    files = sorted(path for path in Path(root).rglob("*") if path.is_file())
    facts = [(path, path.stat()) for path in files]
    return digest(
        [
            (path.relative_to(root).as_posix(), fact.st_size, times and fact.st_mtime_ns)
            for path, fact in facts
        ]
    )


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")

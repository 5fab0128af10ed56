"""Runs: each is one line of a file, found there again instead of being repeated."""

from __future__ import annotations

import hashlib
import json
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from benchmarks.street import readouts, streets, training
from benchmarks.street.settings import Setting

Line = dict[str, Any]


@dataclass(frozen=True)
class Job:
    """One run.

    Args:
        method: one of ``METHODS``, "random" or "position".
        setting: all numbers.
        seed: of weights, order and draws.
        split: "val" while settings are chosen, "test" in the end.
        note: why it was made.
    """

    method: str
    setting: Setting
    seed: int
    split: str
    note: str = ""

    @property
    def name(self) -> str:
        """Method, seed, split and a hash of the numbers."""
        plain = json.dumps(self.setting.plain(), sort_keys=True).encode()
        digest = hashlib.sha256(plain).hexdigest()[:10]
        return f"{self.method}-{self.seed}-{self.split}-{digest}"


def finished(out: Path) -> dict[str, Line]:
    """The runs in the folder's file, by name, in the order in which they ended."""
    path = out / "runs.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return {line["name"]: line for line in map(json.loads, lines)}


def run_all(jobs: list[Job], out: Path, processes: int, device: str) -> list[Line]:
    """The lines of the jobs, in their order; those that are not in the file are run now."""
    known = finished(out)
    missing = [job for job in jobs if job.name not in known]
    for job in missing[:1]:  # data is made once, before the processes start
        prepare(job.setting, [j.split for j in missing], out, processes)
    if processes <= 1:
        for job in missing:
            known[job.name] = _note(run(job, out, device), out)
    else:
        pool = ProcessPoolExecutor(processes, get_context("spawn"), initializer=_one_thread)
        with pool:
            for done in as_completed([pool.submit(run, job, out, device) for job in missing]):
                line = done.result()
                known[line["name"]] = _note(line, out)
    return [known[job.name] for job in jobs]


def prepare(setting: Setting, splits: list[str], out: Path, workers: int) -> None:
    """Make all data that is not there yet."""
    streets.pairs(setting, out / "data", workers)
    for part in ("readout", *sorted(set(splits))):
        streets.labelled(setting, part, out / "data", workers)


def run(job: Job, out: Path, device: str) -> Line:
    """Train, read out, keep the weights."""
    on = torch.device(device)
    fit = streets.labelled(job.setting, "readout", out / "data", 1)
    test = streets.labelled(job.setting, job.split, out / "data", 1)
    line: Line = {"name": job.name, "method": job.method, "seed": job.seed, "split": job.split}
    line |= {"note": job.note, "setting": job.setting.plain(), "device": device}
    if job.method == "position":
        return line | readouts.place_alone(fit, test)
    if job.method.startswith("random"):
        like = training.method(job.method.removeprefix("random "), job.setting, job.seed)
        encoder = readouts.untrained(readouts.readable(like, job.setting), job.seed).to(on)
        line |= readouts.scores(encoder, fit, test, job.setting)
        return line | readouts.signs(encoder, test[0][:100])
    learner = training.method(job.method, job.setting, job.seed)
    cost = training.costs(learner, job.setting)
    data = streets.on(streets.pairs(job.setting, out / "data", 1), on)
    trained = training.train(learner, data, job.setting, job.seed, on)
    encoder = readouts.readable(trained.method, job.setting)
    line |= readouts.scores(encoder, fit, test, job.setting)
    line |= readouts.signs(encoder, test[0][:100])
    if job.method in ("poodle", "sdm_only"):
        alone = readouts.dilated(encoder.encoder, job.setting)  # type: ignore[arg-type]
        line["encoder_alone"] = readouts.scores(alone, fit, test, job.setting)
    line |= {key: round(value, 4) for key, value in cost.items()}
    line |= {"wall_seconds": round(trained.wall, 1), "cpu_seconds": round(trained.cpu, 1)}
    line["curve"] = trained.curve
    _save(trained.method, out / "weights" / f"{job.name}.pt")
    return line


def network(job: Job, out: Path) -> Any:
    """The readable network of a finished run, from its weights."""
    learner = training.method(job.method, job.setting, job.seed)
    learner.load_state_dict(torch.load(out / "weights" / f"{job.name}.pt", weights_only=True))
    return readouts.readable(learner.eval(), job.setting)


def _save(learner: torch.nn.Module, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({key: value.cpu() for key, value in learner.state_dict().items()}, path)


def _note(line: Line, out: Path) -> Line:
    out.mkdir(parents=True, exist_ok=True)
    with (out / "runs.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")
    shown = "  ".join(f"{group} {line[group]:.1f}" for group in readouts.GROUPS)
    print(f"{line['name']:<44}{shown}  {line.get('wall_seconds', 0):.0f} s  {line['note']}", flush=True)
    return line


def _one_thread() -> None:
    torch.set_num_threads(1)

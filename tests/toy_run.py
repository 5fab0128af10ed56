"""A working folder with a toy experiment, and shortcuts to run it and to read what it wrote."""

from __future__ import annotations

import csv
from pathlib import Path

import torch

from poodle_lightning import cli

FILES = {
    "experiment/toy.yaml": """
# A toy, for tests
trainer: {accelerator: cpu, max_epochs: 2, log_every_n_steps: 1, enable_model_summary: false}
model: ../method/toy.yaml
data: ../data/numbers.yaml
""",
    "method/toy.yaml": """
class_path: stand_in.Toy
init_args:
  trunk: ../trunk/deep.yaml
  rule: {rate: 0.01}
""",
    "trunk/deep.yaml": "class_path: stand_in.DeepTrunk\ninit_args: {width: 5}\n",
    "data/numbers.yaml": "class_path: stand_in.ToyData\n",
    "patch/wide.yaml": "model: {init_args: {trunk: {init_args: {width: 7}}}}\n",
}


def make_configs(folder):
    """Writes the configurations into ``folder/cfg``."""
    for name, text in FILES.items():
        path = folder / "cfg" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text.lstrip("\n"))


def run(verb, *words):
    return cli.main([verb, "--config", "cfg/experiment/toy.yaml", "--allow", "stand_in", *words])


def runs_of(name="toy"):
    return sorted(Path("runs", name).iterdir())


def rows(run_folder):
    with (run_folder / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def weights(path):
    return torch.load(path, weights_only=True)["state_dict"]

"""The words of the command line: which are configurations, which are overrides, what the verbs are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import NoReturn

from poodle_lightning import recipes

TRAINING = {
    "fit": "train, or go on with --ckpt_path last",
    "validate": "loss and health on held-out clips",
    "test": "the test loop of a model that has one",
    "predict": "the predict loop of a model that has one",
    "evaluate": "train a readout on an encoder, if the protocol has one, and score it",
}


@dataclass
class Request:
    """A command line's words, sorted.

    Args:
        words: for the parser; configuration files first, by full path.
        name: of the experiment, where nothing else names it.
        allow: packages that configurations may name classes of.
    """

    words: list[str]
    name: str = "run"
    allow: list[str] = field(default_factory=list)


def read_words(words: Sequence[str]) -> Request:
    """Finds configuration files by name, and puts them before the overrides whatever the order.

    Raises:
        UserError: a file is not found, or a word is missing.
    """
    configs: list[Path] = []
    allow: list[str] = []
    rest: list[str] = []
    model = None
    waiting = iter(words)
    for word in waiting:
        flag, equals, value = word.partition("=")
        if flag in ("--config", "-c", "--allow"):
            value = value if equals else next(waiting, "")
            if not value or value.startswith("--"):
                _refuse(f"{flag} needs a value")
            if flag == "--allow":
                allow += [name for name in value.split(",") if name]
            else:
                configs.append(recipes.find(value))
            continue
        if flag in ("--model", "--data", "--trainer"):
            value = value if equals else next(waiting, "")
            model = value if flag == "--model" else model
            # a fragment by its shipped name, e.g. --trainer trainer/cpu.yaml
            rest += [flag, str(recipes.find(value)) if value.endswith((".yaml", ".yml")) else value]
            continue
        rest.append(word)
    plain = Path(model or "run")
    named = plain.stem if plain.suffix in (".yaml", ".yml") else plain.name.rsplit(".", 1)[-1]
    name = "+".join(path.stem for path in configs) or named
    front = [word for path in configs for word in ("--config", str(path))]
    return Request(front + rest, name, allow)


@dataclass
class EvaluationRequest:
    """What ``evaluate`` is asked for.

    Args:
        request: the words of ``fit`` that do it.
        runs: how often, with different seeds.
        check: read all held-out labels first.
    """

    request: Request
    runs: int = 1
    check: bool = True


def read_evaluation(words: Sequence[str]) -> EvaluationRequest:
    """The words of ``evaluate`` as those of ``fit``: ``--encoder X`` is ``--model.encoder X``.

    Raises:
        UserError: ``--runs`` is no number above 0, or see :func:`read_words`.
    """
    count, check, encoder = 1, True, ""
    rest: list[str] = []
    waiting = iter(words)
    for word in waiting:
        flag, equals, value = word.partition("=")
        if word == "--skip-check":
            check = False
        elif flag in ("--encoder", "--runs"):
            value = value if equals else next(waiting, "")
            if not value or value.startswith("--"):
                _refuse(f"{flag} needs a value")
            if flag == "--encoder":
                encoder = value
                rest.append(f"--model.encoder={value}")
            elif value.isdigit() and int(value) > 0:
                count = int(value)
            else:
                _refuse(f"--runs {value}: give a number of runs, 1 or more")
        else:
            near = get_close_matches(flag, ("--encoder", "--runs", "--skip-check"), 1, 0.8)
            if near and flag.startswith("--"):
                _refuse(f"no such option: {flag}: did you mean {near[0]}?")
            rest.append(word)
    if not any(word.partition("=")[0] in ("--config", "-c", "--model") for word in rest):
        _refuse("evaluate needs a protocol: --config evaluation/NAME.yaml (evaluate --help lists them)")
    request = read_words(rest)
    if encoder:  # runs of different encoders are different experiments
        request.name += "-" + _file_name(encoder)
    return EvaluationRequest(request, count, check)


def _file_name(encoder: str) -> str:
    """An encoder's name in that of a folder: the last two parts of a path, what is odd replaced."""
    path = Path(encoder)
    parts = [part for part in path.parts if part not in ("/", ".", "..", "checkpoints")][-2:]
    text = "-".join(parts).removesuffix(path.suffix if path.suffix in (".ckpt", ".pth", ".pt") else "")
    return "".join(letter if letter.isalnum() or letter in "._" else "-" for letter in text)[:80]


def usage(others: Mapping[str, str]) -> str:
    """The list of verbs; ``others`` are those that do not train, with their help."""
    lines = ["usage: poodle-lightning VERB [options]      (poodle-lightning VERB --help for the options)", ""]
    rows = [*TRAINING.items(), *others.items()]
    lines += [f"  {verb:<16} {text}" for verb, text in rows]
    lines += [
        "",
        "  --config FILE    a configuration; repeat it to layer files (`list` shows the shipped ones)",
        "  --allow NAME     let configurations name classes of your own package NAME (also from this folder)",
        "  --debug          show the traceback of an error",
        "",
        "  poodle-lightning fit --config experiment/quickstart.yaml --data.root my_videos/",
        "  poodle-lightning evaluate --config evaluation/quick_linear.yaml --encoder RUN --data.root labels/",
    ]
    return "\n".join(lines)


def evaluate_usage() -> str:
    """How to evaluate, and which protocols there are."""
    rows = [(name, recipes.headline(path)) for name, path in recipes.shipped("evaluation").items()]
    width = max((len(name) for name, _ in rows), default=0)
    lines = [
        "usage: poodle-lightning evaluate --config PROTOCOL --encoder ENCODER [--data.root DIR] [options]",
        "",
        "  --encoder ENCODER  a run folder or checkpoint, an exported folder, owner/name on the hub,",
        "                     torchvision:NAME[:WEIGHTS], timm:NAME, or another project's checkpoint file",
        "  --runs N           N runs that differ in their seed: mean and deviation (default: 1)",
        "  --skip-check       do not look through all masks first (check-data does the same)",
        "  any option of fit, e.g. --trainer.devices 4, --data.num_workers 8, --model.layer layer4",
        "",
        "Writes result.json, result.md and, of some, pictures/ into the run folder. Protocols:",
        "",
        *(f"  {name:<{width}}  {text}" for name, text in rows),
    ]
    return "\n".join(lines)


def _refuse(message: str) -> NoReturn:
    from poodle_lightning.types import UserError  # only a mistake needs the heavy imports

    raise UserError(message)

"""``poodle-lightning``: the verbs, their words, and errors in one line. Heavy imports wait until needed."""

from __future__ import annotations

import argparse
import importlib
import logging
import os
import pkgutil
import re
import select
import sys
import traceback
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import poodle_lightning
from poodle_lightning import commands
from poodle_lightning.words import TRAINING, evaluate_usage, read_evaluation, read_words, usage

if TYPE_CHECKING:
    import lightning as L

# Whose classes a configuration may name. Importing a module runs it, so nothing else is imported for a
# `class_path`; torch and lightning as a whole reach functions that run code, hence only parts of them.
ALLOWED = [
    "poodle_lightning",
    *(f"lightning.pytorch.{part}" for part in ("callbacks", "loggers", "profilers", "strategies", "plugins")),
    *("lightning.pytorch.accelerators", "lightning.fabric.plugins", "lightning.pytorch.demos.boring_classes"),
    "datetime.timedelta",
]
_CLASSES = ("methods", "flow", "nn", "augment", "data", "evaluation", "callbacks")
# Said by Lightning and jsonargparse about each other at every start.
_NOISE = [
    r"`torch\.distributed\.\w+` is deprecated.*",  # the older names serve older versions too
    r".*deprecated (in|since) v4\..* will be removed in v5\..*",
    r".*instantiate_subclass_spec_in_any.*",
    r".*isinstance\(treespec, LeafSpec\).* is deprecated.*",
    r"Checkpoint directory .* exists and is not empty.*",  # going on in a run's folder is meant
    r"Found \d+ module\(s\) in eval mode at the start of training.*",  # a frozen encoder is meant to be
]
# Gloo's and NCCL's words for a process that is not there any more.
_PEER_GONE = re.compile(r"Connection (closed|reset) by peer|remote process exited", re.IGNORECASE)
_log = logging.getLogger("poodle_lightning")


def main(args: list[str] | None = None) -> int:
    """Runs a command line.

    Args:
        args: the words after the program's name; None takes them from the system.

    Returns:
        Exit code: 0 done, 1 unexpected error (with traceback), 2 something the user can mend (one line),
        128 + n stopped by signal n after leaving a checkpoint.
    """
    words = list(sys.argv[1:] if args is None else args)
    debug = "--debug" in words
    words = [word for word in words if word != "--debug"]
    with ExitStack() as stack:
        stack.enter_context(_speaking())
        try:
            code = _dispatch(words, stack)
            sys.stdout.flush()
            return code
        except BaseException as error:
            return 141 if _nobody_reads(error) else _explain(error, debug)


def build(
    configs: Sequence[str | Path], overrides: Sequence[str] = ()
) -> tuple[L.LightningModule, L.LightningDataModule]:
    """Model and data module of configuration files, for notebooks and commands; nothing is run or written.

    Args:
        configs: files by path or shipped name, later ones over earlier ones.
        overrides: as on the command line, e.g. ``["--data.root", "videos/"]`` or ``["--data.root=videos/"]``.

    Raises:
        UserError: something in them is wrong.
    """
    words = [word for config in configs for word in ("--config", str(config))]
    request = read_words([*words, *overrides])
    with _policy(request.allow), warnings.catch_warnings():
        _hush()
        from poodle_lightning.training import TrainingCLI

        _import_classes()
        try:
            cli = TrainingCLI(request.words, request.name, run=False)
        except argparse.ArgumentError as error:
            from poodle_lightning.types import UserError

            raise UserError(_parser_message(error)) from error
    return cli.model, cli.datamodule


# ---- verbs
def _dispatch(words: list[str], stack: ExitStack) -> int:
    if not words or words[0] in ("-h", "--help", "help"):
        print(usage({verb: commands.help_of(module) for verb, module in commands.names().items()}))
        return 0
    if words[0] == "--version":
        print(f"poodle-lightning {poodle_lightning.__version__}")
        return 0
    verb, rest = words[0], words[1:]
    if verb == "evaluate":
        _evaluate(rest, stack)
        return 0
    if verb in TRAINING:
        _train(verb, rest, stack)
        return 0
    known = commands.names()
    if verb in known:
        return _command(verb, known[verb], rest)
    from poodle_lightning.messages import did_you_mean

    _fail(f"no command {verb!r}{did_you_mean(verb, [*TRAINING, *known]) or ': see poodle-lightning --help'}")


# ---- training verbs
def _train(verb: str, words: list[str], stack: ExitStack) -> None:
    request = read_words(words)
    stack.enter_context(_policy(request.allow))
    from poodle_lightning.training import TrainingCLI

    _import_classes()
    _quieten_lightning()
    command = ["poodle-lightning", verb, *words]
    TrainingCLI([verb, *request.words], request.name, command=command, stack=stack)


def _evaluate(words: list[str], stack: ExitStack) -> None:
    """Train and score, once or for several seeds; every run has its folder."""
    if not words or "-h" in words or "--help" in words:
        print(evaluate_usage())
        return
    command = ["poodle-lightning", "evaluate", *words]
    asked = read_evaluation(words)
    request, count = asked.request, asked.runs
    stack.enter_context(_policy(request.allow))
    from poodle_lightning.evaluating import EvaluationCLI
    from poodle_lightning.report.results import shown, write_summary

    _import_classes()
    _quieten_lightning()
    contents: list[dict[str, Any]] = []
    folder = Path()
    for number in range(count):
        with ExitStack() as own:
            words = ["fit", *request.words]
            check = asked.check and number == 0  # the data are the same in every run
            cli = EvaluationCLI(
                words,
                request.name,
                command=command,
                stack=own,
                run_number=number,
                runs=count,
                check=check,
            )
            assert cli.run_folder is not None
            folder = cli.run_folder
            contents += [cli.content] if cli.content is not None else []
    if count > 1 and len(contents) == count:
        summary = write_summary(folder, contents)
        name = summary["headline"]
        mean, spread = (shown(name, summary[kind][name], digits=2) for kind in ("mean", "std"))
        print(f"{name} of {count} runs: {mean} ± {spread}  ({folder / 'runs.md'})")


@contextmanager
def _policy(allow: Sequence[str]) -> Iterator[None]:
    """Lets configurations name classes of this package and of ``allow``, and of no other."""
    from jsonargparse import set_parsing_settings

    for name in allow:
        if not all(part.isidentifier() for part in name.split(".")) or name.split(".")[0] == "jsonargparse":
            _fail(f"--allow {name}: give the name of a package, such as my_methods")
    # LightningCLI turns reading of remote files on when it is imported; a file here names files beside it
    importlib.import_module("lightning.pytorch.cli")
    set_parsing_settings(
        config_read_mode_fsspec_enabled=False,
        import_path_denylist=["*"],
        import_path_allowlist=[*ALLOWED, *allow],
    )
    if allow and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    for name in allow:
        try:
            importlib.import_module(name)
        except ModuleNotFoundError as error:
            _fail(f"--allow {name}: {error} (looked in this folder and in the environment)")
    try:
        yield
    finally:
        set_parsing_settings(import_path_denylist=list(allow))


def _import_classes() -> None:
    """Imports this package's classes, so that their short names are known."""
    for room in _CLASSES:
        package = importlib.import_module(f"poodle_lightning.{room}")
        for info in pkgutil.iter_modules(package.__path__):
            importlib.import_module(f"{package.__name__}.{info.name}")


# ---- other verbs
class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        _fail(f"{self.prog}: {message}; see {self.prog} --help")


def _command(verb: str, module: str, words: list[str]) -> int:
    command = commands.load(module)
    parser = _Parser(prog=f"poodle-lightning {verb}", description=command.HELP, allow_abbrev=False)
    command.add_arguments(parser)
    args, unknown = parser.parse_known_args(words)
    if unknown:
        overrides = getattr(args, "overrides", None)
        if not isinstance(overrides, list):
            from poodle_lightning.messages import did_you_mean

            known = [option for action in parser._actions for option in action.option_strings]
            _fail(
                f"{parser.prog}: no such option: {unknown[0]}{did_you_mean(unknown[0].split('=')[0], known)}"
            )
        overrides.extend(unknown)
    return command.run(args, lambda configs, overrides: build(configs, overrides))


# ---- what is said
def _fail(message: str) -> NoReturn:
    from poodle_lightning.types import UserError

    raise UserError(message)


def _nobody_reads(error: BaseException) -> bool:
    """Whether the reader of what is printed has ended (``| head``), which is no fault of ours."""
    if not isinstance(error, BrokenPipeError) or not hasattr(select, "poll"):
        return False
    try:
        pipe = select.poll()
        pipe.register(sys.stdout.fileno(), 0)  # errors are always told
        if not any(event & select.POLLERR for _, event in pipe.poll(0)):
            return False
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains at its end
    except (OSError, ValueError):  # standard output is no file
        return False
    return True


def _explain(error: BaseException, debug: bool) -> int:
    """Says what went wrong, in one line where the user can mend it; returns the exit code."""
    if isinstance(error, KeyboardInterrupt):
        _log.error("interrupted")
        return 130
    if isinstance(error, SystemExit):
        if type(error).__name__ == "SIGTERMException":  # Lightning's own, outside of training, has no code
            return 143
        return error.code if isinstance(error.code, int) else int(bool(error.code))
    line = _line(error)
    if line is None or debug:
        text = "".join(traceback.format_exception(error)).rstrip()
        _log.error("%s", text)
    if line is None:
        return 1
    _log.error("%s", line)
    return 2


def _line(error: BaseException) -> str | None:
    """The one line of an error that the user can mend, or None."""
    from poodle_lightning.types import UserError

    causes = [error]
    while causes[-1].__cause__ is not None:
        causes.append(causes[-1].__cause__)
    # raised while the parser makes an object, it is wrapped
    error = next((cause for cause in causes if isinstance(cause, UserError)), error)
    text = str(error).strip()
    if isinstance(error, argparse.ArgumentError):
        return _parser_message(error)
    if isinstance(error, UserError):
        # raised in a loader's worker, it arrives with that process's traceback as its text
        last = text.splitlines()[-1] if text else type(error).__name__
        return last.split("UserError: ", 1)[-1] if "Original Traceback" in text else " ".join(text.split())
    if "No supported gpu backend found" in text:
        return "trainer.accelerator is gpu, but there is none here: try --trainer trainer/cpu.yaml"
    if type(error).__name__ == "MisconfigurationException":
        return " ".join(text.split())
    if isinstance(error, RuntimeError) and "Error(s) in loading state_dict" in text:
        wrong = [" ".join(line.split()) for line in text.splitlines()[1:] if line.strip()]
        more = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
        what = wrong[0][:200] if wrong else text
        return f"--ckpt_path: the checkpoint is of another architecture: {what}{more}"
    if isinstance(error, ValueError) and text.startswith("Expected more than 1 value per channel"):
        return "BatchNorm needs more than one clip on each device: raise --data.batch_size (--debug: which)"
    if isinstance(error, ValueError) and text.startswith("SyncBatchNorm layers only work with GPU"):
        return "trainer.sync_batchnorm is for GPUs: give --trainer.sync_batchnorm false"
    if isinstance(error, RuntimeError) and _PEER_GONE.search(text):
        return "another process of this run has ended: see its message (--debug: where this one waited)"
    from poodle_lightning.messages import missing_package

    return missing_package(text)  # said by a logger or callback that the parser makes


def _parser_message(error: argparse.ArgumentError) -> str:
    import inspect

    from lightning import Trainer

    from poodle_lightning.messages import one_line

    top = [
        "model",
        "data",
        "trainer",
        "seed_everything",
        "config",
        "name",
        "ckpt_path",
        "allow",
        "checkpoint",
    ]
    flags = [
        *top,
        *(f"trainer.{name}" for name in inspect.signature(Trainer.__init__).parameters if name != "self"),
    ]
    return one_line(str(error.message), flags)


class _Format(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        return text if record.levelno < logging.WARNING else f"{record.levelname.lower()}: {text}"


@contextmanager
def _speaking() -> Iterator[None]:
    """Messages and warnings of the package on the terminal, one line each, until the command is done."""
    handler = logging.StreamHandler()
    handler.setFormatter(_Format("%(message)s"))
    before = (_log.level, _log.propagate)
    rank = os.environ.get("RANK") or os.environ.get("LOCAL_RANK") or os.environ.get("SLURM_PROCID") or "0"
    first = not rank.isdecimal() or int(rank) == 0  # what is no number is for the command to refuse
    _log.addHandler(handler)
    _log.setLevel(logging.INFO if first else logging.WARNING)
    _log.propagate = False
    try:
        with warnings.catch_warnings():
            _hush()
            warnings.showwarning = _warn
            yield
    finally:
        _log.removeHandler(handler)
        _log.setLevel(before[0])
        _log.propagate = before[1]


def _quieten_lightning() -> None:
    """Leaves out the advertisements among Lightning's messages."""

    def wanted(record: logging.LogRecord) -> bool:
        return "Tip:" not in str(record.msg)

    for name in ("lightning", "lightning.pytorch"):
        for handler in logging.getLogger(name).handlers:
            if not handler.filters:
                handler.addFilter(wanted)


def _hush() -> None:
    for pattern in _NOISE:
        warnings.filterwarnings("ignore", message=f"(?s){pattern}")


def _warn(
    message: Any, category: type[Warning], filename: str, lineno: int, file: Any = None, line: Any = None
) -> None:
    _log.warning("%s", " ".join(str(message).split()))

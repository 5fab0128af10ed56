"""Lightning's command line (fit, validate, test, predict) with this package's run folder and defaults."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning as L
import yaml
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.callbacks import ProgressBar as AnyProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only
from torch.nn import Parameter

from poodle_lightning import runs
from poodle_lightning.callbacks.checkpoints import AtomicCheckpointIO, TimedCheckpoint, check_fits
from poodle_lightning.callbacks.faults import Faults
from poodle_lightning.callbacks.health import Health
from poodle_lightning.callbacks.metrics_file import MetricsFile
from poodle_lightning.callbacks.record import Record
from poodle_lightning.callbacks.throughput import ProgressBar, Throughput
from poodle_lightning.data.video import VideoDataModule
from poodle_lightning.evaluation.base import Evaluation
from poodle_lightning.methods.base import Method
from poodle_lightning.report.results import report_result
from poodle_lightning.types import UserError

_log = logging.getLogger(__name__)
VERBS = ("fit", "validate", "test", "predict")
_SECONDS_BETWEEN_LINES = 10.0


@dataclass(frozen=True)
class CheckpointPlan:
    """When checkpoints are written; ``last.ckpt`` is the newest of them.

    Args:
        every_n_epochs: at the end of every n-th epoch.
        every_n_steps: also every n optimiser steps.
        every_minutes: also after so many minutes, into ``recent.ckpt``; null never.
        keep: how many of the regular ones are kept, -1 all. Two, so that a damaged one is no loss.
    """

    every_n_epochs: int = 1
    every_n_steps: int | None = None
    every_minutes: float | None = 30.0
    keep: int = 2

    def callbacks(self) -> list[L.Callback]:
        """Lightning's callbacks that do it."""
        regular: dict[str, Any] = {"monitor": "step", "mode": "max", "save_top_k": self.keep}
        regular |= {"auto_insert_metric_name": False, "save_last": "link", "enable_version_counter": False}
        name = "epoch={epoch:04d}-step={step:07d}"
        made: list[L.Callback] = [
            ModelCheckpoint(
                filename=name, every_n_epochs=self.every_n_epochs, save_on_train_epoch_end=True, **regular
            )
        ]
        if self.every_n_steps is not None:
            made.append(ModelCheckpoint(filename=name, every_n_train_steps=self.every_n_steps, **regular))
        if self.every_minutes is not None:
            interval = timedelta(minutes=self.every_minutes)
            recent = TimedCheckpoint(
                filename="recent", train_time_interval=interval, save_top_k=1, enable_version_counter=False
            )
            made.append(recent)
        return made


class TrainingCLI(LightningCLI):
    """The training verbs; ``run=False`` builds the model and the data only.

    Args:
        args: words after the program's name (``run=True``: the first is the verb).
        name: of the experiment, where neither ``--name`` nor a config says it.
        command: the whole command, for the record.
        run: run the verb.
        stack: closed by the caller when all is said (``train.log``).
    """

    def __init__(
        self,
        args: Sequence[str],
        name: str,
        *,
        command: Sequence[str] = (),
        run: bool = True,
        stack: ExitStack | None = None,
    ) -> None:
        self._default_name = name
        self._stack = stack or ExitStack()
        self._command = list(command)
        self.run_folder: Path | None = None
        self._checkpoint: Path | None = None
        self._building = not run
        raising: dict[str, Any] = {"exit_on_error": False, "allow_abbrev": False}
        super().__init__(
            L.LightningModule,
            L.LightningDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            auto_configure_optimizers=False,
            save_config_kwargs={"overwrite": True},
            trainer_defaults={"log_every_n_steps": 10},
            seed_everything_default=0,
            parser_kwargs={**raising, **({verb: dict(raising) for verb in VERBS} if run else {})},
            args=_with_data(args, 1 if run else 0),
            run=run,
            load_from_checkpoint_support=False,
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Adds ``--name`` and ``--checkpoint``."""
        parser.add_argument(
            "--name", type=str | None, default=None, help="Name of the experiment: runs/<name>/<time>."
        )
        parser.add_argument("--checkpoint", type=CheckpointPlan, default=CheckpointPlan())
        if self._building:  # what the verbs bring, so that any config can be read
            parser.add_argument("--ckpt_path", type=str | None, default=None)
            parser.add_argument("--weights_only", type=bool | None, default=None)

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Reads ``args`` (Lightning's own warns when the system has arguments as well)."""
        self.config = parser.parse_args(args)

    def _parse_ckpt_path(self) -> None:
        """Nothing: the configuration says what the model is; Lightning would read the whole file for it."""

    def before_instantiate_classes(self) -> None:
        """Takes the data's seed from ``seed_everything`` where it has none, and the checkpoint's path."""
        # every draw is a function of a key, so workers need no seeds of Lightning's
        os.environ["PL_SEED_WORKERS"] = "0"
        config = self.config.get(str(self.subcommand), self.config)
        data = config.get("data")
        arguments = data.get("init_args") if data is not None else None
        if arguments is not None and "seed" in arguments and arguments["seed"] is None:
            arguments["seed"] = int(config["seed_everything"] or 0)
        if self._building:
            return
        config["name"] = config.get("name") or self._default_name
        self._ckpt_path = config.get("ckpt_path")
        if self._ckpt_path is None and int(os.environ.get("SLURM_RESTART_COUNT") or 0) > 0:
            self._ckpt_path = "last"
        config["ckpt_path"] = (
            None  # config.yaml describes the experiment; env.json says what a start went on from
        )

    def instantiate_classes(self) -> None:
        """Makes model and data, and the trainer unless only building."""
        if not self._building:
            super().instantiate_classes()
            return
        self.config_init = self.parser.instantiate_classes(self.config)
        self.model = self.config_init["model"]
        self.datamodule = self.config_init["data"]

    # ---- the trainer
    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        """The trainer of the config, in the run's folder, with the package's callbacks and loggers."""
        config = self._get(self.config_init, "trainer")
        run = self._open_run(Path(config.get("default_root_dir") or runs.DEFAULT_ROOT))
        mine: dict[str, Any] = {
            "default_root_dir": str(run.folder),
            "logger": self._loggers(config.get("logger"), run.folder),
            "callbacks": self._callbacks(config),
            "plugins": [*_as_list(config.get("plugins")), AtomicCheckpointIO()],
            "enable_checkpointing": config.get("enable_checkpointing") is not False
            and self.subcommand == "fit",
        }
        if config.get("enable_model_summary") is None:
            mine["enable_model_summary"] = False  # one line says what there is to train
        if not any(isinstance(callback, AnyProgressBar) for callback in mine["callbacks"]):
            mine["enable_progress_bar"] = False
        try:
            return super().instantiate_trainer(**{**mine, **kwargs})
        except (ValueError, TypeError) as error:
            raise UserError(f"trainer: {error}") from error

    def _open_run(self, root: Path) -> runs.Run:
        verb = str(self.subcommand)
        run = runs.plan(root, self._get(self.config, "name"), verb, self._ckpt_path)
        self.run_folder, self._checkpoint = run.folder, run.checkpoint
        if run.checkpoint is not None and isinstance(self.model, Method):
            check_fits(run.checkpoint, self.model)  # before anything is written
        if run.fresh:
            # processes that this one starts for the other devices join the same run
            self._stack.enter_context(runs.shared_time(run.folder))
        if self._first():
            run.folder.mkdir(parents=True, exist_ok=True)
            runs.clear_parts(run.folder)
            self._stack.enter_context(runs.logged(run.folder))
        return run

    def _first(self) -> bool:
        """Whether this is the process that writes, as far as it is known before there is a trainer."""
        nodes = int(self._get(self.config_init, "trainer").get("num_nodes") or 1)
        # Lightning's own launcher tells a node's first process its node, and no rank
        later = nodes > 1 and (os.environ.get("NODE_RANK") or "0") != "0"
        return getattr(rank_zero_only, "rank", 0) == 0 and not later

    def _loggers(self, given: Any, folder: Path) -> Any:
        if given is False:
            return False
        others = [logger for logger in _as_list(given) if isinstance(logger, Logger)]
        return [MetricsFile(folder), *others]

    def _callbacks(self, config: Any) -> list[L.Callback]:
        given: list[L.Callback] = _as_list(config.get("callbacks"))
        checkpoint = None if self._checkpoint is None else str(self._checkpoint)
        record = Record(self._command, self._text(), checkpoint)
        bar = config.get("enable_progress_bar") is not False
        shown = bar and sys.stderr.isatty()
        throughput = Throughput(print_every=_SECONDS_BETWEEN_LINES if bar and not shown else None)
        mine: list[L.Callback] = [record]
        if self.subcommand == "fit":
            saving = config.get("enable_checkpointing") is not False
            mine += [throughput, Faults(save=saving)]
            mine += self._get(self.config_init, "checkpoint").callbacks() if saving else []
        if isinstance(self.model, Method):
            mine.append(Health())
        if shown:
            mine.append(ProgressBar(throughput))
        # a callback of the config takes the place of the default of its kind
        return [*given, *(one for one in mine if not any(_same_kind(one, other) for other in given))]

    def _text(self) -> str:
        verb = str(self.subcommand)
        return str(self._parser(verb).dump(self.config[verb], skip_none=False))

    # ---- the verbs
    def _begin(self) -> None:
        assert self.run_folder is not None
        self.config_init[self.subcommand]["ckpt_path"] = (
            None if self._checkpoint is None else str(self._checkpoint)
        )
        if not self.trainer.is_global_zero:
            return
        if self._checkpoint is not None:
            _log.info("going on from %s", self._checkpoint)
        elif self.subcommand != "fit" and getattr(self.model, "trains", True):
            _log.warning("no --ckpt_path: the model has its initial weights")
        name, parameters = type(self.model).__name__, list(self.model.parameters())
        if isinstance(self.model, Evaluation):  # its head is made when the classes are known
            _log.info("%s of an encoder of %.2f M parameters", name, _millions(parameters))
        else:
            trainable = [parameter for parameter in parameters if parameter.requires_grad]
            _log.info("%s: %.2f M trainable parameters", name, _millions(trainable))
        _log.info("run folder: %s", self.run_folder)

    def before_fit(self) -> None:
        """Tells where the run writes and hands over the checkpoint."""
        self._begin()

    def before_validate(self) -> None:
        """As before fit."""
        self._begin()

    def after_validate(self) -> None:
        """Writes the result of an evaluation."""
        if isinstance(self.model, Evaluation):
            report_result(self.trainer, self.model, self.datamodule, self.about())

    def about(self) -> dict[str, Any]:
        """What an evaluation's result is of: encoder, configuration, seed, checkpoint of the head."""
        config = self.config[str(self.subcommand)]
        encoder = (config["model"].get("init_args") or {}).get("encoder")
        if not isinstance(encoder, str):
            encoder = type(getattr(self.model, "encoder", None)).__name__
        return {
            "encoder": encoder,
            "config": config["name"],
            "seed": int(config["seed_everything"] or 0),
            "checkpoint": None if self._checkpoint is None else str(self._checkpoint),
        }

    def before_test(self) -> None:
        """As before fit."""
        self._begin()

    def before_predict(self) -> None:
        """As before fit."""
        self._begin()


def _with_data(args: Sequence[str], front: int) -> list[str]:
    """The words with the default data module, where neither they nor their files name another.

    As a default of the parser it would leave its own settings (``val_fraction``, ``batch_size``, …) to
    whatever class takes its place.
    """
    words = list(args)
    for word, value in zip(words, [*words[1:], ""], strict=True):
        named = word == "--data" or word.startswith("--data=")
        if named or (word == "--config" and _names_data(Path(value))):
            return words
    default = f"--data={VideoDataModule.__module__}.{VideoDataModule.__name__}"
    return [*words[:front], default, *words[front:]]


def _names_data(config: Path) -> bool:
    """Whether a configuration says which data module it is, itself or by a file."""
    try:
        content = yaml.safe_load(config.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return False  # the parser says what is wrong with it
    data = content.get("data") if isinstance(content, dict) else None
    return isinstance(data, str) or (isinstance(data, dict) and "class_path" in data)


def _millions(parameters: Sequence[Parameter]) -> float:
    return sum(parameter.numel() for parameter in parameters) / 1e6


def _same_kind(mine: L.Callback, given: L.Callback) -> bool:
    kinds = (ModelCheckpoint, AnyProgressBar, Throughput, Faults, Health, Record)
    return any(isinstance(mine, kind) and isinstance(given, kind) for kind in kinds)


def _as_list(value: Any) -> list[Any]:
    if value is None or value is True:
        return []
    return list(value) if isinstance(value, (list, tuple)) else [value]

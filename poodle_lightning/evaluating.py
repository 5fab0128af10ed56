"""``poodle-lightning evaluate``: fit and validate of an evaluation in one run folder."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import lightning as L

from poodle_lightning.data.labelled import LabelledDataModule
from poodle_lightning.data.loading import SharedDataModule
from poodle_lightning.evaluation.base import Evaluation
from poodle_lightning.report.results import report_result
from poodle_lightning.training import TrainingCLI
from poodle_lightning.types import UserError

_log = logging.getLogger(__name__)


class EvaluationCLI(TrainingCLI):
    """``evaluate``: train the head if the protocol has one, validate once, write the result.

    Args:
        args: as for :class:`TrainingCLI`; the verb is ``fit``.
        name: of the experiment.
        run_number: added to the seed, for runs that differ in nothing else.
        runs: how many of them there are; with several, each seed has a folder of its own.
        check: look through the labels before anything is trained.
        **kwargs: of :class:`TrainingCLI`.
    """

    def __init__(
        self,
        args: Sequence[str],
        name: str,
        *,
        run_number: int = 0,
        runs: int = 1,
        check: bool = True,
        **kwargs: Any,
    ) -> None:
        self._run_number, self._runs, self._check = run_number, runs, check
        self.content: dict[str, Any] | None = None
        super().__init__(args, name, **kwargs)

    def before_instantiate_classes(self) -> None:
        """Moves the seed by the number of the run."""
        config = self.config[str(self.subcommand)]
        config["seed_everything"] = int(config["seed_everything"] or 0) + self._run_number
        L.seed_everything(config["seed_everything"], workers=False, verbose=False)
        super().before_instantiate_classes()
        if self._runs > 1:  # so that "last" is the last of the same seed
            config["name"] = f"{config['name']}_seed{config['seed_everything']}"

    def fit(self, model: L.LightningModule, datamodule: L.LightningDataModule, **kwargs: Any) -> None:
        """Training without validation in between, then validation.

        Raises:
            UserError: the configuration is of no evaluation, or something is wrong with the labels.
        """
        if not isinstance(model, Evaluation):
            raise UserError(
                f"evaluate: {type(model).__name__} is no evaluation: give --config evaluation/… "
                "(`poodle-lightning evaluate --help` lists them)"
            )
        model.the_encoder()
        if self._check and isinstance(datamodule, LabelledDataModule) and self.trainer.is_global_zero:
            check_labels(datamodule, train=model.reads_training_images)
        if model.trains:
            if isinstance(datamodule, SharedDataModule):
                check_devices(datamodule, self.trainer)
            watched, self.trainer.limit_val_batches = self.trainer.limit_val_batches, 0
            self.trainer.fit(model, datamodule=datamodule, **kwargs)
            self.trainer.limit_val_batches = watched
        self.trainer.validate(model, datamodule=datamodule, verbose=False)
        self.content = report_result(self.trainer, model, datamodule, self.about())


def check_devices(data: SharedDataModule, trainer: L.Trainer) -> None:
    """Refuses fewer held-out items than devices before anything is trained, not when it is scored.

    Args:
        data: the labelled items.
        trainer: of the devices.

    Raises:
        UserError: there are fewer, or the items cannot be listed.
    """
    if trainer.world_size > 1:
        data.trainer = trainer
        data.setup("validate")
        data.val_dataloader()


def check_labels(data: LabelledDataModule, train: bool = True) -> None:
    """Refuses bad labels before hours are spent: every held-out mask, the headers of the training masks.

    Args:
        data: the labelled images.
        train: the training images are needed.

    Raises:
        UserError: nothing can be measured on these data; the first file that is wrong.
    """
    before = data.check("train", every_mask=False) if train else []
    for finding in (*before, *data.check("val", every_mask=True)):
        if finding.fatal:
            raise UserError(f"{finding} (`poodle-lightning check-data` lists everything)")
        _log.warning("%s", finding)

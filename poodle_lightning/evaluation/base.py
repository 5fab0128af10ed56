"""What every evaluation shares: the encoder that is measured, classes, learning rate, devices, scores."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import lightning as L
from torch import Tensor

from poodle_lightning import __version__
from poodle_lightning.configured import Configured, spec
from poodle_lightning.hub import FORMAT, dilate, load_encoder, rebuild
from poodle_lightning.nn.encoder import DecodedEncoder, Encoder
from poodle_lightning.nn.head_optim import HeadRecipe
from poodle_lightning.nn.optim import Schedule
from poodle_lightning.types import ClassSet, UserError


@dataclass(frozen=True)
class Scores:
    """What an evaluation found, as plain data.

    Args:
        protocol: name of the protocol, for tables.
        headline: the key of ``scores`` that stands for the result.
        scores: fractions, or what their names say.
        per_class: measure → class → value; NaN where a class has none.
        counts: images, ignored pixels, and the like.
        details: whatever else there is to say.
        worst: ``(class, image)`` pairs worth a look: the weakest classes, and the number of the held-out
            image on which each is weakest.
    """

    protocol: str
    headline: str
    scores: dict[str, float]
    per_class: dict[str, dict[str, float]] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    details: dict[str, Any] = field(default_factory=dict)
    worst: list[tuple[str, int]] = field(default_factory=list)


class Evaluation(L.LightningModule, Configured):
    """Base of all evaluations: measures one encoder on one labelled data set.

    Subclasses write ``validation_step`` and :meth:`scores`; where they train something, also
    ``training_step``, ``configure_optimizers`` and perhaps :meth:`rate`, with ``trains = True``.

    Args:
        encoder: what ``hub.load_encoder`` takes, or an encoder; None only where nothing is run.
        output_stride: dilate a ResNet to this stride; None leaves the encoder as it is. An encoder with a
            decoder that is kept has the decoder's stride and is never dilated.
        decoder: ``keep`` reads the decoder's map where there is one; ``drop`` measures the bare encoder.
        classes: how many, or their names, or names and groups; None takes those of the data.

    Attributes:
        encoder: the encoder, or None.
        class_set: names and groups, once the data or ``classes`` have said them.

    Raises:
        UserError: the encoder cannot be read, or not be dilated.
    """

    trains: ClassVar[bool] = False
    reads_training_images: ClassVar[bool] = True
    encoder: Encoder | None

    def __init__(
        self,
        encoder: str | Encoder | None = None,
        *,
        output_stride: int | None = None,
        decoder: Literal["keep", "drop"] = "keep",
        classes: int | Sequence[str] | ClassSet | None = None,
    ) -> None:
        super().__init__()
        found = load_encoder(encoder) if isinstance(encoder, str) else encoder
        if decoder == "drop" and isinstance(found, DecodedEncoder):
            found = found.encoder
        if output_stride is not None and found is not None and not isinstance(found, DecodedEncoder):
            found = dilate(found, output_stride)
        self.encoder = found
        self.source = encoder if isinstance(encoder, str) else None
        self.class_set: ClassSet | None = None if classes is None else _class_set(classes)

    # ---- what the protocol says
    def scores(self) -> Scores:
        """What the last validation found; the same on every device.

        Raises:
            UserError: there was none yet.
        """
        raise UserError(f"{type(self).__name__} has no scores(): subclass an evaluation or write it")

    # ---- encoder and classes
    def the_encoder(self) -> Encoder:
        """The encoder.

        Raises:
            UserError: none was given.
        """
        if self.encoder is None:
            raise UserError(
                "there is no encoder to measure: give --encoder (with fit --model.encoder): "
                "a run, a file or a name"
            )
        return self.encoder

    def the_classes(self) -> ClassSet:
        """Names and groups of the classes.

        Raises:
            UserError: neither data nor ``classes`` have said them.
        """
        if self.class_set is None:
            raise UserError("the classes are not known: give --model.classes or a labelled data module")
        return self.class_set

    def setup(self, stage: str) -> None:
        """Takes the classes from the data module.

        Raises:
            UserError: no encoder was given, or the data have another number of classes.
        """
        self.the_encoder()
        found = getattr(getattr(self.trainer, "datamodule", None), "classes", None)
        if isinstance(found, ClassSet):
            self.take_classes(found)
        self.the_classes()

    def take_classes(self, classes: ClassSet) -> None:
        """Names and groups of the data from here on.

        Raises:
            UserError: their number is not the one that ``classes`` or the checkpoint said.
        """
        if self.class_set is not None and len(self.class_set) != len(classes):
            raise UserError(
                f"the data have {len(classes)} classes, but the model was made for {len(self.class_set)}: "
                "give --model.classes or the data set of the checkpoint"
            )
        self.class_set = classes

    # ---- training
    def rate(self) -> float | None:
        """The learning rate of the next optimiser step; None: the optimiser's own."""
        return None

    def optimizer_step(
        self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None
    ) -> None:
        """One step at :meth:`rate`, times the group's own factor ``lr_scale``."""
        rate = self.rate()
        if rate is not None:
            for group in optimizer.param_groups:
                group["lr"] = rate * group.get("lr_scale", 1.0)
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)

    def over_devices(self, value: Tensor, how: str) -> Tensor:
        """``mean`` or ``sum`` of a value over all devices, perhaps in place; without a trainer, itself."""
        if self._trainer is None:
            return value
        reduced: Tensor = self.trainer.strategy.reduce(value, reduce_op=how)
        return reduced

    # ---- what is kept
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds what rebuilds the evaluation and its encoder, as plain data."""
        encoder, classes = spec(self.the_encoder()), self.the_classes()
        plain = spec_without_encoder(self)
        # the encoder in hand is already dilated and bare where that was asked for
        plain["init_args"] |= {"encoder": encoder, "classes": spec(classes)}
        plain["init_args"] |= {"output_stride": None, "decoder": "keep"}
        checkpoint["poodle_lightning"] = {
            "format": FORMAT,
            "version": __version__,
            "method": plain,
            "backbone": encoder,
            "prefixes": {"encoder": "encoder."},
            "source": self.source,
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuses the checkpoint of another encoder: its weights would take the place of the given ones.

        Raises:
            UserError: it is one.
        """
        there, here = checkpoint.get("poodle_lightning", {}).get("source"), self.source
        if there is not None and here is not None and not _same_source(there, here):
            raise UserError(
                f"--ckpt_path: that run measured the encoder {there}, not {here}: "
                "leave --ckpt_path out, or give the encoder of the run"
            )

    @classmethod
    def load_from_checkpoint(  # type: ignore[override]
        cls, checkpoint_path: str | Path, **_: Any
    ) -> Self:
        """The evaluation of a checkpoint, with its weights, on the CPU. Only plain data are read."""
        made, weights = rebuild(checkpoint_path)
        if not isinstance(made, cls):
            raise UserError(f"{checkpoint_path} holds a {type(made).__name__}, not a {cls.__name__}")
        made.load_state_dict(weights)
        return made


class Scheduled(Evaluation):
    """An evaluation whose rate is that of a ``HeadRecipe``; a run that goes on keeps its first horizon.

    Attributes:
        recipe: how it is optimised.
        schedule: once training has begun, or a checkpoint has brought it.
    """

    trains: ClassVar[bool] = True
    recipe: HeadRecipe
    schedule: Schedule | None = None

    def plan(self) -> None:
        """Makes the schedule, unless a checkpoint has brought one."""
        planned = self.recipe.schedule(self.trainer.max_steps)
        if self.schedule not in (None, planned):
            warnings.warn(f"going on along the checkpoint's {self.schedule}, not {planned}", stacklevel=3)
        self.schedule = self.schedule or planned

    def rate(self) -> float:
        """See ``Evaluation``."""
        assert self.schedule is not None
        return self.schedule.lr(self.global_step)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """See ``Evaluation``; the schedule too."""
        super().on_save_checkpoint(checkpoint)
        state = None if self.schedule is None else self.schedule.state_dict()
        checkpoint["poodle_lightning"]["schedule"] = state

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """See ``Evaluation``; takes the schedule of the run, whose horizon was fixed when it began."""
        super().on_load_checkpoint(checkpoint)
        schedule = checkpoint.get("poodle_lightning", {}).get("schedule")
        if schedule is not None:
            self.schedule = Schedule.from_state(schedule)


def _class_set(classes: int | Sequence[str] | ClassSet) -> ClassSet:
    if isinstance(classes, int):
        return ClassSet(tuple(f"class {i}" for i in range(classes)))
    if isinstance(classes, ClassSet):  # one from a checkpoint has lists
        groups = {group: tuple(members) for group, members in classes.groups.items()}
        return ClassSet(tuple(classes.names), groups)
    return ClassSet(tuple(classes))


def spec_without_encoder(evaluation: Evaluation) -> dict[str, Any]:
    """The spec of an evaluation whose ``encoder`` is None."""
    given: Mapping[str, Any] = evaluation.init_args
    kind = type(evaluation)
    arguments = {name: spec(value) for name, value in given.items() if name != "encoder"}
    return {"class_path": f"{kind.__module__}.{kind.__qualname__}", "init_args": arguments}


def _same_source(one: str, other: str) -> bool:
    """Whether two words for an encoder mean the same name or the same file."""
    return one == other or (Path(one).exists() and Path(other).exists() and Path(one).samefile(other))

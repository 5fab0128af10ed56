"""Label propagation on DAVIS 2017: how well features find the objects of the first frame again.

Nothing is trained. The masks of the first frame are carried through the sequence: each cell of a frame's map
takes the labels of the cells most like it, in the first frame and in some frames before it, near its own
place (``ops.propagation``). The soft labels, not the masks made of them, are carried on. For a mask they are
enlarged, each object's are stretched to [0, 1], and the largest wins.

The defaults are DINO's (``eval_video_segmentation.py`` of facebookresearch/dino). The other column is VFS's
code (xvjiarui/VFS: ``configs/r50_nc_sgd_cos_100e_r5_1xNx2_k400.py``, ``vanilla_tracker.py``,
``local_attention.py``, ``affinity_utils.py``):

==================  ==================  ==================================================================
argument            DINO                VFS
==================  ==================  ==================================================================
``layer``           last map of a ViT   ``layer3`` of a ResNet
``output_stride``   –                   8 with ``dilation`` false: strides go, dilations do not come
``view``            480, ×64            480, ``multiple`` 1
``last``            7 and the first     20 and the first
``repeat_first``    no                  yes: it counts twice while it is among the 20
``topk``            5                   10
``temperature``     0.1                 0.07
``radius``          12                  18 (R18: 12); half of their ``neighbor_range``
``window``          square              circle
``ties``            keep                drop
``upsample``        frame               original
``floor``           0                   1e-12
``deviation``       0.228 for red       the usual 0.229
==================  ==================  ==================================================================

Scores are those of ``evaluation.video_metrics``.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from poodle_lightning.configured import spec
from poodle_lightning.data.davis import DavisDataModule, MaskedVideo, voc_colours, write_masks
from poodle_lightning.draw.canvas import png
from poodle_lightning.draw.masks import mask_strip, spread_frames
from poodle_lightning.evaluation.base import Evaluation, Scores
from poodle_lightning.evaluation.memory import gathered
from poodle_lightning.evaluation.video_metrics import BOUND, ObjectScore, score_sequence, summary
from poodle_lightning.hub import dilate
from poodle_lightning.nn.encoder import DecodedEncoder, Encoder
from poodle_lightning.ops.geometry import Size
from poodle_lightning.ops.propagation import BUDGET, Ties, Window, propagate
from poodle_lightning.types import UserError

_PICTURED = 6  # frames of a sequence in its picture


@dataclass(frozen=True)
class PropagationRecipe:
    """How labels are carried on; see the module for the two published settings.

    Args:
        last: frames before, whose labels are asked beside those of the first.
        repeat_first: the first frame counts twice while it is one of them.
        topk: cells that give their labels.
        temperature: of the weights of their cosines.
        radius: of the window, in cells; None asks the whole frame.
        window: its shape, see ``ops.propagation.propagate``.
        ties: see there.
        upsample: soft labels are enlarged to the ``frame`` as the network sees it, and the mask from there to
            its own size by the nearest pixel; or at once to the ``original`` size.
        floor: see :func:`hard_mask`.
        deviation: per colour channel, what images are divided by instead of the encoder's own.
        bound: of the contour measure, share of the diagonal.
        batch: frames per forward pass.
        budget: bytes of working memory for products; like ``batch`` it changes the speed only.
        pictures: of so many sequences, evenly spread over the list, into ``pictures/`` of the run: frames
            with their true and found masks.
    """

    last: int = 7
    repeat_first: bool = False
    topk: int = 5
    temperature: float = 0.1
    radius: int | None = 12
    window: Window = "square"
    ties: Ties = "keep"
    upsample: Literal["frame", "original"] = "frame"
    floor: float = 0.0
    deviation: tuple[float, float, float] | None = None
    bound: float = BOUND
    batch: int = 4
    budget: int = BUDGET
    pictures: int = 0

    def __post_init__(self) -> None:
        radius = 1 if self.radius is None else self.radius
        numbers = (self.topk, self.temperature, radius, self.bound, self.batch, self.budget)
        if min(numbers) <= 0 or min(self.last, self.floor, self.pictures) < 0:
            raise UserError("PropagationRecipe: numbers must be above 0, last, floor and pictures 0 or more")
        if self.deviation is not None and (len(self.deviation) != 3 or min(self.deviation) <= 0):
            raise UserError("PropagationRecipe: deviation must be three numbers above 0")


class LabelPropagation(Evaluation):
    """Semi-supervised video object segmentation without training (see the module).

    The data module is ``DavisDataModule``.

    Args:
        encoder: see ``Evaluation``.
        recipe: how labels are carried on.
        layer: name of the map that is read; None is the last.
        save: a folder for the masks, ``<save>/<sequence>/<frame>.png``, as the official
            evaluation reads them.
        output_stride: see ``Evaluation``.
        dilation: False takes back the dilations of a ResNet, so that ``output_stride`` only leaves strides
            out, as in VFS. The network then sees finer than it was trained to.
        decoder: see ``Evaluation``.

    Raises:
        UserError: see ``Evaluation``; a vision transformer with an ``output_stride``.
    """

    reads_training_images = False

    def __init__(
        self,
        encoder: str | Encoder | None = None,
        *,
        recipe: PropagationRecipe | None = None,
        layer: str | None = None,
        save: str | None = None,
        output_stride: int | None = None,
        dilation: bool = True,
        decoder: Literal["keep", "drop"] = "keep",
    ) -> None:
        super().__init__(encoder, decoder=decoder)
        if output_stride is not None and self.encoder is not None:
            self.encoder = strided(self.encoder, output_stride)
        if not dilation and self.encoder is not None:
            self.encoder = undilated(self.encoder)
        self.recipe, self.layer, self.save = recipe or PropagationRecipe(), layer, save
        self.sequences: dict[str, list[ObjectScore]] = {}
        self._frames = 0
        self._rows: list[list[float]] = []

    def setup(self, stage: str) -> None:
        """Sequences have no classes, so there is nothing to take from the data.

        Raises:
            UserError: there is no encoder or no such layer in it, or the data are no sequences with masks.
        """
        encoder = self.the_encoder()
        if self.layer is not None and self.layer not in encoder.channels:
            raise UserError(f"there is no layer {self.layer!r}: choose one of {', '.join(encoder.channels)}")
        self._data()

    def _data(self) -> DavisDataModule:
        data = getattr(self.trainer, "datamodule", None)
        if not isinstance(data, DavisDataModule):
            raise UserError(
                f"{type(data).__name__} has no sequences with masks: give --data of the kind DavisDataModule"
            )
        return data

    def on_validation_start(self) -> None:
        """Forgets what was found before, pictures too."""
        self.sequences, self._rows, self._frames = {}, [], 0
        if self.recipe.pictures and self.trainer.is_global_zero:
            for path in self._folder().glob("propagation_*.png"):
                path.unlink()
        self.trainer.strategy.barrier()

    def validation_step(self, batch: MaskedVideo, batch_idx: int) -> None:
        """Follows the objects of one sequence, and scores them."""
        masks = self.predict_masks(batch)
        scores = score_sequence(batch.masks.numpy(), masks.numpy(), batch.objects, self.recipe.bound)
        self._rows += [[batch.index, len(batch), *score.numbers()] for score in scores]
        if self.save is not None:
            write_masks(Path(self.save), batch, masks)
        self._draw(batch, masks)

    def on_validation_epoch_end(self) -> None:
        """Puts the devices' sequences together; logs ``val/j_and_f``."""
        mine = torch.tensor(self._rows, dtype=torch.float64).reshape(-1, 8)
        (rows,) = gathered((mine,))
        found: dict[int, list[ObjectScore]] = {}
        lengths: dict[int, int] = {}
        for index, length, *numbers in rows.tolist():
            found.setdefault(int(index), []).append(ObjectScore.of(numbers))
            lengths[int(index)] = int(length)
        names = self._data().sequences
        self.sequences = {names[index]: found[index] for index in sorted(found)}
        self._frames = sum(lengths.values())
        value = self.scores().scores["j_and_f"]
        self.log("val/j_and_f", torch.tensor(value, device=self.device), sync_dist=True)

    def scores(self) -> Scores:
        """J and F over all objects, and of each.

        Raises:
            UserError: there was no validation yet.
        """
        if not self.sequences:
            raise UserError("label propagation has no result yet: validate it first")
        objects = {
            f"{name}_{number + 1}": score
            for name, scores in self.sequences.items()
            for number, score in enumerate(scores)
        }
        means = summary(list(objects.values()))
        return Scores(
            protocol="DAVIS 2017 label propagation",
            headline="j_and_f",
            scores=means,
            per_class={
                "j": {name: score.region.mean for name, score in objects.items()},
                "f": {name: score.contour.mean for name, score in objects.items()},
            },
            counts={"sequences": len(self.sequences), "objects": len(objects), "frames": self._frames},
            details={
                "sequences": {name: summary(scores) for name, scores in self.sequences.items()},
                "objects": {name: asdict(score) for name, score in objects.items()},
                "recipe": spec(self.recipe),
                "layer": self.layer,
            },
        )

    # ---- one sequence
    def predict_masks(self, video: MaskedVideo) -> Tensor:
        """Masks of a sequence, ``(T, h, w)`` uint8 ids on the host; the first is the given one.

        Raises:
            UserError: the encoder gives features that are not finite.
        """
        recipe, size = self.recipe, (video.masks.shape[1], video.masks.shape[2])
        masks = [video.masks[0]]
        known: _Known | None = None
        for features in self._features(video.frames):
            if known is None:
                cells = (features.shape[0], features.shape[1])
                first = one_hot(video.masks[0], cells, video.objects).to(features.device)
                known = _Known(features, first, recipe.last, recipe.repeat_first)
                continue
            keys, values = known.frames()
            labels = propagate(
                features,
                keys,
                values,
                topk=recipe.topk,
                temperature=recipe.temperature,
                radius=recipe.radius,
                window=recipe.window,
                ties=recipe.ties,
                budget=recipe.budget,
            )
            known.add(features, labels)
            seen = (video.frames.shape[-2], video.frames.shape[-1])
            mask = hard_mask(labels, seen if recipe.upsample == "frame" else size, recipe.floor)
            masks.append(nearest_mask(mask.cpu(), size))
        return torch.stack(masks)

    def _features(self, frames: Tensor) -> Iterator[Tensor]:
        """Maps of the frames, one after the other, ``(h, w, D)`` float32 of length 1."""
        encoder = self.the_encoder()
        for part in frames.to(self.device).split(self.recipe.batch):
            images = part.float() / 255.0
            if self.recipe.deviation is None:
                found = encoder(images)
            else:
                deviation = images.new_tensor(self.recipe.deviation).reshape(3, 1, 1)
                found = encoder.features((images - encoder.mean) / deviation)
            maps = found.last if self.layer is None else found.maps[self.layer]
            if not bool(maps.isfinite().all()):
                raise UserError("the encoder gives features that are not finite: nothing can be followed")
            yield from F.normalize(maps.float(), dim=1).permute(0, 2, 3, 1).contiguous()

    # ---- pictures
    def _folder(self) -> Path:
        return Path(self.trainer.default_root_dir) / "pictures"

    def _draw(self, video: MaskedVideo, masks: Tensor) -> None:
        """A picture of the sequence, if it is one of those that are wanted."""
        total = len(self._data().sequences)
        wanted = min(self.recipe.pictures, total)
        if video.index not in {i * total // wanted for i in range(wanted)}:
            return
        times = spread_frames(len(video), _PICTURED)
        colours = torch.from_numpy(voc_colours()).float() / 255.0
        drawn = mask_strip(video.frames[times].float() / 255.0, video.masks[times], masks[times], colours)
        self._folder().mkdir(parents=True, exist_ok=True)
        name = "".join(letter if letter.isalnum() else "-" for letter in video.name)[:60]
        (self._folder() / f"propagation_{video.index:05d}_{name}.png").write_bytes(png(drawn))


class _Known:
    """Features and labels of the first frame and of the last ones, in buffers written round and round."""

    def __init__(self, features: Tensor, labels: Tensor, last: int, repeat_first: bool) -> None:
        self.last, self.count = last, 0
        self._features = features.new_empty(1 + last, *features.shape)
        self._labels = labels.new_empty(1 + last, *labels.shape)
        self._features[0], self._labels[0] = features, labels
        if repeat_first:
            self.add(features, labels)

    def add(self, features: Tensor, labels: Tensor) -> None:
        """Takes in the newest frame in place of the oldest."""
        if self.last:
            place = 1 + self.count % self.last
            self._features[place], self._labels[place] = features, labels
            self.count += 1

    def frames(self) -> tuple[Tensor, Tensor]:
        """Features ``(m, h, w, D)`` and labels ``(m, h, w, K)``."""
        filled = 1 + min(self.count, self.last)
        return self._features[:filled], self._labels[:filled]


def one_hot(mask: Tensor, cells: Size, objects: int) -> Tensor:
    """Labels of a map's cells, ``(*cells, objects + 1)`` float32, from a mask ``(h, w)`` of ids on the host.

    A cell has the id of the pixel at its centre, as PIL's nearest filter finds it.
    """
    return F.one_hot(nearest_mask(mask, cells).long(), objects + 1).float()


def nearest_mask(mask: Tensor, size: Size) -> Tensor:
    """A mask ``(h, w)`` uint8 on the host at another size, by PIL's nearest filter."""
    if tuple(mask.shape) == tuple(size):
        return mask
    resized = Image.fromarray(mask.numpy()).resize((size[1], size[0]), Image.Resampling.NEAREST)
    return torch.from_numpy(np.array(resized))


def hard_mask(labels: Tensor, size: Size, floor: float = 0.0) -> Tensor:
    """Soft labels as a mask: bilinear, each stretched to [0, 1], the largest wins.

    Of equal ones the lowest id wins. A label that is nowhere stays 0. One that is the same everywhere cannot
    be stretched: without ``floor`` it wins (as the NaN of DINO's code does), with it it becomes 0 (VFS).

    Args:
        labels: ``(h, w, K)``, 0 or more.
        size: height and width of the mask.
        floor: added to the span by which each is divided; much above a label's largest value it hides it.

    Returns:
        ``(*size)`` uint8.
    """
    large = F.interpolate(labels.permute(2, 0, 1)[None], size=size, mode="bilinear", align_corners=False)[0]
    low, high = (found[:, None, None] for found in large.flatten(1).aminmax(dim=1))
    stretched = ((large - low) / (high - low + floor)).nan_to_num(nan=torch.inf)
    return torch.where(high > 0, stretched, 0.0).argmax(dim=0).to(torch.uint8)


def strided(encoder: Encoder, output_stride: int) -> Encoder:
    """A ResNet at another stride; one with a decoder keeps the decoder's.

    Raises:
        UserError: the encoder has no such argument, as vision transformers.
    """
    if isinstance(encoder, DecodedEncoder):
        return encoder
    if "output_stride" not in encoder.init_args:
        raise UserError(
            f"{type(encoder).__name__} cannot be dilated to output_stride {output_stride}: choose a ResNet, "
            "or, for the last map of a vision transformer, --config evaluation/davis_dino.yaml"
        )
    return dilate(encoder, output_stride)


def undilated(encoder: Encoder) -> Encoder:
    """A copy of an encoder without dilation; its maps keep their sizes.

    Raises:
        UserError: it has no dilated convolution.
    """
    made = copy.deepcopy(encoder)
    dilated = [part for part in made.modules() if isinstance(part, nn.Conv2d) and max(part.dilation) > 1]
    if not dilated:
        raise UserError("dilation false: the encoder has none; give output_stride as well, or leave it out")
    for part in dilated:
        part.dilation = (1, 1)
        part.padding = tuple(side // 2 for side in part.kernel_size)
    return made

"""Linear readout for semantic segmentation: frozen features, one 1×1 convolution, nothing else.

Protocol: evaluation-mode features of one layer, standardised per channel with the statistics of the training
images; a 1×1 convolution; logits upsampled bilinearly to the labels; cross-entropy without ignored pixels;
Adam with a half cosine. A gradient step sees random pixels of random images: upsampling is linear, so reading
the *features* at a label's pixel gives exactly the upsampled logits there, at a fraction of the cost.

Two baselines belong next to every number: ``position_prior`` (what the place in the image alone gives away)
and ``same_architecture_random`` (the same network, untrained).
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from poodle_lightning.configured import build, spec
from poodle_lightning.evaluation.metrics import Confusion
from poodle_lightning.nn.encoder import Encoder
from poodle_lightning.nn.observed import observed
from poodle_lightning.ops.geometry import Size, pixels_to_extent, sample
from poodle_lightning.ops.random import fold, key_of, permutation, randint
from poodle_lightning.ops.schedules import warmup_cosine
from poodle_lightning.types import IGNORE, ClassSet, Features, UserError

Labelled = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class ReadoutRecipe:
    """How a linear readout is trained.

    Args:
        steps: Adam steps.
        images: images per step.
        pixels: labelled pixels per step, over all its images.
        lr: learning rate at the start; falls to 0 along half a cosine.
        seed: of the choice of images and pixels; the weights start at 0, so nothing else is random.
        keep_bytes: features of the training images are kept if they fit into this, else computed each time.
    """

    steps: int = 800
    images: int = 32
    pixels: int = 4096
    lr: float = 1e-2
    seed: int = 0
    keep_bytes: int = 1 << 30


class LinearHead(nn.Module):
    """Standardisation and one 1×1 convolution, starting at zero.

    Args:
        mean: ``(C,)`` of the features.
        std: ``(C,)`` of the features.
        classes: number of classes.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Tensor, std: Tensor, classes: int) -> None:
        super().__init__()
        self.register_buffer("mean", mean.float())
        self.register_buffer("std", std.float())
        self.weight = nn.Parameter(mean.new_zeros(classes, len(mean), dtype=torch.float32))
        self.bias = nn.Parameter(mean.new_zeros(classes, dtype=torch.float32))

    def at_points(self, features: Tensor) -> Tensor:
        """Logits ``(..., classes)`` of features ``(..., C)``."""
        return F.linear((features - self.mean) / self.std, self.weight, self.bias)

    def forward(self, features: Tensor, size: Size) -> Tensor:
        """Logits ``(B, classes, *size)`` of a map ``(B, C, h, w)``."""
        logits = self.at_points(features.movedim(1, -1)).movedim(-1, 1)
        return F.interpolate(logits, size=size, mode="bilinear", align_corners=False)


@dataclass(frozen=True)
class Readout:
    """What a linear readout found.

    Args:
        confusion: over all test pixels.
        classes: names and groups.
        head: the trained head.
        layer: of the encoder that was read; None is the last.
        seconds: wall-clock time in all.
    """

    confusion: Confusion
    classes: ClassSet
    head: LinearHead
    layer: str | None
    seconds: float

    def per_class(self) -> dict[str, float]:
        """IoU per class; NaN where truth and prediction lack it."""
        return dict(zip(self.classes.names, self.confusion.iou().tolist(), strict=True))

    def summary(self) -> dict[str, float]:
        """All scalar views, groups included (see ``Confusion.summary``)."""
        return self.confusion.summary(self.classes.numbered())


def linear_readout(
    encoder: Encoder,
    train: Labelled,
    test: Labelled,
    classes: ClassSet,
    recipe: ReadoutRecipe | None = None,
    layer: str | None = None,
) -> Readout:
    """Train a linear head on frozen features and score it.

    Args:
        encoder: left as it was found, modes included.
        train: images ``(N, 3, H, W)`` uint8 and labels ``(N, H, W)`` uint8, 255 = ignore.
        test: the same, of other images.
        classes: names and groups of the label values.
        recipe: steps, batch, learning rate, seed.
        layer: name of the map that is read; None reads the last.

    Raises:
        ValueError: shapes or label values do not fit, or the encoder has no such layer.
        UserError: features are not finite.
    """
    recipe = recipe or ReadoutRecipe()
    started = time.perf_counter()
    for part in (train, test):
        _check(part, classes)
    with observed(encoder):
        mean, std, kept = _statistics(encoder, train[0], layer, recipe)
        with torch.enable_grad():
            head = LinearHead(mean, std, len(classes))
            _train(head, encoder, kept, train, layer, recipe)
        confusion = Confusion(len(classes))
        for images, labels in zip(test[0].split(16), test[1].split(16), strict=True):
            confusion.update(predict(encoder, head, images, layer), labels)
    return Readout(confusion, classes, head, layer, time.perf_counter() - started)


def predict(encoder: Encoder, head: LinearHead, images: Tensor, layer: str | None = None) -> Tensor:
    """Classes ``(N, H, W)`` int64 on the host, of images ``(N, 3, H, W)`` uint8."""
    size = (images.shape[-2], images.shape[-1])
    with observed(encoder):
        logits: Tensor = head(feature_map(encoder, images, layer), size)
    return logits.argmax(dim=1).cpu()


def feature_map(encoder: Encoder, images: Tensor, layer: str | None = None) -> Tensor:
    """One map ``(N, C, h, w)`` float32 of images ``(N, 3, H, W)`` uint8, on the encoder's device.

    Raises:
        ValueError: the encoder has no such layer.
    """
    device = next(encoder.parameters()).device
    features: Features = encoder(images.to(device).float() / 255.0)
    if layer is not None and layer not in features.maps:
        raise ValueError(f"the encoder has no layer {layer!r}, only {', '.join(features.maps)}")
    return (features.last if layer is None else features.maps[layer]).float()


def position_prior(train_labels: Tensor, test_labels: Tensor, classes: int) -> Confusion:
    """Score of guessing, at every pixel position, the class most frequent there in training.

    Args:
        train_labels: ``(N, H, W)`` uint8, 255 = ignore.
        test_labels: ``(M, H, W)`` uint8.
        classes: number of classes. Ties go to the lower value; a position without labels gets the most
            frequent class of all.
    """
    counts = torch.stack([(train_labels == c).sum(dim=0) for c in range(classes)])
    common = counts.sum(dim=(1, 2)).argmax()
    guess = torch.where(counts.sum(dim=0) > 0, counts.argmax(dim=0), common)
    confusion = Confusion(classes)
    confusion.update(guess.expand(test_labels.shape), test_labels)
    return confusion


def same_architecture_random(encoder: Encoder, seed: int = 0) -> Encoder:
    """The same network with fresh random weights, in evaluation mode, on the same device.

    It is built again from its own description, without pretrained weights, so that it starts exactly as
    training does. The global random state is left as it was.
    """
    plain = spec(encoder)
    packages = _without_weights(plain)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would set those of GPUs too
        fresh: Encoder = build(plain, allow=sorted(packages))
    return fresh.to(next(encoder.parameters()).device).eval()


def _without_weights(plain: Any) -> set[str]:
    """Take ``weights`` out of a spec and all specs inside it; returns the packages that it names."""
    packages: set[str] = set()
    if isinstance(plain, dict):
        if "class_path" in plain:
            packages.add(plain["class_path"].split(".")[0])
            if "weights" in plain["init_args"]:
                plain["init_args"]["weights"] = None
        for item in plain.values():
            packages |= _without_weights(item)
    elif isinstance(plain, list):
        for item in plain:
            packages |= _without_weights(item)
    return packages


def _check(part: Labelled, classes: ClassSet) -> None:
    images, labels = part
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(f"images must be (N, 3, H, W) uint8, not {tuple(images.shape)} {images.dtype}")
    if labels.shape != (len(images), *images.shape[-2:]):
        raise ValueError(f"labels must be {(len(images), *images.shape[-2:])}, not {tuple(labels.shape)}")
    strange = labels[(labels >= len(classes)) & (labels != IGNORE)]
    if len(strange):
        raise ValueError(
            f"label value {int(strange[0])} is no class: there are {len(classes)} (and {IGNORE} = ignore)"
        )


def _statistics(
    encoder: Encoder, images: Tensor, layer: str | None, recipe: ReadoutRecipe
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Mean and deviation per channel in one pass, and all features if they fit."""
    kept: list[Tensor] | None = []
    total = squares = torch.zeros(())
    cells = 0
    for number, batch in enumerate(images.split(16)):
        found = feature_map(encoder, batch, layer)
        if number == 0 and found[0].numel() * 4 * len(images) > recipe.keep_bytes:
            kept = None
        if kept is not None:
            kept.append(found)
        wide = found.double()
        total = wide.sum(dim=(0, 2, 3)) + total
        squares = wide.square().sum(dim=(0, 2, 3)) + squares
        cells += found.numel() // found.shape[1]
    mean = total / cells
    if not bool(mean.isfinite().all()):
        raise UserError("the encoder gives features that are not finite: there is nothing to read from them")
    # a channel that never moves carries nothing: dividing by 1 keeps it at 0
    std = (squares / cells - mean.square()).clamp(min=0).sqrt()
    std = torch.where(std > 1e-6 * mean.abs().clamp(min=1e-12), std, torch.ones_like(std))
    return mean, std, None if kept is None else torch.cat(kept)


def _train(
    head: LinearHead,
    encoder: Encoder,
    kept: Tensor | None,
    train: Labelled,
    layer: str | None,
    recipe: ReadoutRecipe,
) -> None:
    optimizer = torch.optim.Adam(head.parameters(), lr=recipe.lr)
    size = (train[1].shape[-2], train[1].shape[-1])
    for step, (rows, y, x) in enumerate(_draws(len(train[0]), size, recipe)):
        with torch.no_grad():
            maps = feature_map(encoder, train[0][rows], layer) if kept is None else kept[rows.to(kept.device)]
            points = pixels_to_extent(torch.stack([x, y], dim=-1).float(), size)[:, :, None]
            features = sample(maps, points.to(maps.device))[..., 0].transpose(1, 2)
        truth = train[1][rows[:, None], y, x].long().to(features.device)
        loss = F.cross_entropy(
            head.at_points(features).flatten(0, 1), truth.flatten(), ignore_index=IGNORE, reduction="sum"
        )
        for group in optimizer.param_groups:
            group["lr"] = warmup_cosine(step, recipe.lr, 0.0, 0.0, recipe.steps)
        optimizer.zero_grad()
        (loss / (truth != IGNORE).sum().clamp(min=1)).backward()
        optimizer.step()


def _draws(count: int, size: Size, recipe: ReadoutRecipe) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Per step: image numbers ``(b,)``, and pixel rows and columns ``(b, p)``."""
    batch = min(recipe.images, count)
    pixels = max(1, recipe.pixels // batch)
    for step in range(recipe.steps):
        key = key_of(recipe.seed, "readout", step)
        rows = permutation(key[None], count)[0, :batch]
        place = randint(fold(key, "pixels")[None], size[0] * size[1], batch * pixels).reshape(batch, pixels)
        yield rows, place // size[1], place % size[1]

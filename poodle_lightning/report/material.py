"""What a report shows beyond the run's files: computed from the trained method on held-out clips."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields, replace
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from poodle_lightning.data.label_sets import BDD100K
from poodle_lightning.evaluation.linear_readout import (
    Readout,
    ReadoutRecipe,
    feature_map,
    linear_readout,
    position_prior,
    predict,
    same_architecture_random,
)
from poodle_lightning.evaluation.metrics import Confusion
from poodle_lightning.methods.base import Method
from poodle_lightning.nn.encoder import Encoder
from poodle_lightning.nn.observed import observed
from poodle_lightning.nn.patches import whole_patches
from poodle_lightning.nn.vit import ViT
from poodle_lightning.types import ClassSet, Clip, Look


@dataclass(frozen=True)
class FeatureMaps:
    """The deepest maps of the same held-out frames, trained and untrained.

    Args:
        images: ``(B, 3, H, W)`` in [0, 1], all first frames of a batch.
        trained: ``(B, C, h, w)``.
        untrained: ``(B, C, h, w)`` of the same architecture, freshly initialised.
    """

    images: Tensor
    trained: Tensor
    untrained: Tensor


@dataclass(frozen=True)
class AttentionMaps:
    """Where [CLS] of a vision transformer looks in its last block, trained and untrained.

    Args:
        images: ``(B, 3, H, W)`` in [0, 1].
        trained: ``(B, heads, h, w)``.
        untrained: ``(B, heads, h, w)`` of the same architecture, freshly initialised.
    """

    images: Tensor
    trained: Tensor
    untrained: Tensor


@dataclass(frozen=True)
class LabelReadout:
    """Linear readouts on labelled clips and what they predict.

    Args:
        trained: of the trained encoder.
        untrained: of the same architecture, freshly initialised.
        prior: guessing the class most frequent at each position.
        images: ``(B, 3, H, W)`` in [0, 1], some test frames.
        labels: ``(B, H, W)`` their labels.
        predictions: ``(B, H, W)`` of the trained encoder's readout.
    """

    trained: Readout
    untrained: Readout
    prior: Confusion
    images: Tensor
    labels: Tensor
    predictions: Tensor


@dataclass(frozen=True)
class Material:
    """All of it; what is None is left out of the page.

    Args:
        method: name of the method.
        step: optimiser step of the weights.
        held_out: the frames shown were not trained on.
        look: what the method sees of a batch.
        features: feature maps on held-out frames.
        readout: linear readouts, when there are labels.
        attention: attention maps on held-out frames, of a vision transformer with a class token.
        tracks: of each clip of ``look``, ``(P, F, 2)`` places of the tracks that are active on its first
            frame, in extent coordinates of that frame; NaN before and after a track.
    """

    method: str | None = None
    step: int | None = None
    held_out: bool = True
    look: Look | None = None
    features: FeatureMaps | None = None
    readout: LabelReadout | None = None
    attention: AttentionMaps | None = None
    tracks: tuple[Tensor, ...] = ()


def gather(
    method: Method,
    clips: Iterable[Clip],
    training: Iterable[Clip] = (),
    *,
    held_out: bool = True,
    step: int | None = None,
    pairs: int = 3,
    labelled: int = 300,
    classes: ClassSet = BDD100K,
    recipe: ReadoutRecipe | None = None,
    tracks: Callable[[Clip], tuple[Tensor, ...]] | None = None,
) -> Material:
    """Compute what there is to see.

    Args:
        method: with its trained weights.
        clips: pictures come from the first batch; the readout is tested on all of them.
        training: clips for fitting the readout, others than ``clips``; only asked for where there are labels.
        held_out: ``clips`` were not trained on.
        step: optimiser step of the weights.
        pairs: pairs drawn.
        labelled: most labelled frames used on either side of the readout.
        classes: names of the label values.
        recipe: of the readout.
        tracks: finds the tracks of a batch, one for each clip; see ``Material.tracks``.
    """
    source = iter(clips)
    first = next(source, None)
    name = type(method).__name__
    if first is None:
        return Material(name, step, held_out)
    device = next(method.parameters()).device
    with observed(method):
        whole = _on_host(method.look(first.to(device)))
    encoder = method.backbone()
    random = same_architecture_random(encoder)
    # one frame per clip: its frames look nearly the same
    images = whole_patches(whole.frames[:, 0], encoder)
    stored = (images * 255).round().to(torch.uint8)
    maps = []
    for net in (encoder, random):
        with observed(net):
            maps.append(feature_map(net, stored).cpu())
    looks = _attention(encoder, random, images)
    readout = None
    if first.labels is not None:
        train = _labelled(training, labelled, encoder)
        test = None if train is None else _labelled(chain([first], source), labelled, encoder)
        if train is not None and test is not None:
            readout = read_labels(encoder, random, train, test, classes, recipe or ReadoutRecipe())
    features, shown = FeatureMaps(images, *maps), first_pairs(whole, pairs)
    ways = () if tracks is None else tracks(first[:pairs])
    return Material(name, step, held_out, shown, features, readout, looks, ways)


def first_pairs(look: Look, pairs: int) -> Look:
    """A look at fewer clips; views stay whole (their rows need not be the clips')."""
    total = len(look.frames)
    kept = min(pairs, total)
    directed = torch.cat([torch.arange(kept), torch.arange(kept) + total])
    parts: dict[str, Any] = {"frames": look.frames[:kept]}
    if look.flow is not None:
        parts["flow"] = look.flow[directed]
    if look.visible is not None:
        parts["visible"] = look.visible[directed]
    if look.boxes is not None:
        per_image = len(look.boxes[0]) // (2 * total)
        rows = (directed[:, None] * per_image + torch.arange(per_image)).flatten()
        parts["boxes"] = (look.boxes[0][rows], look.boxes[1][rows])
        if look.crops is not None:
            parts["crops"] = (look.crops[0][rows], look.crops[1][rows])
        if look.same is not None:
            parts["same"] = look.same[rows]
    for name in ("large", "small", "hidden", "restored", "points"):
        whole = getattr(look, name)
        parts[name] = None if whole is None else whole[:kept]
    if look.pooling is not None:
        parts["pooling"] = {layer: weights[:kept] for layer, weights in look.pooling.items()}
    if look.objects is not None:
        found = {part.name: getattr(look.objects, part.name) for part in fields(look.objects)}
        some: dict[str, Any] = {
            name: value[:kept] for name, value in found.items() if isinstance(value, Tensor)
        }
        parts["objects"] = replace(look.objects, **some)
    return Look(**parts, views=look.views)


def _attention(encoder: Encoder, random: Encoder, images: Tensor) -> AttentionMaps | None:
    """Attention of [CLS] to the patches in both networks, where there is a [CLS]."""
    found = []
    for net in (encoder, random):
        if not isinstance(net, ViT) or net.cls_token is None:
            return None
        with observed(net):
            looked = net.look(images.to(net.cls_token.device))
        assert looked.attention is not None
        found.append(looked.attention[:, :, 0, 1:].unflatten(-1, looked.last.shape[-2:]).cpu())
    return AttentionMaps(images, *found)


def _on_host(look: Look) -> Look:
    """Every tensor of a look on the CPU."""

    def moved(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.detach().cpu()
        if isinstance(value, tuple):
            return tuple(moved(item) for item in value)
        if isinstance(value, Mapping):
            return {name: moved(item) for name, item in value.items()}
        if hasattr(value, "__dataclass_fields__"):
            return type(value)(**{name: moved(getattr(value, name)) for name in value.__dataclass_fields__})
        return value

    host: Look = moved(look)
    return host


def _labelled(clips: Iterable[Clip], most: int, encoder: Encoder) -> tuple[Tensor, Tensor] | None:
    """First frames and labels of clips, at most so many, as the encoder takes them; None without labels."""
    images: list[Tensor] = []
    labels: list[Tensor] = []
    for clip in clips:
        found = clip.unit_labels()
        if found is None:
            return None
        frames = whole_patches(clip.unit()[:, 0], encoder)
        images.append((frames * 255).round().to(torch.uint8).cpu())
        labels.append(whole_patches(found[:, 0], encoder).cpu())
        if sum(map(len, images)) >= most:
            break
    return (torch.cat(images)[:most], torch.cat(labels)[:most]) if images else None


def read_labels(
    encoder: Encoder,
    random: Encoder,
    train: tuple[Tensor, Tensor],
    test: tuple[Tensor, Tensor],
    classes: ClassSet,
    recipe: ReadoutRecipe,
) -> LabelReadout:
    """Readouts of an encoder, its untrained twin and position alone, on images and labels (N, …) uint8."""
    trained, untrained = (linear_readout(net, train, test, classes, recipe) for net in (encoder, random))
    prior = position_prior(train[1], test[1], len(classes))
    shown = test[0][:4]
    return LabelReadout(
        trained, untrained, prior, shown.float() / 255, test[1][:4], predict(encoder, trained.head, shown)
    )

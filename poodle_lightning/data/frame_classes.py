"""Any ImageNet classifier on frames of videos: which class it puts first.

=================================  =======================================================================
``torchvision:NAME[:WEIGHTS]``     torchvision's classifier; WEIGHTS is a name (default: the best), or a file
``timm:NAME[:FILE]``               timm's, e.g. ``timm:resnet50.a1_in1k``; FILE in place of its weights
a file                             a state dict of a ResNet with its last layer, torchvision's names
=================================  =======================================================================

A classifier of as many outputs as a release of ImageNet has classes (1,000, 21,841, …) is taken to have them
in their usual order.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as F

from poodle_lightning.data.titles import TitleClass, words
from poodle_lightning.nn.resnet import depth_of
from poodle_lightning.nn.weights import load_state, read_state
from poodle_lightning.types import UserError

_LIBRARIES = ("torchvision:", "timm:")
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_USUAL = 1000  # outputs; no part of a network but its last layer is so wide


@dataclass(frozen=True)
class Sight:
    """How a classifier is shown an image: its shorter side is resized, the middle cut out, then normalised.

    Args:
        resize: px.
        crop: side of the square, px.
        mean: of RGB in [0, 1].
        std: of RGB in [0, 1].
        interpolation: of the resizing, as torchvision names it.
    """

    resize: int = 256
    crop: int = 224
    mean: tuple[float, ...] = _MEAN
    std: tuple[float, ...] = _STD
    interpolation: str = "bilinear"


@dataclass(frozen=True, eq=False)
class FrameClassifier:
    """A classifier and what belongs to it.

    Args:
        model: images ``(n, 3, crop, crop)`` to ``(n, outputs)``.
        sight: how it is shown images.
        outputs: number of its classes.
        device: where the model is.
    """

    model: nn.Module
    sight: Sight
    outputs: int
    device: torch.device

    def shrink(self, frame: np.ndarray) -> Tensor:
        """What the classifier is shown of a frame, before normalisation.

        Args:
            frame: ``(H, W, 3)`` uint8 RGB.

        Returns:
            ``(3, crop, crop)`` uint8.
        """
        image = torch.from_numpy(np.ascontiguousarray(frame)).permute(2, 0, 1)
        mode = InterpolationMode(self.sight.interpolation)
        resized = F.resize(image, [self.sight.resize], interpolation=mode, antialias=True)
        return F.center_crop(resized, [self.sight.crop, self.sight.crop])

    @torch.inference_mode()
    def top1(self, images: Tensor, batch: int = 64) -> np.ndarray:
        """The first class of every image, ``(n,)`` int64.

        Args:
            images: ``(n, 3, crop, crop)`` uint8, see ``shrink``.
            batch: so many at once.

        Raises:
            UserError: the device has no room for them.
        """
        found = []
        try:
            for part in images.split(batch):
                pixels = part.to(self.device, non_blocking=True).float().div(255)
                scores = self.model(F.normalize(pixels, list(self.sight.mean), list(self.sight.std)))
                found.append(scores.argmax(1))
            return torch.cat(found).cpu().numpy()
        except torch.OutOfMemoryError as error:
            raise UserError(
                f"--batch {batch}: {self.device} has no room for so many frames: give less"
            ) from error

    def fingerprint(self) -> str:
        """Hash of the weights and of how images are shown: 32 hexadecimal digits."""
        digest = hashlib.blake2b(repr(self.sight).encode(), digest_size=16)
        for name, value in self.model.state_dict().items():
            digest.update(name.encode())
            digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()


def load_classifier(source: str, device: str = "cpu") -> FrameClassifier:
    """A classifier with its weights, ready to be used; see the module for the names.

    Raises:
        UserError: there is no such classifier or file, they do not fit, the weights cannot be fetched, or the
            device is not there.
    """
    if source.startswith(_LIBRARIES):
        library, _, rest = source.partition(":")
        name, _, weights = rest.partition(":")
        model, sight = _torchvision(name, weights) if library == "torchvision" else _timm(name, weights)
    else:
        model, sight = _resnet_file(source)
    try:
        place = torch.device(device)
        model = model.eval().to(place)
        with torch.inference_mode():
            shape = model(torch.zeros(1, 3, sight.crop, sight.crop, device=place)).shape
    except (RuntimeError, AssertionError) as error:  # torch without CUDA asserts
        raise UserError(f"--device {device}: {str(error).splitlines()[0]}") from error
    if len(shape) != 2 or shape[1] < 2:
        raise UserError(f"--classifier {source}: gives {tuple(shape)} for an image: it is no classifier")
    return FrameClassifier(model, sight, int(shape[1]), place)


def _torchvision(name: str, weights: str) -> tuple[nn.Module, Sight]:
    from torchvision import models

    if name not in models.list_models(module=models):
        raise UserError(f"--classifier torchvision:{name}: torchvision has no such classifier, e.g. resnet50")
    known = models.get_model_weights(name)
    members = known.__members__
    if weights and weights not in members:
        state = _state(weights, f"torchvision:{name}", f"a file, or one of {', '.join(members)}")
        entry = next((one for one in known if one.url.endswith(f"/{Path(weights).name}")), next(iter(known)))
        model = _filled(partial(models.get_model, name, weights=None), state, weights)
    else:
        entry = members[weights or "DEFAULT"]
        try:
            model = models.get_model(name, weights=entry)
        except (OSError, RuntimeError) as error:  # also of the URL; a damaged file in torch's cache
            raise UserError(_unfetched(f"torchvision:{name}", error, entry.url)) from error
    shown: Any = entry.transforms()
    mode = shown.interpolation.value
    (resize,), (crop,) = shown.resize_size, shown.crop_size
    return model, Sight(resize, crop, tuple(shown.mean), tuple(shown.std), mode)


def _timm(name: str, weights: str) -> tuple[nn.Module, Sight]:
    import timm
    from timm.data import resolve_model_data_config

    if not timm.is_model(name.partition(".")[0]) or not _has_tag(name):
        raise UserError(f"--classifier timm:{name}: timm has no such model, e.g. timm:resnet50.a1_in1k")
    if weights:
        state = _state(weights, f"timm:{name}", "a file of its weights")
        model = _filled(partial(timm.create_model, name, pretrained=False), state, weights)
    else:
        try:
            model = timm.create_model(name, pretrained=True)
        except Exception as error:  # timm, huggingface_hub, httpx and safetensors have errors of their own
            raise UserError(_unfetched(f"timm:{name}", error, "")) from error
        if getattr(model, "num_classes", None) == 0:
            raise UserError(f"--classifier timm:{name}: has no last layer: it is no classifier")
    shown = resolve_model_data_config(model)
    crop = int(shown["input_size"][-1])
    sight = (int(crop / shown["crop_pct"]), crop, tuple(shown["mean"]), tuple(shown["std"]))
    return model, Sight(*sight, shown["interpolation"])


def _has_tag(name: str) -> bool:
    """Whether timm knows the weights that a name asks for after its dot."""
    from timm.models import get_pretrained_cfg

    try:
        get_pretrained_cfg(name)
    except RuntimeError:
        return False
    return True


def _resnet_file(source: str) -> tuple[nn.Module, Sight]:
    from torchvision import models

    state = _state(source, "", "torchvision:NAME, timm:NAME or a file of weights")
    blocks = [len({key.split(".")[1] for key in state if key.startswith(f"layer{n}.")}) for n in range(1, 5)]
    first, second, third, fourth = blocks
    depth = depth_of((first, second, third, fourth), bottleneck="layer1.0.conv3.weight" in state)
    if depth is None or "fc.weight" not in state:
        lacking = "has no last layer (fc)" if depth is not None else "is no ResNet"
        raise UserError(
            f"--classifier {source}: {lacking}; give torchvision:NAME:{source} or timm:NAME:{source}, of a "
            "model with its classifier"
        )
    return _filled(partial(models.get_model, f"resnet{depth}", weights=None), state, source), Sight()


def _state(path: str, before: str, wanted: str) -> dict[str, Tensor]:
    given = f"{before}:{path}" if before else path
    if not Path(path).is_file():
        raise UserError(f"--classifier {given}: there is no file {path}; give {wanted}")
    return {key.removeprefix("module."): value for key, value in read_state(path).items()}


def _filled(build: Callable[..., Any], state: Mapping[str, Tensor], source: str) -> nn.Module:
    """A model with weights, of as many classes as those have.

    Which tensor tells that is the model's to say: a file may hold its tensors in any order.
    """
    model: nn.Module = build(num_classes=_USUAL)
    last = [name for name, value in model.state_dict().items() if value.shape[:1] == (_USUAL,)][-1:]
    found = [state[name].shape[0] for name in last if name in state and state[name].ndim]
    if found and found[0] != _USUAL:
        model = build(num_classes=found[0])
    load_state(model, state, source)
    return model


def _unfetched(name: str, error: Exception, address: str) -> str:
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    where = f" ({address})" if address else ""
    return (
        f"--classifier {name}: its weights cannot be fetched ({reason}): copy the file{where} here and give "
        f"{name}:FILE"
    )


def outputs_of(classes: Sequence[TitleClass], outputs: int) -> list[int]:
    """Which output of a classifier stands for each class.

    By the class's ``index``, or else by its WordNet id or its names among ImageNet's if the classifier has as
    many outputs; failing that the two lists are taken to be in the same order, if they are equally long.

    Args:
        classes: that are looked for.
        outputs: of the classifier.

    Returns:
        Its number for every class.

    Raises:
        UserError: the classifier is of another label set, or a class may be two of its outputs.
    """
    labels = _labels(outputs)
    if labels is None and any(one.index is None for one in classes) and len(classes) != outputs:
        raise UserError(
            f"--classifier is of another label set: it has {outputs} outputs, --classes {len(classes)} "
            "classes; give one of the same classes, or say which output is whose by index in the JSON"
        )
    found = []
    for place, one in enumerate(classes):
        if one.index is not None:
            found.append(_agreed(one, one.index, labels))
        elif labels is None:
            found.append(place)
        else:
            found.append(_output(one, labels, place if len(classes) == outputs else None))
        if found[-1] >= outputs:
            raise UserError(
                f"--classifier is of another label set: {one.key} is its output {found[-1]} by --classes, "
                f"but it has {outputs} (from 0): mend the index, or give another classifier"
            )
    if len(set(found)) < len(found):
        twice = next(output for output in found if found.count(output) > 1)
        pair = [one.key for one, output in zip(classes, found, strict=True) if output == twice]
        raise UserError(
            f"--classes: {' and '.join(pair[:2])} are the same output of the classifier, {twice}: give one"
        )
    return found


@dataclass(frozen=True)
class _Labels:
    by_wnid: dict[str, int]
    by_name: dict[tuple[str, ...], set[int]]
    release: str


def _labels(outputs: int) -> _Labels | None:
    from timm.data import ImageNetInfo, infer_imagenet_subset

    release = infer_imagenet_subset({"num_classes": outputs})
    if release is None:
        return None
    info = ImageNetInfo(release)
    by_name: dict[tuple[str, ...], set[int]] = defaultdict(set)
    for number in range(outputs):
        for name in info.index_to_description(number).split(","):
            by_name[words(name)].add(number)
    return _Labels({wnid: n for n, wnid in enumerate(info.label_names())}, by_name, release)


def _agreed(one: TitleClass, index: int, labels: _Labels | None) -> int:
    """A class's index, if its WordNet id has no other one among the classifier's."""
    known = index if labels is None or one.wnid is None else labels.by_wnid.get(one.wnid, index)
    if labels is not None and known != index:
        raise UserError(
            f"--classifier is of another label set: {one.key} is its output {index} by --classes, but in its "
            f"{labels.release} {known}: remove the index or the wnid, or give another classifier"
        )
    return index


def _output(one: TitleClass, labels: _Labels, place: int | None) -> int:
    if one.wnid is not None:
        if one.wnid not in labels.by_wnid:
            raise UserError(
                f"--classifier is of another label set: {one.wnid} ({one.names[0]}) is no class of its "
                f"{labels.release}: remove it from --classes, or give another classifier"
            )
        return labels.by_wnid[one.wnid]
    first = labels.by_name.get(words(one.names[0]), set())
    found = first or set().union(*(labels.by_name.get(words(name), set()) for name in one.names))
    if len(found) == 1:
        return next(iter(found))
    if place in found:
        return int(place)
    if found:
        raise UserError(
            f"--classes: {one.key} may be any of the outputs {', '.join(map(str, sorted(found)))} of the "
            "classifier: give its wnid or its index"
        )
    raise UserError(
        f"--classifier is of another label set: {one.key} is no class of its {labels.release}: give a wnid "
        "or a synonym that is, remove it from --classes, or give another classifier"
    )

"""Any image model of timm (https://github.com/huggingface/pytorch-image-models) as an encoder."""

from __future__ import annotations

from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any

import timm
from torch import Tensor, nn

from poodle_lightning.nn.encoder import IMAGENET_MEAN, IMAGENET_STD, Encoder
from poodle_lightning.nn.weights import load_state, read_state
from poodle_lightning.types import Features, UserError

PRETRAINED = "pretrained"
# What makes timm's models take images of other sizes; each model knows at most one of them.
_ANY_SIZE: tuple[dict[str, Any], ...] = ({"dynamic_img_size": True}, {"strict_img_size": False}, {})


class TimmEncoder(Encoder):
    """A model of timm without classifier; a map per stage (per block for transformers), vector = pooled.

    Maps are timm's ``forward_intermediates``, named by the module they come from without dots
    (``stages0``, ``layers1``, ``layer4``, ``blocks3``); the vector is what timm's classifier reads
    (``forward_head(pre_logits=True)``). Mean and deviation are those of the weights' own configuration.
    For torchvision's ResNets and plain vision transformers use ``ResNet`` and ``ViT``.

    Args:
        name: timm's name, with or without the tag of its weights, e.g. ``"convnext_tiny.fb_in1k"``.
        weights: None: untrained; ``"pretrained"``: those that timm offers under the tag; or the path of a
            state dict with timm's names (a classifier in it is left out).
        output_stride: turns strides of the last stages into dilation, where the model can do that.
        norm: the deepest map goes through the model's last normalisation, as the vector does (Swin; plain
            transformers: all maps). For methods that train maps and not the vector: without, the parameters
            of that layer get no gradient from them.

    Raises:
        UserError: timm has no such model or weights, or the model gives no maps or cannot be dilated.
    """

    def __init__(
        self,
        name: str,
        weights: str | None = None,
        output_stride: int | None = None,
        norm: bool = False,
    ) -> None:
        check_name(name)
        model: Any = _create(name, weights == PRETRAINED, output_stride)
        if not hasattr(model, "forward_intermediates"):
            raise UserError(f"timm:{name} gives no maps of its stages: choose another model")
        stages: list[Mapping[str, Any]] = list(model.feature_info)
        names = [str(stage["module"]).replace(".", "") for stage in stages]
        configured: Mapping[str, Any] = model.pretrained_cfg or {}
        super().__init__(
            channels={layer: int(stage["num_chs"]) for layer, stage in zip(names, stages, strict=True)},
            strides={layer: int(stage["reduction"]) for layer, stage in zip(names, stages, strict=True)},
            mean=configured.get("mean") or IMAGENET_MEAN,
            std=configured.get("std") or IMAGENET_STD,
        )
        self.model: Any = model
        self.norm = norm
        if weights is not None and weights != PRETRAINED:
            load_state(model, _without_classifier(read_state(weights), model), f"weights {weights!r}")

    @property
    def vector_dim(self) -> int:
        """Length of the pooled vector; in some models another than the channels of the last map."""
        return int(getattr(self.model, "head_hidden_size", None) or self.model.num_features)

    def features(self, normalised: Tensor) -> Features:
        """A map per stage and the pooled vector."""
        last, maps = self.model.forward_intermediates(normalised, norm=self.norm)
        return Features(
            maps=dict(zip(self.channels, maps, strict=True)),
            strides=dict(self.strides),
            vector=self.model.forward_head(last, pre_logits=True),
        )


def check_name(name: str) -> None:
    """Says which name was probably meant where timm has no such model or no such tag.

    Raises:
        UserError: in that case.
    """
    architecture, _, tag = name.partition(".")
    if timm.is_model(name):
        known = timm.list_pretrained(f"{architecture}.*")
        if not tag or name in known:
            return
        close = get_close_matches(name, known, n=3) or known[:3]
    else:
        close = get_close_matches(name, timm.list_models() + timm.list_pretrained(), n=3, cutoff=0.5)
    hint = f"did you mean {', '.join(close)}?" if close else "timm.list_models() names all"
    raise UserError(f"timm has no model {name!r}: {hint}")


def _create(name: str, pretrained: bool, output_stride: int | None) -> nn.Module:
    for options in _ANY_SIZE:
        try:
            return timm.create_model(
                name, pretrained=pretrained, num_classes=0, output_stride=output_stride, **options
            )
        except TypeError as error:  # the model does not know one of the arguments
            reason: Exception = error
        except Exception as error:  # no network, no weights, no access, ...: each has its own class
            reason = error
            break
    if output_stride is not None and ("output_stride" in str(reason) or isinstance(reason, AssertionError)):
        raise UserError(
            f"timm:{name} cannot be dilated to output_stride {output_stride}: "
            "read it at its own strides (--model.output_stride null), or choose a ResNet"
        ) from reason
    lines = str(reason).strip().splitlines() or [type(reason).__name__]
    if pretrained:
        raise UserError(
            f"weights of timm:{name} could not be fetched ({lines[0]}): download them elsewhere and give "
            f"the file's path as weights of TimmEncoder, or take timm:{name}:untrained"
        ) from reason
    raise UserError(f"timm:{name} cannot be built ({lines[0]}): choose another model") from reason


def _without_classifier(state: Mapping[str, Tensor], model: Any) -> dict[str, Tensor]:
    classifier = (model.pretrained_cfg or {}).get("classifier") or ()
    heads = (classifier,) if isinstance(classifier, str) else tuple(classifier)
    return {
        key: value for key, value in state.items() if not any(key.startswith(f"{head}.") for head in heads)
    }

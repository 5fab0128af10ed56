"""Encoders by the names that torchvision and timm give them: ``torchvision:resnet50``, ``timm:...``."""

from __future__ import annotations

from difflib import get_close_matches
from typing import Any

from timm.models.vision_transformer import Block, VisionTransformer

from poodle_lightning.nn.encoder import IMAGENET_MEAN, IMAGENET_STD, Encoder
from poodle_lightning.nn.resnet import Depth, ResNet
from poodle_lightning.nn.timm_encoder import PRETRAINED, TimmEncoder
from poodle_lightning.nn.vit import ViT
from poodle_lightning.types import UserError

SOURCES = ("torchvision:", "timm:")
UNTRAINED = "untrained"
_DEPTHS: dict[str, Depth] = {"resnet18": 18, "resnet34": 34, "resnet50": 50, "resnet101": 101}


def is_name(source: str) -> bool:
    """Whether :func:`named` is meant."""
    return source.startswith(SOURCES)


def named(source: str) -> Encoder:
    """An encoder of torchvision or timm with its weights.

    torchvision's and timm's plain ResNets become :class:`ResNet` (which can be dilated), timm's plain vision
    transformers :class:`ViT`, all others of timm :class:`TimmEncoder`.

    Args:
        source: ``torchvision:NAME`` (the best weights, torchvision's ``DEFAULT``),
            ``torchvision:NAME:WEIGHTS`` (e.g. ``IMAGENET1K_V1``), ``timm:NAME`` or ``timm:NAME.TAG``; with
            ``:untrained`` at the end without weights.

    Raises:
        UserError: there is no such model or no such weights, or they cannot be fetched.
    """
    library, _, rest = source.partition(":")
    name, _, which = rest.partition(":")
    return _torchvision(name, which) if library == "torchvision" else _timm(name, which)


def _torchvision(name: str, which: str) -> Encoder:
    if name not in _DEPTHS:
        close = get_close_matches(name, _DEPTHS, n=2, cutoff=0.5)
        hint = f"did you mean {' or '.join(close)}?" if close else f"choose from {', '.join(_DEPTHS)}"
        raise UserError(f"torchvision:{name} is not offered: {hint} (others by timm:NAME)")
    if which == UNTRAINED:
        return ResNet(_DEPTHS[name])
    from torchvision.models import get_model_weights

    known = get_model_weights(name)
    if which and which not in known.__members__:
        close = get_close_matches(which, [*known.__members__, UNTRAINED], n=1, cutoff=0.3)
        hint = f"did you mean {close[0]}?" if close else f"choose from {', '.join(known.__members__)}"
        raise UserError(f"torchvision has no weights {which!r} for {name}: {hint}")
    return ResNet(_DEPTHS[name], weights=which if which and which != "DEFAULT" else known.DEFAULT.name)


def _timm(name: str, which: str) -> Encoder:
    if which not in ("", UNTRAINED):
        raise UserError(
            f"timm:{name}:{which} is not offered: write timm:{name}.TAG or timm:{name}:{UNTRAINED}"
        )
    found = TimmEncoder(name, None if which else PRETRAINED)
    own = _own(name, found)
    if own is None:
        return found
    own.load_state_dict(found.model.state_dict())
    return own


def _own(name: str, found: TimmEncoder) -> Encoder | None:
    """This package's class with the same function, untrained, if there is one."""
    model = found.model
    mean, std = _colours(found)
    depth = _DEPTHS.get(name.partition(".")[0])
    if depth is not None and mean == IMAGENET_MEAN and std == IMAGENET_STD:
        return ResNet(depth)
    if type(model) is not VisionTransformer or model.pos_embed is None or not model.blocks:
        return None
    patch, size = model.patch_embed.patch_size[0], model.patch_embed.img_size
    plain = type(model.blocks[0]) is Block and hasattr(model.blocks[0].mlp, "fc1")
    if not plain or size[0] % patch or size[1] % patch:
        return None
    block = model.blocks[0]
    own = ViT(
        patch=patch,
        dim=model.embed_dim,
        depth=len(model.blocks),
        heads=block.attn.num_heads,
        image_size=size,
        mlp_ratio=block.mlp.fc1.out_features / model.embed_dim,
        qkv_bias=block.attn.qkv.bias is not None,
        class_token=model.cls_token is not None,
        mean=mean,
        std=std,
    )
    return own if _same(model, own) else None


def _same(model: Any, own: ViT) -> bool:
    """Whether timm's network is a plain one: the same parts, parameters and position embeddings."""
    parts = ("patch_embed", "blocks", "norm")
    ours, theirs = own.state_dict(), model.state_dict()
    return (
        all(repr(getattr(model, part)) == repr(getattr(own, part)) for part in parts)
        and ours.keys() == theirs.keys()
        and all(ours[key].shape == theirs[key].shape for key in ours)
        and not model.no_embed_class
        and model.global_pool == ("token" if model.cls_token is not None else "avg")
    )


def _colours(found: TimmEncoder) -> tuple[tuple[float, ...], tuple[float, ...]]:
    cfg = found.model.pretrained_cfg or {}
    return tuple(cfg.get("mean") or IMAGENET_MEAN), tuple(cfg.get("std") or IMAGENET_STD)

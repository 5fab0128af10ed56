"""Encoders to and from disk: folders as on the Hugging Face hub, checkpoints, files of other projects.

A folder holds ``model.safetensors``, ``config.json`` (the encoder's spec) and ``README.md`` (a card);
uploaded as it is, it is a repository of the hub. A checkpoint of a run carries the same spec under
``"poodle_lightning"``. Nothing that is read here is ever unpickled or executed.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import poodle_lightning
from poodle_lightning.configured import Configured, build, spec, untrained
from poodle_lightning.nn.encoder import DecodedEncoder, Encoder
from poodle_lightning.nn.foreign import Network, find, infer, summary, translate
from poodle_lightning.nn.named import is_name, named
from poodle_lightning.nn.online import Online
from poodle_lightning.nn.weights import load_state, read_file, state_in
from poodle_lightning.types import UserError

FORMAT = 1
_WEIGHTS, _CONFIG, _CARD = "model.safetensors", "config.json", "README.md"
_ALLOW = ("poodle_lightning",)
_LAST = "checkpoints/last.ckpt"  # in the folder of a run
_STATE_FILES = (".pth", ".pt", ".safetensors")
_log = logging.getLogger(__name__)


def save_pretrained(encoder: Encoder, folder: str | Path, card: str | None = None) -> Path:
    """Writes an encoder so that :func:`from_pretrained` gives it back bit by bit.

    Args:
        encoder: any encoder of the package, with its decoder or without.
        folder: made if needed; files of the same names in it are replaced, each in one step.
        card: text of ``README.md``; None writes a short one.

    Returns:
        The folder.

    Raises:
        TypeError: the encoder was made with an argument that has no plain form.
        UserError: the folder cannot be written.
    """
    folder = Path(folder)
    config = {
        "format": FORMAT,
        "version": poodle_lightning.__version__,
        "encoder": untrained(spec(encoder)),  # no path of this machine in a published file
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _write_safetensors(encoder.state_dict(), folder / _WEIGHTS)
        _write_text(json.dumps(config, indent=2) + "\n", folder / _CONFIG)
        _write_text(_default_card(encoder) if card is None else card, folder / _CARD)
    except OSError as error:
        raise UserError(
            f"{folder} cannot be written ({error.strerror or error}): choose another folder"
        ) from error
    return folder


def from_pretrained(path: str | Path, allow: Sequence[str] = _ALLOW) -> Encoder:
    """An encoder with its weights, in eval mode, on the CPU.

    Args:
        path: a folder of :func:`save_pretrained`; the folder of a run (its ``last.ckpt``) or a ``.ckpt``
            in it; the name ``owner/name`` of a repository on the Hugging Face hub; or ``torchvision:NAME`` or
            ``timm:NAME``, see :func:`poodle_lightning.nn.named.named`.
        allow: packages whose classes the file may name; add the package of your own encoder.

    Raises:
        UserError: nothing is there, it is truncated, or its weights do not fit its description.
    """
    if is_name(str(path)):
        return named(str(path)).eval()
    place = Path(path)
    if (place / _LAST).is_file():
        place = place / _LAST
    if place.is_dir():
        return _from_folder(place, allow)
    if place.is_file() or place.suffix == ".ckpt":
        return _from_checkpoint(read_file(place), place, allow)
    return _from_folder(_download(str(path)), allow)


def load_encoder(
    source: str | Path,
    encoder: Encoder | Mapping[str, Any] | None = None,
    allow: Sequence[str] = _ALLOW,
    network: Network | None = None,
) -> Encoder:
    """Like :func:`from_pretrained`, and also from a checkpoint file of another project.

    Which projects: ``poodle_lightning.nn.foreign.FORMATS`` (torchvision, timm, DINO, iBOT, DoRA, MoCo v1 to
    v3, DenseCL, PixPro, MAE, SwAV, VICReg, the PooDLe authors' files, ...). How many keys matched and what
    was left over is logged.

    Args:
        source: what :func:`from_pretrained` takes, or a file with a state dict.
        encoder: an encoder, or a spec of one, that the file's weights are put into; None: the file describes
            it, or the architecture is inferred from names and shapes.
        allow: see :func:`from_pretrained`.
        network: ``"online"`` (student, query) or ``"teacher"`` (target, key) where a file of another project
            holds both; None: the teacher for DINO, iBOT and DoRA, online for all others.

    Returns:
        The encoder in eval mode; where one was given, that same one.

    Raises:
        UserError: see :func:`from_pretrained`; or no key matches, keys are missing, or shapes differ.
    """
    path = Path(source)
    if encoder is None and (is_name(str(source)) or not path.is_file()):
        _one_network(str(source), network)
        own = from_pretrained(source, allow)
        _log.info("%s: %s, all %d keys matched", source, type(own).__name__, len(own.state_dict()))
        return own
    content = read_file(path, leave_out_objects=True)
    if encoder is not None:
        made = encoder if isinstance(encoder, Encoder) else _build(dict(encoder), str(path), allow)
        return _fill(made, content, path, network)
    if "poodle_lightning" in content:
        _one_network(str(path), network)
        own = _from_checkpoint(content, path, allow)
        _log.info("%s: %s, all %d keys matched", path.name, type(own).__name__, len(own.state_dict()))
        return own
    found = translate(content, network, str(path))
    made = infer(found, str(path))
    load_state(made, found.state, str(path))
    _log.info("%s: %s", path.name, summary(found, made))
    return made.eval()


def dilate(encoder: Encoder, output_stride: int) -> Encoder:
    """The same weights in a network whose last stages are dilated to another ``output_stride``.

    Args:
        encoder: one that has the argument ``output_stride``: ``ResNet``, and ``TimmEncoder`` of a network
            that timm can dilate. It is left as it is.
        output_stride: input pixels per cell of the deepest map.

    Raises:
        UserError: the encoder cannot be dilated, or not to this stride.
    """
    kind = type(encoder)
    if "output_stride" not in encoder.init_args:
        instead = (
            "dilate its encoder, and train a decoder for the new strides"
            if isinstance(encoder, DecodedEncoder)
            else "read it at its own strides (--model.output_stride null), choose a ResNet, or, for a vision "
            "transformer, a protocol evaluation/…_vit.yaml"
        )
        raise UserError(f"{kind.__name__} cannot be dilated to output_stride {output_stride}: {instead}")
    plain = untrained(spec(encoder))
    plain["init_args"]["output_stride"] = output_stride
    made = _build(plain, kind.__name__, [kind.__module__.partition(".")[0]])
    made.load_state_dict(encoder.state_dict())
    for new, old in zip(made.parameters(), encoder.parameters(), strict=True):
        new.requires_grad_(old.requires_grad)
    return made.to(next(encoder.parameters())).train(encoder.training)


def _fill(made: Encoder, content: dict[str, Any], path: Path, network: Network | None) -> Encoder:
    """Puts the weights in a file into a given encoder, from its own names or from a foreign format."""
    expected = _names(made.state_dict())
    found = find(content, network, str(path))
    if found is not None:
        found = found.fitted_to(made)
    if found is None or _names(found.state) != expected:  # perhaps an encoder of another kind
        state = {key: value for key, value in state_in(content).items() if not key.startswith("fc.")}
        if found is None and not state:
            raise UserError(f"{path} holds no tensors: give a state dict")
        if found is None or _names(state) == expected:
            _one_network(str(path), network)
            load_state(made, state, str(path))
            return made.eval()
    load_state(made, found.state, str(path))
    _log.info("%s: %s", path.name, summary(found, made))
    return made.eval()


def _one_network(source: str, network: Network | None) -> None:
    if network is not None:
        raise UserError(f"{source}: network={network!r} is for files of other projects: leave it out")


def _names(state: Mapping[str, Tensor]) -> set[str]:
    return {key for key in state if not key.endswith("num_batches_tracked")}


def describe(method: Configured, online: Online, prefix: str = "online.") -> dict[str, Any]:
    """What a checkpoint says of itself, as plain data: how to build the method and its encoder again.

    Args:
        method: what the checkpoint holds.
        online: the container in it whose encoder is exported.
        prefix: what the container's names begin with in the method's state dict.
    """
    parts = ("encoder",) if online.decoder is None else ("encoder", "decoder")
    return {
        "format": FORMAT,
        "version": poodle_lightning.__version__,
        "method": spec(method),
        "backbone": spec(online.backbone()),
        "prefixes": {part: f"{prefix}{part}." for part in parts},
    }


def rebuild(path: str | Path, allow: Sequence[str] = _ALLOW) -> tuple[Any, dict[str, Tensor]]:
    """The method that a checkpoint describes, still without its weights, and those weights.

    Raises:
        UserError: the file is missing, truncated, or no checkpoint of this package.
    """
    content = read_file(path)
    if "poodle_lightning" not in content:
        raise UserError(f"{path}: not a poodle-lightning checkpoint (its keys: {sorted(content)[:5]})")
    plain = content["poodle_lightning"]["method"]
    # the encoder's weights are in the file; a flow net's are not, and must be found again
    plain["init_args"]["encoder"] = untrained(plain["init_args"].get("encoder"))
    return build(plain, allow), content["state_dict"]


def export_torchvision(encoder: Encoder, path: str | Path) -> Path:
    """Writes a ResNet's weights under torchvision's names, without ``fc`` and without any decoder.

    ``torchvision.models.resnet50().load_state_dict(state, strict=False)`` then lacks ``fc`` only. A network
    with ``output_stride`` 8 needs ``replace_stride_with_dilation=[False, True, True]`` there.

    Args:
        encoder: a ``ResNet`` of torchvision's shape, or one inside a ``DecodedEncoder``.
        path: ``.safetensors``, ``.pth`` or ``.pt``.

    Raises:
        UserError: torchvision has no such network, or the name has another ending.
    """
    from poodle_lightning.nn.resnet import ResNet

    path = Path(path)
    bare = encoder.encoder if isinstance(encoder, DecodedEncoder) else encoder
    if not isinstance(bare, ResNet):
        raise UserError(f"{type(bare).__name__} is no ResNet: torchvision's names exist for ResNet only")
    for name, needed in (("width", (64,)), ("stem_pool", (True,)), ("depth", (18, 34, 50, 101))):
        value = bare.init_args[name]
        if value not in needed:
            raise UserError(f"torchvision has no ResNet with {name}={value}: use save_pretrained instead")
    if path.suffix not in _STATE_FILES:
        raise UserError(f"{path}: unknown ending {path.suffix!r}: choose {', '.join(_STATE_FILES)}")
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".safetensors":
        _write_safetensors(bare.state_dict(), path)
    else:
        state = _plain_tensors(bare.state_dict())
        _in_one_step(path, lambda part: torch.save(state, part))
    return path


def _from_folder(folder: Path, allow: Sequence[str]) -> Encoder:
    config_path = folder / _CONFIG
    if not config_path.is_file():
        raise UserError(f"{folder} holds no {_CONFIG} and no {_LAST}: give an exported folder or a run's")
    try:
        config = json.loads(config_path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(
            f"{config_path} is truncated or no JSON ({error}): copy or download it again"
        ) from error
    encoder = _build(_described(config, "encoder", str(config_path)), str(config_path), allow)
    load_state(encoder, read_file(folder / _WEIGHTS), str(folder / _WEIGHTS))
    return encoder.eval()


def _from_checkpoint(content: dict[str, Any], path: Path, allow: Sequence[str]) -> Encoder:
    if "poodle_lightning" not in content:
        raise UserError(
            f"{path} does not describe its encoder (no entry 'poodle_lightning'): "
            "use load_encoder for a file of another project"
        )
    described = content["poodle_lightning"]
    encoder = _build(_described(described, "backbone", str(path)), str(path), allow)
    prefixes = described.get("prefixes", {})
    state: dict[str, Tensor] = {}
    for part, prefix in prefixes.items():
        inner = f"{part}." if "decoder" in prefixes else ""
        found = {
            inner + key.removeprefix(prefix): value
            for key, value in content.get("state_dict", {}).items()
            if key.startswith(prefix)
        }
        if not found:
            raise UserError(
                f"{path} holds no key {prefix}* for the {part}: it is not a checkpoint of a whole run"
            )
        state.update(found)
    load_state(encoder, state, str(path))
    return encoder.eval()


def _described(config: Any, name: str, source: str) -> dict[str, Any]:
    """The spec under ``name``, after a look at the format."""
    if not isinstance(config, dict) or not isinstance(config.get(name), dict) or "format" not in config:
        raise UserError(
            f"{source} does not describe an encoder of this package (no {name!r}): give another file"
        )
    if config["format"] != FORMAT:
        version = config.get("version", "another version")
        raise UserError(
            f"{source} has format {config['format']} (of poodle-lightning {version}), this version reads "
            f"format {FORMAT}: update the package"
        )
    found: dict[str, Any] = config[name]
    return found


def _build(plain: Mapping[str, Any], source: str, allow: Sequence[str]) -> Encoder:
    made = build(untrained(plain), allow)
    if not isinstance(made, Encoder):
        raise UserError(f"{source} describes a {type(made).__name__}, not an encoder: give another file")
    return made


def _download(name: str) -> Path:
    owner_and_name = name.split("/")
    if len(owner_and_name) != 2 or not all(owner_and_name) or name.startswith((".", "~")):
        raise UserError(
            f"{name} does not exist: give a folder, a file, the owner/name of a hub repository, "
            "torchvision:NAME or timm:NAME"
        )
    import huggingface_hub

    try:
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=[_WEIGHTS, _CONFIG]))
    except Exception as error:  # no network, no such repository, no access, ...: each has its own class there
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise UserError(
            f"{name} is neither here nor could it be fetched from the hub ({reason[0]}): "
            "give a folder, a .ckpt file or the owner/name of a repository"
        ) from error


def _plain_tensors(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {key: value.detach().cpu().contiguous() for key, value in state.items()}


def _write_safetensors(state: Mapping[str, Tensor], path: Path) -> None:
    from safetensors.torch import save_file

    # A clone each, because the format refuses tensors that share memory.
    alone = {key: value.clone() for key, value in _plain_tensors(state).items()}
    _in_one_step(path, lambda part: save_file(alone, part, {"format": "pt"}))


def _write_text(text: str, path: Path) -> None:
    _in_one_step(path, lambda part: part.write_text(text, encoding="utf-8"))


def _in_one_step(path: Path, write: Callable[[Path], object]) -> None:
    """Writes a file beside its place and then gives it its name, so that no reader sees half of it."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        write(part)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def _default_card(encoder: Encoder) -> str:
    rows = "\n".join(
        f"| {name} | {encoder.channels[name]} | {encoder.strides[name]} |" for name in encoder.channels
    )
    parameters = sum(parameter.numel() for parameter in encoder.parameters())
    return f"""---
library_name: poodle-lightning
tags: [self-supervised-learning, image-feature-extraction]
---
# {type(encoder).__name__}

An image encoder of poodle-lightning {poodle_lightning.__version__}, {parameters / 1e6:.2f} M parameters.

```python
from poodle_lightning.hub import from_pretrained

encoder = from_pretrained("this folder or repository")  # eval mode
features = encoder(images)  # (B, 3, H, W) in [0, 1]; it normalises by itself
features.maps, features.vector
```

| map | channels | stride |
|---|---|---|
{rows}
"""

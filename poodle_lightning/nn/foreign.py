"""Checkpoints of other projects: which network is in one, and its weights under this package's names.

Only names and shapes are looked at. The formats are one table, :data:`FORMATS`, in the order in which they
are tried; the architecture is inferred from what is found. What no file says is assumed: a ResNet has the
pooling in its stem and stride 32 (``hub.dilate`` changes that); a vision transformer has the heads of
:func:`_heads`, and takes other image sizes as the project does that the file's layout shows; colours are
normalised as on ImageNet (some of timm's weights want 0.5: ``timm:NAME`` knows that). Where one of these is
wrong, give the encoder.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from torch import Tensor

from poodle_lightning.nn.encoder import DecodedEncoder, Encoder
from poodle_lightning.nn.resnet import ResNet, depth_of
from poodle_lightning.nn.sdm import SDM
from poodle_lightning.nn.vit import OWN_KEYS as _VIT_KEYS
from poodle_lightning.nn.vit import ViT
from poodle_lightning.types import UserError

Network = Literal["online", "teacher"]
_RESNET_KEYS = re.compile(r"(conv1|bn1|layer\d)\..*")
_POODLE = {
    "backbone.": "encoder.",
    "decoder_blocks.": "decoder.blocks.",
    "decoder_laterals.": "decoder.laterals.",
}


@dataclass(frozen=True)
class Format:
    """How one project names the networks in its files, after ``module.`` is taken off.

    Args:
        name: for messages.
        online: ``{prefix in the file: prefix here}`` of the network that is trained by gradients.
        teacher: the same for its moving average; empty: the files have none.
        needs: beginnings of keys without which a file is not of this format.
        default: the network that is taken unless one is asked for.
        pos_interp: how the project's vision transformers take other image sizes.
        mask_token: what the token that stands for masked patches is called, where the encoder has one.
    """

    name: str
    online: Mapping[str, str]
    teacher: Mapping[str, str] = field(default_factory=dict)
    needs: tuple[str, ...] = ()
    default: Network = "online"
    pos_interp: Literal["timm", "dino"] = "timm"
    mask_token: str | None = None


FORMATS = (
    # agentic-learning-ai-lab/poodle src/models/poodle.py; saved under "model" (src/utils/misc.py)
    Format(
        "PooDLe", _POODLE, {f"teacher_{k}": v for k, v in _POODLE.items()}, ("backbone.", "decoder_blocks.")
    ),
    # the same file without the decoder (its ablation rows)
    Format("PooDLe", {"backbone.": ""}, {"teacher_backbone.": ""}, ("teacher_backbone.",)),
    # agentic-learning-ai-lab/poodle src/models/flowe.py
    Format("FlowE", {"encoder.": ""}, {"target_encoder.": ""}, ("target_encoder.",)),
    # bytedance/ibot main_ibot.py: DINO's layout, and a mask token in the student
    Format(
        "iBOT",
        {"student.backbone.": ""},
        {"teacher.backbone.": ""},
        ("student.backbone.masked_embed",),
        "teacher",
        "dino",
        "masked_embed",
    ),
    # facebookresearch/dino main_dino.py; shashankvkt/DoRA_ICLR24 main.py writes the same
    Format("DINO", {"student.backbone.": ""}, {"teacher.backbone.": ""}, (), "teacher", "dino"),
    Format("student/teacher", {"student.": ""}, {"teacher.": ""}, (), "teacher", "dino"),
    # WXinlong/DenseCL openselfsup/models/densecl.py: ``backbone`` is ``encoder_q[0]`` under a second name
    Format("DenseCL", {"backbone.": ""}, {"encoder_k.0.": ""}, ("encoder_q.0.", "queue2")),
    # OpenSelfSup's and mmselfsup's MoCo: the same without the second queue
    Format("OpenSelfSup MoCo", {"encoder_q.0.": ""}, {"encoder_k.0.": ""}, ("encoder_q.0.",)),
    # facebookresearch/moco moco/builder.py (v1 and v2), detection/convert-pretrain-to-detectron2.py
    Format("MoCo", {"encoder_q.": ""}, {"encoder_k.": ""}, ("encoder_q.",)),
    # facebookresearch/moco-v3 moco/builder.py, main_lincls.py
    Format("MoCo-v3", {"base_encoder.": ""}, {"momentum_encoder.": ""}, ("base_encoder.",)),
    # zdaxie/PixPro contrast/models/PixPro.py, transfer/detection/convert_pretrain_to_d2.py
    Format("PixPro", {"encoder.": ""}, {"encoder_k.": ""}, ("encoder.", "encoder_k.")),
    # facebookresearch/mae models_mae.py: the encoder bare, the decoder beside it. Its networks are timm's and
    # take one size; for what it does to a file's positions before, give ViT(pos_interp="mae")
    Format("MAE", {"": ""}, {}, ("decoder_pos_embed",)),
    # facebookresearch/swav src/resnet50.py, hubconf.py
    Format("SwAV", {"": ""}, {}, ("projection_head.",)),
    # vturrisi/solo-learn solo/methods/base.py
    Format("solo-learn", {"backbone.": ""}, {"momentum_backbone.": ""}, ("momentum_backbone.",)),
    # facebookresearch/vicreg main_vicreg.py, mmselfsup, lightly: a bare encoder called backbone
    Format("backbone.*", {"backbone.": ""}),
    Format("encoder.*", {"encoder.": ""}),
    # torchvision, timm, and what most projects publish as "backbone only" (DINO, DenseCL, VICReg, MAE)
    Format("torchvision/timm names", {"": ""}),
)


@dataclass(frozen=True)
class Translated:
    """An encoder's weights out of a foreign file.

    Args:
        format: the row of :data:`FORMATS`.
        network: which of its networks.
        state: under the names of ``ResNet``, ``ViT`` or ``DecodedEncoder``.
        leftover: names in the file of all other tensors (heads, the other network, queues, ...).
    """

    format: Format
    network: Network
    state: dict[str, Tensor]
    leftover: list[str]

    def without_decoder(self) -> Translated:
        """The encoder alone; what is the decoder's is left over."""
        if not any(key.startswith("decoder.") for key in self.state):
            return self
        bare = {k.removeprefix("encoder."): v for k, v in self.state.items() if k.startswith("encoder.")}
        rest = [key for key in self.state if key.startswith("decoder.")]
        return Translated(self.format, self.network, bare, self.leftover + rest)

    def fitted_to(self, encoder: Encoder) -> Translated:
        """What of it a given encoder has a place for: without a decoder or a mask token that it lacks.

        A mask token that only the encoder has stays as it is there, as the encoder's own ``weights`` do.
        """
        found = self if isinstance(encoder, DecodedEncoder) else self.without_decoder()
        own, state = encoder.state_dict().get("mask_token"), dict(found.state)
        # a bare file of ViT's own names holds it under the name it has here; MAE's is the decoder's
        elsewhere = found.format.name != "MAE" and "mask_token" in found.leftover
        if own is None:
            state.pop("mask_token", None)
        elif not elsewhere:
            state.setdefault("mask_token", own)
        return replace(found, state=state)


def find(
    content: Mapping[str, Any], network: Network | None = None, source: str = "the file"
) -> Translated | None:
    """Like :func:`translate`, but None where no encoder is found."""
    tensors = dict(_flat(content))
    for row in FORMATS:
        if not all(any(key.startswith(need) for key in tensors) for need in row.needs):
            continue
        maps: dict[Network, Mapping[str, str]] = {"online": row.online, "teacher": row.teacher}
        other: Network = "online" if row.default == "teacher" else "teacher"
        found = {name: _renamed(tensors, maps[name], row.mask_token) for name in (row.default, other)}
        if not any(found.values()):
            continue
        chosen = network or (row.default if found[row.default] else other)
        names = found[chosen]
        if not names:
            raise UserError(
                f"{source} ({row.name}) holds no {chosen} network: leave network out or give another file"
            )
        state = {new: tensors[old] for old, new in names.items()}
        return Translated(row, chosen, state, [key for key in tensors if key not in names])
    return None


def translate(
    content: Mapping[str, Any], network: Network | None = None, source: str = "the file"
) -> Translated:
    """Finds an encoder in the content of a checkpoint file.

    Args:
        content: a state dict, or what holds one under ``state_dict`` or ``model``, or two under ``student``
            and ``teacher``. Entries that are no tensors are ignored.
        network: which network; None: the format's default, or the other one where only that is there.
        source: the file, for messages.

    Raises:
        UserError: no encoder is found, or not the network that is asked for.
    """
    found = find(content, network, source)
    if found is None:
        first = next((key for key, _ in _flat(content)), None)
        held = "it holds no tensors" if first is None else f"its first key is {first!r}"
        raise UserError(
            f"{source}: no key matches a ResNet or a vision transformer in any known format ({held}): "
            "give the encoder that the weights were made for"
        )
    return found


def infer(found: Translated, source: str = "the file") -> Encoder:
    """The architecture that the names and shapes belong to, untrained.

    Raises:
        UserError: it is none that the package has; the message says what is different.
    """
    if not any(key.startswith("decoder.") for key in found.state):
        return _bare(found, source)
    encoder = _bare(found.without_decoder(), source)
    blocks = _count(found.state, "decoder.blocks.")
    first = found.state.get("decoder.blocks.0.conv1.weight")
    deepest = list(encoder.channels.values())[-1]
    if first is None or first.shape[1] != deepest or "decoder.blocks.0.downsample.0.weight" in found.state:
        raise UserError(
            f"{source}: its decoder changes the number of channels ({deepest} in the encoder), SDM does not: "
            "give ResNet(50) as encoder to load the encoder alone"
        )
    lateral = any(key.startswith("decoder.laterals.") for key in found.state)
    decoder = SDM(encoder.channels, dims=deepest, hidden=first.shape[0], lateral=lateral, blocks=blocks)
    return DecodedEncoder(encoder, decoder)


def title(encoder: Encoder) -> str:
    """A short name of an architecture, e.g. ``ResNet-50 + SDM`` or ``ViT-S/16, 6 heads``."""
    if isinstance(encoder, DecodedEncoder):
        return f"{title(encoder.encoder)} + {type(encoder.decoder).__name__}"
    arguments = encoder.init_args
    if isinstance(encoder, ResNet):
        width = "" if arguments["width"] == 64 else f", width {arguments['width']}"
        return f"ResNet-{arguments['depth']}{width}"
    if isinstance(encoder, ViT):
        size = {(192, 12): "Ti", (384, 12): "S", (768, 12): "B", (1024, 24): "L", (1280, 32): "H"}.get(
            (arguments["dim"], arguments["depth"]), f"{arguments['dim']}x{arguments['depth']}"
        )
        heads = "1 head" if arguments["heads"] == 1 else f"{arguments['heads']} heads"
        if arguments["last_heads"] is not None:
            heads += f" ({arguments['last_heads']} in the last block)"
        return f"ViT-{size}/{arguments['patch']}, {heads}"
    return type(encoder).__name__


def summary(found: Translated, encoder: Encoder) -> str:
    """One line: whose file it is, which network was taken, how many keys matched, and what was left over."""
    groups = dict.fromkeys(_group(key) for key in found.leftover)
    shown = ", ".join(list(groups)[:5]) + (", ..." if len(groups) > 5 else "")
    expected = encoder.state_dict().keys()
    return (
        f"{found.format.name}{f' {found.network}' if found.format.teacher else ''}, {title(encoder)}: "
        f"{len(expected & found.state.keys())} of {len(expected)} keys matched, "
        f"{len(found.leftover)} of the file left over{f' ({shown})' if shown else ''}"
    )


def _group(key: str) -> str:
    parts = key.split(".")
    return ".".join(parts[: 2 if parts[0] in ("student", "teacher") else 1]) + ".*"


def _flat(content: Mapping[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """All tensors of the networks in a file, without the ``module.`` of ``DistributedDataParallel``."""
    for wrapper in ("state_dict", "model"):
        if isinstance(content.get(wrapper), Mapping):
            yield from _flat(content[wrapper])
            return
    pair = {name: content[name] for name in ("student", "teacher") if isinstance(content.get(name), Mapping)}
    for name, inner in pair.items():
        yield from ((f"{name}.{key}", value) for key, value in _flat(inner))
    if not pair:
        for key, value in content.items():
            if isinstance(value, Tensor):
                yield key.removeprefix("module."), value


def _renamed(
    tensors: Mapping[str, Tensor], prefixes: Mapping[str, str], mask_token: str | None
) -> dict[str, str]:
    """``{name in the file: name here}`` of what belongs to an encoder or its decoder."""
    names: dict[str, str] = {}
    for key in tensors:
        for old, new in prefixes.items():
            if key.startswith(old):
                rest = key[len(old) :]
                own = _RESNET_KEYS.fullmatch(rest) or _VIT_KEYS.fullmatch(rest)
                if own or new.startswith("decoder."):
                    names[key] = new + rest
                elif rest == mask_token:
                    names[key] = f"{new}mask_token"
    return names


def _bare(found: Translated, source: str) -> Encoder:
    transformer = any(key.startswith(("patch_embed.", "blocks.")) for key in found.state)
    return (_vit if transformer else _resnet)(found, source)


def _resnet(found: Translated, source: str) -> Encoder:
    state = found.state
    stem = state.get("conv1.weight")
    if stem is None or stem.shape[1:] != (3, 7, 7):
        shape = "no 'conv1.weight'" if stem is None else f"'conv1.weight' {tuple(stem.shape)}"
        raise UserError(
            f"{source} ({found.format.name}) has {shape}, where a ResNet has (width, 3, 7, 7): "
            "give the encoder that the weights were made for"
        )
    counts = tuple(_count(state, f"layer{i}.") for i in range(1, 5))
    depth = depth_of(counts, bottleneck="layer1.0.conv3.weight" in state)
    if depth is None:
        raise UserError(
            f"{source} ({found.format.name}) has {counts} blocks in its four stages, which is no depth of "
            "ResNet: give the encoder that the weights were made for"
        )
    return ResNet(depth, width=stem.shape[0])


def _vit(found: Translated, source: str) -> Encoder:
    state = found.state
    needed = ("patch_embed.proj.weight", "pos_embed", "blocks.0.attn.qkv.weight", "blocks.0.mlp.fc1.weight")
    missing = [name for name in needed if name not in state]
    if missing:
        raise UserError(
            f"{source} ({found.format.name}) is no plain vision transformer, it lacks {missing[0]!r}: "
            "give the encoder that the weights were made for"
        )
    embedding, positions, _, hidden = (state[name] for name in needed)
    dim, patch = embedding.shape[0], embedding.shape[-1]
    class_token = "cls_token" in state
    side = round((positions.shape[1] - class_token) ** 0.5)
    if side**2 + class_token != positions.shape[1] or embedding.shape[1:] != (3, patch, patch):
        raise UserError(
            f"{source} ({found.format.name}) has {positions.shape[1]} position embeddings and patches "
            f"{tuple(embedding.shape[1:])}, where a square grid of RGB patches is expected: "
            "give ViT(image_size=...) as encoder"
        )
    return ViT(
        patch=patch,
        dim=dim,
        depth=_count(state, "blocks."),
        heads=_heads(dim, found.format, source),
        image_size=(side * patch, side * patch),
        mlp_ratio=hidden.shape[0] / dim,
        qkv_bias="blocks.0.attn.qkv.bias" in state,
        class_token=class_token,
        pos_interp=found.format.pos_interp,
        mask_token="mask_token" in state,
    )


def _heads(dim: int, layout: Format, source: str) -> int:
    """Heads by convention, since no shape depends on them: one per 64 channels, with two exceptions."""
    if layout.name == "MoCo-v3" and dim == 384:
        return 12  # facebookresearch/moco-v3 vits.py: ViT-S with 32 channels per head
    if dim == 1280:
        return 16  # ViT-H (Dosovitskiy et al., table 1): 80 channels per head
    if dim % 64:
        raise UserError(
            f"{source}: {dim} channels are no multiple of 64, so the number of heads cannot be told: "
            f"give ViT(dim={dim}, heads=...) as encoder"
        )
    return dim // 64


def _count(state: Mapping[str, Tensor], prefix: str) -> int:
    """How many numbered parts there are behind a prefix."""
    numbers = {key[len(prefix) :].partition(".")[0] for key in state if key.startswith(prefix)}
    return max((int(number) + 1 for number in numbers if number.isdigit()), default=0)

"""``poodle-lightning export``: the trained encoder of a run, for use anywhere."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from poodle_lightning.commands import Build

NAME = "export"
HELP = "write the encoder of a checkpoint: for from_pretrained, or with torchvision's names"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Which checkpoint, where to, in which form."""
    parser.add_argument(
        "checkpoint", metavar="CKPT|RUN", help="a .ckpt file, or a run folder (its newest one)"
    )
    parser.add_argument(
        "--out", metavar="PATH", help="folder, or file for torchvision (default: <run>/export)"
    )
    parser.add_argument(
        "--format",
        choices=("pretrained", "torchvision"),
        default="pretrained",
        help="pretrained: model.safetensors, config.json and a card; torchvision: one file of weights",
    )
    parser.add_argument("--with-decoder", action="store_true", help="keep the decoder (pretrained only)")


def run(args: argparse.Namespace, build: Build) -> int:
    """Writes the encoder and says where it is.

    Raises:
        UserError: no such checkpoint, or an encoder that the form cannot hold.
    """
    from poodle_lightning.hub import export_torchvision, from_pretrained, save_pretrained
    from poodle_lightning.nn.encoder import DecodedEncoder
    from poodle_lightning.runs import explicit
    from poodle_lightning.types import UserError

    if args.with_decoder and args.format == "torchvision":
        raise UserError("--with-decoder: torchvision has no such decoder; use --format pretrained")
    path = explicit(args.checkpoint)
    encoder = from_pretrained(path)
    if isinstance(encoder, DecodedEncoder) and not args.with_decoder:
        encoder = encoder.encoder
    out = Path(args.out) if args.out else _run_folder(path) / "export"
    if args.format == "torchvision":
        file = out if out.suffix else out / "encoder.safetensors"
        file.parent.mkdir(parents=True, exist_ok=True)
        export_torchvision(encoder, file)
        print(f"{file}: load it with torchvision's load_state_dict(..., strict=False); only fc is missing")
    else:
        save_pretrained(encoder, out)
        print(f"{out}: load it with poodle_lightning.from_pretrained({str(out)!r})")
    return 0


def _run_folder(checkpoint: Path) -> Path:
    """The run folder of a checkpoint, or the folder it lies in."""
    folder = checkpoint.parent
    return folder.parent if folder.name == "checkpoints" else folder

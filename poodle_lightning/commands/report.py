"""``poodle-lightning report``: one HTML page of a run, with pictures from its last checkpoint."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from poodle_lightning.callbacks.checkpoints import read_checkpoint
from poodle_lightning.configured import untrained
from poodle_lightning.data.clips import ClipDataset
from poodle_lightning.methods.base import Method
from poodle_lightning.report import Material, gather, write_report
from poodle_lightning.report.results import read_result
from poodle_lightning.runs import DEFAULT_ROOT, folders, newest_checkpoint
from poodle_lightning.types import Clip, UserError

if TYPE_CHECKING:
    from poodle_lightning.commands import Build

NAME = "report"
HELP = "write one HTML page that shows a run: curves, flow, subcrops, features, readout"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command; any ``--data.…`` (moved videos, say) goes to ``args.overrides``."""
    parser.set_defaults(overrides=[])
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument(
        "--run", metavar="DIR|NAME", help="a run folder, or the name of a run (its newest start)"
    )
    which.add_argument("--last", action="store_true", help="the newest run of any name")
    parser.add_argument("--root", default=DEFAULT_ROOT, help="folder of all runs (default: %(default)s)")
    parser.add_argument(
        "--out", metavar="FILE", help="where the page goes (default: <run>/report/index.html)"
    )
    parser.add_argument("--pairs", type=int, default=3, help="pairs of frames drawn (default: %(default)s)")
    parser.add_argument(
        "--labelled",
        type=int,
        default=300,
        help="most labelled frames to train and to test the readout on; 0: none (default: %(default)s)",
    )
    parser.add_argument("--device", default="cpu", help="where the network runs (default: %(default)s)")


def run(args: argparse.Namespace, build: Build) -> int:
    """Write the page and say where it is.

    Args:
        args: as parsed.
        build: ``(configs, overrides) -> (method, data module)``.

    Raises:
        UserError: there is no such run.
    """
    folder = find_run(Path(args.root), args.run)
    if read_result(folder) is not None:  # an evaluation, which has its own pictures
        print(write_report(folder, out=args.out))
        return 0
    try:
        material = material_of(
            folder, build, args.overrides, pairs=args.pairs, labelled=args.labelled, device=args.device
        )
    except (UserError, FileNotFoundError) as error:
        # the curves are worth showing even where the data has moved away
        print(f"report: without pictures: {error}", file=sys.stderr)
        material = Material()
    print(write_report(folder, material, args.out))
    return 0


def find_run(root: Path, run: str | None) -> Path:
    """The folder of a run.

    Args:
        root: folder of all runs.
        run: a run folder, or a name below ``root`` (its newest run), or None for the newest run of all.

    Raises:
        UserError: there is none.
    """
    if run is None:
        known = [folder for name in _names(root) for folder in folders(root / name)]
        if not known:
            raise UserError(f"{root}: no run in this folder; train one, or give --root")
        return max(known, key=lambda folder: folder.name)
    if _is_run(Path(run)):
        return Path(run)
    named = folders(root / run)
    if named:
        return named[-1]
    known_names = ", ".join(_names(root)) or "none"
    raise UserError(f"--run {run}: neither a run folder nor a name in {root} (there: {known_names})")


def _is_run(path: Path) -> bool:
    return path.is_dir() and any(
        (path / name).exists() for name in ("config.yaml", "metrics.csv", "checkpoints")
    )


def _names(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir() if folders(path)) if root.is_dir() else []


def material_of(
    folder: Path,
    build: Build,
    overrides: Sequence[str] = (),
    *,
    pairs: int = 3,
    labelled: int = 300,
    device: str = "cpu",
) -> Material:
    """Pictures and readout of a run's newest checkpoint.

    Args:
        folder: of the run.
        build: ``(configs, overrides) -> (method, data module)``.
        overrides: of the run's config, e.g. where its videos are now.
        pairs: pairs of frames drawn.
        labelled: most labelled frames of the readout; 0 for none.
        device: where the network runs.

    Raises:
        UserError: the run has no config, no checkpoint, or no method of this package.
    """
    config, checkpoint = folder / "config.yaml", newest_checkpoint(folder)
    if not config.is_file() or checkpoint is None:
        raise UserError(f"{folder} has no {'checkpoint' if config.is_file() else 'config.yaml'}")
    content = read_checkpoint(checkpoint)
    method, data = build([str(config)], [*_encoder_of(content), *overrides])
    if not isinstance(method, Method):
        raise UserError(f"{config}: {type(method).__name__} is no method of this package")
    method.load_state_dict(content["state_dict"])
    method.to(torch.device(device))
    data.prepare_data()
    data.setup("fit")
    held_out = data.val_dataloader()
    shown = held_out or data.train_dataloader()
    return gather(
        method,
        shown,
        _Lazy(data.train_dataloader) if held_out and labelled else (),
        held_out=bool(held_out),
        step=int(content.get("global_step", 0)),
        pairs=pairs,
        labelled=labelled,
        tracks=partial(_ways, getattr(shown, "dataset", None)),
    )


def _encoder_of(content: Mapping[str, Any]) -> list[str]:
    """The encoder in the checkpoint's words: the run or file it began from need not be there any more."""
    described = content.get("poodle_lightning", {}).get("method", {}).get("init_args", {}).get("encoder")
    return [] if described is None else ["--model.encoder", json.dumps(untrained(described))]


def _ways(clips: Any, clip: Clip) -> tuple[Tensor, ...]:
    """Tracks through the first frame of each clip of a batch, where the data draw from tracks."""
    moments = zip(clip.index.tolist(), clip.times[:, 0].tolist(), strict=True)
    found = [clips.ways(index, time) for index, time in moments] if isinstance(clips, ClipDataset) else []
    return tuple(ways for ways in found if ways is not None)


@dataclass(frozen=True)
class _Lazy:
    """A loader that is made only when it is asked for batches."""

    make: Callable[[], Any]

    def __iter__(self) -> Any:
        return iter(self.make())

"""``poodle-lightning check-geometry``: the pixel error of a config's windows, views and flow."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from poodle_lightning.commands import add_config_arguments

if TYPE_CHECKING:
    from poodle_lightning.commands import Build

NAME = "check-geometry"
HELP = "put coordinate images through a config's window, affine, flip and flow; report the error in pixels"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command; any ``--data.…``, ``--model.…`` goes to ``args.overrides``."""
    add_config_arguments(parser)
    parser.add_argument(
        "--frame", default="720x1280", metavar="HxW", help="size of the raw frames (default: %(default)s)"
    )
    parser.add_argument("--trials", type=int, default=8, help="draws (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the draws (default: %(default)s)")


def run(args: argparse.Namespace, build: Build) -> int:
    """Print the errors; the exit code is 1 if one is 0.01 px or more.

    Raises:
        UserError: no config, or a frame size that cannot be read.
    """
    from poodle_lightning.analysis.geometry_audit import TOLERANCE, audit
    from poodle_lightning.data.windows import TooSmall
    from poodle_lightning.types import UserError

    if not args.config:
        raise UserError("check-geometry needs a configuration: --config experiment/quickstart.yaml")
    frame = _size(args.frame)
    method, data = build(args.config, args.overrides)
    rule = getattr(data, "rule", None)
    if rule is None:
        raise UserError(f"{type(data).__name__} draws no windows: check-geometry is for VideoDataModule")
    try:
        result = audit(
            rule,
            getattr(method, "view", None),
            frame,
            args.trials,
            args.seed,
            getattr(method, "warp_order", "paper"),
        )
    except TooSmall as error:
        raise UserError(f"--frame {args.frame}: {error}; give the size of your videos") from error
    print(f"crop {rule.size[0]}x{rule.size[1]} from frames of {args.frame}, {args.trials} draws")
    rows = {
        "online view, un-augmented": f"{result.online:.5f} px (largest)",
        "target view, un-augmented and warped": f"{result.target:.5f} px (largest)",
        "mean of both": f"{result.mean:.5f} px",
        "share of the loss grid judged": f"{100 * result.covered:.0f} %",
        "decoder's upsampling": f"{result.upsampling:.5f} px (largest)",
    }
    for name, value in rows.items():
        print(f"  {name:<38} {value}")
    print(f"{'passed' if result.passed else 'FAILED'}: the limit is {TOLERANCE} px")
    return 0 if result.passed else 1


def _size(text: str) -> tuple[int, int]:
    from poodle_lightning.types import UserError

    height, _, width = text.lower().partition("x")
    if not (height.isdigit() and width.isdigit() and int(height) and int(width)):
        raise UserError(f"--frame {text}: give height and width as 720x1280")
    return int(height), int(width)

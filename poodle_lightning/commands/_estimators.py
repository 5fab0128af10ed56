"""Flow estimators of the verbs that run one: their flags, and the devices on which they work."""

from __future__ import annotations

import argparse
import copy
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING

from poodle_lightning.types import UserError

if TYPE_CHECKING:
    from poodle_lightning.data.shares import Share
    from poodle_lightning.flow.raft import RAFT


def add_estimator_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds ``--estimator`` and what DIS and RAFT need."""
    parser.add_argument(
        "--estimator", choices=("dis", "raft"), default="dis", help="what computes it (default: %(default)s)"
    )
    parser.add_argument("--preset", default="medium", help="of DIS: ultrafast, fast or medium (default)")
    parser.add_argument("--size", default="large", help="of RAFT: large (default) or small")
    parser.add_argument(
        "--weights", default="C_T_V1", help="of RAFT: a name or a file (default: %(default)s)"
    )
    parser.add_argument("--iterations", type=int, default=24, help="of RAFT (default: %(default)s)")
    parser.add_argument(
        "--precision",
        choices=("float32", "bfloat16"),
        default="float32",
        help="of RAFT (default: %(default)s); another one is another flow",
    )
    parser.add_argument("--device", default="cpu", help="where RAFT runs (default: %(default)s); not for DIS")
    parser.add_argument(
        "--devices", type=int, default=1, metavar="N", help="RAFT on that many of them (default: %(default)s)"
    )
    parser.add_argument(
        "--batch",
        type=int,
        default=0,
        metavar="N",
        help="of RAFT: pairs at once on a device (default: by the frames' size, 8 at 512x1024)",
    )


def check_estimator(args: argparse.Namespace, least: Mapping[str, int]) -> None:
    """Refuse numbers out of range, and flags of RAFT with DIS.

    Args:
        args: as parsed.
        least: the verb's own whole numbers and the least value of each.

    Raises:
        UserError: in one line.
    """
    for name, bound in {**least, "iterations": 1, "devices": 1, "batch": 0}.items():
        if getattr(args, name) < bound:
            raise UserError(f"--{name.replace('_', '-')} must be at least {bound}, not {getattr(args, name)}")
    if args.estimator == "dis" and (args.devices > 1 or args.device != "cpu" or args.batch):
        raise UserError(
            "--device, --devices and --batch are for RAFT: DIS works on the CPU, in --workers threads"
        )


def on_devices(args: argparse.Namespace, share: Share) -> list[RAFT]:
    """RAFT as the flags say, one on each device.

    Raises:
        UserError: its weights or a device are not there.
    """
    from poodle_lightning.flow.raft import RAFT

    raft = RAFT(args.size, args.weights, args.iterations, args.batch or 8, args.precision)
    names = devices_of(args.device, args.devices, share)
    try:
        return [copy.deepcopy(raft).to(name) for name in names]
    except (RuntimeError, AssertionError) as error:  # torch without CUDA asserts
        raise UserError(f"--device {args.device}: {str(error).splitlines()[0]}") from error


def devices_of(device: str, count: int, share: Share) -> list[str]:
    """Names of the devices.

    With one process per device, which a launcher's ranks tell, each takes its own of those that it sees.
    """
    import torch

    if device == "cpu":
        return [device] * count
    if count > 1:
        if ":" in device:
            raise UserError(
                f"--device {device} is one device: for --devices {count} give its kind, e.g. cuda"
            )
        return [f"{device}:{number}" for number in range(count)]
    local = os.environ.get("LOCAL_RANK") or os.environ.get("SLURM_LOCALID") or ""
    if device == "cuda" and share.origin and local.isdecimal() and torch.cuda.device_count():
        return [f"cuda:{int(local) % torch.cuda.device_count()}"]
    return [device]

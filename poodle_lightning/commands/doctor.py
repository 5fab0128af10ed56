"""``poodle-lightning doctor``: whether this machine has what training needs, and how fast it reads video."""

from __future__ import annotations

import argparse
import importlib.util
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from poodle_lightning.callbacks.record import machine, versions

if TYPE_CHECKING:
    from poodle_lightning.commands import Build

NAME = "doctor"
HELP = "versions, video decoding, flow, GPU and bf16 of this machine, with a small speed test"
_EXTRAS = {"tensorboard": "log", "wandb": "wandb"}
_SECONDS = 4.0  # of the test video


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """How long to measure."""
    parser.add_argument(
        "--pairs", type=int, default=20, help="pairs read in the speed test (default: %(default)s)"
    )


def run(args: argparse.Namespace, build: Build) -> int:
    """Prints one line per check; the exit code is 1 where something needed does not work."""
    for name, version in versions().items():
        print(f"  {name:<24} {version}")
    found = machine()
    print(f"  {'processors':<24} {found['cpus']} (torch uses {torch.get_num_threads()})")
    for gpu in found["gpus"]:
        print(f"  {'GPU':<24} {gpu['name']}, {gpu['gib']} GiB")
    for module, extra in _EXTRAS.items():
        here = importlib.util.find_spec(module) is not None
        advice = f"not here (optional: pip install 'poodle-lightning[{extra}]')"
        print(f"  {module:<24} {'here' if here else advice}")
    checks: dict[str, Callable[[], str]] = {
        "write and read a video": lambda: _video(args.pairs),
        "optical flow (DIS)": _flow,
        "training step": lambda: _step(torch.float32),
        "training step in bf16": lambda: _step(torch.bfloat16),
        "run folder": _writable,
    }
    failed = 0
    for name, check in checks.items():
        try:
            print(f"  ok    {name}: {check()}")
        except Exception as error:  # whatever it is, the other checks are still worth making
            failed += 1
            print(f"  FAILS {name}: {type(error).__name__}: {' '.join(str(error).split())[:200]}")
    print("all is well" if failed == 0 else f"{failed} of {len(checks)} checks fail")
    return 1 if failed else 0


def _video(pairs: int) -> str:
    from poodle_lightning.data.decode import VideoReader
    from poodle_lightning.data.encode import write_video

    y, x = np.mgrid[0:180, 0:320]
    frames = [
        np.stack([(x + 3 * t) % 256, (y + t) % 256, (x + y) % 256], axis=-1).astype(np.uint8)
        for t in range(int(_SECONDS * 15))
    ]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "test.mp4"
        write_video(path, frames, 15.0)
        worst = 0.0
        began = time.perf_counter()
        for number in range(pairs):
            first = (_SECONDS - 1.0) * number / max(1, pairs)
            with VideoReader(path) as reader:
                read, seconds = reader.read([first, first + 0.5], None)
            expected = frames[round(float(seconds[0]) * 15)].astype(np.float64)
            worst = max(worst, float(np.abs(read[0] - expected).mean()))
        rate = pairs / (time.perf_counter() - began)
    if worst > 12.0:
        raise RuntimeError(f"frames come back changed (mean error {worst:.1f} of 255)")
    return f"{rate:.1f} pairs/s of 320x180 in one process"


def _flow() -> str:
    from poodle_lightning.flow.dis import DIS

    image = np.random.default_rng(0).integers(0, 256, (128, 192, 3), dtype=np.uint8)
    import cv2

    smooth = cv2.GaussianBlur(image, (0, 0), 3)
    moved = np.roll(smooth, 4, axis=1)
    began = time.perf_counter()
    flow = np.asarray(DIS().pixels(smooth, moved))[0]
    taken = time.perf_counter() - began
    error = float(np.abs(flow[0, 32:-32, 32:-32] - 4.0).mean())
    if error > 1.0:
        raise RuntimeError(f"a shift of 4 px is seen with an error of {error:.2f} px")
    return f"a shift of 4 px is seen to {error:.2f} px, {1000 * taken:.0f} ms for a pair of 192x128"


def _step(dtype: torch.dtype) -> str:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 32, 3), torch.nn.ReLU(), torch.nn.Conv2d(32, 8, 3)).to(
        device
    )
    began = time.perf_counter()
    with torch.autocast(device.type, dtype=dtype, enabled=dtype is not torch.float32):
        loss = net(torch.ones(2, 3, 64, 64, device=device)).float().square().mean()
    loss.backward()
    if not bool(loss.isfinite()):
        raise RuntimeError("the loss is not finite")
    return f"{1000 * (time.perf_counter() - began):.0f} ms on {device}"


def _writable() -> str:
    if not os.access(Path.cwd(), os.W_OK):
        raise PermissionError(f"{Path.cwd()} cannot be written: use --trainer.default_root_dir")
    return f"{Path.cwd() / 'runs'} can be written"

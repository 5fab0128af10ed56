"""Dense inverse search: optical flow on the CPU, with no weights.

Kroeger et al. 2016, "Fast Optical Flow using Dense Inverse Search", as implemented in OpenCV. It works
offline on any video and is the default estimator. Directed pairs per CPU-second at 512x1024: ultrafast 237,
fast 114, medium 23; every pair needs both directions.
"""

from __future__ import annotations

import math
import os
import threading
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from poodle_lightning.configured import Configured
from poodle_lightning.flow.given import complete
from poodle_lightning.ops.geometry import Flow, Size
from poodle_lightning.types import Clip, FlowEstimator, UserError

Preset = Literal["ultrafast", "fast", "medium"]
_PRESETS = ("ultrafast", "fast", "medium")  # in OpenCV's order
_MIN_SIDE = 12  # OpenCV refuses images whose longer side is less
_PATCH = 8


class _Solvers(threading.local):
    """OpenCV's solvers of one thread: they hold buffers, so they can be neither shared nor pickled."""

    def __init__(self) -> None:
        self._kept: dict[tuple[int, str], tuple[Any, int]] = {}

    def get(self, preset: str, size: Size) -> Any:
        """The solver of a preset, set up for images of a size.

        Where an image is too small for the preset's finest scale, OpenCV picks scales by the width alone:
        that reads and writes beyond low, wide images (a crash, or noise), and it changes the solver for all
        later images. A finest scale that fits the image keeps OpenCV off that path.
        """
        import cv2

        key = (os.getpid(), preset)  # a forked worker makes its own
        if key not in self._kept:
            made = cv2.DISOpticalFlow.create(_PRESETS.index(preset))
            self._kept[key] = (made, made.getFinestScale())
        solver, finest = self._kept[key]
        by_longer = int(math.log2(max(size) / (4 * _PATCH)) + 0.5)  # OpenCV's rule for the coarsest scale
        by_shorter = int(math.log2(min(size) / _PATCH))
        solver.setFinestScale(min(finest, by_longer, by_shorter))
        return solver


_solvers = _Solvers()


class DIS(Configured, FlowEstimator):
    """OpenCV's DIS flow.

    In a method it works on the training crops: they are moved to the host and the flow back, so on a GPU it
    holds up the step. Given to the data module instead, it works in the workers, on the stored pixels.

    Args:
        preset: ``ultrafast``, ``fast`` or ``medium``; slower is more accurate.

    Raises:
        UserError: an unknown preset.
    """

    def __init__(self, preset: Preset = "medium") -> None:
        if preset not in _PRESETS:
            raise UserError(f"DIS has no preset {preset!r}: choose one of {', '.join(_PRESETS)}")
        self.preset = preset

    def __call__(self, clip: Clip, clean: Tensor) -> Flow:
        """The clip's own flow where it has one, else the estimate; see ``FlowEstimator``.

        Raises:
            UserError: the frames are smaller than 12 px.
        """
        return complete(clip, clean, self.estimate)

    def estimate(self, clean: Tensor) -> Flow:
        """Flow of pairs of frames ``(N, 2, 3, H, W)`` in [0, 1] on any device; 2N rows, there then back."""
        if not len(clean):
            return Flow.from_pixels(clean.new_zeros((0, 2, *clean.shape[-2:]), dtype=torch.float32))
        frames = (
            (clean.float().clamp(0, 1) * 255).round().byte().permute(0, 1, 3, 4, 2).contiguous().cpu().numpy()
        )
        both = np.stack([self.pixels(first, second) for first, second in frames], axis=1)
        return Flow.from_pixels(torch.from_numpy(both).flatten(0, 1).to(clean.device))

    def pixels(self, first: np.ndarray, second: np.ndarray) -> np.ndarray:
        """Flow between two images, both ways.

        Args:
            first: ``(H, W, 3)`` uint8 RGB.
            second: the same size.

        Returns:
            ``(2, 2, H, W)`` float32 px: there and back, x and y.

        Raises:
            UserError: the images are smaller than 12 px.
            ValueError: the images are not uint8 RGB of one size.
        """
        import cv2

        for image in (first, second):
            if (
                image.dtype != np.uint8
                or image.ndim != 3
                or image.shape[2] != 3
                or image.shape != first.shape
            ):
                raise ValueError(
                    f"DIS needs two (H, W, 3) uint8 images of one size, not {image.dtype}{image.shape}"
                )
        if min(first.shape[:2]) < _MIN_SIDE:
            height, width = first.shape[:2]
            raise UserError(
                f"DIS needs frames of at least {_MIN_SIDE} x {_MIN_SIDE} px, these are {height} x {width}: "
                "use larger crops or another flow estimator"
            )
        a, b = (cv2.cvtColor(np.ascontiguousarray(image), cv2.COLOR_RGB2GRAY) for image in (first, second))
        solver = _solvers.get(self.preset, (first.shape[0], first.shape[1]))
        both = np.stack([solver.calc(a, b, None), solver.calc(b, a, None)])
        return np.ascontiguousarray(both.transpose(0, 3, 1, 2))

    @property
    def fingerprint(self) -> str:
        """What the flow depends on besides the images; part of a cache's key."""
        import cv2

        return f"DIS {self.preset}, OpenCV {cv2.__version__}"

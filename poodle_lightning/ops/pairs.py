"""Order of the 2N directed images of N pairs: first → second frame for all, then second → first."""

from __future__ import annotations

import torch
from torch import Tensor

from poodle_lightning.ops.random import fold


def both_directions(frames: Tensor) -> tuple[Tensor, Tensor]:
    """Frames ``(N, 2, …)`` as sources and partners, ``(2N, …)`` each."""
    first, second = frames[:, 0], frames[:, 1]
    return torch.cat([first, second]), torch.cat([second, first])


def direction_keys(key: Tensor) -> Tensor:
    """One random key per directed image, ``(2N,)``, from the clips' keys ``(N,)``."""
    return torch.cat([fold(key, "direction", 0), fold(key, "direction", 1)])

"""RAFT, the flow network of the papers, from torchvision; frozen.

Teed and Deng 2020, "RAFT: Recurrent All-Pairs Field Transforms for Optical Flow". Both directions of all
pairs are one batch, in which every frame is encoded once and only the last iterate is upsampled.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.optical_flow import raft as stock

from poodle_lightning.configured import Configured
from poodle_lightning.flow.given import complete
from poodle_lightning.nn.frozen import Frozen
from poodle_lightning.nn.weights import read_state
from poodle_lightning.ops.geometry import Flow, island
from poodle_lightning.types import Clip, FlowEstimator, UserError

_STRIDE = 8
_MIN_SIDE = 128  # four levels of correlation at stride 8
_SIZES = {
    "large": (stock.raft_large, stock.Raft_Large_Weights),
    "small": (stock.raft_small, stock.Raft_Small_Weights),
}


class RAFT(nn.Module, Configured, FlowEstimator):
    """torchvision's RAFT: evaluation mode for ever, float32 under any precision, outside the state dict.

    Args:
        size: ``large`` (5.3 M parameters) or ``small`` (1.0 M).
        weights: a name of torchvision's, downloaded once (``C_T_V1`` is the authors' raft-things, trained on
            FlyingChairs, then FlyingThings3D; PooDLe uses it); the path of a state dict with torchvision's
            keys; or None for random weights, whose flow means nothing.
        iterations: updates; more is more accurate and slower.
        pairs_at_once: pairs per pass; bounds the memory, 0.7 GB per pair at 512x1024. The flow is the same.

    Raises:
        UserError: the weights are missing, cannot be downloaded or belong to another network.
        ValueError: a number that is not positive.
    """

    def __init__(
        self,
        size: Literal["large", "small"] = "large",
        weights: str | None = "C_T_V1",
        iterations: int = 24,
        pairs_at_once: int = 8,
    ) -> None:
        super().__init__()
        if size not in _SIZES:
            raise UserError(f"RAFT has no size {size!r}: choose large or small")
        if iterations < 1 or pairs_at_once < 1:
            raise ValueError(
                f"iterations and pairs_at_once must be positive, not {iterations}, {pairs_at_once}"
            )
        self.size, self.iterations, self.pairs_at_once = size, iterations, pairs_at_once
        net = _SIZES[size][0](weights=None)
        if weights is not None:
            _fill(net, size, weights)
        self.net = Frozen(net)

    def __call__(self, clip: Clip, clean: Tensor) -> Flow:
        """``forward``, under the signature by which configs know a ``FlowEstimator``."""
        flow: Flow = super().__call__(clip, clean)
        return flow

    def forward(self, clip: Clip, clean: Tensor) -> Flow:
        """The clip's own flow where it has one, else the estimate; see ``FlowEstimator``."""
        return complete(clip, clean, self.estimate)

    @torch.no_grad()
    def estimate(self, clean: Tensor) -> Flow:
        """Flow of pairs of frames ``(N, 2, 3, H, W)`` in [0, 1]; 2N rows, there then back."""
        with island(clean.device.type):
            parts = [self._both_ways(part).unflatten(0, (2, -1)) for part in clean.split(self.pairs_at_once)]
            return Flow.from_pixels(torch.cat(parts, dim=1).flatten(0, 1))

    def pixels(self, first: np.ndarray, second: np.ndarray) -> np.ndarray:
        """Flow between two ``(H, W, 3)`` uint8 RGB images: there and back, ``(2, 2, H, W)`` float32 px."""
        pair = torch.from_numpy(np.stack([first, second])).to(self._device)
        clean = pair.permute(0, 3, 1, 2)[None] / 255.0
        flow: np.ndarray = self.estimate(clean).to_pixels().cpu().numpy()
        return flow

    @property
    def fingerprint(self) -> str:
        """What the flow depends on besides the images: size, iterations, weights; part of a cache's key."""
        digest = hashlib.blake2b(digest_size=8)
        for name, value in self.net.module.state_dict().items():
            digest.update(name.encode() + value.cpu().numpy().tobytes())
        return f"RAFT {self.size}, {self.iterations} iterations, weights {digest.hexdigest()}"

    @property
    def _device(self) -> torch.device:
        return next(self.net.module.parameters()).device

    def _both_ways(self, clean: Tensor) -> Tensor:
        """``(n, 2, 3, H, W)`` → ``(2n, 2, H, W)`` px, in one batch."""
        net: Any = self.net.module
        images, inner = _padded(clean.float().transpose(0, 1).flatten(0, 1) * 2 - 1)
        features = net.feature_encoder(images)
        net.corr_block.build_pyramid(features, features.roll(len(clean), dims=0))
        state = net.context_encoder(images)
        hidden, context = state.split(
            [width := net.update_block.hidden_state_size, state.shape[1] - width], dim=1
        )
        hidden, context = hidden.tanh(), context.relu()
        start = stock.make_coords_grid(len(images), *features.shape[-2:]).to(images.device)
        reached = start
        for _ in range(self.iterations):
            correlation = net.corr_block.index_pyramid(reached)
            hidden, step = net.update_block(hidden, context, correlation, reached - start)
            reached = reached + step
        net.corr_block.corr_pyramid = []  # gigabytes, which torchvision would hold until the next call
        mask = None if net.mask_predictor is None else net.mask_predictor(hidden)
        flow: Tensor = stock.upsample_flow(reached - start, mask)
        return flow[..., inner[0], inner[1]]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Follows its owner to another device but not to another precision."""
        super()._apply(lambda x: x.to(fn(x.new_empty(0)).device), recurse)
        return self


def _fill(net: nn.Module, size: str, weights: str) -> None:
    """Load weights by torchvision's name or from a file."""
    known = _SIZES[size][1].__members__
    if weights in known:
        try:
            state = known[weights].get_state_dict(progress=True, check_hash=True)
        except (OSError, RuntimeError) as error:  # no network, no space; a file that is not the announced one
            raise UserError(
                f"RAFT's weights {weights} cannot be downloaded ({' '.join(str(error).split())}): download "
                f"{known[weights].url} elsewhere and give its path as weights, or use the estimator DIS"
            ) from error
    elif not Path(weights).is_file():
        raise UserError(
            f"RAFT {size} has no weights {weights!r}: give one of {', '.join(known)} or the path of a file, "
            "or use the estimator DIS, which needs none"
        )
    else:
        state = read_state(weights)
    try:
        net.load_state_dict(state)
    except RuntimeError as error:
        first = str(error).splitlines()[1:2] or [""]
        raise UserError(
            f"{weights} does not fit RAFT {size} ({first[0].strip()[:200]}): choose the size that it was "
            "made for; keys must be torchvision's"
        ) from error


def _padded(images: Tensor) -> tuple[Tensor, tuple[slice, slice]]:
    """Border repeated on all sides, to multiples of 8 and at least 128 px; and where the images are in it."""
    low, whole, inner = [], [], []
    for length in images.shape[-2:]:
        total = max(_MIN_SIDE, -(-length // _STRIDE) * _STRIDE)
        low.append((total - length) // 2)
        whole.append(total - length)
        inner.append(slice(low[-1], low[-1] + length))
    pad = (low[1], whole[1] - low[1], low[0], whole[0] - low[0])
    return F.pad(images, pad, mode="replicate"), (inner[0], inner[1])

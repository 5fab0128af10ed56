"""RAFT, the flow network of the papers, from torchvision; frozen.

Teed and Deng 2020, "RAFT: Recurrent All-Pairs Field Transforms for Optical Flow". Both directions of all
pairs are one batch, in which every frame is encoded once, the correlation of the way back is the transposed
one of the way there, and only the last iterate is upsampled. Nothing is read back from the device, and after
the frames nothing is copied to it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
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
from poodle_lightning.ops.geometry import Flow, island, pixels_to_extent, sample
from poodle_lightning.types import Clip, FlowEstimator, UserError

_STRIDE = 8
_MIN_SIDE = 128  # four levels of correlation at stride 8
_SIZES = {
    "large": (stock.raft_large, stock.Raft_Large_Weights),
    "small": (stock.raft_small, stock.Raft_Small_Weights),
}
_PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class RAFT(nn.Module, Configured, FlowEstimator):
    """torchvision's RAFT: evaluation mode for ever, of its own precision, outside the state dict.

    Args:
        size: ``large`` (5.3 M parameters) or ``small`` (1.0 M).
        weights: a name of torchvision's, downloaded once (``C_T_V1`` is the authors' raft-things, trained on
            FlyingChairs, then FlyingThings3D; PooDLe uses it); the path of a state dict with torchvision's
            keys; or None for random weights, whose flow means nothing.
        iterations: updates; more is more accurate and slower.
        pairs_at_once: pairs per pass; bounds the memory, 1.4 GB per pair at 512x1024, growing with the square
            of the area. The flow is the same.
        precision: of the networks' weights and maps. ``bfloat16``, for a GPU, changes the flow; coordinates
            and correlation stay float32.

    Raises:
        UserError: the weights are missing, cannot be downloaded or belong to another network; no such size or
            precision.
        ValueError: a number that is not positive.
    """

    def __init__(
        self,
        size: Literal["large", "small"] = "large",
        weights: str | None = "C_T_V1",
        iterations: int = 24,
        pairs_at_once: int = 8,
        precision: Literal["float32", "bfloat16"] = "float32",
    ) -> None:
        super().__init__()
        if size not in _SIZES:
            raise UserError(f"RAFT has no size {size!r}: choose large or small")
        if precision not in _PRECISIONS:
            raise UserError(f"RAFT has no precision {precision!r}: choose one of {', '.join(_PRECISIONS)}")
        if iterations < 1 or pairs_at_once < 1:
            raise ValueError(
                f"iterations and pairs_at_once must be positive, not {iterations}, {pairs_at_once}"
            )
        self.size, self.iterations, self.pairs_at_once = size, iterations, pairs_at_once
        self.precision = precision
        net = _SIZES[size][0](weights=None)
        if weights is not None:
            _fill(net, size, weights)
        net.update_block.to(memory_format=torch.channels_last)  # the look-up's own layout
        self.net = Frozen(net.to(_PRECISIONS[precision]))

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
        if not len(clean):
            return Flow.from_pixels(clean.new_zeros((0, 2, *clean.shape[-2:]), dtype=torch.float32))
        with island(clean.device.type):
            parts = [self._both_ways(part).unflatten(0, (2, -1)) for part in clean.split(self.pairs_at_once)]
            return Flow.from_pixels(torch.cat(parts, dim=1).flatten(0, 1))

    def pixels(self, first: np.ndarray, second: np.ndarray) -> np.ndarray:
        """Flow between two ``(H, W, 3)`` uint8 RGB images: there and back, ``(2, 2, H, W)`` float32 px."""
        flow: np.ndarray = self.pixels_of([np.stack([first, second])])[0]
        return flow

    def pixels_of(self, pairs: Sequence[np.ndarray]) -> np.ndarray:
        """Flow of N pairs of images in one batch, whatever ``pairs_at_once``.

        Args:
            pairs: N times ``(2, H, W, 3)`` uint8 RGB, all of one size.

        Returns:
            ``(N, 2, 2, H, W)`` float32 px: there and back, x and y.
        """
        frames = torch.from_numpy(np.stack(pairs)).to(self._device)
        clean = frames.permute(0, 1, 4, 2, 3).float() / 255.0
        with torch.no_grad(), island(clean.device.type):
            both = self._both_ways(clean).unflatten(0, (2, -1)).transpose(0, 1)
        flow: np.ndarray = both.contiguous().cpu().numpy()
        return flow

    @property
    def fingerprint(self) -> str:
        """What the flow depends on besides the images: size, iterations, weights; part of a cache's key."""
        digest = hashlib.blake2b(digest_size=8)
        for name, value in self.net.module.state_dict().items():
            digest.update(name.encode() + value.cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
        lower = "" if self.precision == "float32" else f", {self.precision}"
        return f"RAFT {self.size}, {self.iterations} iterations, weights {digest.hexdigest()}{lower}"

    @property
    def _device(self) -> torch.device:
        return next(self.net.module.parameters()).device

    def _both_ways(self, clean: Tensor) -> Tensor:
        """``(n, 2, 3, H, W)`` → ``(2n, 2, H, W)`` px, in one batch."""
        net: Any = self.net.module
        dtype = _PRECISIONS[self.precision]
        images, inner = _padded(clean.float().transpose(0, 1).flatten(0, 1) * 2 - 1)
        images = images.to(dtype)
        correlation = _Correlation(net.feature_encoder(images).float(), net.corr_block)
        width = net.update_block.hidden_state_size
        state = net.context_encoder(images).contiguous(memory_format=torch.channels_last)
        hidden, context = state[:, :width].tanh(), state[:, width:].relu()
        start = stock.make_coords_grid(len(images), *state.shape[-2:], device=images.device)
        reached = start
        for _ in range(self.iterations):
            seen = correlation(reached).to(dtype)
            hidden, step = net.update_block(hidden, context, seen, (reached - start).to(dtype))
            reached = reached + step.float()
        mask = None if net.mask_predictor is None else net.mask_predictor(hidden).float()
        flow: Tensor = stock.upsample_flow(reached - start, mask)
        return flow[..., inner[0], inner[1]]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Follows its owner to another device but not to another precision."""
        super()._apply(lambda x: x.to(fn(x.new_empty(0)).device), recurse)
        return self


class _Correlation:
    """How well each place of a frame fits every place of the other, at several resolutions.

    What torchvision's ``CorrBlock`` computes, but one product serves both directions, a look-up is two
    operations a level with nothing copied to the device (there the neighbourhood is, in every iteration), and
    nothing outlives the call.

    Args:
        features: ``(2n, C, h, w)`` float32, all first frames, then all second ones.
        block: gives the number of levels and the radius.
    """

    def __init__(self, features: Tensor, block: Any) -> None:
        count, (channels, height, width) = len(features) // 2, features.shape[1:]
        flat = features.flatten(2)
        product = torch.bmm(flat[:count].transpose(1, 2) / channels**0.5, flat[count:])
        sizes = [(height >> level, width >> level) for level in range(block.num_levels)]
        # a frame of zeros: beyond it, the sampler's repeated border is what RAFT reads outside of the image
        self.levels = [features.new_zeros(2, count * height * width, 1, h + 2, w + 2) for h, w in sizes]
        for way, volume in enumerate((product, product.transpose(1, 2))):
            values = volume.reshape(-1, 1, height, width)
            for level, padded in enumerate(self.levels):
                values = values if level == 0 else F.avg_pool2d(values, kernel_size=2, stride=2)
                padded[way, ..., 1:-1, 1:-1] = values
        side = torch.arange(-block.radius, block.radius + 1, dtype=torch.float32, device=features.device)
        # the authors' neighbourhood goes down its first axis in x: the weights are trained so
        around = torch.stack(torch.meshgrid(side, side, indexing="ij"), dim=-1)
        self.around = [pixels_to_extent(around + 1.0, (h + 2, w + 2)) for h, w in sizes]
        # extent per pixel of the finest map; filled in on the device, as a list of numbers would be copied
        self.scale = [
            torch.stack([side.new_full((), 2.0 * 0.5**level / (length + 2)) for length in (w, h)])
            for level, (h, w) in enumerate(sizes)
        ]

    def __call__(self, centres: Tensor) -> Tensor:
        """Values around centres ``(2n, 2, h, w)``, px of the maps: ``(2n, levels · (2r+1)², h, w)``."""
        batch, _, height, width = centres.shape
        at = centres.permute(0, 2, 3, 1).reshape(-1, 1, 1, 2)
        read = []
        for padded, around, scale in zip(self.levels, self.around, self.scale, strict=True):
            values = sample(padded.flatten(0, 1), torch.addcmul(around, at, scale))
            read.append(values.view(batch, height, width, -1))
        return torch.cat(read, dim=-1).permute(0, 3, 1, 2)


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

"""Pictures of frame pairs: one frame pulled onto the other by the flow, and what is left over."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from poodle_lightning.draw.canvas import blend
from poodle_lightning.ops.geometry import Flow, pull

UNSEEN_GREY = (0.5, 0.5, 0.5)


@dataclass(frozen=True)
class Warped:
    """Every frame rebuilt from its partner.

    Args:
        here: ``(2N, 3, H, W)`` the frames: all first frames, then all second frames.
        there: ``(2N, 3, H, W)`` their partners.
        rebuilt: ``(2N, 3, H, W)`` the partner read where the flow points.
        seen: ``(2N, H, W)`` bool, the point is inside the partner (and visible, if that was given).
    """

    here: Tensor
    there: Tensor
    rebuilt: Tensor
    seen: Tensor

    def error(self) -> tuple[float, float]:
        """Mean absolute difference over seen pixels: of the frames as they are, and after warping."""
        where = self.seen[:, None].expand_as(self.here)
        before, after = ((self.here - x).abs()[where].mean() for x in (self.there, self.rebuilt))
        return float(before), float(after)


def warp_pairs(frames: Tensor, flow: Flow, visible: Tensor | None = None) -> Warped:
    """Pull the second frames onto the first and back.

    Args:
        frames: ``(N, 2, 3, H, W)`` in [0, 1].
        flow: 2N rows, first → second then second → first.
        visible: optional ``(2N, H, W)`` bool.
    """
    frames = frames.detach().float().cpu()
    here = torch.cat([frames[:, 0], frames[:, 1]])
    there = torch.cat([frames[:, 1], frames[:, 0]])
    rebuilt, seen = pull(there, Flow(flow.displacement.detach().cpu()), (frames.shape[-2], frames.shape[-1]))
    return Warped(here, there, rebuilt, seen if visible is None else seen & visible.cpu())


def difference(a: Tensor, b: Tensor, seen: Tensor | None = None, gain: float = 3.0) -> Tensor:
    """How far two images differ: black where equal, white at 1/gain of the full range, grey where not seen.

    Args:
        a: ``(B, 3, H, W)`` in [0, 1].
        b: the same shape.
        seen: optional ``(B, H, W)`` bool.
        gain: brightness of the difference.
    """
    grey = ((a - b).abs().mean(dim=1, keepdim=True) * gain).clamp(max=1.0).expand_as(a)
    return grey if seen is None else blend(grey, UNSEEN_GREY, ~seen, strength=1.0)

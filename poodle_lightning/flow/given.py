"""Flow that needs no estimator: what the data gives, or none at all.

``complete`` is what all estimators share: rows that the clip brings (exact flow of generated videos, a cache)
are taken, only pairs that lack a row are estimated.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from poodle_lightning.configured import Configured
from poodle_lightning.ops.geometry import Flow
from poodle_lightning.types import Clip, FlowEstimator, UserError


@torch.no_grad()
def complete(clip: Clip, clean: Tensor, estimate: Callable[[Tensor], Flow]) -> Flow:
    """The clip's own flow, with the rows it lacks estimated.

    Which rows a clip has is known on the host (``Clip.present``), so nothing is read back from its device.

    Args:
        clip: may give flow; a row of NaN is missing.
        clean: ``(N, 2, 3, H, W)`` in [0, 1].
        estimate: takes some of the pairs of ``clean``, ``(M, 2, 3, H, W)``, and gives their 2M rows.

    Returns:
        2N rows on the grid of ``clean``: first → second frame of every pair, then second → first.

    Raises:
        UserError: the clips are no pairs.
        ValueError: ``clean`` is of another shape.
    """
    _check_pairs(clean)
    given = clip.given_flow()
    if given is None:
        return estimate(clean)
    flow, present = given[0].resized((clean.shape[-2], clean.shape[-1])), given[1]
    pairs = (~present.reshape(2, -1).all(dim=0)).nonzero().squeeze(1)
    if not len(pairs):
        return flow
    rows = torch.cat([pairs, pairs + len(clean)])
    keep = _to(present[rows].reshape(-1, 1, 1, 1), clean.device)
    pairs, rows = _to(pairs, clean.device), _to(rows, clean.device)
    estimated = estimate(clean[pairs]).displacement
    displacement = flow.displacement.clone()
    displacement[rows] = torch.where(keep, displacement[rows], estimated.to(displacement))
    return Flow(displacement)


def _check_pairs(clean: Tensor) -> None:
    if clean.ndim != 5:
        raise ValueError(f"flow is between frames: clean must be (N, 2, 3, H, W), not {tuple(clean.shape)}")
    if clean.shape[1] != 2:
        frames = "one frame" if clean.shape[1] == 1 else f"{clean.shape[1]} frames"
        raise UserError(
            f"this method learns from pairs of frames, the data gives clips of {frames}: leave out"
            " data.sampler (--data.sampler null draws pairs by data.gap), or use another data config"
        )


def _to(x: Tensor, device: torch.device) -> Tensor:
    return x.to(device, non_blocking=device.type == "cuda")


class Given(Configured, FlowEstimator):
    """The flow that the data gives, and nothing else: exact flow of generated videos, or a full cache."""

    def __call__(self, clip: Clip, clean: Tensor) -> Flow:
        """The clip's own flow; see ``FlowEstimator``.

        Raises:
            UserError: a pair has none.
        """
        return complete(clip, clean, self._refuse)

    @staticmethod
    def _refuse(lacking: Tensor) -> Flow:
        raise UserError(
            f"{len(lacking)} pairs of the batch come without flow, which the estimator Given needs: "
            "fill the cache for these pairs (poodle-lightning flow), take a source that knows its flow "
            "(synthetic) or an estimator (DIS, RAFT)"
        )


class ZeroFlow(Configured, FlowEstimator):
    """No motion, whatever the clip knows: the ablation in which a pixel is matched with its own place."""

    def __call__(self, clip: Clip, clean: Tensor) -> Flow:
        """Zeros on the grid of ``clean``; see ``FlowEstimator``.

        Raises:
            UserError: the clips are no pairs.
        """
        _check_pairs(clean)
        pairs, height, width = len(clean), clean.shape[-2], clean.shape[-1]
        return Flow(torch.zeros(2 * pairs, 2, height, width, device=clean.device))

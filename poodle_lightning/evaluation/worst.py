"""Which images are worth a look: of the weakest classes, the image on which each is weakest."""

from __future__ import annotations

from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor

from poodle_lightning.evaluation.metrics import Confusion


class WorstImages:
    """Per class, the image with the lowest IoU among those that show it; few numbers, whatever the data.

    Of equal IoU (often 0) the image with more pixels of the class counts as worse, then the first one.

    Args:
        classes: how many.
    """

    def __init__(self, classes: int) -> None:
        self._rows = torch.full((classes, 3), torch.inf, dtype=torch.float64)  # IoU, -pixels, number

    def update(self, image: Confusion, number: int) -> None:
        """Look at one image's counts.

        Args:
            image: the counts.
            number: its place in the split.
        """
        truth = image.truth.double()
        rows = torch.stack([image.iou(), -truth, torch.full_like(truth, number)], dim=1)
        rows[truth == 0] = torch.inf
        self._rows = _lower(self._rows, rows)

    def all_reduce(self) -> None:
        """Of all processes; without ``torch.distributed`` nothing happens."""
        if not (dist.is_available() and dist.is_initialized()):
            return
        gathered: list[Tensor | None] = [None] * dist.get_world_size()
        dist.all_gather_object(gathered, self._rows)
        for rows in cast("list[Tensor]", gathered):
            self._rows = _lower(self._rows, rows)

    def choose(self, iou: Tensor, names: tuple[str, ...], count: int = 3) -> list[tuple[str, int]]:
        """Class and image for the classes of lowest IoU over all data, weakest first.

        Args:
            iou: of every class, ``(C,)``; classes that no image shows are left out.
            names: of the classes.
            count: at most so many.
        """
        shown = self._rows[:, 2].isfinite() & iou.isfinite()
        order = sorted(torch.nonzero(shown).flatten().tolist(), key=lambda place: (float(iou[place]), place))
        return [(names[place], int(self._rows[place, 2])) for place in order[:count]]


def _lower(one: Tensor, other: Tensor) -> Tensor:
    """Row by row the lexicographically smaller."""
    smaller = torch.zeros(len(one), dtype=torch.bool)
    equal = torch.ones_like(smaller)
    for a, b in zip(one.unbind(1), other.unbind(1), strict=True):
        smaller |= equal & (b < a)
        equal &= a == b
    return torch.where(smaller[:, None], other, one)

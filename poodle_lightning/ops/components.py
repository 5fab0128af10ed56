"""From an attention map to a mask and a box: share of the mass, connected components, extents, overlaps.

The rules are those of DINO's ``visualize_attention.py`` (mass) and of LOST's ``object_discovery.py``
(``dino_seg``: components and box; Siméoni et al., BMVC 2021). Boxes are ``(left, top, right, bottom)``, from
the first pixel's left edge 0 to the last one's right edge.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Rule = Literal["largest", "lost"]


def keep_mass(attention: Tensor, mass: float) -> Tensor:
    """The cells that hold this share of the attention: the smallest ones are left out up to ``1 - mass``.

    Cells are added up from the smallest; one is kept as soon as the sum with it is above ``1 - mass`` (so the
    cell that crosses the line is kept). Of equal cells the first ones are left out first.

    Args:
        attention: ``(..., n)``, not negative, of any sum; added up in float64.
        mass: share that is kept, above 0 up to 1.

    Returns:
        ``(..., n)`` bool.
    """
    ordered, places = attention.double().sort(dim=-1, stable=True)
    shares = (ordered / ordered.sum(dim=-1, keepdim=True)).cumsum(dim=-1)
    return torch.zeros_like(places, dtype=torch.bool).scatter(-1, places, shares > 1.0 - mass)


def largest_component(mask: Tensor, rule: Rule = "largest") -> Tensor:
    """The largest group of cells that touch by their sides; of equal ones the first, row by row.

    Args:
        mask: ``(h, w)`` bool.
        rule: ``largest``; a mask without a cell gives one. ``lost``: what LOST's code does, whose list of
            sizes ends before the last component: the largest of all but the last one, and where there is one
            component or none, everything outside it (or, if nothing is outside, everything).

    Returns:
        ``(h, w)`` bool on the host.
    """
    from scipy import ndimage

    numbered, count = ndimage.label(mask.cpu().numpy())
    labels = torch.from_numpy(numbered).long()
    if rule == "lost" and count < 2:
        outside = labels == 0
        return outside if bool(outside.any()) else ~outside
    sizes = torch.bincount(labels.flatten(), minlength=count + 1)[1:]
    if rule == "lost":
        sizes = sizes[:-1]
    if not len(sizes):
        return torch.zeros_like(labels, dtype=torch.bool)
    # not argmax: which of several largest it takes is not promised
    return labels == 1 + int((sizes == sizes.max()).nonzero()[0])


def extent(mask: Tensor) -> Tensor:
    """The smallest box around the cells of a mask, ``(4,)`` float64 in cells; zeros where it has none.

    Args:
        mask: ``(h, w)`` bool.
    """
    rows, columns = (mask.any(dim=side).nonzero().flatten() for side in (1, 0))
    if not len(rows):
        return torch.zeros(4, dtype=torch.float64)
    ends = (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1)
    return torch.stack(ends).double().cpu()


def box_iou(box: Tensor, others: Tensor) -> Tensor:
    """Intersection over union of a box ``(4,)`` with others ``(N, 4)``: ``(N,)`` float64, 0 of empty ones."""
    one, many = box.double(), others.double()
    corners = torch.cat([torch.maximum(one[:2], many[:, :2]), torch.minimum(one[2:], many[:, 2:])], dim=1)
    shared, mine, theirs = (_area(boxes) for boxes in (corners, one[None], many))
    union = mine + theirs - shared
    return torch.where(union > 0, shared / union.clamp(min=torch.finfo(torch.float64).tiny), 0.0)


def _area(boxes: Tensor) -> Tensor:
    return (boxes[:, 2:] - boxes[:, :2]).clamp(min=0.0).prod(dim=1)

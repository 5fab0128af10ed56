"""Which pixels of a frame are visible in the other frame, from a forward and a backward flow.

A point seen in both frames comes back to where it started: ``x + F12(x) + F21(x + F12(x)) = x``. Where it
does not, something else covers it in the other frame. A point that leaves the frame is not visible either,
so both functions also ask that ``x + F12(x)`` lies inside the frame.

All thresholds are in pixels of the flow's own resolution (the training crop's) and are not rescaled with it.
The flow is sampled bilinearly at the target point and computed in float32 (float64 stays) under any autocast.
A flow that is not finite makes its pixel invisible.
"""

from __future__ import annotations

import torch
from torch import Tensor

from poodle_lightning.ops.geometry import Flow, Size, inside, island, pixel_grid


def there_and_back(flow: Flow) -> tuple[Tensor, Tensor, Tensor]:
    """The flow at every pixel, the opposite flow where it leads, and whether it leads inside the frame.

    Args:
        flow: 2N rows; rows 0 … N−1 first frame → second, rows N … 2N−1 second → first.

    Returns:
        ``F12(x)`` and ``F21(x + F12(x))``, both ``(2N, H, W, 2)`` in pixels, and ``(2N, H, W)`` bool.

    Raises:
        ValueError: the number of rows is odd.
    """
    rows = len(flow)
    if rows % 2:
        raise ValueError(f"occlusion needs both directions of every pair: an even number of rows, not {rows}")
    with island(flow.displacement.device.type):
        opposite = Flow(flow.displacement.roll(rows // 2, dims=0))
        there = flow.displacement.permute(0, 2, 3, 1)
        target = pixel_grid(flow.size, there.device, there.dtype) + there
        back = opposite.at(target)
        return _in_pixels(there, flow.size), _in_pixels(back, flow.size), inside(target)


def _in_pixels(displacement: Tensor, size: Size) -> Tensor:
    x, y = displacement.unbind(-1)
    return torch.stack([x * (size[1] / 2.0), y * (size[0] / 2.0)], dim=-1)


@torch.no_grad()
def visible_ddflow(flow: Flow, alpha1: float = 0.1, alpha2: float = 0.5) -> Tensor:
    """The forward-backward check of DDFlow, with PooDLe's thresholds.

    Occluded iff ``|F12(x) + F21(x+F12(x))|² > α₁ (|F12(x)|² + |F21(x+F12(x))|²) + α₂``
    (Liu et al. 2019, "DDFlow", eq. 1, after Meister et al. 2018, "UnFlow"; PooDLe: α₁ = 0.1, α₂ = 0.5;
    DDFlow and UFlow: α₁ = 0.01).

    Args:
        flow: 2N rows; rows 0 … N−1 first frame → second, rows N … 2N−1 second → first.
        alpha1: share of the squared lengths that is tolerated.
        alpha2: squared pixels that are tolerated in any case.

    Returns:
        ``(2N, H, W)`` bool, true where visible; row i is about the frame in which row i of the flow starts.
    """
    there, back, lands = there_and_back(flow)
    tolerated = alpha1 * (there.square().sum(-1) + back.square().sum(-1)) + alpha2
    return ((there + back).square().sum(-1) <= tolerated) & lands


@torch.no_grad()
def visible_endpoint(flow: Flow, threshold: float = 3.54) -> Tensor:
    """The forward-backward check by the distance between start and end point alone, as for FlowE.

    Occluded iff ``‖F12(x) + F21(x+F12(x))‖ > threshold`` (after Sundaram et al. 2010; the FlowE paper gives
    no threshold, PooDLe's code uses 10/√8 = 3.54 px).

    Args:
        flow: 2N rows; rows 0 … N−1 first frame → second, rows N … 2N−1 second → first.
        threshold: pixels of the flow's resolution.

    Returns:
        ``(2N, H, W)`` bool, true where visible.
    """
    there, back, lands = there_and_back(flow)
    return ((there + back).square().sum(-1) <= threshold**2) & lands

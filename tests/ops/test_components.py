"""Mass, components, boxes and overlaps against loops and torchvision, and LOST's slip by its rule."""

import numpy as np
import pytest
import torch
from torchvision.ops import box_iou as published_iou

from poodle_lightning.ops.components import box_iou, extent, keep_mass, largest_component


def slow_mass(values, mass):
    """Take away the smallest while what is taken stays within 1 - mass."""
    values = [float(v) for v in values]
    total, gone = sum(values), 0.0
    kept = [True] * len(values)
    for place in sorted(range(len(values)), key=lambda i: (values[i], i)):
        gone += values[place] / total
        if gone > 1 - mass:
            break
        kept[place] = False
    return kept


@pytest.mark.parametrize("mass", [0.1, 0.6, 0.8, 0.95, 1.0])
def test_mass_against_a_loop(mass):
    draw = torch.Generator().manual_seed(1)
    attention = torch.rand(2, 5, 37, generator=draw) ** 4
    found = keep_mass(attention, mass)
    for row, kept in zip(attention.flatten(0, 1), found.flatten(0, 1), strict=True):
        assert kept.tolist() == slow_mass(row, mass)
        assert row[kept].sum() >= mass * row.sum() * (1 - 1e-6)
        without = row[kept].sum() - row[kept].min()  # one cell less would not be enough
        assert without < mass * row.sum() * (1 + 1e-6)


def test_mass_by_hand():
    attention = torch.tensor([0.05, 0.5, 0.1, 0.35])
    assert keep_mass(attention, 0.8).tolist() == [False, True, False, True]
    assert keep_mass(10 * attention, 0.9).tolist() == [False, True, True, True]
    assert keep_mass(attention, 0.4).tolist() == [False, True, False, False]
    assert keep_mass(torch.tensor([0.0, 1.0, 0.0]), 0.8).tolist() == [False, True, False]
    # of equal cells the first are left out
    assert keep_mass(torch.ones(8), 0.5).tolist() == [False] * 4 + [True] * 4


def slow_components(mask):
    """Flood fill from every cell, row by row."""
    height, width = mask.shape
    seen, groups = set(), []
    for start in [(y, x) for y in range(height) for x in range(width) if mask[y, x]]:
        if start in seen:
            continue
        group, waiting = set(), [start]
        while waiting:
            y, x = waiting.pop()
            if (y, x) in seen or not (0 <= y < height and 0 <= x < width) or not mask[y, x]:
                continue
            seen.add((y, x))
            group.add((y, x))
            waiting += [(y + 1, x), (y - 1, x), (y, x + 1), (y, x - 1)]
        groups.append(group)
    return groups


def as_mask(group, shape):
    made = torch.zeros(shape, dtype=torch.bool)
    for y, x in group:
        made[y, x] = True
    return made


@pytest.mark.parametrize("seed", range(12))
def test_largest_component_against_a_flood_fill(seed):
    draw = torch.Generator().manual_seed(seed)
    mask = torch.rand(9, 13, generator=draw) < (0.25, 0.45, 0.6, 0.8)[seed % 4]
    groups = slow_components(mask)
    largest = max(groups, key=len)  # the first of equal ones
    assert torch.equal(largest_component(mask), as_mask(largest, mask.shape))


@pytest.mark.parametrize("seed", range(12))
def test_losts_rule_forgets_the_last_component(seed):
    draw = torch.Generator().manual_seed(seed)
    mask = torch.rand(6, 7, generator=draw) < 0.3
    groups = slow_components(mask)
    assert len(groups) > 1
    # sizes of background and of all components but the last; the largest behind the first entry
    sizes = [int((~mask).sum()), *map(len, groups)][: len(groups)]
    chosen = 1 + int(np.argmax(sizes[1:]))
    assert torch.equal(largest_component(mask, "lost"), as_mask(groups[chosen - 1], mask.shape))


def test_losts_rule_takes_the_background_of_a_single_component():
    mask = torch.zeros(3, 4, dtype=torch.bool)
    mask[1, 1:3] = True
    assert torch.equal(largest_component(mask, "lost"), ~mask)
    assert bool(largest_component(torch.ones(2, 2, dtype=torch.bool), "lost").all())
    assert bool(largest_component(torch.zeros(2, 2, dtype=torch.bool), "lost").all())


def test_corners_do_not_touch():
    mask = torch.tensor([[1, 1, 0], [0, 0, 1], [0, 0, 1]]).bool()
    assert largest_component(mask).tolist() == [[True, True, False], [False] * 3, [False] * 3]
    assert not largest_component(torch.zeros(2, 3, dtype=torch.bool)).any()


def test_extent_against_a_loop():
    draw = torch.Generator().manual_seed(0)
    for _ in range(20):
        mask = torch.rand(8, 6, generator=draw) < 0.1
        cells = [(y, x) for y in range(8) for x in range(6) if mask[y, x]]
        if not cells:
            continue
        rows, columns = zip(*cells, strict=True)
        expected = [min(columns), min(rows), max(columns) + 1, max(rows) + 1]
        assert extent(mask).tolist() == expected
    assert extent(torch.zeros(3, 3, dtype=torch.bool)).tolist() == [0, 0, 0, 0]


def test_overlap_against_torchvision():
    draw = torch.Generator().manual_seed(0)
    corners = torch.rand(2, 30, 2, generator=draw, dtype=torch.float64) * 20
    boxes = torch.cat([corners.amin(0), corners.amax(0)], dim=1)
    found = torch.stack([box_iou(box, boxes) for box in boxes])
    assert torch.allclose(found, published_iou(boxes, boxes), atol=1e-12)
    # exactly one half: 2 of 4 pixels
    assert box_iou(torch.tensor([0, 0, 2, 1]), torch.tensor([[0, 0, 4, 1], [5, 5, 6, 6]])).tolist() == [
        0.5,
        0,
    ]
    assert box_iou(torch.zeros(4), torch.zeros(1, 4)).tolist() == [0.0]

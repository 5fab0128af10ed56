import math

import pytest
import torch
from device_reads import DeviceReads

from poodle_lightning.losses import pixel_consistency
from poodle_lightning.losses.pixel_consistency import consistency, positive_pairs
from poodle_lightning.ops.geometry import Affine

# crops as PixPro has them, (left, top, right, bottom) in shares of the image; a flip swaps left and right
FIRST = [(0.0, 0.0, 1.0, 1.0), (0.1, 0.2, 0.8, 0.7), (0.6, 0.1, 0.2, 0.9), (0.0, 0.0, 0.3, 0.3)]
SECOND = [(0.0, 0.0, 1.0, 1.0), (0.3, 0.1, 0.9, 0.9), (0.1, 0.0, 0.7, 0.6), (0.6, 0.6, 1.0, 1.0)]
GRID = (3, 4)


def crops(boxes):
    return Affine.box(torch.tensor(boxes, dtype=torch.float64) * 2 - 1)


def pairs_by_loops(first, second, grid, threshold):
    """The published form: starts and bins of axis-aligned boxes."""
    height, width = grid
    found = []
    for boxes in zip(first, second, strict=True):
        bins = [((x1 - x0) / width, (y1 - y0) / height) for x0, y0, x1, y1 in boxes]
        longest = max(math.hypot(*size) for size in bins)
        centres = [
            [(x0 + (c + 0.5) * w, y0 + (r + 0.5) * h) for r in range(height) for c in range(width)]
            for (x0, y0, _, _), (w, h) in zip(boxes, bins, strict=True)
        ]
        found.append([[math.dist(a, b) / longest < threshold for b in centres[1]] for a in centres[0]])
    return torch.tensor(found)


@pytest.mark.parametrize("threshold", [0.3, 0.7, 1.5])
def test_pairs_equal_loops(threshold):
    found = positive_pairs(crops(FIRST), crops(SECOND), GRID, threshold)
    wanted = pairs_by_loops(FIRST, SECOND, GRID, threshold)
    assert torch.equal(found, wanted)
    assert not found[3].any()  # these crops do not meet
    assert found[1:3].any(dim=2).any(dim=1).all()
    assert torch.equal(positive_pairs(crops(SECOND), crops(FIRST), GRID, threshold), found.mT)


def test_the_same_view_pairs_every_cell_with_itself():
    found = positive_pairs(Affine.identity(1), Affine.identity(1), (4, 4))
    assert torch.equal(found[0], torch.eye(16, dtype=torch.bool))


def test_a_turned_view_pairs_cells_at_the_same_place():
    quarter = Affine(torch.tensor([[[0.0, -1.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, 1.0]]]))
    found = positive_pairs(quarter, Affine.identity(1), (3, 3))[0].nonzero()
    for cell, other in found.tolist():
        x, y = cell % 3 - 1, cell // 3 - 1
        assert (other % 3 - 1, other // 3 - 1) == (-y, x)
    assert len(found) == 9


def make(dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    both = torch.randn(2, 4, 5, *GRID, dtype=dtype, generator=generator)
    return both[0], both[1], pairs_by_loops(FIRST, SECOND, GRID, 0.7)


def loss_by_loops(online, target, positive):
    total = 0.0
    for x, y, mask in zip(online.flatten(2), target.flatten(2), positive, strict=True):
        values = [
            float(x[:, i] @ y[:, j] / x[:, i].norm() / y[:, j].norm()) for i, j in mask.nonzero().tolist()
        ]
        total += sum(values) / max(len(values), 1)
    return -2.0 * total / len(positive)


@pytest.mark.parametrize("block", [1, 4 * 12 * 5, 1 << 26], ids=["row by row", "in blocks", "at once"])
def test_consistency_equals_loops(block, monkeypatch):
    monkeypatch.setattr(pixel_consistency, "BLOCK_PAIRS", block)
    online, target, positive = make()
    found = consistency(online, target, positive)
    assert float(found) == pytest.approx(loss_by_loops(online, target, positive), rel=1e-9)
    back = consistency(target, online, positive.mT)  # cosines have no direction
    torch.testing.assert_close(back, found)


def test_equal_maps_reach_the_minimum():
    online, _, _ = make()
    itself = torch.eye(12, dtype=torch.bool).expand(4, 12, 12)
    assert float(consistency(online, 3 * online, itself)) == pytest.approx(-2.0)


def test_gradient_goes_to_the_online_map_alone():
    online, target, positive = make()
    online.requires_grad_()
    target.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: consistency(x, target.detach(), positive), [online])
    consistency(online, target, positive).backward()
    assert target.grad is None
    assert not online.grad[3].any()


def test_half_precision_and_no_reads():
    online, target, positive = make()
    online, target = online.bfloat16().requires_grad_(), target.bfloat16()
    first, second = crops(FIRST), crops(SECOND)
    tensors = [online, target, first.matrix, second.matrix]
    with torch.autocast("cpu", dtype=torch.bfloat16), DeviceReads(tensors) as reads:
        loss = consistency(online, target, positive_pairs(first, second, GRID))
        loss.backward()
    assert reads.found == []
    assert loss.dtype == torch.float32
    exact = consistency(online.detach().double(), target.double(), positive)
    torch.testing.assert_close(loss.double(), exact, rtol=1e-5, atol=1e-6)

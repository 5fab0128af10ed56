import copy

import pytest
import torch
from torch import nn

from poodle_lightning.nn import pixel_propagation
from poodle_lightning.nn.heads import ConvMLP
from poodle_lightning.nn.pixel_propagation import PixelPropagation
from poodle_lightning.types import UserError


def by_loops(module, maps):
    """Eqs. 3 and 4, cell by cell, with g's vectors of length 1."""
    values = module.transform(maps)
    cells = [(b, i, j) for b in range(len(maps)) for i in range(maps.shape[2]) for j in range(maps.shape[3])]
    rows = []
    for b, i, j in cells:
        total = 0.0
        for c, k, m in cells:
            if c != b:
                continue
            x, other, g = maps[b, :, i, j], maps[b, :, k, m], values[b, :, k, m]
            cosine = (x / x.norm()) @ (other / other.norm())
            total = total + cosine.clamp(min=0) ** module.gamma * g / g.norm()
        rows.append(total)
    return torch.stack(rows).view(len(maps), *maps.shape[2:], -1).permute(0, 3, 1, 2)


@pytest.mark.parametrize("pairs", [1 << 24, 2 * 12 * 5])
@pytest.mark.parametrize(("layers", "gamma"), [(0, 1.0), (1, 2.0), (2, 3.0)])
def test_equal_to_the_formula_in_float64(layers, gamma, pairs, monkeypatch):
    """All at once, and in blocks of five cells that are computed again backward."""
    monkeypatch.setattr(pixel_propagation, "BLOCK_PAIRS", pairs)
    torch.manual_seed(0)
    module = PixelPropagation(5, layers, gamma).double().eval()
    twin = copy.deepcopy(module)
    maps = torch.randn(2, 5, 3, 4, dtype=torch.float64, requires_grad=True)
    others = maps.detach().clone().requires_grad_()
    found, wanted = module(maps), by_loops(twin, others)
    torch.testing.assert_close(found, wanted)
    weight = torch.randn_like(found)
    (found * weight).sum().backward()
    (wanted * weight).sum().backward()
    torch.testing.assert_close(maps.grad, others.grad)
    for one, other in zip(module.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad)


def test_the_transformation_has_so_many_layers():
    kinds = [type(PixelPropagation(4, layers).transform) for layers in (0, 1, 2)]
    assert kinds == [nn.Identity, nn.Conv2d, ConvMLP]
    assert PixelPropagation().transform.weight.shape == (256, 256, 1, 1)


@pytest.mark.parametrize("pairs", [1 << 24, 16])
def test_half_precision_stays_outside(pairs, monkeypatch):
    monkeypatch.setattr(pixel_propagation, "BLOCK_PAIRS", pairs)
    module, maps = PixelPropagation(8, 0), torch.randn(2, 8, 3, 3, requires_grad=True)
    exact = module(maps)
    with torch.autocast("cpu", torch.bfloat16):
        rough = module(maps)
    assert torch.equal(rough, exact)


@pytest.mark.parametrize("wrong", [{"layers": 3}, {"gamma": 0.5}])
def test_other_numbers_are_refused(wrong):
    with pytest.raises(UserError, match="layers of 0, 1 or 2 and gamma >= 1"):
        PixelPropagation(4, **wrong)

import pytest
import torch
from device_reads import DeviceReads
from lightly.loss import VICRegLoss
from side_by_side import in_two
from torch.utils.flop_counter import FlopCounterMode

from poodle_lightning.losses.redundancy import vicreg
from poodle_lightning.ops.distributed import mean_across

SHAPES = [(6, 4), (4, 6), (5, 5)]  # either product is the smaller


def make(count, dims, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    mixed = torch.randn(2, count, dims, dtype=dtype, generator=generator)
    return 0.7 * mixed + 0.4 * mixed.roll(1, dims=2) + 3.0  # correlated, and not around zero


def by_loops(first, second):
    count, dims = len(first), len(first[0])
    squared = [
        (a - b) ** 2 for one, two in zip(first, second, strict=True) for a, b in zip(one, two, strict=True)
    ]
    variance = covariance = 0.0
    for branch in (first, second):
        means = [sum(row[d] for row in branch) / count for d in range(dims)]
        for d in range(dims):
            for e in range(dims):
                products = ((row[d] - means[d]) * (row[e] - means[e]) for row in branch)
                value = sum(products) / (count - 1)
                if d == e:
                    variance += max(0.0, 1.0 - (value + 1e-4) ** 0.5) / dims / 2
                else:
                    covariance += value**2 / dims
    return {"invariance": sum(squared) / len(squared), "variance": variance, "covariance": covariance}


@pytest.mark.parametrize("shape", SHAPES)
def test_terms_equal_loops(shape):
    first, second = make(*shape)
    wanted = by_loops(first.tolist(), second.tolist())
    assert wanted["variance"] > 0.01
    weights = {"invariance": 25.0, "variance": 25.0, "covariance": 1.0}
    found, other = vicreg(first, second), vicreg(first, second, 2.0, 3.0, 5.0)
    assert list(found) == list(weights)
    for name, factor in zip(weights, (2.0, 3.0, 5.0), strict=True):
        assert float(found[name]) == pytest.approx(weights[name] * wanted[name], rel=1e-9)
        assert float(other[name]) == pytest.approx(factor * wanted[name], rel=1e-9)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equals_lightlys_loss_and_gradient(shape, dtype):
    grads = []
    for form in (lambda a, b: sum(vicreg(a, b).values()), VICRegLoss()):
        both = make(*shape, dtype).requires_grad_()
        loss = form(both[0], both[1])
        loss.backward()
        grads.append((loss.detach(), both.grad))
    torch.testing.assert_close(*grads, rtol=1e-4 if dtype == torch.float32 else 1e-9, atol=1e-5)


@pytest.mark.parametrize("shape", [(4, 64), (64, 4)])
def test_the_smaller_product_is_made(shape):
    with FlopCounterMode(display=False) as counted:
        vicreg(*make(*shape))
    assert counted.get_total_flops() == 2 * 2 * 4 * 4 * 64


def step(both):
    leaf = both.clone().requires_grad_()
    loss = sum(vicreg(leaf[0], leaf[1]).values())
    loss.backward()
    return loss.detach(), leaf.grad


@pytest.mark.parametrize("shape", [(6, 4), (6, 9)])
def test_two_processes_equal_one(shape):
    both = make(*shape)

    def act(rank):
        loss, gradient = step(both[:, 3 * rank : 3 * rank + 3])
        return mean_across(loss), gradient / 2  # the mean of two losses

    loss, gradient = step(both)
    for rank, found in enumerate(in_two(act)):
        torch.testing.assert_close(found, (loss, gradient[:, 3 * rank : 3 * rank + 3]), rtol=1e-9, atol=1e-12)


def test_one_row_has_no_variance():
    with pytest.raises(ValueError, match="two rows or more"):
        vicreg(*make(1, 4))


def test_half_precision_and_no_reads():
    both = make(6, 4).bfloat16().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16), DeviceReads([both]) as reads:
        terms = vicreg(both[0], both[1])
        sum(terms.values()).backward()
    assert reads.found == []
    exact = vicreg(*both.detach().double())
    for name, term in terms.items():
        assert term.dtype == torch.float32
        torch.testing.assert_close(term.double(), exact[name], rtol=1e-4, atol=1e-5)

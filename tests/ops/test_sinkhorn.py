import math

import pytest
import torch
from device_reads import DeviceReads
from lightly.loss.swav_loss import sinkhorn
from side_by_side import in_two

from poodle_lightning.ops.sinkhorn import assign, transport


def exponential_form(scores, epsilon, rounds):
    """One image, plain Python: exp, then rows to 1 / k and columns to 1 / n, over and over."""
    k, n = len(scores), len(scores[0])
    top = max(max(row) for row in scores)
    plan = [[math.exp((value - top) / epsilon) for value in row] for row in scores]
    for _ in range(rounds):
        for i in range(k):
            mass = sum(plan[i])
            plan[i] = [value / mass / k for value in plan[i]]
        for j in range(n):
            mass = sum(plan[i][j] for i in range(k))
            for i in range(k):
                plan[i][j] = plan[i][j] / mass / n
    return torch.tensor(plan, dtype=torch.float64)


@pytest.mark.parametrize(("rounds", "epsilon"), [(1, 0.05), (3, 0.5), (30, 0.05)])
def test_equals_the_exponential_form(rounds, epsilon):
    torch.manual_seed(0)
    scores = torch.randn(3, 3, 10, dtype=torch.float64) * 0.5
    found = transport(scores, epsilon, rounds)
    assert found.dtype == torch.float64
    for image, plan in zip(scores.tolist(), found, strict=True):
        torch.testing.assert_close(plan, exponential_form(image, epsilon, rounds), rtol=1e-9, atol=1e-14)


def test_marginals():
    torch.manual_seed(0)
    scores = torch.randn(4, 3, 50)
    plan = transport(scores)
    torch.testing.assert_close(plan.sum(dim=1), torch.full((4, 50), 1 / 50), rtol=1e-5, atol=0)
    few, many = ((transport(scores, 0.3, rounds).sum(dim=2) - 1 / 3).abs().max() for rounds in (1, 200))
    assert many < 1e-4 < few  # rows only come near


def test_the_limit_is_a_scaled_kernel():
    """What minimises cost minus entropy is diag(u) exp(scores / ε) diag(v): logarithms differ by u + v."""
    torch.manual_seed(0)
    scores = torch.randn(2, 3, 8, dtype=torch.float64)
    rest = transport(scores, 0.5, 300).log() - scores / 0.5
    centred = rest - rest.mean(1, keepdim=True) - rest.mean(2, keepdim=True) + rest.mean((1, 2), keepdim=True)
    assert centred.abs().max() < 1e-10


def test_one_object_has_all_patches_alike():
    torch.testing.assert_close(transport(torch.randn(2, 1, 7)), torch.full((2, 1, 7), 1 / 7))


def test_a_row_that_underflows_is_as_good_as_any():
    """In float32 the exponentials of the second row are all zero, and zero over zero is not a number."""
    torch.manual_seed(0)
    scores = torch.randn(1, 3, 12) * 0.2
    scores[:, 1] -= 20.0
    wanted = exponential_form(scores[0].double().tolist(), 0.05, 30)
    kernel = ((scores - scores.max()) / 0.05).exp()
    assert (kernel / kernel.sum(dim=2, keepdim=True)).isnan().any()
    torch.testing.assert_close(transport(scores)[0].double(), wanted, rtol=1e-3, atol=1e-6)
    far = scores.clone()
    far[:, 1] -= 1e4  # a row's own scale does not matter at all
    torch.testing.assert_close(transport(far), transport(scores), rtol=1e-1, atol=1e-3)


def test_half_precision_and_autocast_work_in_float32():
    torch.manual_seed(0)
    scores = torch.randn(2, 3, 9)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = transport(scores)
    assert torch.equal(found, transport(scores))
    assert transport(scores.bfloat16()).dtype == torch.float32


def test_gradient_equals_finite_differences():
    torch.manual_seed(0)
    scores = torch.randn(1, 2, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda s: transport(s, 0.5, 4), scores)


def test_reads_nothing_back_and_names_bad_numbers():
    scores = torch.randn(2, 3, 9)
    with DeviceReads([scores]) as reads:
        transport(scores)
    assert reads.found == []
    for bad in ({"epsilon": 0.0}, {"iterations": 0}):
        with pytest.raises(ValueError, match="epsilon > 0 and iterations >= 1"):
            transport(scores, **bad)


def assigned_by_loops(scores, epsilon, rounds):
    """Samples in rows: prototypes' sums to 1 / K, samples' sums to 1 / B, and at last to 1."""
    plan = exponential_form([list(column) for column in zip(*scores, strict=True)], epsilon, rounds)
    return plan.t() * len(scores)


@pytest.mark.parametrize(("rounds", "epsilon"), [(1, 0.05), (3, 0.05), (20, 0.5)])
def test_assignment_equals_loops_and_lightlys(rounds, epsilon):
    torch.manual_seed(0)
    scores = torch.randn(2, 6, 4, dtype=torch.float64).clamp(-1, 1)
    found = assign(scores, epsilon, rounds)
    for one, plan in zip(scores, found, strict=True):
        wanted = assigned_by_loops(one.tolist(), epsilon, rounds)
        torch.testing.assert_close(plan, wanted, rtol=1e-9, atol=1e-14)
        torch.testing.assert_close(plan, sinkhorn(one, rounds, epsilon), rtol=1e-9, atol=1e-14)


def test_assignment_shares_prototypes_out_evenly():
    torch.manual_seed(0)
    plan = assign(torch.rand(40, 5) + torch.tensor([1.0, 0, 0, 0, 0]), 0.5, 200)
    torch.testing.assert_close(plan.sum(dim=1), torch.ones(40))
    torch.testing.assert_close(plan.sum(dim=0), torch.full((5,), 8.0), rtol=1e-3, atol=0)


def test_two_processes_assign_as_one():
    torch.manual_seed(0)
    scores = torch.randn(2, 6, 4, dtype=torch.float64)
    wanted = assign(scores)
    halves = in_two(lambda rank: assign(scores[:, 2 * rank : 2 + 4 * rank]))  # 2 rows and 4
    torch.testing.assert_close(torch.cat(halves, dim=1), wanted, rtol=1e-9, atol=1e-14)


def test_assignment_where_exponentials_overflow():
    """A score of 5 over 0.05 is e^100, more than float32 holds."""
    torch.manual_seed(0)
    scores = torch.randn(6, 4) + 5.0
    assert (scores / 0.05).exp().isinf().any()
    wanted = assigned_by_loops(scores.double().tolist(), 0.05, 3)
    torch.testing.assert_close(assign(scores).double(), wanted, rtol=1e-3, atol=1e-6)


def test_assignment_is_float32_without_gradient_or_reads():
    scores = torch.randn(6, 4, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16), DeviceReads([scores]) as reads:
        found = assign(scores)
        half = assign(scores.bfloat16())
    assert reads.found == []
    assert found.dtype == half.dtype == torch.float32
    assert not found.requires_grad
    for bad in ({"epsilon": 0.0}, {"iterations": 0}):
        with pytest.raises(ValueError, match="epsilon > 0 and iterations >= 1"):
            assign(scores, **bad)

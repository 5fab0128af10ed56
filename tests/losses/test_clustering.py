import math

import pytest
import torch
from device_reads import DeviceReads
from lightly.loss import SwaVLoss
from side_by_side import in_two

from poodle_lightning.losses.clustering import swapped_prediction
from poodle_lightning.ops.distributed import mean_across
from poodle_lightning.ops.sinkhorn import assign

U, V, B, K = 2, 5, 6, 4


def make(dtype=torch.float64):
    return torch.randn(V, B, K, dtype=dtype, generator=torch.Generator().manual_seed(0)).clamp(-1, 1)


def test_equals_loops():
    scores = make()
    targets = assign(scores[:U])
    wanted = 0.0
    for u in range(U):
        for v in range(V):
            if v == u:
                continue
            for b in range(B):
                weights = [math.exp(x / 0.1) for x in scores[v, b].tolist()]
                logs = [math.log(w / sum(weights)) for w in weights]
                share = -sum(q * log for q, log in zip(targets[u, b].tolist(), logs, strict=True))
                wanted += share / B / (V - 1) / U
    assert float(swapped_prediction(scores, targets, 0.1)) == pytest.approx(wanted, rel=1e-9)


def test_equals_lightlys_loss_and_gradient():
    grads = []
    for form in (
        lambda s: swapped_prediction(s, assign(s[:U]), 0.1),
        lambda s: SwaVLoss()(list(s[:U]), list(s[U:]))[0],
    ):
        scores = make().requires_grad_()
        loss = form(scores)
        loss.backward()
        grads.append((loss.detach(), scores.grad))
    torch.testing.assert_close(*grads)


def test_equals_lightlys_loss_with_a_queue():
    scores, queue = make(), make().flip(0)[:U]
    targets = assign(torch.cat([scores[:U], queue], dim=1))[:, :B]
    wanted = SwaVLoss()(list(scores[:U]), list(scores[U:]), list(queue))[0]
    torch.testing.assert_close(swapped_prediction(scores, targets), wanted)


def step(scores):
    leaf = scores.clone().requires_grad_()
    loss = swapped_prediction(leaf, assign(leaf[:U]))
    loss.backward()
    return loss.detach(), leaf.grad


def test_two_processes_equal_one():
    scores = make()

    def act(rank):
        loss, gradient = step(scores[:, 3 * rank : 3 * rank + 3])
        return mean_across(loss), gradient / 2  # the mean of two losses

    loss, gradient = step(scores)
    for rank, found in enumerate(in_two(act)):
        torch.testing.assert_close(found, (loss, gradient[:, 3 * rank : 3 * rank + 3]), rtol=1e-9, atol=1e-12)


def test_wrong_numbers_of_views_are_named():
    scores = make()
    with pytest.raises(ValueError, match="2 views or more"):
        swapped_prediction(scores[:1], scores[:1])
    with pytest.raises(ValueError, match="no more assignments"):
        swapped_prediction(scores[:2], scores[:3])


def test_half_precision_and_no_reads():
    scores = make(torch.float32).bfloat16().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16), DeviceReads([scores]) as reads:
        loss = swapped_prediction(scores, assign(scores[:U]))
        loss.backward()
    assert reads.found == []
    assert loss.dtype == torch.float32
    exact = scores.detach().double()
    torch.testing.assert_close(loss.double(), swapped_prediction(exact, assign(exact[:U])), rtol=1e-5, atol=0)

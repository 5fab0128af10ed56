import numpy as np
import pytest
import torch
from torch import nn

from poodle_lightning.nn.ema import EMA
from poodle_lightning.nn.resnet import ResNet


def small():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1))


def test_moves_by_one_minus_momentum():
    torch.manual_seed(0)
    online = small()
    target = EMA(online)
    expected = [p.detach().double().numpy().copy() for p in target.parameters()]
    for momentum in (0.996, 0.9, 0.5, 0.3, 0.0, 0.99999, 1.0):
        with torch.no_grad():
            for p in online.parameters():
                p.add_(torch.randn_like(p))
        before = [p.detach().clone() for p in target.parameters()]
        target.update(online, momentum)
        for i, (p, q) in enumerate(zip(target.parameters(), online.parameters(), strict=True)):
            # From float32 values before the step, in float64: one rounding of values of order 1 is allowed.
            exact = before[i].double() * momentum + q.detach().double() * (1 - momentum)
            np.testing.assert_allclose(p.double().numpy(), exact.numpy(), rtol=2e-7, atol=1e-7)
            expected[i] = momentum * expected[i] + (1 - momentum) * q.detach().double().numpy()
            np.testing.assert_allclose(p.double().numpy(), expected[i], rtol=1e-6, atol=1e-6)


def test_exact_in_float64():
    online = small().double()
    target = EMA(online)
    with torch.no_grad():
        for p in online.parameters():
            p.copy_(torch.randn_like(p))
    before = [p.clone() for p in target.parameters()]
    target.update(online, 0.996)
    for p, b, q in zip(target.parameters(), before, online.parameters(), strict=True):
        torch.testing.assert_close(p, 0.996 * b + 0.004 * q.detach(), rtol=1e-14, atol=1e-14)


def test_buffers_are_the_copys_own():
    online = small()
    target = EMA(online)
    online(torch.randn(8, 3, 8, 8) + 5)
    assert torch.equal(target.module[1].running_mean, torch.zeros(4))
    target.update(online, 0.0)
    assert torch.equal(target.module[1].running_mean, torch.zeros(4))
    # In train mode the copy normalises with its own batch and moves its own statistics.
    online_mean = online[1].running_mean.clone()
    out = target(torch.randn(8, 3, 8, 8) - 3)
    assert target.module[1].training
    assert not torch.equal(target.module[1].running_mean, torch.zeros(4))
    assert torch.equal(online[1].running_mean, online_mean)
    assert not out.requires_grad


def test_no_graph_even_for_inputs_that_ask_for_one():
    target = EMA(small())
    assert not any(p.requires_grad for p in target.parameters())
    assert not target(torch.randn(2, 3, 8, 8, requires_grad=True)).requires_grad


def test_the_original_stays_trainable_and_apart():
    online = ResNet(10, width=8)
    target = EMA(online)
    assert all(p.requires_grad for p in online.parameters())
    assert not {p.data_ptr() for p in online.parameters()} & {p.data_ptr() for p in target.parameters()}
    assert target.module.init_args == online.init_args


@pytest.mark.parametrize("momentum", [-0.1, 1.1, float("nan")])
def test_momentum_out_of_range(momentum):
    with pytest.raises(ValueError, match=r"in \[0, 1\]"):
        EMA(small()).update(small(), momentum)


def test_another_network_is_refused():
    with pytest.raises(ValueError, match="zip"):
        EMA(small()).update(nn.Linear(2, 2), 0.5)

"""Looking leaves every module's mode and the gradient switch as they were."""

import pytest
import torch
from torch import nn

from poodle_lightning.nn.observed import observed


@pytest.fixture
def net():
    made = nn.Sequential(nn.Conv2d(1, 1, 1), nn.BatchNorm2d(1), nn.Dropout(0.5))
    made.train()
    made[1].eval()
    return made


def test_inside_it_evaluates_without_gradients(net):
    with observed(net):
        assert not any(part.training for part in net.modules())
        assert not net(torch.ones(1, 1, 2, 2)).requires_grad


def test_modes_come_back_even_after_an_error(net):
    with pytest.raises(RuntimeError), observed(net):
        raise RuntimeError("stop")
    assert [part.training for part in net.modules()] == [True, True, False, True]
    assert torch.is_grad_enabled()

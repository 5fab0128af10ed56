import copy

import torch
from torch import nn

from poodle_lightning.nn.frozen import Frozen


class Owner(nn.Module):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(4, 2)
        self.flow = Frozen(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5)))

    def forward(self, x):
        return self.head(self.flow(x))


def test_stays_in_eval():
    owner = Owner()
    for _ in range(2):
        owner.train()
        assert owner.training
        assert not any(m.training for m in owner.flow.module.modules())
        owner(torch.randn(8, 4))
        assert torch.equal(owner.flow.module[1].running_mean, torch.zeros(4))
    owner.flow.module.train()
    owner.train()
    assert not any(m.training for m in owner.flow.module.modules())


def test_outside_the_state_dict():
    owner = Owner()
    assert sorted(owner.state_dict()) == ["head.bias", "head.weight"]
    other = Owner()
    before = copy.deepcopy(other.flow.module.state_dict())
    other.load_state_dict(owner.state_dict(), strict=True)
    assert all(torch.equal(before[k], v) for k, v in other.flow.module.state_dict().items())
    assert [name for name, _ in owner.named_parameters()] == ["head.weight", "head.bias"]


def test_no_gradient_through_it():
    owner = Owner()
    x = torch.randn(3, 4, requires_grad=True)
    owner(x).sum().backward()
    assert x.grad is None
    assert owner.head.weight.grad is not None
    assert all(not p.requires_grad and p.grad is None for p in owner.flow.module.parameters())


def test_moves_with_its_owner_and_is_copied_with_it():
    owner = Owner().double()
    assert all(p.dtype == torch.float64 for p in owner.flow.module.parameters())
    assert all(p.device.type == "meta" for p in copy.deepcopy(owner).to("meta").flow.module.parameters())
    twin = copy.deepcopy(owner)
    assert twin.flow.module is not owner.flow.module
    x = torch.randn(3, 4).double()
    assert torch.equal(twin(x), owner(x))


def test_synchronised_batchnorm_does_not_reach_it():
    owner = nn.SyncBatchNorm.convert_sync_batchnorm(nn.Sequential(nn.BatchNorm1d(4), Owner()))
    assert isinstance(owner[0], nn.SyncBatchNorm)
    assert isinstance(owner[1].flow.module[1], nn.BatchNorm1d)

"""Recomputing changes the memory and nothing else."""

import copy
import gc
from unittest.mock import patch

import pytest
import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

from poodle_lightning.nn.recompute import recomputed
from poodle_lightning.nn.resnet import ResNet


def images(batch=2, size=(64, 96), dtype=torch.float64):
    return torch.rand(batch, 3, *size, generator=torch.Generator().manual_seed(0)).to(dtype)


def pair(depth=50, dtype=torch.float64, **kwargs):
    torch.manual_seed(0)
    plain = ResNet(depth, width=8, **kwargs).to(dtype)
    switched = ResNet(depth, width=8, recompute=True, **kwargs).to(dtype)
    switched.load_state_dict(plain.state_dict())
    return plain, switched


def same_gradients(one, other):
    pairs = zip(one.parameters(), other.parameters(), strict=True)
    assert all(torch.equal(a.grad, b.grad) for a, b in pairs)


def step(encoder, batch):
    """Loss of all maps, backward; everything that could differ."""
    features = encoder(batch)
    loss = features.vector.square().sum() + sum(m.square().mean() for m in features.maps.values())
    loss.backward()
    gradients = {name: p.grad for name, p in encoder.named_parameters()}
    return {"loss": loss.detach(), **gradients, **dict(encoder.named_buffers())}


@pytest.mark.parametrize(
    "kwargs",
    [{"depth": 10}, {"depth": 50}, {"depth": 18, "output_stride": 8}, {"depth": 10, "stem_pool": False}],
)
def test_loss_gradients_and_buffers_equal_the_plain_step(kwargs):
    plain, switched = pair(**kwargs)
    for _ in range(2):  # the second step sees what the first did to the statistics
        expected, found = step(plain, images()), step(switched, images())
        assert all(torch.equal(found[name], value) for name, value in expected.items())
    assert found["bn1.num_batches_tracked"] == 2
    assert plain.state_dict().keys() == switched.state_dict().keys()


@pytest.mark.parametrize("momentum", [None, 0.3])
def test_cumulative_and_other_momenta(momentum):
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(3, momentum=momentum)
    layers = nn.Sequential(nn.Conv2d(3, 3, 3), norm, nn.ReLU(inplace=True))
    other = copy.deepcopy(layers)
    for _ in range(3):
        x = torch.randn(2, 3, 8, 8)
        layers(x).square().sum().backward()
        recomputed(other, x).square().sum().backward()
    assert all(torch.equal(a, b) for a, b in zip(layers.buffers(), other.buffers(), strict=True))
    assert other[1].momentum == momentum
    assert all(
        torch.equal(a.grad, b.grad) for a, b in zip(layers.parameters(), other.parameters(), strict=True)
    )


def test_a_failing_backward_leaves_the_layers_as_they_were():
    layers = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))
    calls = []

    def fails_the_second_time(x):
        calls.append(1)
        if len(calls) > 1:
            raise RuntimeError("second time")
        return layers(x)

    result = recomputed(fails_the_second_time, torch.randn(2, 3, 4, 4), of=layers)
    with pytest.raises(RuntimeError, match="second time"):
        result.sum().backward()
    assert (layers[1].momentum, int(layers[1].num_batches_tracked)) == (0.1, 1)


def kept_bytes(encoder, batch):
    """Bytes of all storages that autograd holds between forward and backward, parameters left out."""
    own = {t.untyped_storage().data_ptr() for t in [*encoder.parameters(), *encoder.buffers(), batch]}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)  # held, so that no address comes twice
        return tensor

    gc.collect()
    with saved_tensors_hooks(pack, lambda tensor: tensor):
        result = encoder(batch).vector.sum()
    total = sum(size for size, _ in kept.values())
    result.backward()
    return total


def test_a_third_of_the_bytes_is_kept():
    plain, switched = pair(50, torch.float32)
    batch = images(dtype=torch.float32)
    assert kept_bytes(switched, batch) < 0.33 * kept_bytes(plain, batch)


@pytest.mark.parametrize("change", ["eval", "no_grad"])
def test_evaluation_is_the_same_and_without_gradients_nothing_is_kept(change):
    plain, switched = pair(10)
    plain.eval(), switched.eval()
    with torch.set_grad_enabled(change == "eval"):
        expected, found = plain(images()), switched(images())
    assert torch.equal(found.vector, expected.vector)
    assert found.vector.requires_grad is (change == "eval")
    assert int(switched.bn1.num_batches_tracked) == 0


def test_under_autocast():
    plain, switched = pair(10, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        expected, found = (net(images(dtype=torch.float32)).vector for net in (plain, switched))
    expected.float().sum().backward()
    found.float().sum().backward()  # outside autocast, as trainers do
    assert torch.equal(found, expected)
    assert all(
        torch.equal(a.grad, b.grad) for a, b in zip(plain.parameters(), switched.parameters(), strict=True)
    )


def test_synchronised_batch_norm_is_recomputed_too():
    """It insists on a counter, and counts once."""
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()).double()
    again = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(plain))
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    plain(x).square().sum().backward()
    with patch.object(nn.SyncBatchNorm, "_check_non_zero_input_channels", lambda self, x: None):
        recomputed(again, x).square().sum().backward()
    for mine, theirs in zip(again.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad)
    for (name, mine), theirs in zip(again.named_buffers(), plain.buffers(), strict=True):
        assert torch.allclose(mine.double(), theirs.double()), name


def test_two_backward_passes_through_one_graph():
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()).double()
    again = copy.deepcopy(plain)
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    for layers, result in ((plain, plain(x)), (again, recomputed(again, x))):
        result.sum().backward(retain_graph=True)
        result.square().sum().backward()
        assert int(layers[1].num_batches_tracked) == 1
    for mine, theirs in zip(again.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad)
    assert torch.equal(again[1].running_mean, plain[1].running_mean)

"""The order of an epoch and its share per device."""

from __future__ import annotations

import pytest
from torch.utils.data.distributed import DistributedSampler

from poodle_lightning.data.order import Order, RequestSampler


def items(order, epoch):
    return [order.item(epoch, position) for position in range(order.length)]


def test_every_pass_is_a_permutation_of_the_videos():
    order = Order(videos=11, passes=3, length=33, seed=4)
    for epoch in (0, 1, 7):
        seen = items(order, epoch)
        assert sorted(seen) == list(range(33))
        for number in range(3):
            assert sorted(i % 11 for i in seen[number * 11 : (number + 1) * 11]) == list(range(11))
    assert items(order, 0) != items(order, 1)
    assert items(order, 0) == items(Order(11, 3, 33, seed=4), 0)
    assert items(order, 0) != items(Order(11, 3, 33, seed=5), 0)


def test_what_is_left_out_changes():
    order = Order(videos=10, passes=1, length=8)
    assert len({frozenset(range(10)) - frozenset(items(order, epoch)) for epoch in range(20)}) > 5


def test_unshuffled_begins_again_at_the_end():
    assert items(Order(3, 1, 4, shuffle=False), 9) == [0, 1, 2, 0]


@pytest.mark.parametrize("world", [1, 2, 3])
def test_devices_divide_the_positions(world):
    order = Order(12, 1, 12, stride=world)
    samplers = [RequestSampler(order, rank) for rank in range(world)]
    for sampler in samplers:
        sampler.set_epoch(5)
        assert isinstance(sampler, DistributedSampler)  # or Lightning would replace it
        assert len(sampler) == 12 // world
    shares = [list(sampler) for sampler in samplers]
    assert [request for step in zip(*shares, strict=True) for request in step] == [(5, p) for p in range(12)]


def test_start_keeps_the_length_of_the_epoch():
    sampler = RequestSampler(Order(6, 1, 6), 0)
    sampler.start = 4
    assert list(sampler) == [(0, 4), (0, 5)]
    assert len(sampler) == 6


def test_held_out_requests_do_not_follow_the_epoch():
    sampler = RequestSampler(Order(2, 1, 2, shuffle=False), 0, epoch=-1)
    sampler.set_epoch(3)
    assert list(sampler) == [(-1, 0), (-1, 1)]

import pytest
import torch
from device_reads import DeviceReads
from side_by_side import in_two

from poodle_lightning.ops.distributed import exchange, gather, mean_across, on_first, rank, world_size

OWN = torch.tensor([[1.0, 2.0, 3.0], [5.0, -2.0, 0.0]])


def test_alone_a_process_has_its_own_values():
    x = torch.randn(2, 3, requires_grad=True)
    assert world_size() == 1
    assert torch.equal(mean_across(x), x)
    assert not mean_across(x).requires_grad


def test_alone_a_process_gathers_itself():
    x = torch.randn(2, 3, requires_grad=True)
    assert rank() == 0
    assert gather(x) is x
    assert gather(x, dim=1) is x


def test_gathered_rows_lie_in_rank_order_along_any_dimension():
    whole = torch.arange(48.0).view(2, 4, 6)

    def act(number):
        found = [gather(whole.chunk(2, dim)[number], dim) for dim in (0, 1, 2, -1, -2)]
        return {"rank": rank(), "found": found, "half": gather(whole[number].to(torch.bfloat16))}

    for number, told in enumerate(in_two(act)):
        assert told["rank"] == number
        assert all(torch.equal(x, whole) for x in told["found"])
        assert torch.equal(told["half"], whole.flatten(0, 1).to(torch.bfloat16))


def test_gradients_come_back_from_all_processes():
    """Each process weighs all rows in its own way; a row's gradient is the sum of both weights."""
    torch.manual_seed(0)
    rows, weights = torch.randn(6, 3), torch.randn(2, 3, 6)

    def act(number):
        mine = rows.chunk(2)[number].clone().requires_grad_()
        (gather(mine.t(), dim=1) * weights[number]).sum().backward()
        half = rows.chunk(2)[number].to(torch.bfloat16).requires_grad_()
        (gather(half) * weights[number].t()).sum().backward()
        return mine.grad, half.grad

    for number, (found, half) in enumerate(in_two(act)):
        wanted = weights.sum(dim=0).t().chunk(2)[number]
        torch.testing.assert_close(found, wanted)
        assert half.dtype == torch.bfloat16
        torch.testing.assert_close(half.float(), wanted, rtol=2e-2, atol=2e-2)


def test_two_processes_share_one_mean():
    def act(rank):
        mine = OWN[rank].clone()
        half = mean_across(mine.to(torch.bfloat16))
        return {"world": world_size(), "mean": mean_across(mine), "mine": mine, "half": half}

    for number, found in enumerate(in_two(act)):
        assert found["world"] == 2
        assert torch.equal(found["mean"], torch.tensor([3.0, 0.0, 1.5]))
        assert torch.equal(found["mine"], OWN[number])  # what was given stays
        assert found["half"].dtype == torch.bfloat16
        assert found["half"].tolist() == [3.0, 0.0, 1.5]


def test_two_processes_read_nothing_back():
    def act(rank):
        mine = OWN[rank].clone()
        with DeviceReads([mine]) as reads:
            mean_across(mine)
            gather(mine.requires_grad_()).sum().backward()
        return reads.found

    assert in_two(act) == [[], []]


def test_exchanged_rows_have_the_new_order_and_come_back():
    whole = torch.randn(8, 3, 2, generator=torch.Generator().manual_seed(0))
    orders = [torch.randperm(8, generator=torch.Generator().manual_seed(seed)) for seed in range(4)]
    orders += [torch.arange(8), torch.arange(8).flip(0)]  # all stay; all go

    def act(number):
        mine = whole.chunk(2)[number]
        moved = [exchange(mine, order) for order in orders]
        back = [exchange(x, order.argsort()) for x, order in zip(moved, orders, strict=True)]
        vector = exchange(mine[:, 0, 0], orders[0])
        half = exchange(mine.to(torch.bfloat16), orders[0])
        return {"moved": moved, "back": back, "vector": vector, "half": half}

    for number, found in enumerate(in_two(act)):
        for order, moved, back in zip(orders, found["moved"], found["back"], strict=True):
            assert torch.equal(moved, whole[order].chunk(2)[number])
            assert torch.equal(back, whole.chunk(2)[number])
        wanted = whole[orders[0]].chunk(2)[number]
        assert torch.equal(found["vector"], wanted[:, 0, 0])
        assert torch.equal(found["half"], wanted.to(torch.bfloat16))


def test_exchanged_images_may_lie_channels_last():
    whole = torch.randn(4, 3, 5, 6)
    order = torch.tensor([2, 0, 3, 1])

    def act(number):
        return exchange(whole.chunk(2)[number].to(memory_format=torch.channels_last), order)

    for number, found in enumerate(in_two(act)):
        assert torch.equal(found, whole[order].chunk(2)[number])


def test_alone_rows_are_put_in_order():
    x = torch.randn(4, 2, requires_grad=True)
    order = torch.tensor([3, 0, 2, 1])
    assert torch.equal(exchange(x, order), x[order])
    assert not exchange(x, order).requires_grad
    with pytest.raises(ValueError, match=r"an order of 1 x 4 rows, not \(8,\)"):
        exchange(x, torch.arange(8))


def test_an_exchange_reads_nothing_back():
    def act(number):
        mine = OWN[number].clone()[:, None].expand(3, 2).contiguous()
        with DeviceReads([mine]) as reads:
            exchange(mine, torch.tensor([5, 3, 0, 1, 2, 4]))
        return reads.found

    assert in_two(act) == [[], []]


def test_objects_of_all_processes_come_to_the_first():
    assert on_first({"a": 1}) == [{"a": 1}]
    first, second = in_two(lambda number: {"found": on_first([number, "x" * (number + 1)])})
    assert first["found"] == [[0, "x"], [1, "xx"]]
    assert second["found"] is None

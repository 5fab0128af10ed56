import copy

import pytest
import torch
from device_reads import DeviceReads
from lightly.models.modules.memory_bank import MemoryBankModule
from side_by_side import in_two
from torch.nn.functional import normalize

from poodle_lightning.losses.contrastive import info_nce
from poodle_lightning.nn.queue import Queue
from poodle_lightning.types import UserError


def keys(count, seed=1):
    return 3 * torch.randn(count, 4, generator=torch.Generator().manual_seed(seed))


def by_lists(size, first, batches):
    """A list of rows and a place that goes round."""
    rows, place = [row.tolist() for row in first], 0
    for batch in batches:
        for row in batch.double():
            rows[place] = (row / row.square().sum().sqrt()).tolist()
            place = (place + 1) % size
    return torch.tensor(rows), place


@pytest.mark.parametrize("counts", [[3, 3], [3, 3, 3], [7], [5, 7, 1], [8], [17], [2, 17, 3]])
def test_order_and_wrap_equal_a_list(counts):
    queue = Queue(4, 7)
    first = queue.rows.clone()
    batches = [keys(count, seed) for seed, count in enumerate(counts)]
    for batch in batches:
        queue.enqueue(batch)
    rows, place = by_lists(7, first, batches)
    torch.testing.assert_close(queue.rows, rows)
    assert int(queue.place) == place


def test_equals_lightlys_memory_bank():
    """Where the batch divides the size: it drops what goes beyond the end."""
    queue, bank = Queue(4, 6), MemoryBankModule(size=(6, 4))
    bank.bank = queue.rows.clone()
    for seed in range(5):
        batch = normalize(keys(2, seed), dim=1)
        queue.enqueue(batch)
        bank(batch, update=True)
        torch.testing.assert_close(queue.rows, bank.bank)


def test_begins_with_rows_of_length_one_from_its_seed():
    queue = Queue(64, 500)
    torch.testing.assert_close(queue.rows.norm(dim=1), torch.ones(500))
    assert queue.rows.mean().abs() < 0.01  # all directions
    assert torch.equal(Queue(64, 500).rows, queue.rows)
    assert not torch.equal(Queue(64, 500, seed=1).rows, queue.rows)
    torch.manual_seed(3)
    before = torch.get_rng_state()
    Queue(4, 5)
    assert torch.equal(torch.get_rng_state(), before)


def test_goes_on_from_its_state():
    queue, other = Queue(4, 7), Queue(4, 7, seed=5)
    queue.enqueue(keys(5))
    other.load_state_dict(copy.deepcopy(queue.state_dict()))
    for one in (queue, other):
        one.enqueue(keys(4, seed=2))
    assert torch.equal(queue.rows, other.rows)
    assert torch.equal(queue.place, other.place)
    assert sorted(queue.state_dict()) == ["place", "rows"]


@pytest.mark.parametrize(("size", "count"), [(10, 6), (6, 6), (7, 2), (4, 6)])
def test_two_processes_have_the_rows_of_one_in_rank_order(size, count):
    """Going round in the middle of a process' keys, at their end, and with more keys than room."""
    batches = [keys(count, seed) for seed in range(5)]

    def act(rank):
        queue = Queue(4, size)
        for batch in batches:
            queue.enqueue(batch.chunk(2)[rank])
        return queue.state_dict()

    alone = Queue(4, size)
    for batch in batches:
        alone.enqueue(batch)
    first, second = in_two(act)
    for name, value in alone.state_dict().items():
        assert torch.equal(first[name], second[name])
        assert torch.equal(first[name], value)


def test_eval_mode_takes_nothing_and_no_gradient_is_kept():
    queue = Queue(4, 7).eval()
    before = queue.rows.clone()
    queue.enqueue(keys(3))
    assert torch.equal(queue.rows, before)
    queue.train().enqueue(keys(3).requires_grad_())
    assert not queue.rows.requires_grad
    assert not torch.equal(queue.rows, before)


def test_a_step_may_enqueue_before_it_goes_backward():
    queue, query = Queue(4, 7), keys(3).requires_grad_()
    loss = info_nce(query, keys(3, seed=2), queue.rows)
    queue.enqueue(keys(3, seed=2))
    loss.backward()
    assert query.grad.abs().sum() > 0


def test_half_precision_and_no_reads():
    queue, batch = Queue(4, 7), keys(5).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16), DeviceReads([batch, *queue.buffers()]) as reads:
        queue.enqueue(batch)
    assert reads.found == []
    torch.testing.assert_close(queue.rows[:5], normalize(batch.float(), dim=1))


@pytest.mark.parametrize(("dims", "size"), [(4, 0), (0, 4)])
def test_no_rows_are_refused_in_one_line(dims, size):
    with pytest.raises(UserError, match=rf"not {size} of {dims}: set model\.queue and model\.out") as error:
        Queue(dims, size)
    assert "\n" not in str(error.value)

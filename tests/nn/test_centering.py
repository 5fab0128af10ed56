import copy

import torch
from device_reads import DeviceReads
from lightly.models.modules.center import Center
from side_by_side import in_two

from poodle_lightning.nn.centering import Centre


def test_equals_lightlys_centre_over_some_steps():
    torch.manual_seed(0)
    mine, reference = Centre(6, momentum=0.8).train(), Center((1, 6), momentum=0.8)
    for _ in range(4):
        rows = torch.randn(5, 6) + 2
        mine.observe(rows.mean(dim=0), len(rows))
        mine.step()
        reference.update(rows)
        torch.testing.assert_close(mine.value, reference.value[0])


def test_accumulated_batches_of_any_size_make_one_step():
    torch.manual_seed(0)
    parts, whole = Centre(6), Centre(6)
    rows = torch.randn(8, 6) + 1
    for part in rows.split([1, 5, 2]):
        parts.observe(part.mean(dim=0), len(part))
        assert not parts.value.any()
    parts.step()
    whole.observe(rows.mean(dim=0), 8)
    whole.step()
    torch.testing.assert_close(parts.value, 0.1 * rows.mean(dim=0))
    torch.testing.assert_close(parts.value, whole.value)


def test_what_was_observed_is_forgotten_after_the_step():
    centre = Centre(2)
    centre.observe(torch.tensor([10.0, 0.0]), 3)
    centre.step()
    after = centre.value.clone()
    centre.step()  # nothing new
    assert torch.equal(centre.value, after)
    centre.observe(torch.tensor([0.0, 10.0]), 1)
    centre.step()
    torch.testing.assert_close(centre.value, torch.tensor([0.9, 1.0]))


def test_nothing_is_observed_in_eval_mode():
    centre = Centre(2).eval()
    centre.observe(torch.ones(2), 4)
    centre.step()
    assert not centre.value.any()
    centre.train().observe(torch.ones(2), 4)
    centre.step()
    torch.testing.assert_close(centre.value, torch.full((2,), 0.1))


def test_only_the_centre_is_in_the_state():
    centre = Centre(3)
    centre.observe(torch.ones(3), 2)
    assert list(centre.state_dict()) == ["value"]
    assert list(dict(centre.named_buffers())) == ["value"]  # nothing else that processes would copy
    other = Centre(3)
    centre.step()
    other.load_state_dict(centre.state_dict())
    assert torch.equal(other.value, centre.value)
    assert copy.deepcopy(centre).value.tolist() == centre.value.tolist()


def test_half_precision_is_summed_in_float32_and_without_graph():
    centre = Centre(2)
    mean = torch.tensor([1.0, -1.0], dtype=torch.bfloat16, requires_grad=True)
    centre.observe(mean, 300)
    centre.observe(mean, 1)
    centre.step()
    assert not centre.value.requires_grad
    torch.testing.assert_close(centre.value, torch.tensor([0.1, -0.1]))


def test_two_processes_step_like_one():
    """With parts of unequal size."""
    torch.manual_seed(0)
    rows = torch.randn(7, 4) + 3

    def act(rank):
        centre = Centre(4)
        for part in rows[:5].split(2) if rank == 0 else [rows[5:]]:
            centre.observe(part.mean(dim=0), len(part))
        centre.step()
        return centre.value

    alone = Centre(4)
    alone.observe(rows.mean(dim=0), 7)
    alone.step()
    for found in in_two(act):
        torch.testing.assert_close(found, alone.value)


def test_reads_nothing_back():
    centre, mean = Centre(4), torch.randn(4)
    with DeviceReads([centre.value, mean]) as reads:
        centre.observe(mean, 2)
        centre.observe(mean, 3)
        centre.step()
    assert reads.found == []

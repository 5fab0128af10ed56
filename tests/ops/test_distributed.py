import torch
from device_reads import DeviceReads
from side_by_side import in_two

from poodle_lightning.ops.distributed import mean_across, world_size

OWN = torch.tensor([[1.0, 2.0, 3.0], [5.0, -2.0, 0.0]])


def test_alone_a_process_has_its_own_values():
    x = torch.randn(2, 3, requires_grad=True)
    assert world_size() == 1
    assert torch.equal(mean_across(x), x)
    assert not mean_across(x).requires_grad


def test_two_processes_share_one_mean():
    def act(rank):
        mine = OWN[rank].clone()
        half = mean_across(mine.to(torch.bfloat16))
        return {"world": world_size(), "mean": mean_across(mine), "mine": mine, "half": half}

    for rank, found in enumerate(in_two(act)):
        assert found["world"] == 2
        assert torch.equal(found["mean"], torch.tensor([3.0, 0.0, 1.5]))
        assert torch.equal(found["mine"], OWN[rank])  # what was given stays
        assert found["half"].dtype == torch.bfloat16
        assert found["half"].tolist() == [3.0, 0.0, 1.5]


def test_two_processes_read_nothing_back():
    def act(rank):
        mine = OWN[rank].clone()
        with DeviceReads([mine]) as reads:
            mean_across(mine)
        return reads.found

    assert in_two(act) == [[], []]

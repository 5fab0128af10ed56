"""Two processes with half a batch each take the steps of one process with the whole batch."""

import pytest
import torch
from side_by_side import two_of, wait_for
from two_processes import NAMES, main, make


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """The files of one process and of two, all methods one after the other."""
    folder = tmp_path_factory.mktemp("steps")
    running = two_of("two_processes.py", folder)
    main(folder, 1)
    wait_for(running)
    return folder


@pytest.mark.parametrize("name", NAMES)
def test_two_processes_step_like_one(name, weights):
    one, two = (torch.load(weights / f"{name}-{n}.pt", weights_only=True) for n in (1, 2))
    start = make(name).state_dict()
    assert max(float((one[key] - start[key]).abs().max()) for key in one) > 1e-3
    assert all(
        (one[key] - start[key]).abs().max() > 1e-3
        for key in one
        if key.endswith(("centre.value", "queue.rows"))
    )
    for key, value in one.items():
        assert (value - two[key]).abs().max() <= 1e-5, key

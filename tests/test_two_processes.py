"""Two processes with half a batch each take the steps of one process with the whole batch."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from two_processes import NAMES, main, make

HERE = Path(__file__).parent


def start(folder, rank, port):
    # a seed that another test has set would be set again where processes join, and only there
    inherited = {name: value for name, value in os.environ.items() if name != "PL_GLOBAL_SEED"}
    environment = inherited | {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2",
        "GROUP_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
        "TORCHELASTIC_RUN_ID": "none",
        "OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE), "PYTHONWARNINGS": "ignore",
    }  # fmt: skip
    words = [sys.executable, str(HERE / "two_processes.py"), str(folder), "2"]
    return subprocess.Popen(
        words, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """The files of one process and of two, all methods one after the other."""
    folder = tmp_path_factory.mktemp("steps")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    running = [start(folder, rank, port) for rank in range(2)]
    main(folder, 1)
    said = [process.communicate(timeout=240)[0] for process in running]
    for process, text in zip(running, said, strict=True):
        assert process.returncode == 0, text[-3000:]
    return folder


@pytest.mark.parametrize("name", NAMES)
def test_two_processes_step_like_one(name, weights):
    one, two = (torch.load(weights / f"{name}-{n}.pt", weights_only=True) for n in (1, 2))
    start = make(name).state_dict()
    assert max(float((one[key] - start[key]).abs().max()) for key in one) > 1e-3
    assert all((one[key] - start[key]).abs().max() > 1e-3 for key in one if key.endswith("centre.value"))
    for key, value in one.items():
        assert (value - two[key]).abs().max() <= 1e-5, key

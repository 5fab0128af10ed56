"""Two processes with half a batch each take the steps of one process with the whole batch."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from two_processes import main, make

HERE = Path(__file__).parent


@pytest.mark.parametrize("name", ["PooDLe", "FlowE", "BYOL", "DINO", "IBOT", "AttMask", "DoRA", "MAE"])
def test_two_processes_step_like_one(name, tmp_path):
    main(name, 1, str(tmp_path / "1.pt"))
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE), "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, str(HERE / "two_processes.py"), name, "2", str(tmp_path / "2.pt")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    one, two = (torch.load(tmp_path / f"{n}.pt", weights_only=True) for n in (1, 2))
    start = make(name).state_dict()
    assert max(float((one[key] - start[key]).abs().max()) for key in one) > 1e-3
    assert all((one[key] - start[key]).abs().max() > 1e-3 for key in one if key.endswith("centre.value"))
    for key, value in one.items():
        assert (value - two[key]).abs().max() <= 1e-5, key

"""Work in two processes that know of each other (gloo), each with its own part."""

import multiprocessing
import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from torch import distributed


def _work(act, rank, folder):
    distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    try:
        torch.save(act(rank), f"{folder}/{rank}.pt")
    finally:
        distributed.destroy_process_group()


def in_two(act):
    """``[act(0), act(1)]``, called at the same time in two forked processes; plain data or tensors."""
    context = multiprocessing.get_context("fork")  # torch is loaded already
    with tempfile.TemporaryDirectory() as folder:
        both = [context.Process(target=_work, args=(act, rank, folder)) for rank in (0, 1)]
        for process in both:
            process.start()
        for process in both:
            process.join(timeout=240)
        assert [process.exitcode for process in both] == [0, 0]
        return [torch.load(Path(folder) / f"{rank}.pt", weights_only=True) for rank in (0, 1)]


def two_of(script, folder):
    """Two started processes of ``python tests/SCRIPT FOLDER 2``, which Lightning finds to be torchrun's."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return [_started(script, folder, rank, port) for rank in (0, 1)]


def _started(script, folder, rank, port):
    here = Path(__file__).parent
    # a seed that another test has set would be set again where processes join, and only there
    inherited = {name: value for name, value in os.environ.items() if name != "PL_GLOBAL_SEED"}
    environment = inherited | {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2",
        "GROUP_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
        "TORCHELASTIC_RUN_ID": "none",
        "OMP_NUM_THREADS": "1", "PYTHONPATH": str(here), "PYTHONWARNINGS": "ignore",
    }  # fmt: skip
    words = [sys.executable, str(here / script), str(folder), "2"]
    return subprocess.Popen(
        words, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def wait_for(running):
    """Waits for both; what they said is shown where one failed."""
    said = [process.communicate(timeout=240)[0] for process in running]
    for process, text in zip(running, said, strict=True):
        assert process.returncode == 0, text[-3000:]

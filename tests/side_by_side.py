"""A function in two processes that know of each other (gloo), each with its own part of the work."""

import multiprocessing
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
            process.join(timeout=60)
        assert [process.exitcode for process in both] == [0, 0]
        return [torch.load(Path(folder) / f"{rank}.pt", weights_only=True) for rank in (0, 1)]

"""Tracks of the videos of a folder, fewer than there are processes; run once per process.

usage: python two_traces.py FOLDER PROCESSES

With torchrun's variables in the environment Lightning joins the processes that are there and starts none.
"""

import os
import sys
from pathlib import Path

import lightning as L
import torch
from lightning.pytorch.strategies import DDPStrategy

from poodle_lightning.data.footage import footage_loader
from poodle_lightning.data.sources import FolderSource
from poodle_lightning.flow.dis import DIS
from poodle_lightning.methods import trace


def main(folder: Path, rank: int, world: int) -> dict:
    said = []
    trace.rank_zero_info = said.append
    source = FolderSource(str(folder / "films"))
    loader = footage_loader(source, source.entries, rank, world, 0, str(folder / "films"))
    trainer = L.Trainer(
        accelerator="cpu", devices=world, strategy=DDPStrategy(process_group_backend="gloo"), logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    module = trace.Trace(DIS("fast"), str(folder / "out"), points=30)
    trainer.predict(module, dataloaders=loader, return_predictions=False)
    return {"videos": module.total.videos, "said": said}


if __name__ == "__main__":
    where, number = Path(sys.argv[1]), int(os.environ["RANK"])
    torch.save(main(where, number, int(sys.argv[2])), where / f"{number}.pt")

"""A tiny run with probes, by one or two processes; run as a script.

usage: python probed.py PROCESSES FILE
"""

import sys

import lightning as L
import torch
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import DDPStrategy
from tiny_models import make_clip, tiny_encoder, tiny_recipe
from torch.utils.data import DataLoader

from poodle_lightning import BYOL
from poodle_lightning.augment.geometric import ResizedCrop
from poodle_lightning.callbacks.probes import Probes
from poodle_lightning.data.label_streets import StreetLabels
from poodle_lightning.data.labelled import LabelledDataModule
from poodle_lightning.evaluation.linear_readout import ReadoutRecipe
from poodle_lightning.evaluation.memory import RetrievalRecipe


def streets():
    few = StreetLabels(train=4, val=3, size=(32, 64), supersample=1)
    return LabelledDataModule("synthetic", synthetic=few, num_workers=0)


def small(labels=None, **kwargs):
    sizes = {"train_images": 3, "test_images": 2, "size": (32, 64)}
    readout = ReadoutRecipe(steps=3, images=2, pixels=64)
    recipes = {"readout": readout, "retrieval": RetrievalRecipe(k=3)}
    return Probes(labels or streets(), **{**sizes, **recipes, **kwargs})


def method():
    torch.manual_seed(0)
    recipe = tiny_recipe(lr=0.01, ema_start=0.9)
    return BYOL(tiny_encoder(), crop=ResizedCrop((32, 32)), hidden=16, out=8, recipe=recipe)


class Halves(L.LightningDataModule):
    """Every process takes its own part of each step's clips."""

    def train_dataloader(self):
        world, rank = self.trainer.world_size, self.trainer.global_rank
        part = slice(rank * 4 // world, (rank + 1) * 4 // world)
        clips = [make_clip(batch=4, seed=step)[part] for step in range(4)]
        return DataLoader(clips, batch_size=None, collate_fn=lambda clip: clip)


def settings(steps):
    off = {"enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    return {"accelerator": "cpu", "max_steps": steps, "use_distributed_sampler": False, **off}


def run(folder, *callbacks, steps=3, accumulate=1, module=None):
    L.seed_everything(7)
    module = method() if module is None else module
    logger = CSVLogger(folder, name="", version="")
    trainer = L.Trainer(
        **settings(steps),
        devices=1,
        callbacks=list(callbacks),
        logger=logger,
        log_every_n_steps=1,
        accumulate_grad_batches=accumulate,
    )
    trainer.fit(module, datamodule=Halves())
    return module, trainer


class Keep(L.Callback):
    """Writes down what every process was told."""

    def __init__(self, file):
        self.file = file

    def on_train_end(self, trainer, module):
        found = {name: float(value) for name, value in trainer.callback_metrics.items()}
        end = f".{trainer.global_rank}" if trainer.world_size > 1 else ""
        torch.save({k: v for k, v in found.items() if k.startswith("probe/")}, self.file + end)


def main(processes, file):
    strategy = DDPStrategy(start_method="fork", process_group_backend="gloo") if processes > 1 else "auto"
    trainer = L.Trainer(
        **settings(2),
        devices=processes,
        strategy=strategy,
        logger=False,
        callbacks=[small(every_n_steps=1), Keep(file)],
    )
    trainer.fit(method().eval(), datamodule=Halves())  # BatchNorm frozen: SyncBN exists only on GPUs


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])

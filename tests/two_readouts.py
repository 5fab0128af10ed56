"""A tiny readout, trained and scored by one or two processes; run as a script, once for each of them.

usage: python two_readouts.py PROCESSES FILE, with LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT set
"""

import sys

import lightning as L
import torch
from few_labels import FewLabels
from lightning.pytorch.strategies import DDPStrategy
from tiny_models import tiny_encoder

from poodle_lightning.evaluation.segmentation import Segmentation
from poodle_lightning.nn.head_optim import HeadRecipe

OFF = {
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "num_sanity_val_steps": 0,
    "use_distributed_sampler": False,
    "accelerator": "cpu",
}


def readout(**kwargs):
    L.seed_everything(0, verbose=False)
    recipe = HeadRecipe(lr=0.05)
    return Segmentation(tiny_encoder(), **{"output_stride": 8, "recipe": recipe, **kwargs})


def main(processes: int, file: str) -> None:
    strategy = DDPStrategy(process_group_backend="gloo") if processes > 1 else "auto"
    trainer = L.Trainer(
        devices=processes,
        strategy=strategy,
        max_steps=4,
        callbacks=[Keep(file)],
        limit_val_batches=1.0,
        **OFF,
    )
    trainer.fit(readout(), datamodule=FewLabels())


class Keep(L.Callback):
    """What the last validation found; on every process, so that they can be compared."""

    def __init__(self, file: str) -> None:
        self.file = file

    def on_train_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        trainer.fit_loop.epoch_loop.val_loop.run()
        scores = module.scores()
        found = {"scores": scores.scores, "loss": scores.details["loss"], "counts": scores.counts}
        found |= {"worst": scores.worst, "iou": scores.per_class["iou"]}
        found |= {"logged": {k: float(v) for k, v in trainer.callback_metrics.items() if "val/" in k}}
        found |= {"head": module.head.conv_seg.weight.detach()}
        torch.save(found, f"{self.file}.{trainer.global_rank}")


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])

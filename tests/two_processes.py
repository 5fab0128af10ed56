"""Two optimiser steps of each tiny method on four clips per step, by one or two processes.

usage, once per process: python two_processes.py FOLDER PROCESSES

With torchrun's variables in the environment Lightning joins the processes that are there and starts none.
"""

import sys
from pathlib import Path

import lightning as L
import torch
from lightning.pytorch.strategies import DDPStrategy
from tiny_models import make_clip, tiny_crops, tiny_encoder, tiny_head, tiny_recipe, tiny_sdm, tiny_vit
from torch.utils.data import DataLoader

from poodle_lightning import (
    BYOL,
    DINO,
    IBOT,
    MAE,
    VITO,
    AttMask,
    DenseCL,
    DoRA,
    FlowE,
    MoCLR,
    MoCo,
    PiCo,
    PixPro,
    PooDLe,
    SimCLR,
    SwAV,
    VICReg,
)
from poodle_lightning.augment.geometric import ResizedCrop
from poodle_lightning.augment.multicrop import MultiCrop
from poodle_lightning.flow.given import Given
from poodle_lightning.methods.mae import DecoderSizes
from poodle_lightning.nn.fpn import SemanticFPN
from poodle_lightning.ops.crops import SubcropRecipe

NAMES = ["PooDLe", "FlowE", "BYOL", "DINO", "IBOT", "AttMask", "DoRA", "MAE"]
CONTRASTIVE = {
    "MoCo": MoCo,
    "DenseCL": DenseCL,
    "PiCo": PiCo,
    "SimCLR": SimCLR,
    "SwAV": SwAV,
    "VICReg": VICReg,
    "PixPro": PixPro,
}
NAMES += [*CONTRASTIVE, "MoCLR", "VITO"]
DISTILLATION = {"DINO": DINO, "IBOT": IBOT, "AttMask": AttMask, "DoRA": DoRA}


def make(name: str, **settings) -> L.LightningModule:
    """A tiny method; BatchNorm, where there is some, frozen: SyncBN exists only on GPUs."""
    torch.manual_seed(0)
    recipe = tiny_recipe(optimizer="sgd", lr=0.05, sgd_momentum=0.0, weight_decay=0.0, ema_start=0.9)
    heads = {"hidden": 16, "out": 8, "recipe": recipe}
    if name == "PooDLe":
        encoder = tiny_encoder()
        subcrops = SubcropRecipe(count=2, size=(16, 16))
        method = PooDLe(encoder, tiny_sdm(encoder), Given(), subcrops=subcrops, **heads)
    elif name == "FlowE":
        method = FlowE(tiny_encoder(output_stride=8), Given(), **heads)
    elif name == "BYOL":
        method = BYOL(tiny_encoder(), crop=ResizedCrop((32, 32)), **heads)
    elif name in CONTRASTIVE:
        return frozen_norms(contrastive(name, **heads))
    elif name in ("MoCLR", "VITO"):
        kind, views = {"MoCLR": MoCLR, "VITO": VITO}[name], {"views": 2}
        method = kind(tiny_encoder(), crop=ResizedCrop((64, 64)), **views, **heads)
    elif name == "MAE":
        encoder = tiny_vit(positions="sincos")
        return MAE(encoder, ResizedCrop((32, 32)), decoder=DecoderSizes(16, 1, 2), recipe=recipe)
    else:
        views = 1 if name == "DoRA" else 2
        encoder = tiny_vit(mask_token=name in ("IBOT", "AttMask"))
        common = {"freeze_last_epochs": 0, "recipe": recipe, **settings}
        return DISTILLATION[name](encoder, head=tiny_head(), crops=tiny_crops(views=views), **common)
    return method.eval()


def contrastive(name: str, **heads) -> L.LightningModule:
    pair = MultiCrop(ResizedCrop((64, 64), (0.4, 1.0), fit="redraw"), locals=0, clip_wide=False)
    if name == "PiCo":
        encoder = tiny_encoder()
        decoder = SemanticFPN(encoder.channels, dims=32, pyramid=16)
        return PiCo(encoder, decoder, crops=pair, queue=64, **heads)
    if name == "SwAV":
        more = {"prototypes": 8, "queue": 0, "freeze_steps": 0, "crops": tiny_crops(clip_wide=False)}
    else:
        more = {"crops": pair} | ({"queue": 32} if name in ("MoCo", "DenseCL") else {})
    return CONTRASTIVE[name](tiny_encoder(), **more, **heads)


def frozen_norms(method: L.LightningModule) -> L.LightningModule:
    """In training, as queues want it, but for BatchNorm."""
    for layer in method.train().modules():
        if isinstance(layer, torch.nn.modules.batchnorm._BatchNorm):
            layer.eval()
    return method


class Halves(L.LightningDataModule):
    """Every process takes its own part of each step's four clips."""

    def train_dataloader(self) -> DataLoader:
        world, rank = self.trainer.world_size, self.trainer.global_rank
        part = slice(rank * 4 // world, (rank + 1) * 4 // world)
        clips = [make_clip(batch=4, seed=step)[part] for step in range(2)]
        return DataLoader(clips, batch_size=None, collate_fn=lambda clip: clip)


class Keep(L.Callback):
    def __init__(self, file: Path) -> None:
        self.file = file

    def on_train_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if trainer.is_global_zero:
            centres = {
                name: c for name, c in module.named_buffers() if name.endswith(("centre.value", "queue.rows"))
            }
            torch.save({**centres, **{name: p.detach() for name, p in module.named_parameters()}}, self.file)


def main(folder: Path, processes: int) -> None:
    for name in NAMES:
        strategy = DDPStrategy(process_group_backend="gloo") if processes > 1 else "auto"
        trainer = L.Trainer(
            accelerator="cpu",
            devices=processes,
            strategy=strategy,
            max_steps=2,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            use_distributed_sampler=False,
            callbacks=[Keep(folder / f"{name}-{processes}.pt")],
        )
        trainer.fit(make(name), datamodule=Halves())


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))

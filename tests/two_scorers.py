"""Evaluations without a segmentation head, by one or two processes; run as a script once per process.

usage: python two_scorers.py FOLDER PROCESSES

With torchrun's variables in the environment Lightning joins the processes that are there and starts none.
"""

import json
import os
import sys
from pathlib import Path

import lightning as L
import torch
from lightning.pytorch.strategies import DDPStrategy
from object_trees import voc_objects
from tiny_models import tiny_encoder

from poodle_lightning.data.image_classes import ImageClassDataModule, ImageViews
from poodle_lightning.data.label_streets import StreetLabels
from poodle_lightning.data.labelled import LabelledDataModule
from poodle_lightning.data.objects import ObjectDataModule
from poodle_lightning.evaluation.classification import KNN, KNNRecipe, LinearProbe, ProbeRecipe
from poodle_lightning.evaluation.clustering import Clustering, ClusteringRecipe
from poodle_lightning.evaluation.discovery import ObjectDiscovery
from poodle_lightning.evaluation.metrics import Confusion
from poodle_lightning.evaluation.retrieval import DenseRetrieval, RetrievalRecipe, dense_retrieval
from poodle_lightning.nn.vit import ViT


def trainer(world: int, **kwargs) -> L.Trainer:
    strategy = DDPStrategy(process_group_backend="gloo") if world > 1 else "auto"
    return L.Trainer(
        accelerator="cpu", devices=world, strategy=strategy, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, use_distributed_sampler=False, **kwargs,
    )  # fmt: skip


def confusion(world: int) -> dict:
    """Images of unequal number per process: 1 and 4 of 5."""
    draw = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 5, (5, 6, 7), generator=draw)
    guess = torch.randint(0, 4, labels.shape, generator=draw)
    labels[:, 0] = 255
    own = slice(0, 5) if world == 1 else (slice(0, 1), slice(1, 5))[int(os.environ["RANK"])]
    found = Confusion(5)
    found.update(guess[own], labels[own])
    return found.all_reduce().state_dict()


def main(folder: Path, world: int) -> dict:
    torch.manual_seed(0)
    encoder = tiny_encoder(output_stride=8).eval()
    # 5 and 3 images: the second process has one less
    streets = LabelledDataModule("synthetic", synthetic=StreetLabels(5, 3, (32, 64)), num_workers=0)
    images = ImageClassDataModule(
        str(folder / "images"), views=ImageViews(size=16, resize=16), num_workers=0, batch_size=4 // world
    )
    # the draws of a bounded memory and of k-means are part of the comparison
    retrieval = DenseRetrieval(encoder, recipe=RetrievalRecipe(k=5, vectors=100))
    clustering = Clustering(encoder, recipe=ClusteringRecipe(clusters=24, restarts=1, seeds=2, iterations=5))
    knn = KNN(encoder, recipe=KNNRecipe(k=(1, 3), headline=3))
    tree = voc_objects(folder / f"voc{os.environ.get('RANK', '')}")
    objects = ObjectDataModule(str(tree), num_workers=0, batch_size=2)
    discovery = ObjectDiscovery(ViT(patch=8, dim=24, depth=2, heads=3, image_size=(32, 32)).eval())
    found = {}
    for name, module, data in (
        ("retrieval", retrieval, streets), ("clustering", clustering, streets), ("knn", knn, images),
        ("discovery", discovery, objects),
    ):  # fmt: skip
        trainer(world).validate(module, datamodule=data, verbose=False)
        scores = module.scores()
        found[name] = [scores.scores, scores.counts, scores.per_class, scores.worst]
    probe = LinearProbe(encoder, recipe=ProbeRecipe(lr=10.0))
    fitted = trainer(world, max_epochs=2, limit_val_batches=0)
    fitted.fit(probe, datamodule=images)
    fitted.limit_val_batches = 1.0
    fitted.validate(probe, datamodule=images, verbose=False)
    found["probe"] = [probe.scores().scores, probe.scores().counts]
    found["weights"] = probe.head.weight.tolist()
    if world == 1 or os.environ["RANK"] == "0":
        # the other process does not take part, as when the first one probes for all
        train, test = (streets.sample(split, 3, (32, 64)) for split in ("train", "val"))
        alone = dense_retrieval(encoder, train, test, streets.classes, RetrievalRecipe(k=5))
        found["alone"] = alone.confusion.state_dict()
    found["confusion"] = confusion(world)
    return found


if __name__ == "__main__":
    where, processes = Path(sys.argv[1]), int(sys.argv[2])
    (where / f"{os.environ['RANK']}.json").write_text(json.dumps(main(where, processes)))

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
from davis_trees import Colours, davis
from lightning.pytorch.strategies import DDPStrategy
from object_trees import voc_objects
from tiny_models import tiny_encoder

from poodle_lightning.data.davis import DavisDataModule, FrameView
from poodle_lightning.data.image_classes import ImageClassDataModule, ImageViews
from poodle_lightning.data.label_streets import StreetLabels
from poodle_lightning.data.labelled import LabelledDataModule
from poodle_lightning.data.objects import ObjectDataModule
from poodle_lightning.evaluation.classification import KNN, KNNRecipe, LinearProbe, ProbeRecipe
from poodle_lightning.evaluation.clustering import Clustering, ClusteringRecipe
from poodle_lightning.evaluation.discovery import ObjectDiscovery
from poodle_lightning.evaluation.finetuning import FineTune
from poodle_lightning.evaluation.metrics import Confusion
from poodle_lightning.evaluation.mixing import Mixing
from poodle_lightning.evaluation.propagation import LabelPropagation, PropagationRecipe
from poodle_lightning.evaluation.retrieval import DenseRetrieval, RetrievalRecipe, dense_retrieval
from poodle_lightning.nn.layer_decay import FineTuneRecipe
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


class Recorded(Mixing):
    """Keeps what it draws."""

    def __call__(self, images, labels, classes, key):
        self.__dict__.setdefault("drawn", []).append(self.draw(key, (16, 16)).share)
        return super().__call__(images, labels, classes, key)


def finetuned(images: ImageClassDataModule, world: int) -> dict:
    """Scores and weights without anything that is drawn for a batch; then what is drawn for one."""
    torch.manual_seed(3)
    encoder = ViT(patch=8, dim=24, depth=2, heads=3, image_size=(16, 16))
    # a large eps: AdamW must not make whole steps of rounding
    recipe = FineTuneRecipe(lr=1e-2, reference_batch=4, warmup_epochs=0, eps=1e-2)
    module = FineTune(encoder, recipe=recipe, mixing=Mixing(0.0, 0.0), drop_path=0.0)
    fitted = trainer(world, max_epochs=2, limit_val_batches=0)
    fitted.fit(module, datamodule=images)
    fitted.limit_val_batches = 1.0
    fitted.validate(module, datamodule=images, verbose=False)
    mixing = Recorded()
    once = trainer(world, max_epochs=1, limit_train_batches=2, limit_val_batches=0)
    once.fit(FineTune(encoder, recipe=recipe, mixing=mixing), datamodule=images)
    found = module.scores()
    return {
        "finetune": [found.scores, found.counts, found.per_class],
        "tuned": [module.head.weight.tolist(), module.encoder.blocks[0].mlp.fc1.weight.tolist()],
        "mixing": mixing.drawn,
    }


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
    videos = [("dog", 5, 2), ("swan", 4, 1), ("cat", 4, 1)]
    tree = davis(folder / f"davis{os.environ.get('RANK', '')}", videos)
    sequences = DavisDataModule(str(tree), view=FrameView(short_side=None), num_workers=0)
    propagation = LabelPropagation(Colours(), recipe=PropagationRecipe(last=2, topk=3, radius=2))
    found = {}
    for name, module, data in (
        ("retrieval", retrieval, streets), ("clustering", clustering, streets), ("knn", knn, images),
        ("discovery", discovery, objects), ("propagation", propagation, sequences),
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
    found |= finetuned(images, world)
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

"""Trained evaluations of detection, depth and actions, by one or two processes; run once per process.

usage: python two_evaluations.py FOLDER PROCESSES

With torchrun's variables in the environment Lightning joins the processes that are there and starts none.
"""

import os
import sys
from pathlib import Path

import action_trees
import cv2
import depth_trees
import lightning as L
import torch
from detection_trees import detection_tree
from lightning.pytorch.strategies import DDPStrategy
from tiny_models import tiny_encoder
from torch.optim import SGD

from poodle_lightning.data.detection import DetectionDataModule
from poodle_lightning.data.detection_views import DetectionTestView, DetectionTrainView
from poodle_lightning.evaluation.action import ActionFineTune, ActionRecipe
from poodle_lightning.evaluation.depth import DepthReadout
from poodle_lightning.evaluation.detection import Detection
from poodle_lightning.nn.encoder import DecodedEncoder
from poodle_lightning.nn.fpn import SemanticFPN
from poodle_lightning.nn.head_optim import HeadRecipe
from poodle_lightning.nn.vit import ViT

NAMES = ("maskrcnn", "fcos", "depth", "action")
BATCH = 2  # of all processes


class Descent(ActionFineTune):
    """Adam would make whole steps of rounding."""

    def configure_optimizers(self):
        return SGD(self.parameters(), lr=1.0)


class Helped(Detection):
    """Also finds what is there, some pixels beside it: an untrained detector alone would score 0."""

    def detect(self, batch):
        found, source = super().detect(batch), self._data().objects("val")
        for one, image in zip(found, batch.ids, strict=True):
            number = [known["id"] for known in source.images].index(image)
            boxes, labels, _ = source.truth(number, masks=False)
            more = {
                "boxes": torch.from_numpy(boxes).float() + 4 * number,
                "labels": torch.from_numpy(labels),
                "scores": torch.full((len(labels),), 0.9),
                "masks": torch.ones(len(labels), 1, 28, 28),
            }
            one |= {key: torch.cat([value, more[key]]) for key, value in one.items()}
        return found


def trees(folder: Path) -> None:
    """The data, with three held-out items each: the second process has one less."""
    detection_tree(folder / "coco", images=3)
    depth_trees.folder(folder / "depth", (("train", 4), ("val", 3)))
    path = str(folder / "depth" / "train" / "depth" / "1.png")
    depth = cv2.imread(path, cv2.IMREAD_UNCHANGED)
    depth[3:] = 0  # fewer measured pixels than the others
    cv2.imwrite(path, depth)
    action_trees.ucf(folder / "ucf")


def made(name: str, folder: Path, world: int):
    """A small evaluation with its data."""
    torch.manual_seed(0)
    size = {"batch_size": BATCH // world, "num_workers": 0}
    recipe = HeadRecipe(lr=0.01, decay="constant", momentum=0.0)
    detector = {"recipe": recipe, "threshold": 1e-3, "detections": 20, "classes": ("red", "green")}
    if name in ("maskrcnn", "fcos"):
        views = {"train": DetectionTrainView(short_sides=(64,)), "test": DetectionTestView(short_side=64)}
        data = DetectionDataModule("coco", str(folder / "coco"), masks=name == "maskrcnn", **views, **size)
        bare = tiny_encoder()
        if name == "fcos":
            return Helped(bare, detector="fcos", frozen=False, **detector), data
        encoder = DecodedEncoder(bare, SemanticFPN(bare.channels, dims=32, pyramid=32))
        module = Helped(encoder, frozen_pyramid=True, **detector)
        # few, so that rounding does not decide which of two proposals is kept
        module.network.rpn._pre_nms_top_n = {"training": 50, "testing": 50}
        for part in (module.network.rpn, module.network.roi_heads):
            part.fg_bg_sampler.batch_size_per_image = 24  # fewer than there are: they are drawn
        return module, data
    if name == "depth":
        data = depth_trees.module(folder / "depth", source="folder", **size)
        return DepthReadout(tiny_encoder(), output_stride=4, recipe=recipe), data
    data = action_trees.module(folder / "ucf", clips_per_video=1, **size)
    encoder = ViT(patch=8, dim=24, depth=2, heads=3, image_size=(16, 16))  # no batch norms to synchronise
    recipe = ActionRecipe(lr=0.05, warmup_epochs=0)
    return Descent(encoder, dropout=0.0, recipe=recipe, classes=action_trees.NAMES), data


def run(name: str, folder: Path, world: int) -> dict:
    """Two steps; then the test, of the first weights, which are equal to the last bit."""
    (module, data), (tested, _) = (made(name, folder, world) for _ in range(2))
    strategy = DDPStrategy(process_group_backend="gloo") if world > 1 else "auto"
    trainer = L.Trainer(
        accelerator="cpu", devices=world, strategy=strategy, max_steps=2, limit_val_batches=0,
        logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        use_distributed_sampler=False,
    )  # fmt: skip
    trainer.fit(module, datamodule=data)
    trainer.limit_val_batches = 1.0
    trainer.validate(tested, datamodule=data, verbose=False)
    scores = tested.scores()
    return {
        "weights": {name: value.detach() for name, value in module.state_dict().items()},
        "scores": scores.scores,
        "counts": scores.counts,
        "per_class": scores.per_class,
    }


def main(folder: Path, world: int) -> dict:
    return {name: run(name, folder, world) for name in NAMES}


if __name__ == "__main__":
    where = Path(sys.argv[1])
    torch.save(main(where, int(sys.argv[2])), where / f"{os.environ['RANK']}.pt")

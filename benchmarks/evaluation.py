"""Evaluation, images per second: ``Segmentation`` in ``Trainer.validate`` against a plain loop.

Both take the same images from memory through the same network and head, one by one, bring the logits to the
labels' size and count a confusion matrix, in turns. The matrices must be equal, or the comparison would be of
different work. The plain loop computes no loss and looks for no worst images, and it starts no trainer: the
small network shows what that costs per image, the other one what it amounts to. Times are CPU seconds.
"""

from __future__ import annotations

import logging
import time
import warnings
from dataclasses import dataclass
from typing import Any

from benchmarks import record

import lightning as L  # isort: skip  (after record, which fixes the number of threads)
import torch
import torch.nn.functional as F
from torch import Tensor

from poodle_lightning.data.label_streets import StreetLabels
from poodle_lightning.data.labelled import LabelledDataModule
from poodle_lightning.evaluation.segmentation import Segmentation
from poodle_lightning.nn.resnet import ResNet
from poodle_lightning.nn.seg_heads import LinearHead


@dataclass(frozen=True)
class Setting:
    """A network and its images.

    Args:
        encoder: arguments of the ResNet.
        size: height and width of images and labels.
        images: of one pass.
    """

    encoder: dict[str, Any]
    size: tuple[int, int]
    images: int


SETTINGS = {
    "ResNet-10, width 24, 96×192": Setting({"depth": 10, "width": 24, "stem_pool": False}, (96, 192), 48),
    "ResNet-18, stride 8, 256×512": Setting({"depth": 18, "output_stride": 8}, (256, 512), 8),
}


def plain_loop(model: Segmentation, data: LabelledDataModule) -> Tensor:
    """The confusion matrix by hand, ``(C, C)`` int64."""
    encoder, head, classes = model.the_encoder(), model.head, len(data.classes)
    matrix = torch.zeros(classes * classes, dtype=torch.int64)
    with torch.no_grad():
        for number in data.numbers("val"):
            image, labels = data.source.read("val", number)
            pixels = torch.from_numpy(image).permute(2, 0, 1)[None].float() / 255.0
            truth = torch.from_numpy(labels).long()
            logits = F.interpolate(head(encoder(pixels)), truth.shape, mode="bilinear", align_corners=False)
            guess = logits.argmax(dim=1)[0]
            kept = truth < classes
            matrix += torch.bincount(truth[kept] * classes + guess[kept], minlength=len(matrix))
    return matrix.reshape(classes, classes)


def measure(setting: Setting, rounds: int) -> dict[str, Any]:
    """Images per CPU-second of both, in turns; the first round does not count."""
    torch.manual_seed(0)
    streets = StreetLabels(train=1, val=setting.images, size=setting.size, supersample=1)
    data = LabelledDataModule("synthetic", synthetic=streets, num_workers=0)
    model = Segmentation(ResNet(**setting.encoder), LinearHead())
    model.take_classes(data.classes)
    torch.nn.init.normal_(next(p for p in model.head.parameters() if p.ndim > 1), std=1.0)
    trainer = L.Trainer(
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    module, by_hand = [], []
    for _ in range(rounds + 1):
        began = time.process_time()
        trainer.validate(model, datamodule=data, verbose=False)
        module.append(time.process_time() - began)
        model.eval()
        began = time.process_time()
        matrix = plain_loop(model, data)
        by_hand.append(time.process_time() - began)
    same = torch.equal(matrix, model.confusion.matrix)
    module, by_hand = module[1:], by_hand[1:]
    return {
        "images": setting.images,
        "module_images_per_cpu_s": record.spread(setting.images / seconds for seconds in module),
        "loop_images_per_cpu_s": record.spread(setting.images / seconds for seconds in by_hand),
        "module_to_loop": record.ratio(module, by_hand),
        "same_confusion": same,
    }


def main(words: list[str] | None = None) -> dict[str, Any]:
    parser = record.arguments(__doc__, rounds=5)
    args = parser.parse_args(words)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")
    results = {name: measure(setting, args.rounds) for name, setting in SETTINGS.items()}
    path = record.save("evaluation", args, results)
    print(_report(results))
    print(f"written to {path}")
    return results


def _report(results: dict[str, Any]) -> str:
    head = ["images per CPU-second", "Segmentation", "plain loop", "time, module ÷ loop", "same matrix"]
    rows = [
        [
            name,
            record.shown(found["module_images_per_cpu_s"], 1),
            record.shown(found["loop_images_per_cpu_s"], 1),
            record.shown(found["module_to_loop"], 3),
            "yes" if found["same_confusion"] else "NO",
        ]
        for name, found in results.items()
    ]
    return record.table(head, rows)


if __name__ == "__main__":
    main()

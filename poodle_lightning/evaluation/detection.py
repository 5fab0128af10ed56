"""Object detection on COCO and LVIS: torchvision's Mask R-CNN and FCOS on an encoder, frozen or finetuned.

Mask R-CNN with a frozen pyramid is PiCo's (Table 2, appendix A.2.2: detectron2's FPN 1x, of which proposals
and heads are trained); FCOS finetuned stands for VITO's FCOS* (Table 1), which adds tricks that its text
does not list. Where torchvision differs from detectron2:

====================  ========================================================================================
regions               sampled at 2×2 points per bin; detectron2 takes as many as the region is large
proposals             1,000 in training are kept per image, as detectron2's; it keeps them per batch
box loss              smooth L1 with β 1/9, of proposals and heads; detectron2: L1
means of losses       over what is sampled on all devices; detectron2: on each device
FCOS levels           P3 to P7, GroupNorm in the heads, GIoU, centre sampling 1.5: torchvision's numbers
====================  ========================================================================================

Batches are padded after normalisation, with 0. The heads and losses are float32 under any autocast. Which
anchors and proposals of an image are sampled is a function of the image's key.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Sequence
from typing import Any, Literal, Self
from zlib import crc32

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool, LastLevelP6P7

from poodle_lightning.data.detection import DetectionBatch, DetectionDataModule
from poodle_lightning.evaluation.base import Scheduled, Scores
from poodle_lightning.evaluation.box_scores import Kind, average_precision
from poodle_lightning.evaluation.detectors import (
    FINEST,
    LEVELS,
    DetectorName,
    batch_norms,
    divisors,
    make_detector,
    run_lengths,
    sample_by,
)
from poodle_lightning.evaluation.segmentation import seeded
from poodle_lightning.nn.encoder import DecodedEncoder, Encoder
from poodle_lightning.nn.fpn import FPN
from poodle_lightning.nn.head_optim import HeadRecipe, build_head_optimizer
from poodle_lightning.ops.distributed import on_first, world_size
from poodle_lightning.ops.random import fold
from poodle_lightning.types import ClassSet, UserError


class Detection(Scheduled):
    """Trains a detector on an encoder and scores its boxes, and of Mask R-CNN its masks.

    The pyramid is the encoder's own where it was trained with one (PiCo's ``SemanticFPN``), else a new one.

    Args:
        encoder: see ``Evaluation``; an encoder object is copied and stays as it is. It needs maps of strides
            4, 8, 16, 32 (FCOS: 8, 16, 32).
        detector: ``maskrcnn`` or ``fcos``; the data module's ``masks`` must be on for the first.
        decoder: ``drop`` leaves the encoder's own pyramid out.
        classes: see ``Evaluation``.
        frozen: the encoder never changes; False finetunes it.
        frozen_pyramid: nor does the pyramid, the encoder's or a new one.
        frozen_norms: a finetuned encoder keeps its batch norms as they are, statistics and scales
            (detectron2, torchvision); False trains them.
        recipe: how it is optimised; None is detectron2's 1x.
        detections: of an image, at most; COCO 100, LVIS 300.
        threshold: score below which a detection is left out; detectron2: COCO 0.05, LVIS 1e-4, for its rare
            classes have low scores.
        protocol: its name in tables; None makes one up.

    Raises:
        UserError: the encoder has no such maps, or a number is out of range.
    """

    def __init__(
        self,
        encoder: str | Encoder | None = None,
        *,
        detector: DetectorName = "maskrcnn",
        decoder: Literal["keep", "drop"] = "keep",
        classes: int | Sequence[str] | ClassSet | None = None,
        frozen: bool = True,
        frozen_pyramid: bool = False,
        frozen_norms: bool = True,
        recipe: HeadRecipe | None = None,
        detections: int = 100,
        threshold: float = 0.05,
        protocol: str | None = None,
    ) -> None:
        given = copy.deepcopy(encoder) if isinstance(encoder, Encoder) else encoder
        super().__init__(given, decoder=decoder, classes=classes)
        if detections < 1:
            raise UserError("model.detections must be at least 1")
        self.kind, self.frozen, self.frozen_pyramid = detector, frozen, frozen_pyramid
        self.frozen_norms, self.detections, self.threshold = frozen_norms, detections, threshold
        self.recipe = recipe or HeadRecipe(
            min_lr=0.0,
            weight_decay=1e-4,
            decay="step",
            milestones=(60_000, 80_000),
            warmup_steps=1000,
            warmup_ratio=1e-3,
        )
        mode = "frozen" if frozen else "finetuned"
        self.protocol = protocol or f"{'Mask R-CNN' if detector == 'maskrcnn' else 'FCOS'}, {mode}"
        self.pyramid: FPN | None = None
        self.network: nn.Module | None = None
        self._scores: Scores | None = None
        self._found: list[dict[str, Any]] = []
        self._seen: list[int] = []
        self._mixed: tuple[bool, torch.dtype] = (False, torch.float32)
        self._build()

    # ---- parts
    def _own(self) -> FPN | None:
        """The encoder's own pyramid."""
        encoder = self.encoder
        found = getattr(encoder.decoder, "fpn", None) if isinstance(encoder, DecodedEncoder) else None
        return found if isinstance(found, FPN) else None

    def _layers(self) -> dict[str, int]:
        """The encoder's layers that the detector reads, with their channels, from fine to coarse."""
        encoder = self.the_encoder()
        bare = encoder.encoder if isinstance(encoder, DecodedEncoder) else encoder
        wanted = [FINEST[self.kind] * 2**level for level in range(LEVELS[self.kind])]
        # the deepest layer of each stride
        at = {stride: name for name, stride in bare.strides.items()}
        if lacking := [stride for stride in wanted if stride not in at]:
            there = ", ".join(map(str, bare.strides.values()))
            raise UserError(
                f"{self.kind} needs maps of strides {', '.join(map(str, wanted))}, {type(bare).__name__} has "
                f"{there} (none of {lacking[0]}): give a ResNet that is not dilated, or a Swin"
            )
        return {at[stride]: bare.channels[at[stride]] for stride in wanted}

    def _build(self) -> None:
        """Makes pyramid and heads as soon as encoder and classes are known."""
        if self.network is not None or self.encoder is None or self.class_set is None:
            return
        layers, own = self._layers(), self._own()
        if own is not None and (lacking := set(layers) - set(own.channels)):
            raise UserError(f"the encoder's pyramid has no level {lacking.pop()}: set decoder to drop")
        # from the seed alone, as in ``Segmentation``
        with seeded(torch.initial_seed() ^ crc32(b"heads")):
            if own is None:
                if self.frozen_pyramid:
                    warnings.warn(
                        "the encoder has no pyramid: the one that is frozen is random", stacklevel=3
                    )
                self.pyramid = FPN(layers)
            width = (own or self.pyramid).dims  # type: ignore[union-attr]
            extra = LastLevelMaxPool() if self.kind == "maskrcnn" else LastLevelP6P7(width, width)
            self.coarser = extra
            limits, classes = (self.detections, self.threshold), len(self.class_set)
            self.network = make_detector(self.kind, self._levels, self.the_encoder(), width, classes, *limits)
        self._set_gradients()
        self.train(self.training)

    def _set_gradients(self) -> None:
        encoder, own = self.the_encoder(), self._own()
        encoder.requires_grad_(False)  # the rest of a decoder has no part in the detector
        bare = encoder.encoder if isinstance(encoder, DecodedEncoder) else encoder
        bare.requires_grad_(not self.frozen)
        if self.frozen_norms:
            for norm in batch_norms(bare):
                norm.requires_grad_(False)
        pyramid = own or self.pyramid
        assert pyramid is not None
        read = self._layers()
        for layer, *blocks in zip(
            pyramid.channels, pyramid.pyramid.inner_blocks, pyramid.pyramid.layer_blocks, strict=True
        ):
            for block in blocks:  # a level finer than those that are read gets no gradient: DDP would wait
                block.requires_grad_(not self.frozen_pyramid and layer in read)

    def take_classes(self, classes: ClassSet) -> None:
        """See ``Evaluation``; makes the detector."""
        super().take_classes(classes)
        self._build()

    def setup(self, stage: str) -> None:
        """Classes of the data and the detector; before DDP wraps.

        Raises:
            UserError: the data are no images with objects, or lack the masks of Mask R-CNN.
        """
        data = self._data()
        if self.kind == "maskrcnn" and stage == "fit" and not data.masks:
            raise UserError("Mask R-CNN learns from masks: set data.masks true")
        super().setup(stage)

    def _data(self) -> DetectionDataModule:
        data = getattr(self.trainer, "datamodule", None)
        if not isinstance(data, DetectionDataModule):
            raise UserError("detection needs images with boxes and classes: give data: DetectionDataModule")
        return data

    def train(self, mode: bool = True) -> Self:
        """A frozen encoder stays in eval mode, and so do frozen norms."""
        super().train(mode)
        if self.encoder is not None:
            if self.frozen:
                self.encoder.eval()
            if self.frozen_norms:
                for norm in batch_norms(self.encoder):
                    norm.eval()
        return self

    # ---- networks
    def _levels(self, normalised: Tensor) -> dict[str, Tensor]:
        """The levels that the detector reads, float32, of padded normalised images."""
        encoder = self.the_encoder()
        bare = encoder.encoder if isinstance(encoder, DecodedEncoder) else encoder
        on, dtype = self._mixed
        with torch.autocast(normalised.device.type, dtype=dtype, enabled=on):
            with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
                maps = bare.features(normalised).maps
            pyramid = self._own() or self.pyramid
            assert pyramid is not None
            found = pyramid(maps)
        layers = self._layers()
        levels = [found[name].float() for name in layers]
        names = [str(number) for number in range(len(levels))]
        levels, names = self.coarser(levels, [maps[name].float() for name in layers], names)
        return dict(zip(names, levels, strict=True))

    def _run(self, images: list[Tensor], targets: list[dict[str, Tensor]] | None = None) -> Any:
        assert self.network is not None
        device = self.device.type
        self._mixed = (torch.is_autocast_enabled(device), torch.get_autocast_dtype(device))
        with torch.autocast(device, enabled=False):
            return self.network(images, targets)

    # ---- training
    def training_step(self, batch: DetectionBatch, batch_idx: int) -> Tensor:
        """The sum of the detector's losses; logs it and each of them."""
        first = 1 if self.kind == "maskrcnn" else 0
        targets = [
            {"boxes": boxes, "labels": labels + first}
            for boxes, labels in zip(batch.boxes, batch.labels, strict=True)
        ]
        if self.kind == "maskrcnn":
            assert batch.masks is not None
            for target, masks in zip(targets, batch.masks, strict=True):
                target["masks"] = masks
        assert self.network is not None
        sample_by(self.network, batch.key)
        with seeded(int(fold(batch.key, "detector")[0])):  # of the encoder: stochastic depth
            terms: dict[str, Tensor] = self._run([image.float() / 255 for image in batch.images], targets)
        # gradients are averaged over devices: by the mean divisor there they are those of the whole batch
        own = divisors(self.network, terms)
        mean = self.over_devices(own.clone(), "mean").clamp(min=1 / world_size())
        losses = torch.stack(list(terms.values())) * (own.clamp(min=1) / mean)
        logs = {
            f"train/loss_{name.removeprefix('loss_')}": value
            for name, value in zip(terms, losses.detach(), strict=True)
        }
        total = losses.sum()
        self.log_dict({"train/loss": total.detach(), **logs}, batch_size=len(batch))
        return total

    def configure_optimizers(self) -> Optimizer:
        """The recipe's optimiser over all that is trained."""
        self.plan()
        assert self.network is not None
        parts: dict[str, nn.Module] = {"encoder": self.the_encoder(), "heads": self.network}
        parts["coarser"] = self.coarser
        if self.pyramid is not None:
            parts["pyramid"] = self.pyramid
        return build_head_optimizer(self.recipe, parts)

    # ---- scoring
    def on_validation_epoch_start(self) -> None:
        """Begins anew."""
        self._found, self._seen, self._scores = [], [], None

    @torch.no_grad()
    def detect(self, batch: DetectionBatch) -> list[dict[str, Tensor]]:
        """What is found in each image, in pixels of its file, on the device.

        Returns:
            ``boxes (k, 4)`` (left, top, right, bottom), ``scores (k,)``, ``labels (k,)`` (0 = the first
            class), and of Mask R-CNN ``masks (k, 1, 28, 28)``: probabilities inside the boxes.
        """
        training = self.training
        self.eval()
        found: list[dict[str, Tensor]] = []
        for image, size, shown in zip(batch.images, batch.sizes, batch.shown, strict=True):
            # one by one: nothing depends on how images are batched
            (one,) = self._run([image.to(self.device).float() / 255])
            scale = torch.tensor([size[1] / shown[1], size[0] / shown[0]] * 2, device=self.device)
            largest = torch.tensor([size[1], size[0]] * 2, device=self.device, dtype=torch.float32)
            one["boxes"] = (one["boxes"] * scale).clamp(min=0).minimum(largest)
            one["labels"] = one["labels"] - (1 if self.kind == "maskrcnn" else 0)
            found.append(one)
        self.train(training)
        return found

    def validation_step(self, batch: DetectionBatch, batch_idx: int) -> None:
        """Collects what is found, masks as run lengths."""
        categories = self._data().objects("val").categories
        for one, image, size in zip(self.detect(batch), batch.ids, batch.sizes, strict=True):
            masks = run_lengths(one, size) if "masks" in one else None
            boxes, scores = one["boxes"].double().cpu(), one["scores"].double().cpu().tolist()
            boxes[:, 2:] -= boxes[:, :2]
            labels = one["labels"].cpu().tolist()
            self._seen.append(image)
            for place, (box, score, label) in enumerate(zip(boxes.tolist(), scores, labels, strict=True)):
                row = {"image_id": image, "category_id": categories[label]["id"], "score": score, "bbox": box}
                self._found.append(row if masks is None else {**row, "segmentation": masks[place]})

    def on_validation_epoch_end(self) -> None:
        """Puts the devices' images together on the first, which scores them; every device ends with the same.

        Several million detections, of LVIS, need gigabytes: they are in one process only.
        """
        parts = on_first((self._seen, self._found))
        self._seen, self._found = [], []
        scores: Scores | None = None
        if parts is not None:
            seen = sorted({image for images, _ in parts for image in images})
            # in the order of the images, so that equal scores do not depend on the devices
            rows = sorted((row for _, found in parts for row in found), key=lambda row: row["image_id"])
            scores = self._summary(seen, rows)
        self._scores = self.trainer.strategy.broadcast(scores)
        assert self._scores is not None
        scored = self._scores.scores
        logs = {
            f"val/{name}": torch.tensor(scored[name], dtype=torch.float32, device=self.device)
            for name in ("box_ap", "mask_ap")
            if name in scored
        }
        self.log_dict(logs, sync_dist=True)

    def _summary(self, seen: list[int], found: list[dict[str, Any]]) -> Scores:
        data = self._data()
        source, names = data.objects("val"), self.the_classes().names
        kept = set(seen)
        truth = {
            "images": [one for one in source.images if one["id"] in kept],
            "annotations": [one for image in seen for one in source.objects[image]],
            "categories": source.categories,
        }
        kinds: dict[str, Kind] = {"box": "bbox"}
        if self.kind == "maskrcnn":
            kinds["mask"] = "segm"
        scores: dict[str, float] = {}
        per_class: dict[str, dict[str, float]] = {}
        for word, kind in kinds.items():
            # LVIS: as many as an image may have, of any class
            limit = max(100, self.detections) if data.federated else 100
            judged = average_precision(truth, found, kind, federated=data.federated, limit=limit)
            scores |= {f"{word}_{name}": value for name, value in judged.means.items()}
            per_class[f"{word}_ap"] = dict(zip(names, judged.classes, strict=True))
        return Scores(
            protocol=self.protocol,
            headline="box_ap",
            scores=scores,
            per_class=per_class,
            counts={"images": len(seen), "objects": len(truth["annotations"]), "detections": len(found)},
            details={"frozen": self.frozen, "frozen_pyramid": self.frozen_pyramid, "detector": self.kind},
        )

    def scores(self) -> Scores:
        """Average precision of boxes, and of Mask R-CNN of masks.

        Raises:
            UserError: there was no validation yet.
        """
        if self._scores is None:
            raise UserError("there are no scores yet: run validate first")
        return self._scores

    # ---- what is kept
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """See ``Scheduled``."""
        super().on_save_checkpoint(checkpoint)
        # a detector has none
        checkpoint["poodle_lightning"]["method"]["init_args"].pop("output_stride", None)

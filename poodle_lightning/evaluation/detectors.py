"""torchvision's detectors on features that come from elsewhere, see ``evaluation.detection``."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torchvision.models.detection import FCOS, MaskRCNN
from torchvision.models.detection._utils import BalancedPositiveNegativeSampler
from torchvision.models.detection.fcos import FCOSHead
from torchvision.models.detection.roi_heads import paste_masks_in_image
from torchvision.models.detection.transform import GeneralizedRCNNTransform

from poodle_lightning.data.coco_objects import mask_api
from poodle_lightning.evaluation.segmentation import seeded
from poodle_lightning.nn.encoder import Encoder
from poodle_lightning.nn.patches import multiple_of
from poodle_lightning.ops.random import fold

DetectorName = Literal["maskrcnn", "fcos"]
FINEST = {"maskrcnn": 4, "fcos": 8}  # stride of the first level that the detector reads
LEVELS = {"maskrcnn": 4, "fcos": 3}  # levels of the encoder that it reads
_BINARY = 0.5  # a mask is where its probability is above this


class _AsGiven(GeneralizedRCNNTransform):
    """Normalises and pads; the data module has resized already."""

    def resize(
        self, image: Tensor, target: dict[str, Tensor] | None = None
    ) -> tuple[Tensor, dict[str, Tensor] | None]:
        return image, target

    def postprocess(
        self, result: list[dict[str, Tensor]], image_shapes: Any, original_image_sizes: Any
    ) -> list[dict[str, Tensor]]:
        return result


class _Backbone(nn.Module):
    """What torchvision's detectors take for a backbone; it owns nothing."""

    def __init__(self, read: Callable[[Tensor], dict[str, Tensor]], width: int) -> None:
        super().__init__()
        self.read, self.out_channels = read, width

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        return self.read(images)


class _Sampler(BalancedPositiveNegativeSampler):
    """Draws for every image from its own key; counts what it took, and what of that has an object."""

    keys: Iterable[int] = ()
    taken: Tensor
    positive: Tensor

    def __call__(self, matched_idxs: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        positive, negative = [], []
        for key, matched in zip(self.keys, matched_idxs, strict=True):
            with seeded(key):  # torchvision draws with the global generator
                (there,), (not_there,) = super().__call__([matched])
            positive.append(there)
            negative.append(not_there)
        self.positive = torch.cat(positive).sum(dtype=torch.float32)
        self.taken = self.positive + torch.cat(negative).sum(dtype=torch.float32)
        return positive, negative


class _FCOSHead(FCOSHead):
    """Remembers how many places of the maps have an object."""

    taken: Tensor

    def compute_loss(
        self, targets: Any, head_outputs: Any, anchors: Any, matched_idxs: list[Tensor]
    ) -> dict[str, Tensor]:
        self.taken = (torch.cat(matched_idxs) >= 0).sum(dtype=torch.float32)
        found: dict[str, Tensor] = super().compute_loss(targets, head_outputs, anchors, matched_idxs)
        return found


def make_detector(
    name: DetectorName,
    read: Callable[[Tensor], dict[str, Tensor]],
    encoder: Encoder,
    width: int,
    classes: int,
    detections: int,
    threshold: float,
) -> nn.Module:
    """Proposals and heads of Mask R-CNN, or the heads of FCOS; they own no backbone.

    Args:
        name: which.
        read: padded normalised images to all levels, from fine to coarse.
        encoder: whose colours and multiples images are brought to.
        width: channels of the levels.
        classes: without the background.
        detections: of an image, at most.
        threshold: score below which a detection is left out.
    """
    backbone = _Backbone(read, width)
    made: nn.Module
    if name == "maskrcnn":
        made = MaskRCNN(
            backbone,
            classes + 1,  # class 0 of the network is the background
            rpn_post_nms_top_n_train=1000,
            box_score_thresh=threshold,
            box_detections_per_img=detections,
        )
        parts: tuple[Any, ...] = (made.rpn, made.roi_heads)
        for part in parts:
            given = part.fg_bg_sampler
            part.fg_bg_sampler = _Sampler(given.batch_size_per_image, given.positive_fraction)
    else:
        head = _FCOSHead(width, 1, classes)
        made = FCOS(backbone, classes, head=head, score_thresh=threshold, detections_per_img=detections)
    mean, std = (part.flatten().tolist() for part in (encoder.mean, encoder.std))
    made.transform = _AsGiven(1, 1, mean, std, size_divisible=max(32, *multiple_of(encoder)))
    return made


def sample_by(network: nn.Module, keys: Tensor) -> None:
    """Makes the samples of the next training step a function of its images' ``keys (B,)``, on the host."""
    for name in ("rpn", "roi_heads"):
        part: Any = getattr(network, name, None)
        if part is not None:
            part.fg_bg_sampler.keys = fold(keys, name).tolist()


def divisors(network: nn.Module, terms: Iterable[str]) -> Tensor:
    """By what the losses of the last training step were divided, ``(losses,)`` float32.

    It is the number of samples; where there were none, torchvision divides by 1.

    Args:
        network: what ``make_detector`` made.
        terms: names of its losses.
    """
    made: Any = network
    if isinstance(network, FCOS):
        return torch.stack([made.head.taken for _ in terms])
    anchors, proposals = made.rpn.fg_bg_sampler, made.roi_heads.fg_bg_sampler
    counts = {
        "loss_objectness": anchors.taken,
        "loss_rpn_box_reg": anchors.taken,
        "loss_classifier": proposals.taken,
        "loss_box_reg": proposals.taken,
        "loss_mask": proposals.positive,
    }
    return torch.stack([counts[name] for name in terms])


def batch_norms(module: nn.Module) -> list[nn.Module]:
    """All batch norms in a network."""
    return [part for part in module.modules() if isinstance(part, nn.modules.batchnorm._BatchNorm)]


def run_lengths(one: dict[str, Tensor], size: tuple[int, int]) -> list[dict[str, Any]]:
    """The masks of an image at the size of its file, as COCO's run lengths; few at once, they are large."""
    api, made = mask_api(), []
    for masks, boxes in zip(one["masks"].split(16), one["boxes"].split(16), strict=True):
        whole = (paste_masks_in_image(masks, boxes, size)[:, 0] > _BINARY).byte().cpu().numpy()
        made += [api.encode(mask.copy(order="F")) for mask in whole]
    return made

"""torchvision's detectors on features that come from elsewhere, see ``evaluation.detection``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

from torch import Tensor, nn
from torchvision.models.detection import FCOS, MaskRCNN
from torchvision.models.detection.roi_heads import paste_masks_in_image
from torchvision.models.detection.transform import GeneralizedRCNNTransform

from poodle_lightning.data.coco_objects import mask_api
from poodle_lightning.nn.encoder import Encoder
from poodle_lightning.nn.patches import multiple_of

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
    else:
        made = FCOS(backbone, classes, score_thresh=threshold, detections_per_img=detections)
    mean, std = (part.flatten().tolist() for part in (encoder.mean, encoder.std))
    made.transform = _AsGiven(1, 1, mean, std, size_divisible=max(32, *multiple_of(encoder)))
    return made


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

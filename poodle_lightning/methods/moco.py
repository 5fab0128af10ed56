"""MoCo-v2: Improved baselines with momentum contrastive learning (Chen et al., 2020).

MoCo is He et al., CVPR 2020. A query, one view of an image, is to find its key, which a slowly moving copy of
the network makes of another view, among the keys of many earlier images. Those wait in a queue, so that their
number does not depend on the batch. On video every frame is an image, or the key comes from the other frame
of a pair.

=====================  ==============================================================
in the paper           here
=====================  ==============================================================
x^q, x^k               ``self.views``: both from ``self.crops``
f_q; f_k               ``self.online``; ``self.target``: encoder and projector
q; k_+, k_i            ``q``; ``k``, ``self.queue.rows``
L_q (Eq. 1), τ         ``info_nce``, ``temperature``
m                      ``recipe.ema_start`` = ``recipe.ema_end`` = 0.999
shuffling BN           ``self.observe``
=====================  ==============================================================

Deviations: the copy moves behind each optimiser step (the code: before each forward pass), the queue behind
each batch as there. Biases and normalisation layers do not decay (in the code they do). Crops are plain
bilinear, of the training crop that the data brings. Shuffling BN is for BatchNorm that knows its own
process' batch only: alone in a process, with SyncBN (``trainer/gpu8.yaml``; the paper's training has
``--trainer.sync_batchnorm false``), with frozen BatchNorm or without any there is nothing to shuffle, and
nothing is sent.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn

from poodle_lightning.augment.geometric import ResizedCrop
from poodle_lightning.augment.multicrop import MultiCrop
from poodle_lightning.augment.photometric import Colour
from poodle_lightning.losses.contrastive import info_nce
from poodle_lightning.methods.base import Method
from poodle_lightning.methods.run_length import check_queue, frames_per_clip
from poodle_lightning.nn.ema import EMA
from poodle_lightning.nn.encoder import Encoder
from poodle_lightning.nn.online import Online
from poodle_lightning.nn.optim import Recipe
from poodle_lightning.nn.queue import Queue
from poodle_lightning.nn.resnet import ResNet
from poodle_lightning.nn.vit import ViT
from poodle_lightning.ops.distributed import exchange, world_size
from poodle_lightning.ops.random import key_of, permutation
from poodle_lightning.types import Clip, Look, Losses, UserError

RECIPE = Recipe(
    optimizer="sgd",
    lr=0.03,
    weight_decay=1e-4,
    warmup_epochs=0.0,
    horizon_epochs=200.0,
    scale_lr="linear",
    reference_batch=256,
    ema_start=0.999,
    ema_end=0.999,
)
"""MoCo-v2's recipe for 200 epochs of ImageNet (facebookresearch/moco README and ``main_moco.py``)."""


class MoCoNet(Online):
    """Everything the target copies: encoder and projector (linear, ReLU, linear; no BatchNorm)."""

    def __init__(self, encoder: Encoder, hidden: int, out: int) -> None:
        super().__init__(encoder)
        self.projector = nn.Sequential(
            nn.Linear(encoder.vector_dim, hidden), nn.ReLU(inplace=True), nn.Linear(hidden, out)
        )

    def pooled(self, images: Tensor) -> Tensor:
        """Projected vector ``(N, out)`` of images ``(N, 3, h, w)``."""
        projected: Tensor = self.projector(self.encoder(images).vector)
        return projected


class MoCo(Method):
    """MoCo-v2.

    Args:
        encoder: default ResNet-50.
        hidden: width of the projector's hidden layer. (Paper: 2048)
        out: length of queries and keys. (Paper: 128)
        queue: how many keys wait as negatives. (Paper: 65,536)
        temperature: τ. (Paper: 0.2)
        crops: the two views. (Paper: 224 px, area 0.2–1, jitter .4 .4 .4 .1 at 0.8, greyscale 0.2, blur 0.5)
        frames: "frame" takes both views from each frame; "pair" the query from a clip's first frame, the key
            from its last.
        shuffle: the processes exchange images before keys are made of them, and keys afterwards, so that
            BatchNorm does not tell which key belongs to which query (MoCo, section 3.3).
        recipe: optimiser and schedules; None: the paper's for 200 epochs.

    Raises:
        UserError: ``crops`` does not make two crops, or their side is no multiple of the encoder's patch; at
            the start of a fit: the queue holds more keys than an epoch brings.
    """

    online: MoCoNet
    target: EMA[MoCoNet]

    def __init__(
        self,
        encoder: Encoder | None = None,
        hidden: int = 2048,
        out: int = 128,
        queue: int = 65_536,
        temperature: float = 0.2,
        crops: MultiCrop | None = None,
        frames: Literal["frame", "pair"] = "frame",
        shuffle: bool = True,
        recipe: Recipe | None = None,
    ) -> None:
        super().__init__(recipe or RECIPE)
        encoder = encoder or ResNet(50)
        self.online = self.network(encoder, hidden, out)
        self.target = EMA(self.online)
        self.queue = Queue(out, queue)
        self.temperature = temperature
        self.crops = crops or moco_crops()
        check_two_views(self.crops, encoder, type(self).__name__)
        self.frames = frames
        self.shuffle = shuffle

    def network(self, encoder: Encoder, hidden: int, out: int) -> MoCoNet:
        """What is trained."""
        return MoCoNet(encoder, hidden, out)

    def losses(self, clip: Clip) -> Losses:
        """The contrast of each query (MoCo, Eq. 1); its keys then join the queue."""
        x_q, x_k = self.views(clip)
        q = self.online.pooled(x_q)
        (k,) = self.observe(lambda images: (self.target.module.pooled(images),), x_k)
        loss = info_nce(q, k, self.queue.rows, self.temperature)
        self.queue.enqueue(k)
        return {"contrast": loss}

    @torch.no_grad()
    def observe(self, network: Callable[[Tensor], tuple[Tensor, ...]], images: Tensor) -> tuple[Tensor, ...]:
        """What the target makes of images ``(N, 3, h, w)``, in a batch shuffled over the processes.

        Args:
            network: images to tensors with a row per image.
            images: of this process.
        """
        if not self.shuffle or world_size() == 1 or not _sees_own_batch(self.target):
            return network(images)
        # no clip's key would do: all processes must draw the same
        key = key_of(0, "shuffle", self.global_step)
        order = permutation(key, world_size() * len(images))[0]
        back = order.argsort()
        return tuple(exchange(rows, back) for rows in network(exchange(images, order)))

    @torch.no_grad()
    def views(self, clip: Clip) -> tuple[Tensor, Tensor]:
        """The images of queries and of keys, ``(N, 3, h, w)`` each; N = B·T, of pairs B."""
        count = clip.frames.shape[1]
        large = self.crops(clip).large
        if self.frames == "frame":
            return large[0], large[1]
        if count < 2:
            raise UserError(
                f"frames=pair needs clips of 2 frames or more, not {count}: set model.frames=frame, or "
                "data.gap in place of data.sampler"
            )
        return large[0, ::count], large[1, count - 1 :: count]

    # ---- hooks
    def on_fit_start(self) -> None:
        """Compares the queue with what an epoch brings."""
        keys = 1 if self.frames == "pair" else frames_per_clip(self.trainer)
        check_queue(self.trainer, len(self.queue.rows), keys)

    @torch.no_grad()
    def look(self, clip: Clip) -> Look:
        """The images of each clip's first query and its key, as training draws them."""
        both = torch.stack(self.views(clip), dim=1)
        return Look(clip.unit(), large=both[:: len(both) // len(clip)])


def moco_crops() -> MultiCrop:
    """MoCo-v2's two views (facebookresearch/moco ``main_moco.py``, ``--aug-plus``)."""
    crop = ResizedCrop((224, 224), (0.2, 1.0), fit="redraw")
    return MultiCrop(crop, locals=0, colours=(Colour(0.4, 0.4, 0.4, 0.1),), clip_wide=False)


def check_two_views(crops: MultiCrop, encoder: Encoder, name: str) -> None:
    """Checks that there are two large crops and no small ones, which the encoder can take.

    Args:
        crops: of the method.
        encoder: a vision transformer wants sides that are multiples of its patch.
        name: of the method.

    Raises:
        UserError: they are others.
    """
    if crops.views != 2 or crops.locals:
        raise UserError(
            f"{name} compares two crops of an image: set crops.views=2 and crops.locals=0, not {crops.views} "
            f"and {crops.locals}"
        )
    if isinstance(encoder, ViT):
        crops.check_patch(encoder.patch)


def _sees_own_batch(network: nn.Module) -> bool:
    """Whether some BatchNorm normalises with the batch of this process alone."""
    return any(
        isinstance(layer, nn.modules.batchnorm._BatchNorm)
        and not isinstance(layer, nn.SyncBatchNorm)
        and layer.training
        for layer in network.modules()
    )

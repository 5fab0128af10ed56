"""PiCo: Pixel-level correspondence for self-supervised learning from video (Sharma et al., 2022).

A point of one frame is to find itself in another frame, where a track says it is, among the pixels of many
earlier frames. The backbone is frozen; what is learnt is a pyramid with a semantic branch on top of it. One
frame instead of two is Static (Frame), which is VADeR (Pinheiro et al., NeurIPS 2020) with MoCo-v2's parts;
Static (Video) and Random frames are this class with other samplers (``data.tracked.TrackedFrames``).

=====================  ==============================================================
in the paper           here
=====================  ==============================================================
f                      ``self.online``: frozen encoder, decoder, projector
momentum network       ``self.target``: its decoder and projector behind the same encoder
v, v⁺; v⁻              ``q``, ``k``; ``self.queue.rows``
tracked points         ``clip.points``
index = point / 4      ``lookup="nearest"``
L, τ, m                ``info_nce``, ``temperature``; ``recipe.ema_start`` = ``recipe.ema_end``
=====================  ==============================================================

Deviations: the paper tells neither optimiser nor batch nor length: the recipe, τ and m are MoCo-v2's. Crops
are plain bilinear. The projector runs on the pixels looked up alone, which is the same with ``nearest``. The
encoder runs once for both networks; the target's copy of it, which makes a whole network of it for whoever
reads one, never runs and never moves. Shapes are fixed: a point outside of either view has no weight, and
where it is outside of the key's view a random pixel of that view joins the queue in its place. So every key
in the queue is of a pixel that was shown.
"""

from __future__ import annotations

from typing import Literal

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from poodle_lightning.augment.multicrop import MultiCrop
from poodle_lightning.hub import load_encoder
from poodle_lightning.losses.contrastive import info_nce
from poodle_lightning.methods.base import Method
from poodle_lightning.methods.moco import RECIPE, check_two_views, moco_crops
from poodle_lightning.methods.run_length import check_queue
from poodle_lightning.nn.ema import EMA
from poodle_lightning.nn.encoder import DecodedEncoder, Decoder, Encoder
from poodle_lightning.nn.fpn import SemanticFPN
from poodle_lightning.nn.online import Online
from poodle_lightning.nn.optim import Recipe
from poodle_lightning.nn.queue import Queue
from poodle_lightning.nn.resnet import ResNet
from poodle_lightning.ops.geometry import inside, sample
from poodle_lightning.ops.random import fold, uniform
from poodle_lightning.types import Clip, Features, Look, Losses, UserError


class PiCoNet(Online):
    """A frozen encoder, and decoder and projector (1x1 convolution, ReLU, 1x1 convolution), which learn."""

    decoder: Decoder

    def __init__(self, encoder: Encoder, decoder: Decoder, hidden: int, out: int) -> None:
        super().__init__(encoder.requires_grad_(False).eval(), decoder)
        self.projector = nn.Sequential(
            nn.Conv2d(decoder.dims, hidden, 1), nn.ReLU(inplace=True), nn.Conv2d(hidden, out, 1)
        )

    def train(self, mode: bool = True) -> PiCoNet:
        """The encoder stays in eval mode."""
        super().train(mode)
        self.encoder.eval()
        return self


class PiCo(Method):
    """PiCo, and Static (Frame) on clips of one frame.

    Args:
        encoder: frozen; default ResNet-50. The paper's has MoCo-v2's weights. Or where to find it, as
            ``hub.load_encoder`` takes it: a run's folder, a file, ``torchvision:resnet50``; of one with a
            decoder the encoder alone. A checkpoint then describes the encoder, and needs that file no more.
        decoder: default :class:`SemanticFPN`.
        hidden: of the projector; 2048 is MoCo-v2's.
        out: length of queries and keys. (MoCo-v2: 128)
        queue: pixel keys. (MoCo-v2: 65,536)
        temperature: τ. (MoCo-v2: 0.2)
        crops: two views of each frame. (Paper: MoCo-v2's)
        lookup: "nearest" cell of the map, the paper's index, or "bilinear".
        places: points of an image where a clip of one frame brings none; ours.
        recipe: the paper's is not known; None: MoCo-v2's.

    Raises:
        UserError: the encoder is not to be found, ``crops`` does not make two crops, ``lookup`` is another
            word, ``places`` is below 1; clips of more frames bring no points; at the start of a fit: the
            queue holds more keys than an epoch brings.
    """

    online: PiCoNet
    target: EMA[PiCoNet]

    def __init__(
        self,
        encoder: Encoder | str | None = None,
        decoder: Decoder | None = None,
        hidden: int = 2048,
        out: int = 128,
        queue: int = 65_536,
        temperature: float = 0.2,
        crops: MultiCrop | None = None,
        lookup: Literal["nearest", "bilinear"] = "nearest",
        places: int = 256,
        recipe: Recipe | None = None,
    ) -> None:
        super().__init__(recipe or RECIPE)
        if lookup not in ("nearest", "bilinear") or places < 1:
            raise UserError(
                f"PiCo: lookup is nearest or bilinear and places at least 1, not {lookup} and {places}"
            )
        encoder = self._found(encoder)
        if isinstance(decoder, SemanticFPN) and decoder.fpn.channels != encoder.channels:
            raise UserError(
                f"model.decoder is for maps of {decoder.fpn.channels}, the encoder has {encoder.channels}: "
                "set decoder.channels to these, or leave model.decoder out"
            )
        self.online = PiCoNet(encoder, decoder or SemanticFPN(encoder.channels), hidden, out)
        self.target = EMA(self.online)
        self.queue = Queue(out, queue)
        self.temperature, self.lookup, self.places = temperature, lookup, places
        self.crops = crops or moco_crops()
        check_two_views(self.crops, encoder, type(self).__name__)

    def _found(self, encoder: Encoder | str | None) -> Encoder:
        """The encoder alone; the method's arguments then describe it as it is."""
        found = load_encoder(encoder) if isinstance(encoder, str) else encoder or ResNet(50)
        found = found.encoder if isinstance(found, DecodedEncoder) else found
        self.init_args["encoder"] = found
        return found

    def losses(self, clip: Clip) -> Losses:
        """The contrast of each point (paper, section 3.1); its keys then join the queue."""
        x_q, x_k, p_q, p_k, weight = self.views(clip)
        with torch.no_grad():
            seen = self.online.encoder(torch.cat([x_q, x_k]))
            of_q, of_k = _split(seen, len(x_q))
            k = self.pixels(self.target.module, of_k, p_k)
        q = self.pixels(self.online, of_q, p_q)
        others = len(k) // len(q)
        q = q.repeat(others, 1, 1).flatten(0, 1)
        loss = info_nce(q, k.flatten(0, 1), self.queue.rows, self.temperature, weight.flatten())
        # clip by clip, so that the order is the same however many processes share the batch
        self.queue.enqueue(k.unflatten(0, (others, -1)).transpose(0, 1).flatten(0, 2))
        return {"pixels": loss}

    def pixels(self, network: PiCoNet, seen: Features, points: Tensor) -> Tensor:
        """Projected pixels ``(N, P, out)`` at ``points (N, P, 2)`` in extent coordinates of the views."""
        maps = network.decoder(seen).last
        if self.lookup == "bilinear":
            return sample(network.projector(maps), points[:, None])[:, :, 0].transpose(1, 2)
        height, width = maps.shape[-2:]
        x, y = ((points + 1) / 2).unbind(-1)
        column = (x * width).floor().long().clamp(0, width - 1)
        row = (y * height).floor().long().clamp(0, height - 1)
        cell = (row * width + column)[:, None].expand(-1, maps.shape[1], -1)
        projected: Tensor = network.projector(maps.flatten(2).gather(2, cell)[..., None])
        return projected[..., 0].transpose(1, 2)

    @torch.no_grad()
    def views(self, clip: Clip) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Images and points of queries and keys.

        Returns:
            Images of queries ``(B, 3, h, w)``, of keys ``(K·B, 3, h, w)`` (K = T − 1 other frames, one after
            the other; of clips of one frame 1), points in the views ``(B, P, 2)`` and ``(K·B, P, 2)``, and
            ``(K·B, P)`` bool: whether both views show the point.
        """
        batch, count = clip.frames.shape[:2]
        points, crops = self.points(clip), self.crops(clip)
        others = range(1, count) if count > 1 else range(1)
        to_clean = crops.large_to_clean.inverse().to(clip.device)
        p_q = to_clean[: batch * count : count](points[:, :, 0])
        second = to_clean[batch * count :]
        p_k = torch.cat([second[t::count](points[:, :, t]) for t in others])
        weight = inside(p_k) & inside(p_q).repeat(len(others), 1)
        p_q, p_k = (self._filled(p, clip, name) for p, name in ((p_q, "query"), (p_k, "key")))
        x_k = torch.cat([crops.large[1, t::count] for t in others])
        return crops.large[0, ::count], x_k, p_q, p_k, weight

    def points(self, clip: Clip) -> Tensor:
        """The clip's own points ``(B, P, T, 2)``; of one frame without any, drawn uniformly.

        Raises:
            UserError: clips of more frames bring no points.
        """
        if clip.points is not None:
            return clip.points
        if clip.frames.shape[1] > 1:
            raise UserError(
                "PiCo needs to know which points of two frames belong together: set data.sampler to "
                "poodle_lightning.data.tracked.TrackedFrames, or take clips of one frame"
            )
        drawn = uniform(fold(clip.key, "places"), 2 * self.places, -1.0, 1.0)
        return drawn.view(len(clip), self.places, 1, 2).to(clip.device, non_blocking=True)

    def _filled(self, points: Tensor, clip: Clip, name: str) -> Tensor:
        """Random places of the view where there is no point in it."""
        rows = len(points) // len(clip)
        keys = torch.cat([fold(clip.key, "filler", name, row) for row in range(rows)])
        drawn = uniform(keys, 2 * points.shape[1], -1.0, 1.0).view(points.shape)
        drawn = drawn.to(points.device, non_blocking=True)
        return torch.where(inside(points)[..., None], points, drawn.to(points.dtype))

    def on_fit_start(self) -> None:
        """Warns of a frozen encoder that has learnt nothing; compares the queue with what an epoch brings."""
        if _is_fresh(self.online.encoder):
            rank_zero_warn(
                "PiCo's encoder is frozen and has fresh weights: give --model.encoder a run, a checkpoint of "
                "MoCo-v2, or torchvision:resnet50"
            )
        sampler = getattr(getattr(self.trainer, "datamodule", None), "sampler", None)
        others = max(1, int(getattr(sampler, "frames", 1)) - 1)
        points = int(getattr(sampler, "points", self.places))
        check_queue(self.trainer, len(self.queue.rows), points * others)

    @torch.no_grad()
    def embed(self, images: Tensor) -> dict[str, Tensor]:
        """Encoder vectors, which stay, and what learns: projections at every cell of the map."""
        seen = self.online.encoder(images)
        projected = self.online.projector(self.online.decoder(seen).last).float()
        return {"encoder": seen.vector.float(), "pixels": projected.permute(0, 2, 3, 1).flatten(0, 2)}

    @torch.no_grad()
    def look(self, clip: Clip) -> Look:
        """The points of a batch, and the query's and the last frame's view."""
        crops, count = self.crops(clip), clip.frames.shape[1]
        large = torch.stack([crops.large[0, ::count], crops.large[1, count - 1 :: count]], dim=1)
        return Look(clip.unit(), large=large, points=self.points(clip))


def _is_fresh(encoder: Encoder) -> bool:
    """Whether no BatchNorm has ever seen a batch; of an encoder without any nothing is said."""
    norms = [part for part in encoder.modules() if isinstance(part, nn.BatchNorm2d)]
    return bool(norms) and not any(norm.running_mean.any() for norm in norms if norm.running_mean is not None)


def _split(seen: Features, rows: int) -> tuple[Features, Features]:
    """Features of the first rows, and of the others."""
    parts = [
        Features({name: x[part] for name, x in seen.maps.items()}, seen.strides)
        for part in (slice(rows), slice(rows, None))
    ]
    return parts[0], parts[1]

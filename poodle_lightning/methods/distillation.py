"""Self-distillation with [CLS] tokens: what DINO, iBOT, AttMask and DoRA share. No paper of its own.

A student learns to say of its views what a teacher, its slowly moving average, says of others. Both end in a
head of K outputs. The teacher's are centred and sharpened, so that neither one output nor all alike wins.

=====================  ==============================================================
in the papers          here
=====================  ==============================================================
g_θ, g_θ'              ``self.student``, ``self.teacher``
global, local views    ``Crops.large`` (V, N, 3, h, w), ``Crops.small`` (L, N, 3, h', w')
C, m                   ``self.centre``, ``centre_momentum``
τ_s, τ_t               ``student_temperature``, ``self.temperature``
=====================  ==============================================================

The N = B·T frames of a batch are images. A method says in ``losses`` who sees which view.

Deviation: stochastic depth is drawn for a batch, from its first key: the same after a restart, but not where
the batch is split otherwise, over devices or accumulated ones. All other draws are each clip's own.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import ClassVar

import torch
from timm.layers import DropPath
from torch import Tensor
from torch.optim import Optimizer

from poodle_lightning.augment.multicrop import Crops, MultiCrop, first_frames
from poodle_lightning.losses.distillation import teacher_probabilities
from poodle_lightning.methods.base import Method
from poodle_lightning.nn.centering import Centre
from poodle_lightning.nn.dino_head import DINOHead, NormedLinear
from poodle_lightning.nn.ema import EMA
from poodle_lightning.nn.encoder import Encoder
from poodle_lightning.nn.online import Online
from poodle_lightning.nn.optim import Recipe
from poodle_lightning.nn.vit import ViT
from poodle_lightning.types import Clip, Look, UserError

RECIPE = Recipe(
    lr=5e-4, min_lr=1e-6, weight_decay=0.04, weight_decay_end=0.4, clip_each=3.0, eps=1e-8,
    warmup_epochs=10.0, warmup_closed=True, horizon_epochs=100.0, scale_lr="linear", reference_batch=256,
)  # fmt: skip
"""DINO's for ViT-S/16 and 100 epochs (README of facebookresearch/dino); the others start from it."""


@dataclass(frozen=True)
class HeadSizes:
    """The projection head; the defaults are DINO's.

    Args:
        hidden: width of its two hidden layers.
        bottleneck: width before the last layer, where rows are brought to length 1.
        out: outputs K.
        norm_last: keeps the gain of the weight-normalised last layer at 1.
        batch_norm: BatchNorm behind the hidden layers. (DINO's convolutional networks)
    """

    hidden: int = 2048
    bottleneck: int = 256
    out: int = 65536
    norm_last: bool = True
    batch_norm: bool = False


class StudentNet(Online):
    """Everything the teacher copies: encoder and head; a last layer of its own for patches, or None."""

    patch_last_layer: NormedLinear | None

    def __init__(self, encoder: Encoder, head: DINOHead) -> None:
        super().__init__(encoder)
        self.head = head
        self.patch_last_layer = None

    def logits(self, images: Tensor) -> Tensor:
        """The head's outputs ``(B, K)`` for the vectors of ``images (B, 3, h, w)``."""
        outputs: Tensor = self.head(self.encoder(images).vector)
        return outputs

    def patch_logits(self, rows: Tensor) -> Tensor:
        """Outputs for patches, from rows of length 1 ``(…, bottleneck)``."""
        outputs: Tensor = (self.patch_last_layer or self.head.logits)(rows)
        return outputs


class SelfDistillation(Method):
    """A student, its teacher, their crops, temperatures and centre; ``losses`` is left to the methods.

    The teacher is what is exported. Its stochastic depth is off, as published.

    Args:
        encoder: default ViT-S/16 with a drop path of 0.1; ResNets work too, by their pooled vector.
        head: sizes of the projection head.
        crops: global and local views.
        student_temperature: τ_s. (DINO: 0.1)
        teacher_temperature: τ_t at epoch 0 and at the end of its warm-up. (DINO: 0.04 to 0.04, or to 0.07)
        teacher_warmup_epochs: over which it rises linearly.
        centre_momentum: m of the centre. (DINO: 0.9)
        freeze_last_epochs: the last layer does not move during so many epochs. (DINO: 1)
        recipe: optimiser and schedules; None: the paper's, ``published``.

    Raises:
        UserError: a crop's side is no multiple of the encoder's patch.
    """

    published: ClassVar[Recipe] = RECIPE
    masks_patches: ClassVar[bool] = False
    online: StudentNet
    target: EMA[StudentNet]

    def __init__(
        self,
        encoder: Encoder | None = None,
        head: HeadSizes | None = None,
        crops: MultiCrop | None = None,
        student_temperature: float = 0.1,
        teacher_temperature: tuple[float, float] = (0.04, 0.04),
        teacher_warmup_epochs: int = 0,
        centre_momentum: float = 0.9,
        freeze_last_epochs: int = 1,
        recipe: Recipe | None = None,
    ) -> None:
        super().__init__(recipe or self.published)
        encoder = encoder or ViT(drop_path=0.1, pos_interp="dino")
        sizes = head or HeadSizes()
        self.crops = crops or MultiCrop()
        if isinstance(encoder, ViT):
            self.crops.check_patch(encoder.patch)
            if encoder.mask_token is not None:  # unused, it would make DDP wait for its gradient
                encoder.mask_token.requires_grad_(self.masks_patches)
        self.online = StudentNet(encoder, DINOHead(encoder.vector_dim, **asdict(sizes)))
        self.start_teacher()
        self.centre = Centre(sizes.out, centre_momentum)
        self.student_temperature = student_temperature
        self.teacher_temperature = teacher_temperature
        self.teacher_warmup_epochs = teacher_warmup_epochs
        self.freeze_last_epochs = freeze_last_epochs

    @property
    def student(self) -> StudentNet:
        """The network that is trained."""
        return self.online

    @property
    def teacher(self) -> StudentNet:
        """Its moving average."""
        return self.target.module

    @property
    def temperature(self) -> float:
        """τ_t of the current epoch."""
        return warmed_up(self.current_epoch, self.teacher_temperature, self.teacher_warmup_epochs)

    # ---- the two networks
    def start_teacher(self) -> None:
        """The teacher is the student as it is now, without its stochastic depth."""
        self.target = EMA(self.online)
        for module in self.target.modules():
            if isinstance(module, DropPath):
                module.drop_prob = 0.0

    def teach(self, logits: Tensor) -> Tensor:
        """The teacher's probabilities for its logits ``(…, K)``; the centre takes their mean down."""
        rows = logits.detach().flatten(0, -2)
        exact = torch.promote_types(rows.dtype, torch.float32)
        self.centre.observe(rows.mean(dim=0, dtype=exact), len(rows))
        return teacher_probabilities(logits, self.centre.value, self.temperature)

    # ---- hooks
    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Takes the last layer's gradients away while it is frozen, so that it does not decay either."""
        super().on_before_optimizer_step(optimizer)
        if self.current_epoch < self.freeze_last_epochs:
            for name, parameter in self.online.named_parameters():
                if "last_layer" in name:
                    parameter.grad = None

    def after_step(self) -> None:
        """Moves the centre, once per optimiser step."""
        self.centre.step()

    # ---- what is kept and shown
    def exported(self) -> tuple[Online, str]:
        """The teacher: it is better than the student all along (DINO, section 5.2)."""
        return self.teacher, "target.module."

    @torch.no_grad()
    def embed(self, images: Tensor) -> dict[str, Tensor]:
        """The student's encoder vectors and its rows before the last layer."""
        vectors = self.student.encoder(images).vector
        return {"encoder": vectors.float(), "bottleneck": self.student.head.project(vectors).float()}

    @torch.no_grad()
    def look(self, clip: Clip) -> Look:
        """The crops of the first frames, as training draws them."""
        return self.show(clip, self.crops(clip))

    def show(self, clip: Clip, crops: Crops) -> Look:
        """The clean frames, and the crops of the first ones."""
        count = clip.times.shape[1]
        small = None if crops.small is None else first_frames(crops.small, count)
        return Look(clip.unit(), large=first_frames(crops.large, count), small=small)


def other_views(losses: Tensor) -> Tensor:
    """Mean of ``losses (U, V)`` over pairs of different views; the student's first U are the teacher's."""
    pairs = losses.numel() - len(losses)
    if not pairs:
        raise UserError("one view alone has no other to predict: set crops.views or crops.locals higher")
    return losses.triu(1).sum() / pairs + losses.tril(-1).sum() / pairs


def warmed_up(epoch: int, ends: tuple[float, float], epochs: int) -> float:
    """``np.linspace(*ends, epochs)[epoch]``, then the second end: the temperature schedule of DINO's code."""
    start, end = ends
    return end if epoch >= epochs else start + (end - start) * epoch / max(epochs - 1, 1)

"""Multi-crop (Caron et al., SwAV, 2020; DINO, 2021): few large crops and many small ones of every frame.

A clip of T frames gives N = B·T images, in rows ``i·T + t``. Whatever is drawn for one of them is a function
of its clip's key, its place t in the clip and the number of the crop, so that how a batch is split changes
nothing.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from poodle_lightning.augment.geometric import ResizedCrop
from poodle_lightning.augment.photometric import Colour
from poodle_lightning.configured import Configured, spec
from poodle_lightning.ops.geometry import Affine, pull_boxes
from poodle_lightning.ops.random import fold
from poodle_lightning.types import Clip, UserError


@dataclass(frozen=True)
class Crops:
    """Crops of N = B·T images, crop by crop.

    Args:
        large: ``(V, N, 3, h, w)`` in [0, 1], float32, contiguous.
        small: ``(L, N, 3, h', w')`` likewise; None: there are none.
        large_to_clean: V·N rows (row ``v·N + n`` is crop v of image n), from a point of the crop to the point
            of the training crop shown there; on the host, whatever the crops' device.
        small_to_clean: the same L·N rows of the small ones, on the host too.
    """

    large: Tensor
    small: Tensor | None
    large_to_clean: Affine
    small_to_clean: Affine | None


class MultiCrop(Configured):
    """Large and small random resized crops in colours of their own. Defaults: DINO's.

    Crops are plain bilinear, of the training crop (the original's resize bicubically, of the image file).

    Args:
        large: of the large crops; None: 224 px, area 0.4–1, flipped half the time.
        small: of the small crops; None: 96 px, area 0.05–0.4, flipped half the time.
        views: large crops of every frame.
        locals: small crops of every frame; 0 for none.
        colours: recipes of the large crops: one of each, one for all, or ``()`` for none. None: DINO's, the
            first always blurred, the others blurred at 0.1 and solarised at 0.2.
        local_colour: recipe of the small crops; None: DINO's, blurred at 0.5.
        clip_wide: one geometry of each large crop for all frames of a clip, as objects are followed in it
            (DoRA); otherwise every frame has its own. Small crops and colours are always each frame's own.

    Raises:
        ValueError: no view, fewer than no small crops, or a number of recipes that fits no views.
    """

    def __init__(
        self,
        large: ResizedCrop | None = None,
        small: ResizedCrop | None = None,
        views: int = 2,
        locals: int = 8,
        colours: tuple[Colour, ...] | None = None,
        local_colour: Colour | None = None,
        clip_wide: bool = True,
    ) -> None:
        if views < 1 or locals < 0:
            raise ValueError(f"MultiCrop needs views >= 1 and locals >= 0, not {views} and {locals}")
        if colours is None:
            colours = (_dino(blur=1.0), *[_dino(blur=0.1, solarize=0.2)] * (views - 1))
        if len(colours) not in (0, 1, views):
            raise ValueError(
                f"MultiCrop has {len(colours)} colours for {views} views: give one of each, one or none"
            )
        self.large = large or ResizedCrop(area=(0.4, 1.0), fit="redraw")
        self.small = small or ResizedCrop((96, 96), (0.05, 0.4), fit="redraw")
        self.views = views
        self.locals = locals
        self.colours = tuple(colours) * views if len(colours) == 1 else tuple(colours)
        self.local_colour = local_colour or _dino(blur=0.5)
        self.clip_wide = clip_wide

    def check_patch(self, patch: int) -> None:
        """Checks that a vision transformer can take the crops.

        Args:
            patch: side of its patches in pixels.

        Raises:
            UserError: a side is no multiple of the patch.
        """
        sizes = {"large": self.large.size} | ({"small": self.small.size} if self.locals else {})
        for name, size in sizes.items():
            if any(side % patch for side in size):
                raise UserError(
                    f"crops.{name}.size={list(size)} does not divide into the encoder's patches of {patch} "
                    f"pixels: choose multiples of {patch}, or another encoder.patch"
                )

    @torch.no_grad()
    def __call__(self, clip: Clip) -> Crops:
        """All crops of all frames: one sampling per resolution, one pass of colour per recipe."""
        images, count = clip.unit().flatten(0, 1), clip.frames.shape[1]
        frames = torch.stack([fold(clip.key, "frame", t) for t in range(count)], dim=1).flatten()
        clips = clip.key.repeat_interleave(count) if self.clip_wide else frames
        aspect = None if clip.aspect is None else clip.aspect.repeat_interleave(count)
        large, to_clean = _cut(images, self.large, _numbered(clips, "large crop", self.views), aspect)
        large = _coloured(large, _numbered(frames, "large colour", self.views), self.colours)
        if not self.locals:
            return Crops(large, None, to_clean, None)
        keys = _numbered(frames, "small crop", self.locals)
        small, small_to_clean = _cut(images, self.small, keys, aspect)
        recipes = [self.local_colour] * self.locals
        small = _coloured(small, _numbered(frames, "small colour", self.locals), recipes)
        return Crops(large, small, to_clean, small_to_clean)


def crop_keys(clip: Clip, name: str, count: int) -> Tensor:
    """Keys of ``count`` crops of every frame, in the crops' order ``(count, B, T)``, on the host."""
    frames = range(clip.times.shape[1])
    keys = [torch.stack([fold(clip.key, name, crop, t) for t in frames], dim=1) for crop in range(count)]
    return torch.stack(keys)


def first_frames(views: Tensor, count: int) -> Tensor:
    """Of views ``(V, B·T, …)`` of clips of ``count`` frames those of the first frames, ``(B, V, …)``."""
    return views[:, ::count].transpose(0, 1)


def _dino(blur: float, solarize: float = 0.0) -> Colour:
    """What DINO's recipes share (facebookresearch/dino ``main_dino.py``, ``DataAugmentationDINO``)."""
    return Colour(0.4, 0.4, 0.2, 0.1, 0.8, 0.2, blur, (0.1, 2.0), solarize)


def _numbered(keys: Tensor, name: str, count: int) -> Tensor:
    """Keys of ``count`` crops of the images ``(N,)``: ``(count, N)``."""
    return torch.stack([fold(keys, name, number) for number in range(count)])


def _cut(images: Tensor, crop: ResizedCrop, keys: Tensor, aspect: Tensor | None) -> tuple[Tensor, Affine]:
    """Crops ``(K, N, 3, h, w)`` of ``images (N, 3, H, W)`` and their K·N maps, the latter on the host."""
    number = len(keys)
    shape = None if aspect is None else aspect.repeat(number)
    to_clean = crop.draw(keys.flatten(), (images.shape[-2], images.shape[-1]), shape)
    matrices = to_clean.matrix.unflatten(0, (number, -1)).transpose(0, 1)
    pixels, _ = pull_boxes(images, Affine(matrices.flatten(0, 1)).to(images.device), crop.size)
    return pixels.unflatten(0, (len(images), number)).transpose(0, 1), to_clean


def _coloured(pixels: Tensor, keys: Tensor, recipes: Sequence[Colour]) -> Tensor:
    """Crops ``(K, N, 3, h, w)`` recoloured from keys ``(K, N)``; crops of equal recipes go together."""
    together: dict[str, list[int]] = {}
    for number, recipe in enumerate(recipes):
        together.setdefault(json.dumps(spec(recipe)), []).append(number)
    done = list(pixels.unbind(0))
    for numbers in together.values():
        rows = torch.stack([done[number] for number in numbers]).flatten(0, 1)
        coloured = recipes[numbers[0]](rows, keys[numbers].flatten()).unflatten(0, (len(numbers), -1))
        if len(numbers) == len(done):
            return coloured
        for number, part in zip(numbers, coloured, strict=True):
            done[number] = part
    return torch.stack(done)

"""What one opened video gave, and how clips become a batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from poodle_lightning.data.windows import Rect
from poodle_lightning.ops.geometry import Affine, Size
from poodle_lightning.ops.planes import planes_size, planes_to_rgb, split_planes
from poodle_lightning.types import IGNORE, Clip, Skip


@dataclass(frozen=True)
class Item:
    """One clip before it is put in a batch.

    Args:
        frames: ``(T, 3, h, w)`` uint8 RGB; or, with ``yuv``, ``(T, h·3/2, w)`` uint8 planes (see ``Clip``).
        window: the crop in ``frames``, ``(x0, y0, x1, y1)``, pixel edges.
        times: T seconds from the start of the video.
        index: number of the item.
        key: ``()`` int64.
        flow: optional ``(2, 2, h, w)`` float32, px of ``frames``.
        labels: optional ``(T, h, w)`` uint8.
        yuv: optional ``(3, 4)`` float32, from the planes to RGB.
        aspect: width over height of what the window shows, where the crop squeezes it; else None.
        points: optional ``(P, T, 2)`` float32, extent coordinates of the window; NaN where none is.
    """

    frames: Tensor
    window: Rect
    times: Sequence[float]
    index: int
    key: Tensor
    flow: Tensor | None = None
    labels: Tensor | None = None
    yuv: Tensor | None = None
    aspect: float | None = None
    points: Tensor | None = None

    @property
    def size(self) -> Size:
        """Height and width of the stored pixels."""
        if self.yuv is not None:
            return planes_size(self.frames.shape)
        return self.frames.shape[-2], self.frames.shape[-1]


@dataclass(frozen=True)
class Group:
    """The clips of one opened video, and what was tried before it; without clips when all tries failed."""

    items: tuple[Item, ...]
    skipped: tuple[Skip, ...] = ()


@dataclass(frozen=True)
class Exhausted:
    """What a worker hands over instead of a batch when one request after the other failed."""

    skipped: tuple[Skip, ...]


def collate(groups: Sequence[Group], size: Size) -> Clip | Exhausted:
    """A batch: the clips of all groups one after the other, padded at the right and bottom to the largest.

    Padding repeats the border, so that sampling at a frame's border reads what clamping would. Planes stay
    planes if all clips are; otherwise they become RGB here, on the host.

    Args:
        groups: of one batch.
        size: height and width of the training crop, px.
    """
    skipped = tuple(skip for group in groups for skip in group.skipped)
    if any(not group.items for group in groups):
        return Exhausted(skipped)
    items = [item for group in groups for item in group.items]
    if any(item.yuv is None for item in items):
        items = [_as_rgb(item) for item in items]
    height, width = (max(item.size[axis] for item in items) for axis in (0, 1))
    whole = torch.tensor([2.0 / width, 2.0 / height] * 2, dtype=torch.float64)
    boxes = torch.tensor([item.window for item in items], dtype=torch.float64) * whole - 1.0
    flow, labels = [item.flow for item in items], [item.labels for item in items]
    return Clip(
        frames=_frames(items, height, width),
        window=Affine(Affine.box(boxes).matrix.float()),
        size=size,
        times=torch.tensor([list(item.times) for item in items], dtype=torch.float64),
        index=torch.tensor([item.index for item in items], dtype=torch.int64),
        key=torch.stack([item.key for item in items]),
        flow=_stacked(flow, (2, 2, height, width), torch.nan, torch.float32),
        present=_present(flow),
        points=_points(items),
        labels=_stacked(labels, (len(items[0].times), height, width), IGNORE, torch.uint8),
        skipped=skipped,
        yuv=_matrices(items),
        aspect=_aspects(items),
    )


def _as_rgb(item: Item) -> Item:
    """A clip of planes as RGB: a batch holds one kind."""
    if item.yuv is None:
        return item
    return replace(item, frames=planes_to_rgb(item.frames[None], item.yuv[None])[0].byte(), yuv=None)


def _frames(items: Sequence[Item], height: int, width: int) -> Tensor:
    """Frames of one kind, each copied once into the batch."""
    count = len(items[0].frames)
    shape = (3, height, width) if items[0].yuv is None else (height * 3 // 2, width)
    batch = torch.empty((len(items), count, *shape), dtype=torch.uint8)
    for row, item in zip(batch, items, strict=True):
        if item.yuv is None:
            _lay(row, item.frames)
        else:
            for target, source in zip(split_planes(row), split_planes(item.frames), strict=True):
                _lay(target, source)
    return batch


def _lay(target: Tensor, source: Tensor) -> None:
    """Copy ``(..., h, w)`` into a larger tensor and repeat its border to the right and below."""
    height, width = source.shape[-2:]
    target[..., :height, :width] = source
    target[..., :height, width:] = source[..., -1:]
    target[..., height:, :] = target[..., height - 1 : height, :]


def _matrices(items: Sequence[Item]) -> Tensor | None:
    matrices = [item.yuv for item in items if item.yuv is not None]
    return torch.stack(matrices) if matrices else None


def _aspects(items: Sequence[Item]) -> Tensor | None:
    """True shapes, ``(B,)`` float32; all clips of a batch are squeezed, or none is."""
    aspects = [item.aspect for item in items if item.aspect is not None]
    return torch.tensor(aspects) if aspects else None


def _points(items: Sequence[Item]) -> Tensor | None:
    """Points of all clips; all have as many rows, or none has any."""
    points = [item.points for item in items if item.points is not None]
    return torch.stack(points) if points else None


def _stacked(
    rows: Sequence[Tensor | None], shape: tuple[int, ...], missing: float, dtype: torch.dtype
) -> Tensor | None:
    if all(row is None for row in rows):
        return None
    fill = torch.full(shape, missing, dtype=dtype)
    return torch.stack([fill if row is None else _padded(row, *shape[-2:]) for row in rows])


def _present(rows: Sequence[Tensor | None]) -> Tensor | None:
    """Which directions of which clips have flow, ``(B, 2)`` bool: a sum is finite if its terms are."""
    if all(row is None for row in rows):
        return None
    missing = torch.zeros(2, dtype=torch.bool)
    return torch.stack([missing if row is None else row.sum((1, 2, 3)).isfinite() for row in rows])


def _padded(x: Tensor, height: int, width: int) -> Tensor:
    """``(A, B, h, w)`` or ``(A, h, w)`` padded at the right and bottom by repeating the border."""
    if x.shape[-2:] == (height, width):
        return x
    target = x.new_empty((*x.shape[:-2], height, width))
    _lay(target, x)
    return target

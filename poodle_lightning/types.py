"""The types that flow through the package: clips in, views in between, features out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from poodle_lightning.ops.geometry import Affine, Flow, Size, extent_to_pixels, pixel_grid, pull
from poodle_lightning.ops.planes import planes_size, planes_to_rgb

Losses = dict[str, Tensor]

IGNORE = 255
"""The label of pixels that take no part in any loss or score."""

# What the host needs to decide or to log stays on the host: moving it would only force reads back.
_HOST_FIELDS = ("times", "index", "key", "present", "aspect")


class UserError(Exception):
    """Something the user can mend, said in one line: what happened, which file or key, what to do.

    The command line prints it without a traceback and exits with 2.
    """


@dataclass(frozen=True)
class Skip:
    """A video that could not be used, and why.

    Args:
        path: the file.
        reason: a short stable word, e.g. ``"corrupt"``, ``"too_short"``, ``"not_a_video"``.
        detail: one line for a person.
        time: seconds into the video at which it failed, if known.
    """

    path: str
    reason: str
    detail: str
    time: float | None = None


@dataclass(frozen=True)
class Clip:
    """Frames of one moment of a video, for a batch. T = 2 is a pair.

    Args:
        frames: ``(B, T, 3, H, W)`` uint8 RGB, raw crops with a 1 px margin, padded at the right and bottom
            to the batch's largest; or, with ``yuv``, ``(B, T, H·3/2, W)`` uint8, the same as YUV 4:2:0: H
            rows of Y, then (H/2)·(W/2) values of U, then of V (I420; H and W are even).
        window: batch B; from a point of the training crop to the point of ``frames``. Resize and crop are
            this one map, sampled once on the device.
        size: height and width of the training crop in pixels.
        times: ``(B, T)`` float64, seconds from the start of the video; stays on the host.
        index: ``(B,)`` int64, which item of the data set; stays on the host.
        key: ``(B,)`` int64, the item's random key = f(seed, epoch, index); stays on the host.
        flow: optional ``(B, 2, 2, H, W)`` float32: ``[:, 0]`` first frame → second, ``[:, 1]`` back, in
            pixels of ``frames``. A row of NaN is missing and is filled by the estimator.
        present: optional ``(B, 2)`` bool, which rows of ``flow`` are there; stays on the host, so that
            nothing need be read back from a device to know it. None: the flow itself is looked at.
        points: optional ``(B, P, T, 2)`` float32, places of P points in the frames, in extent coordinates of
            the training crop; NaN where a point is not seen.
        labels: optional ``(B, T, H, W)`` uint8 in pixels of ``frames``; 255 = ignore.
        skipped: videos that were tried for this batch and replaced; stays on the host.
        yuv: optional ``(B, 3, 4)`` float32: the frames are planes, and this takes their (Y, U, V, 1) in bytes
            to RGB in 0…255. None: the frames are RGB.
        aspect: optional ``(B,)`` float32, true width over height of what the training crop shows, where that
            is not ``size``'s own: whole images of any shape are squeezed to ``size``. Crops drawn from it
            take their shape from this. Stays on the host. None: that of ``size``.

    Raises:
        ValueError: shapes do not agree.
        TypeError: frames are not uint8, or ``yuv`` is not float32.
    """

    frames: Tensor
    window: Affine
    size: Size
    times: Tensor
    index: Tensor
    key: Tensor
    flow: Tensor | None = None
    present: Tensor | None = None
    points: Tensor | None = None
    labels: Tensor | None = None
    skipped: tuple[Skip, ...] = ()
    yuv: Tensor | None = None
    aspect: Tensor | None = None

    def __post_init__(self) -> None:
        self._check_frames()
        batch, count = self.frames.shape[:2]
        if self.times.shape != (batch, count):
            raise ValueError(f"Clip.times must be ({batch}, {count}), not {tuple(self.times.shape)}")
        for name, length in (
            ("window", len(self.window)),
            ("index", len(self.index)),
            ("key", len(self.key)),
        ):
            if length != batch:
                raise ValueError(f"Clip.{name} has {length} rows for {batch} clips")
        for name, given, shape in (
            ("flow", self.flow, (batch, 2, 2, *self.pixels)),
            ("present", self.present, (batch, 2)),
            ("labels", self.labels, (batch, count, *self.pixels)),
            ("yuv", self.yuv, (batch, 3, 4)),
            ("aspect", self.aspect, (batch,)),
        ):
            if given is not None and given.shape != shape:
                raise ValueError(f"Clip.{name} must be {shape}, not {tuple(given.shape)}")
        if (points := self.points) is not None and points.shape != (batch, points.shape[1], count, 2):
            raise ValueError(f"Clip.points must be ({batch}, P, {count}, 2), not {tuple(points.shape)}")

    def _check_frames(self) -> None:
        shape = tuple(self.frames.shape)
        if self.yuv is None:
            if len(shape) != 5 or shape[2] != 3:
                raise ValueError(f"Clip.frames must be (B, T, 3, H, W), not {shape}")
        elif len(shape) != 4 or shape[2] % 3 or shape[3] % 2 or not min(shape[2:]):
            raise ValueError(f"Clip.frames with Clip.yuv must be (B, T, H·3/2, W), H and W even, not {shape}")
        elif self.yuv.dtype != torch.float32:
            raise TypeError(f"Clip.yuv must be float32, not {self.yuv.dtype}")
        if self.frames.dtype != torch.uint8:
            raise TypeError(f"Clip.frames must be uint8, not {self.frames.dtype}")

    def __len__(self) -> int:
        return self.frames.shape[0]

    @property
    def device(self) -> torch.device:
        """Where the frames are."""
        return self.frames.device

    @property
    def pixels(self) -> Size:
        """Height and width of the stored pixels, whether they are RGB or planes."""
        if self.yuv is not None:
            return planes_size(self.frames.shape)
        return self.frames.shape[-2], self.frames.shape[-1]

    def unit(self) -> Tensor:
        """The training crops in [0, 1], ``(B, T, 3, *size)`` float32: one sampling of the raw pixels.

        Planes are made into RGB first, on the device, rounded as bytes of RGB are: both forms of a clip
        differ by at most one level (two in a few of a million pixels) before they are sampled, where FFmpeg's
        converter rounds otherwise.
        """
        batch, count = self.frames.shape[:2]
        window = Affine(self.window.matrix.repeat_interleave(count, dim=0))
        raw = self.frames if self.yuv is None else planes_to_rgb(self.frames, self.yuv)
        crops, _ = pull(raw.flatten(0, 1), window, self.size)
        return (crops / 255.0).unflatten(0, (batch, count))

    def unit_labels(self) -> Tensor | None:
        """The labels of the training crops by nearest neighbour, ``(B, T, *size)`` uint8, or None."""
        if self.labels is None:
            return None
        batch, count, height, width = self.labels.shape
        grid = self.window(pixel_grid(self.size, self.device).expand(batch, *self.size, 2))
        x, y = extent_to_pixels(grid, (height, width)).round().long().unbind(-1)
        x, y = x.clamp(0, width - 1), y.clamp(0, height - 1)
        rows = torch.arange(batch, device=self.device).reshape(-1, 1, 1, 1)
        times = torch.arange(count, device=self.device).reshape(1, -1, 1, 1)
        return self.labels[rows, times, y[:, None], x[:, None]]

    def given_flow(self) -> tuple[Flow, Tensor] | None:
        """The clip's own flow inside the training crop, both ways (2B), and which rows it has (2B) bool."""
        if self.flow is None:
            return None
        both = torch.cat([self.flow[:, 0], self.flow[:, 1]])
        known = self.present
        present = both.isfinite().flatten(1).all(dim=1) if known is None else known.t().flatten()
        window = Affine(self.window.matrix.repeat(2, 1, 1))
        return Flow.from_pixels(both.nan_to_num(0.0)).through(window, self.size), present

    def __getitem__(self, rows: slice) -> Clip:
        """Some of the clips; what was skipped stays with the whole."""
        parts = {part.name: getattr(self, part.name) for part in fields(self)}
        kept: dict[str, Any] = {
            name: value[rows] for name, value in parts.items() if isinstance(value, Tensor | Affine)
        }
        return replace(self, **kept, skipped=())

    def to(self, device: torch.device | str, non_blocking: bool | None = None) -> Clip:
        """Moved to a device (to CUDA without waiting); times, index and keys stay on the host."""
        on = torch.device(device).type == "cuda" if non_blocking is None else non_blocking
        return self._each(lambda x: x.to(device=device, non_blocking=on))

    def pin_memory(self) -> Clip:
        """With its tensors in page-locked memory, so that the copy to the device does not block."""
        return self._each(lambda x: x.pin_memory())

    def _each(self, act: Any) -> Clip:
        changed: dict[str, Any] = {"window": Affine(act(self.window.matrix))}
        for part in fields(self):
            value = getattr(self, part.name)
            if isinstance(value, Tensor) and part.name not in _HOST_FIELDS:
                changed[part.name] = act(value)
        return replace(self, **changed)


@dataclass(frozen=True)
class ClassSet:
    """The classes of a labelled data set.

    Args:
        names: in the order of the label values 0, 1, …
        groups: group name → names of its classes.

    Raises:
        ValueError: a group names a class that does not exist.
    """

    names: tuple[str, ...]
    groups: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for group, members in self.groups.items():
            if strange := sorted(set(members) - set(self.names)):
                raise ValueError(f"group {group!r} names classes that do not exist: {', '.join(strange)}")

    def __len__(self) -> int:
        return len(self.names)

    def indices(self, group: str) -> list[int]:
        """Label values of a group's classes."""
        return [self.names.index(name) for name in self.groups[group]]

    def numbered(self) -> dict[str, list[int]]:
        """Group name → label values of its classes."""
        return {group: self.indices(group) for group in self.groups}


@dataclass(frozen=True)
class LabelledBatch:
    """Images with a class per pixel.

    Args:
        images: ``(B, 3, H, W)`` uint8 RGB.
        labels: ``(B, h, w)`` uint8 label values, 255 = ignore. In training ``(h, w) = (H, W)``; in evaluation
            the labels keep the resolution of their file, to which predictions are resized, whatever the
            size at which the network sees the image.
        index: ``(B,)`` int64, place in the split; stays on the host.
        key: ``(B,)`` int64, the item's random key = f(seed, epoch, index); stays on the host.
        names: of the image files, for messages and pictures; stays on the host.

    Raises:
        ValueError: shapes do not agree.
        TypeError: images or labels are not uint8.
    """

    images: Tensor
    labels: Tensor
    index: Tensor
    key: Tensor
    names: tuple[str, ...]

    def __post_init__(self) -> None:
        if self.images.ndim != 4 or self.images.shape[1] != 3:
            raise ValueError(f"LabelledBatch.images must be (B, 3, H, W), not {tuple(self.images.shape)}")
        if self.labels.ndim != 3:
            raise ValueError(f"LabelledBatch.labels must be (B, h, w), not {tuple(self.labels.shape)}")
        if self.images.dtype != torch.uint8 or self.labels.dtype != torch.uint8:
            kinds = f"{self.images.dtype} and {self.labels.dtype}"
            raise TypeError(f"LabelledBatch needs uint8 images and labels, not {kinds}")
        lengths = {len(part) for part in (self.images, self.labels, self.index, self.key, self.names)}
        if len(lengths) != 1:
            raise ValueError(f"LabelledBatch has parts of different lengths: {sorted(lengths)}")

    def __len__(self) -> int:
        return len(self.images)

    def unit(self) -> Tensor:
        """The images in [0, 1], ``(B, 3, H, W)`` float32."""
        return self.images.float() / 255.0

    def to(self, device: torch.device | str, non_blocking: bool | None = None) -> LabelledBatch:
        """Moved to a device (to CUDA without waiting); index, key and names stay on the host."""
        on = torch.device(device).type == "cuda" if non_blocking is None else non_blocking
        images, labels = (part.to(device, non_blocking=on) for part in (self.images, self.labels))
        return replace(self, images=images, labels=labels)

    def pin_memory(self) -> LabelledBatch:
        """With its tensors in page-locked memory, so that the copy to the device does not block."""
        return replace(self, images=self.images.pin_memory(), labels=self.labels.pin_memory())


@dataclass(frozen=True)
class View:
    """An augmented image that carries its own geometry.

    Args:
        image: ``(B, 3, h, w)`` in [0, 1].
        to_clean: from a point of the view to the point of the clean crop shown there.
    """

    image: Tensor
    to_clean: Affine


@dataclass(frozen=True)
class Objects:
    """Objects found in the first frame of N clips and followed over T frames, on a grid of patches.

    Args:
        frames: ``(N, T, 3, H, W)`` in [0, 1], the crops in which they were found.
        heads: ``(N, heads, h, w)`` attention of [CLS] to the patches of the first frame, all heads.
        chosen: numbers of the k heads that became objects.
        raw: ``(N, T, k, h, w)`` cross-attention of the objects as the heads give them; rows sum to 1.
        tracks: ``(N, T, k, h, w)`` the same of the refined objects.
        masks: ``(N, T, k, h, w)`` what the student's images are multiplied with.
    """

    frames: Tensor
    heads: Tensor
    chosen: tuple[int, ...]
    raw: Tensor
    tracks: Tensor
    masks: Tensor


@dataclass(frozen=True)
class Look:
    """What there is to see of one batch; everything a method does not have is None.

    Args:
        frames: ``(N, T, 3, H, W)`` clean crops in [0, 1]; T = 2 where there is a flow.
        flow: 2N rows, first → second frame, then back.
        visible: ``(2N, H, W)`` bool.
        views: the online view of the 2N frames and the target view of their partners.
        boxes: online and target subcrop boxes, 2N·K rows (row ``i·K + k``).
        crops: the crops themselves, ``(2N·K, 3, h, w)`` each.
        same: ``(2N·K,)`` bool, pairs whose two boxes lie in the same frame.
        large: ``(N, V, 3, h, w)`` large crops as the networks see them, of the first frame or of any.
        small: ``(N, L, 3, h, w)`` local crops of the first frame.
        hidden: ``(N, V, h, w)`` bool, patches of the global crops that are masked.
        restored: ``(N, V, 3, h, w)`` the global crops with their masked patches as predicted.
        objects: objects found and followed.
        points: ``(N, P, T, 2)`` points that belong together, in extent coordinates of ``frames``; NaN = lost.
        pooling: layer → ``(N, V, h, w)``, the weights with which each of ``large`` is pooled; they sum to 1.
    """

    frames: Tensor
    flow: Flow | None = None
    visible: Tensor | None = None
    views: tuple[View, View] | None = None
    boxes: tuple[Affine, Affine] | None = None
    crops: tuple[Tensor, Tensor] | None = None
    same: Tensor | None = None
    large: Tensor | None = None
    small: Tensor | None = None
    hidden: Tensor | None = None
    restored: Tensor | None = None
    objects: Objects | None = None
    points: Tensor | None = None
    pooling: Mapping[str, Tensor] | None = None


@dataclass(frozen=True)
class Features:
    """What an encoder or a decoder returns.

    Args:
        maps: ``{layer: (B, C, h, w)}`` from shallow to deep.
        strides: ``{layer: int}``, input pixels per cell.
        vector: ``(B, D)`` pooled, or None.
        attention: optional ``(B, heads, N, N)``.
        queries: optional ``(B, heads, N, d)``.
        keys: optional ``(B, heads, N, d)``.
    """

    maps: dict[str, Tensor]
    strides: dict[str, int]
    vector: Tensor | None = None
    attention: Tensor | None = None
    queries: Tensor | None = None
    keys: Tensor | None = None

    @property
    def last(self) -> Tensor:
        """The deepest map."""
        return self.maps[next(reversed(self.maps))]


@runtime_checkable
class FlowEstimator(Protocol):
    """Estimates the motion between the two frames of each pair, both ways."""

    def __call__(self, clip: Clip, clean: Tensor) -> Flow:
        """Flow of ``clean (N, 2, 3, H, W)`` in [0, 1].

        Returns:
            2N rows: first → second frame of every pair, then second → first; on the grid of ``clean``.
        """
        ...

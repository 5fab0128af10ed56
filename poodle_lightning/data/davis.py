"""DAVIS 2017: short videos with a mask of every object in every frame.

::

    root/ImageSets/2017/val.txt                    names of sequences, one a line
    root/JPEGImages/480p/<sequence>/00000.jpg …
    root/Annotations/480p/<sequence>/00000.png …   palette images; the index is the object, 0 is background

One sequence is one batch. An object is an id of the first mask; 255 is background, as the official evaluation
has it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import cv2
import lightning as L
import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from poodle_lightning.data.label_files import Array, Codes, image_size, mask_size, read_image, read_mask
from poodle_lightning.data.order import ClipLoader, Order, Request, RequestSampler
from poodle_lightning.data.video import HELD_OUT_EPOCH
from poodle_lightning.types import UserError

_CODES = replace(Codes.plain(255, kind="palette"), meaning="numbers of objects")
_COUNTED = 3  # the first and the last frame of a sequence are not scored


@dataclass(frozen=True)
class MaskedVideo:
    """One sequence with its masks.

    Args:
        frames: ``(T, 3, H, W)`` uint8 RGB, as the network sees them.
        masks: ``(T, h, w)`` uint8 ids at the size of the files, 0 = background; stays on the host.
        objects: how many; their ids are 1 … ``objects``.
        index: place in the list of sequences.
        name: of the sequence.
        stems: names of the masks' files without their ending.
        palette: ``(256, 3)`` uint8, colours of the ids; stays on the host.
    """

    frames: Tensor
    masks: Tensor
    objects: int
    index: int
    name: str
    stems: tuple[str, ...]
    palette: Tensor

    def __len__(self) -> int:
        return len(self.frames)

    def to(self, device: torch.device | str, non_blocking: bool | None = None) -> MaskedVideo:
        """Moved to a device (to CUDA without waiting); all but the frames stays on the host."""
        on = torch.device(device).type == "cuda" if non_blocking is None else non_blocking
        return replace(self, frames=self.frames.to(device, non_blocking=on))

    def pin_memory(self) -> MaskedVideo:
        """With its frames in page-locked memory, so that the copy to the device does not block."""
        return replace(self, frames=self.frames.pin_memory())


@dataclass(frozen=True)
class FrameView:
    """At which size a network sees a frame; the defaults are DINO's ``eval_video_segmentation.py``.

    Args:
        short_side: px; None leaves a frame as it is.
        multiple: the long side is rounded down to a multiple of it (DINO: 854×480 to 832×480). 1: to the
            nearest pixel (VFS).
    """

    short_side: int | None = 480
    multiple: int = 64

    def __post_init__(self) -> None:
        if self.multiple < 1 or (self.short_side is not None and self.short_side < self.multiple):
            raise UserError(
                f"view: short_side {self.short_side} must be at least multiple, {self.multiple}, and that 1"
            )

    def size(self, height: int, width: int) -> tuple[int, int]:
        """Height and width of what is shown of a frame of this height and width."""
        if self.short_side is None:
            return height, width
        exact = self.short_side * max(height, width) / min(height, width)
        long = int(exact + 0.5) if self.multiple == 1 else int(exact // self.multiple) * self.multiple
        return (long, self.short_side) if height > width else (self.short_side, long)

    def __call__(self, frame: Array) -> Array:
        """A frame ``(h, w, 3)`` uint8, bilinear as OpenCV has it (no averaging), as both projects do."""
        height, width = self.size(frame.shape[0], frame.shape[1])
        if (height, width) == frame.shape[:2]:
            return frame
        shown: Array = cv2.resize(frame, (width, height), interpolation=cv2.INTER_LINEAR)
        return shown


class DavisDataModule(L.LightningDataModule):
    """Sequences of DAVIS 2017, each a batch of its own and each exactly once over all devices.

    Args:
        root: the folder with ``JPEGImages``, or the one above ``DAVIS``.
        view: at which size a network sees the frames.
        split: which list of sequences.
        resolution: name of the folders in ``JPEGImages`` and ``Annotations``.
        sequences: only these of the list, in this order; None takes all.
        num_workers: processes that read frames.

    Raises:
        UserError: a setting is out of range, or the list of sequences is not there or lacks one of them, or
            a sequence is named twice.
    """

    def __init__(
        self,
        root: str | None = None,
        *,
        view: FrameView | None = None,
        split: Literal["val", "train"] = "val",
        resolution: str = "480p",
        sequences: list[str] | None = None,
        num_workers: int = 2,
    ) -> None:
        super().__init__()
        if root is None:
            raise UserError("DAVIS needs a folder: give --data.root, the one that holds JPEGImages")
        if num_workers < 0:
            raise UserError("data: num_workers must be at least 0")
        inner = Path(root, "DAVIS")
        self.root = inner if inner.is_dir() else Path(root)
        self.view, self.num_workers, self.resolution = view or FrameView(), num_workers, resolution
        self.sequences = _listed(self.root / "ImageSets" / "2017" / f"{split}.txt", sequences)
        self._files: list[list[tuple[Path, Path]]] = []

    def setup(self, stage: str | None = None) -> None:
        """List frames and masks and compare their sizes, from the headers alone.

        Raises:
            UserError: a sequence, a frame or a mask is missing, or sizes differ within a sequence.
        """
        if not self._files:
            self._files = [self._pairs(name) for name in self.sequences]

    def _pairs(self, name: str) -> list[tuple[Path, Path]]:
        """Frames of a sequence and their masks, in order of their names."""
        folder, masks = (self.root / part / self.resolution / name for part in ("JPEGImages", "Annotations"))
        frames = sorted(folder.glob("*.jpg"))
        if not frames:
            raise UserError(f"{folder}: no frames (*.jpg) of the sequence {name}, which the list names")
        pairs = [(frame, masks / f"{frame.stem}.png") for frame in frames]
        missing = [mask for _, mask in pairs if not mask.is_file()]
        if missing and missing[0] == pairs[0][1]:
            raise UserError(f"{missing[0]}: no such file: without a first mask nothing can be followed")
        if missing:
            raise UserError(
                f"{missing[0]}: no such file ({len(missing)} of {len(pairs)} masks are missing): a sequence"
                " is scored by the masks of all its frames"
            )
        if len(pairs) < _COUNTED:
            raise UserError(f"{folder}: {len(pairs)} frames; the first and the last do not count: give more")
        first = mask_size(pairs[0][1])
        for frame, mask in pairs:
            for path, (height, width) in ((mask, mask_size(mask)), (frame, image_size(frame, first))):
                if (height, width) != first:
                    raise UserError(
                        f"{path}: {width}×{height} px, but the first mask of {name} is {first[1]}×{first[0]}"
                        " px: all frames and masks of a sequence need one size"
                    )
        return pairs

    def read(self, index: int) -> MaskedVideo:
        """One sequence.

        Raises:
            UserError: a file is damaged, or the first mask shows no object.
        """
        self.setup()
        pairs = self._files[index]
        labels = [_ids(mask) for _, mask in pairs]
        objects = int(labels[0].max())
        if not objects:
            raise UserError(f"{pairs[0][1]}: shows no object: there is nothing to follow")
        frames = [self.view(read_image(frame, labels[0].shape)).transpose(2, 0, 1) for frame, _ in pairs]
        return MaskedVideo(
            frames=torch.from_numpy(np.stack(frames)),
            masks=torch.from_numpy(np.stack(labels)),
            objects=objects,
            index=index,
            name=self.sequences[index],
            stems=tuple(mask.stem for _, mask in pairs),
            palette=torch.from_numpy(_palette(pairs[0][1])),
        )

    def val_dataloader(self) -> ClipLoader:
        """Every sequence exactly once over all devices.

        Raises:
            UserError: there are more devices than sequences.
        """
        self.setup()
        total = len(self.sequences)
        world, rank = (1, 0) if self.trainer is None else (self.trainer.world_size, self.trainer.global_rank)
        if total < world:
            raise UserError(
                f"{self.root}: {total} sequences for {world} devices: use at most {total} devices"
            )
        order = Order(total, 1, total, world, shuffle=False)
        return ClipLoader(
            _Sequences(self, order),
            batch_size=1,
            sampler=RequestSampler(order, rank, HELD_OUT_EPOCH),
            collate_fn=_the_one,
            num_workers=self.num_workers,
            # a sequence is large: one in hand per process is enough
            prefetch_factor=1 if self.num_workers else None,
            persistent_workers=False,
        )


class _Sequences(Dataset[MaskedVideo]):
    def __init__(self, data: DavisDataModule, order: Order) -> None:
        self.read, self.order = data.read, order

    def __len__(self) -> int:
        return self.order.length

    def __getitem__(self, request: Request) -> MaskedVideo:
        return self.read(self.order.item(*request))


def _the_one(videos: Sequence[MaskedVideo]) -> MaskedVideo:
    return videos[0]


def write_masks(folder: Path, video: MaskedVideo, masks: Tensor) -> list[Path]:
    """Write a sequence's masks in the layout of the official evaluation's results.

    Args:
        folder: gets ``<sequence>/<frame>.png``, palette images in the colours of the given masks.
        video: the sequence.
        masks: ``(T, h, w)`` uint8 ids on the host.

    Raises:
        UserError: the folder cannot be written.
    """
    target = folder / video.name
    written = []
    try:
        target.mkdir(parents=True, exist_ok=True)
        for stem, mask in zip(video.stems, masks, strict=True):
            image = Image.fromarray(mask.numpy())
            image.putpalette(video.palette.flatten().tolist())
            written.append(target / f"{stem}.png")
            image.save(written[-1])
    except OSError as error:
        raise UserError(f"{target} cannot be written ({error.strerror or error}): choose another") from error
    return written


def voc_colours() -> Array:
    """Colours of ids where a file has none, ``(256, 3)`` uint8: PASCAL VOC's, which are DAVIS's.

    The bits of an id go in turn to red, green and blue, the lowest to the highest bit of the colour.
    """
    ids = np.arange(256)
    channels = [
        sum(((ids >> (3 * bit + channel)) & 1) << (7 - bit) for bit in range(3)) for channel in range(3)
    ]
    return np.stack(channels, axis=1).astype(np.uint8)


def _listed(path: Path, wanted: Sequence[str] | None) -> list[str]:
    try:
        names = path.read_text(encoding="utf-8").split()
    except OSError as error:
        raise UserError(
            f"{path}: no such list of sequences: --data.root must be the folder of DAVIS 2017"
        ) from error
    if not names:
        raise UserError(f"{path}: names no sequence")
    if strange := sorted(set(wanted or ()) - set(names)):
        raise UserError(f"sequences: {strange[0]} is not in {path}")
    if twice := [name for name, times in Counter(wanted or ()).items() if times > 1]:
        raise UserError(f"sequences: {twice[0]} is named more than once, and would count so: name it once")
    return names if wanted is None else list(wanted)


def _ids(path: Path) -> Array:
    ids = read_mask(path, _CODES)
    return np.where(ids == 255, 0, ids)


def _palette(path: Path) -> Array:
    """Colours of a mask, filled up with VOC's where the file has fewer or is grey."""
    colours = voc_colours()
    with Image.open(path) as image:
        found = np.asarray((image.getpalette() if image.mode == "P" else None) or [], np.uint8).reshape(-1, 3)
    colours[: len(found)] = found
    return colours

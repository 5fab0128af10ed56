"""Images with a depth per pixel: NYUv2 as published, or any in two folders.

==========  ==================================================================================================
``nyu``     ``nyu_depth_v2_labeled.mat`` and ``splits.mat`` (Silberman et al., 2012: 795 / 654 images). The
            first is HDF5 (MATLAB 7.3), whose axes are reversed there: ``images (N, 3, W, H)`` uint8,
            ``depths (N, W, H)`` float32 metres. ``splits.mat`` has ``trainNdxs`` and ``testNdxs``, from 1.
``folder``  ``{train,val}/rgb/*`` + ``{train,val}/depth/*.png``, 16 bits, millimetres; matched by name
==========  ==================================================================================================

A depth of 0 is one that was not measured.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import cv2
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from poodle_lightning.data.label_files import IMAGES, Array, read_image
from poodle_lightning.data.label_sources import SPLITS, Split, by_key, matched
from poodle_lightning.data.label_views import resized
from poodle_lightning.data.loading import SharedDataModule, each_once, whole_batches
from poodle_lightning.data.order import ClipLoader, Order, Request, RequestSampler
from poodle_lightning.data.video import HELD_OUT_EPOCH
from poodle_lightning.ops.random import bernoulli, fold, key_of
from poodle_lightning.types import UserError

NYU_FILE, NYU_SPLITS = "nyu_depth_v2_labeled.mat", "splits.mat"
_KEYS = {"train": "trainNdxs", "val": "testNdxs"}
_MILLIMETRE = 1e-3


@dataclass(frozen=True)
class DepthBatch:
    """Images with a depth per pixel.

    Args:
        images: ``(B, 3, H, W)`` uint8 RGB.
        depth: ``(B, h, w)`` float32 metres, 0 = not measured.
        index: ``(B,)`` int64, place in the split; stays on the host.
        names: of the images; stays on the host.
    """

    images: Tensor
    depth: Tensor
    index: Tensor
    names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.images)

    def unit(self) -> Tensor:
        """The images in [0, 1], ``(B, 3, H, W)`` float32."""
        return self.images.float() / 255.0

    def to(self, device: torch.device | str, non_blocking: bool | None = None) -> DepthBatch:
        """Moved to a device (to CUDA without waiting); index and names stay on the host."""
        on = torch.device(device).type == "cuda" if non_blocking is None else non_blocking
        images, depth = (part.to(device, non_blocking=on) for part in (self.images, self.depth))
        return replace(self, images=images, depth=depth)

    def pin_memory(self) -> DepthBatch:
        """With its tensors in page-locked memory, so that the copy to the device does not block."""
        return replace(self, images=self.images.pin_memory(), depth=self.depth.pin_memory())


class DepthSource(ABC):
    """Images and their depth, by split and place."""

    @abstractmethod
    def names(self, split: Split) -> Sequence[str]:
        """The images of a split in a fixed order.

        Raises:
            UserError: they are not there.
        """

    @abstractmethod
    def read(self, split: Split, number: int) -> tuple[Array, Array]:
        """Image ``(H, W, 3)`` uint8 RGB and depth ``(H, W)`` float32 metres, 0 = not measured.

        Raises:
            UserError: it cannot be read.
        """


class NYU(DepthSource):
    """The labelled part of NYUv2 in its own two files; see the module. Needs ``h5py``.

    Args:
        root: the folder with both files.

    Raises:
        UserError: a file is missing or is not what it should be.
    """

    def __init__(self, root: str | Path) -> None:
        self.path = Path(root) / NYU_FILE
        splits = Path(root) / NYU_SPLITS
        for path in (self.path, splits):
            if not path.is_file():
                raise UserError(
                    f"{path}: no such file; --data.root is the folder with {NYU_FILE} and {NYU_SPLITS}"
                )
        self._opened: Any = None
        total = len(self._file()["images"])
        self._numbers: dict[Split, list[int]] = {
            split: _listed(splits, _KEYS[split], total) for split in SPLITS
        }
        both = set(self._numbers["train"]) & set(self._numbers["val"])
        if both:
            raise UserError(f"{splits}: image {min(both) + 1} is in both splits: take the published file")
        self.close()  # each worker opens its own

    def close(self) -> None:
        """Give the file back; the next ``read`` opens it again."""
        if self._opened is not None:
            self._opened.close()
        self._opened = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_opened": None}

    def names(self, split: Split) -> Sequence[str]:
        """See ``DepthSource.names``."""
        return [f"{self.path}:{number + 1}" for number in self._numbers[split]]

    def read(self, split: Split, number: int) -> tuple[Array, Array]:
        """See ``DepthSource.read``."""
        place = self._numbers[split][number]
        try:
            image, depth = self._file()["images"][place], self._file()["depths"][place]
        except (OSError, KeyError) as error:
            raise UserError(f"{self.path}: image {place + 1} cannot be read: {error}") from error
        return np.ascontiguousarray(image.transpose(2, 1, 0)), measured(depth.T.astype(np.float32))

    def _file(self) -> Any:
        if self._opened is None:
            self._opened = _open_hdf5(self.path)
        return self._opened


class DepthFolder(DepthSource):
    """Images and 16-bit depth files in two folders per split; see the module.

    Args:
        root: the folder with ``train`` and ``val``.
    """

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root)
        self._files: dict[Split, list[tuple[Path, Path]]] = {}

    def _listed(self, split: Split) -> list[tuple[Path, Path]]:
        if split not in self._files:
            images, depths = (self.root / split / name for name in ("rgb", "depth"))
            for folder in (images, depths):
                if not folder.is_dir():
                    raise UserError(
                        f"{folder}: no such folder; depth in folders is {split}/rgb and {split}/depth"
                    )
            found = matched(by_key(images, "", IMAGES), by_key(depths, "", (".png",)), images, depths)
            if found.problems:
                raise UserError(found.problems[0].replace("mask", "depth file"))
            self._files[split] = [(files.image, files.mask) for files in found.items]
        return self._files[split]

    def names(self, split: Split) -> Sequence[str]:
        """See ``DepthSource.names``."""
        return [str(image) for image, _ in self._listed(split)]

    def read(self, split: Split, number: int) -> tuple[Array, Array]:
        """See ``DepthSource.read``."""
        path, depth_path = self._listed(split)[number]
        depth = cv2.imread(str(depth_path), cv2.IMREAD_UNCHANGED)
        if depth is None:
            raise UserError(f"{depth_path}: the depth cannot be read: it must be a 16-bit PNG of millimetres")
        if depth.dtype != np.uint16 or depth.ndim != 2:
            kind = f"{depth.dtype} with {1 if depth.ndim == 2 else depth.shape[2]} channels"
            raise UserError(f"{depth_path}: {kind}, but depth is one channel of 16 bits, in millimetres")
        image = read_image(path, depth.shape)
        if image.shape[:2] != depth.shape:
            (h, w), (dh, dw) = image.shape[:2], depth.shape
            raise UserError(f"{depth_path}: the depth is {dw}×{dh} px, its image {path.name} is {w}×{h} px")
        return image, depth.astype(np.float32) * np.float32(_MILLIMETRE)


class DepthDataModule(SharedDataModule):
    """Images with a depth per pixel for a readout of depth.

    Images and depths are brought to one size, in training and in tests, and only mirrored (PiCo, appendix
    A.2.4). Depths are resized by the nearest neighbour, so that what was not measured is not mixed in.

    Args:
        source: the layout; see the module.
        root: its folder.
        size: height and width of what the network sees and of the depths, px.
        flip: probability of a mirror image in training.
        batch_size: images per device and step.
        val_batch_size: images per device in a test.
        num_workers: processes that read images.
        seed: of the order and of all draws; None is 0, or ``seed_everything`` on the command line.

    Raises:
        UserError: a setting is out of range, or files are missing.
    """

    def __init__(
        self,
        source: Literal["nyu", "folder"] = "nyu",
        root: str | None = None,
        *,
        size: tuple[int, int] = (480, 640),
        flip: float = 0.5,
        batch_size: int = 16,
        val_batch_size: int = 1,
        num_workers: int = 2,
        seed: int | None = None,
    ) -> None:
        super().__init__()
        if root is None:
            raise UserError("images with depth need a folder: give --data.root")
        if min(batch_size, val_batch_size, *size) < 1 or num_workers < 0 or not 0 <= flip <= 1:
            raise UserError(
                "data: batch sizes and size must be at least 1, num_workers at least 0, flip from 0 to 1"
            )
        self.root, self.size, self.flip, self.seed = root, (size[0], size[1]), flip, seed or 0
        self.batch_size, self.val_batch_size, self.num_workers = batch_size, val_batch_size, num_workers
        self.source: DepthSource = NYU(root) if source == "nyu" else DepthFolder(root)

    def setup(self, stage: str | None = None) -> None:
        """List the images.

        Raises:
            UserError: a split is missing or empty.
        """
        for split in SPLITS if stage in ("fit", None) else ("val",):
            self.count(split)  # type: ignore[arg-type]

    def count(self, split: Split) -> int:
        """Images of a split."""
        return len(self.source.names(split))

    def train_dataloader(self) -> ClipLoader:
        """Mirrored or not, in batches of ``batch_size``; starts where training stands."""
        order = whole_batches(self.count("train"), self.batch_size, self._world, self.seed)
        return self._loader("train", order, None, self.batch_size, consumed=self._consumed)

    def val_dataloader(self) -> ClipLoader:
        """Every held-out image exactly once over all devices."""
        total = self.count("val")
        order = each_once(total, self._world, f"{self.root}: {total} images of the split val")
        return self._loader("val", order, HELD_OUT_EPOCH, self.val_batch_size)

    def _loader(
        self, split: Split, order: Order, epoch: int | None, batch_size: int, **kwargs: Any
    ) -> ClipLoader:
        flip = self.flip if epoch is None else 0.0
        return ClipLoader(
            _Views(self.source, split, order, self.size, flip, self.seed),
            batch_size=batch_size,
            sampler=RequestSampler(order, self._rank, epoch),
            collate_fn=_collate,
            num_workers=self.num_workers,
            seed=self.seed,
            **kwargs,
        )


class _Views(Dataset[tuple[Array, Array, int, str]]):
    """Images and depths of a split at one size."""

    def __init__(
        self, source: DepthSource, split: Split, order: Order, size: tuple[int, int], flip: float, seed: int
    ) -> None:
        self.source, self.split, self.order, self.size = source, split, order, size
        self.flip, self.seed = flip, seed
        self.names = source.names(split)

    def __len__(self) -> int:
        return self.order.length

    def __getitem__(self, request: Request) -> tuple[Array, Array, int, str]:
        epoch, position = request
        item = self.order.item(epoch, position)
        index = item % len(self.names)
        image, depth = self.source.read(self.split, index)
        depth = cv2.resize(depth, (self.size[1], self.size[0]), interpolation=cv2.INTER_NEAREST_EXACT)
        if self.split == "val" and not depth.any():
            raise UserError(f"{self.names[index]}: no depth was measured: there is nothing to compare with")
        image = resized(image, None, self.size)[0]
        key = key_of(self.seed, epoch, index, item // len(self.names)).reshape(1)
        if bool(bernoulli(fold(key, "flip"), self.flip)[0, 0]):
            image, depth = image[:, ::-1], depth[:, ::-1]
        return image, depth, index, self.names[index]


def _collate(items: Sequence[tuple[Array, Array, int, str]]) -> DepthBatch:
    images, depths, index, names = zip(*items, strict=True)
    stacked = np.stack([np.ascontiguousarray(image.transpose(2, 0, 1)) for image in images])
    return DepthBatch(
        torch.from_numpy(stacked), torch.from_numpy(np.stack(depths)), torch.tensor(index), tuple(names)
    )


def measured(depth: Array) -> Array:
    """Depths, with 0 for what is no length: below 0, infinite, not a number."""
    found: Array = np.where(np.isfinite(depth) & (depth > 0), depth, np.float32(0))
    return found


def _open_hdf5(path: Path) -> Any:
    try:
        import h5py
    except ImportError as error:
        raise UserError(
            "NYUv2's file is HDF5: install poodle-lightning[nyu], or give the images as --data.source folder"
        ) from error
    try:
        file = h5py.File(path, "r")
    except OSError as error:
        raise UserError(f"{path}: no HDF5 file (MATLAB 7.3): {' '.join(str(error).split())}") from error
    shapes = [tuple(file[key].shape) if key in file else () for key in ("images", "depths")]
    images, depths = shapes
    if len(images) != 4 or images[1] != 3 or depths != (images[0], *images[2:]):
        file.close()
        raise UserError(
            f"{path}: images {images} and depths {depths}, but (N, 3, W, H) and (N, W, H) are expected"
        )
    return file


def _listed(path: Path, key: str, total: int) -> list[int]:
    """Places from 0 in one list of ``splits.mat``."""
    from scipy.io import loadmat

    try:
        values = loadmat(str(path))[key]
    except (OSError, ValueError, KeyError, TypeError, NotImplementedError) as error:  # the last: MATLAB 7.3
        raise UserError(f"{path}: {key} cannot be read: take NYUv2's splits.mat") from error
    numbers = [int(value) - 1 for value in np.asarray(values).ravel()]
    if not numbers or min(numbers) < 0 or max(numbers) >= total or len(set(numbers)) < len(numbers):
        raise UserError(f"{path}: {key} must be different numbers from 1 to {total}, at least one")
    return sorted(numbers)

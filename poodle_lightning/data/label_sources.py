"""Where labelled images come from: one interface over the published data sets' layouts.

``root`` is the folder that holds the layout, or the one above it. ``{s}`` is ``train`` or ``val``:

==============  ==============================================================================================
``bdd100k``     ``images/10k/{s}/*.jpg`` + ``labels/sem_seg/masks/{s}/*.png``; or the old release,
                ``seg/images/{s}/*.jpg`` + ``seg/labels/{s}/*_train_id.png``
``cityscapes``  ``leftImg8bit/{s}/<city>/*_leftImg8bit.png`` + ``gtFine/{s}/<city>/*_gtFine_labelIds.png``
``ade20k``      ``images/{training,validation}/*.jpg`` + ``annotations/{training,validation}/*.png``
``voc``         ``JPEGImages/*.jpg`` + ``SegmentationClass[Aug]/*.png`` + ``ImageSets/Segmentation/*.txt``
``coco``        ``{s}2017/*.jpg`` + ``panoptic_{s}2017/*.png`` + ``annotations/panoptic_{s}2017.json``; or the
                converted ``panoptic_stuff_{s}2017/*.png`` of detectron2
``wt_sem``      ``images/{s}/<video>/*.jpg`` + ``masks/{s}/<video>/*.png``, labels 0 to 149 of ADE20K
==============  ==============================================================================================
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

from poodle_lightning.data import label_sets
from poodle_lightning.data.label_files import IMAGES, MASKS, Array, Codes, image_size, mask_size, read_pair
from poodle_lightning.types import IGNORE, ClassSet, UserError

Split = Literal["train", "val"]
SPLITS: tuple[Split, Split] = ("train", "val")
DOCS = "see docs/labelled_data.md"


@dataclass(frozen=True)
class Files:
    """An image and its mask."""

    image: Path
    mask: Path


@dataclass(frozen=True)
class Listing:
    """The labelled images of a split.

    Args:
        items: in a fixed order.
        problems: what does not match, each in one line; images without mask, masks without image.
    """

    items: Sequence[Files]
    problems: tuple[str, ...] = ()


class LabelSource(Protocol):
    """Labelled images to train and to measure on."""

    @property
    def name(self) -> str:
        """Of the data set."""
        ...

    @property
    def classes(self) -> ClassSet:
        """In the order of the labels."""
        ...

    @property
    def published(self) -> Mapping[str, int]:
        """Images per split as published; empty if there is no such number."""
        ...

    def names(self, split: Split) -> Sequence[str]:
        """The images of a split, in a fixed order.

        Raises:
            UserError: the layout is not there.
        """
        ...

    def problems(self, split: Split) -> tuple[str, ...]:
        """What is wrong with the list of files, each in one line."""
        ...

    def read(self, split: Split, number: int) -> tuple[Array, Array]:
        """Image ``(H, W, 3)`` uint8 RGB and labels ``(H, W)`` uint8, 255 = ignore.

        Raises:
            UserError: it cannot be read or is not what it should be.
        """
        ...

    def sizes(self, split: Split, number: int) -> tuple[tuple[int, int], tuple[int, int]]:
        """Height and width of image and mask, from the headers alone."""
        ...


class FileSource(ABC):
    """Labelled images in files; what all data sets on disk share.

    Args:
        name: of the data set.
        root: the folder that the user gave.
        classes: in the order of the labels.
        codes: what the masks' values mean.
        published: images per split.
    """

    def __init__(
        self,
        name: str,
        root: str | Path,
        classes: ClassSet,
        codes: Codes,
        published: Mapping[str, int] | None = None,
    ) -> None:
        self.name, self.root, self.classes, self.codes = name, Path(root), classes, codes
        self.published: Mapping[str, int] = published or {}
        self._listings: dict[Split, Listing] = {}

    @abstractmethod
    def find(self, split: Split) -> Listing:
        """Look for the files of a split."""

    def listing(self, split: Split) -> Listing:
        """The files of a split, looked for once."""
        if split not in self._listings:
            self._listings[split] = self.find(split)
        return self._listings[split]

    def names(self, split: Split) -> Sequence[str]:
        """See ``LabelSource.names``."""
        return [str(files.image) for files in self.listing(split).items]

    def problems(self, split: Split) -> tuple[str, ...]:
        """See ``LabelSource.problems``."""
        return self.listing(split).problems

    def read(self, split: Split, number: int) -> tuple[Array, Array]:
        """See ``LabelSource.read``."""
        files = self.listing(split).items[number]
        return read_pair(files.image, files.mask, self.codes)

    def sizes(self, split: Split, number: int) -> tuple[tuple[int, int], tuple[int, int]]:
        """See ``LabelSource.sizes``."""
        files = self.listing(split).items[number]
        size = mask_size(files.mask)
        return image_size(files.image, size), size


@dataclass(frozen=True)
class Layout:
    """Two folders whose files belong together by name; ``{s}`` is the split.

    Args:
        images: folder of the images.
        masks: folder of the masks.
        image_end: what follows an image's key in its name, e.g. ``_leftImg8bit.png``; "" any image suffix.
        mask_end: what follows the same key in the mask's name; "" any mask suffix.
        below: what the folder above it may call the layout.
        splits: the split's name in the folders.
    """

    images: str
    masks: str
    image_end: str = ".jpg"
    mask_end: str = ".png"
    below: tuple[str, ...] = ()
    splits: Mapping[str, str] | None = None

    def folder(self, pattern: str, split: Split) -> str:
        """A folder of a split, relative to the root."""
        return pattern.replace("{s}", (self.splits or {}).get(split, split))


LAYOUTS: dict[str, tuple[Layout, ...]] = {
    "bdd100k": (
        Layout("images/10k/{s}", "labels/sem_seg/masks/{s}", below=("bdd100k",)),
        Layout("seg/images/{s}", "seg/labels/{s}", mask_end="_train_id.png", below=("bdd100k",)),
    ),
    "cityscapes": (
        Layout(
            "leftImg8bit/{s}", "gtFine/{s}", "_leftImg8bit.png", "_gtFine_labelIds.png", below=("cityscapes",)
        ),
    ),
    "ade20k": (
        Layout(
            "images/{s}",
            "annotations/{s}",
            below=("ADEChallengeData2016", "ade/ADEChallengeData2016"),
            splits={"train": "training", "val": "validation"},
        ),
    ),
    "wt_sem": (Layout("images/{s}", "masks/{s}", "", ".png", below=("wt_sem",)),),
}


class LayoutSource(FileSource):
    """A data set whose images and masks lie in two folders per split: all of ``LAYOUTS``.

    Args:
        name: a key of ``LAYOUTS``.
        root: the folder that holds the layout, or the one above it.
    """

    def __init__(self, name: str, root: str | Path) -> None:
        classes, codes = _meanings()[name]
        super().__init__(name, root, classes, codes, label_sets.PUBLISHED[name])
        self.layouts = LAYOUTS[name]

    def find(self, split: Split) -> Listing:
        """See ``FileSource.find``.

        Raises:
            UserError: the folders are not there.
        """
        for layout in self.layouts:
            for base in (self.root, *(self.root / part for part in layout.below)):
                images = base / layout.folder(layout.images, split)
                if not images.is_dir():
                    continue
                masks = base / layout.folder(layout.masks, split)
                if not masks.is_dir():
                    raise UserError(f"{masks}: no such folder; the masks of {images} belong there ({DOCS})")
                found = by_key(images, layout.image_end, IMAGES), by_key(masks, layout.mask_end, MASKS)
                return matched(*found, images, masks)
        wanted = [layout.folder(layout.images, split) for layout in self.layouts]
        raise not_there(self.root, self.name, wanted, self.layouts[0].below)


def _meanings() -> dict[str, tuple[ClassSet, Codes]]:
    """Classes of a data set and what its masks' values mean."""
    cities = dict.fromkeys(range(label_sets.CITYSCAPES_LAST + 1), IGNORE) | {IGNORE: IGNORE}
    ade = {0: IGNORE} | {value: value - 1 for value in range(1, len(label_sets.ADE20K) + 1)}
    return {
        "bdd100k": (label_sets.BDD100K, Codes.plain(19)),
        "cityscapes": (
            label_sets.CITYSCAPES,
            Codes("ids", cities | label_sets.CITYSCAPES_IDS, "Cityscapes' labelIds 0 to 33"),
        ),
        "ade20k": (label_sets.ADE20K, Codes("ids", ade, "0 (ignored) to 150")),
        "wt_sem": (label_sets.ADE20K, Codes.plain(150)),
    }


# ---- files of a folder
def by_key(folder: Path, end: str, suffixes: Iterable[str]) -> dict[str, Path]:
    """Files below a folder, by their relative path without ``end`` (or without a suffix, if it is "").

    Raises:
        UserError: two files have one key.
    """
    allowed = tuple(suffixes)
    found: dict[str, Path] = {}
    for path in _files(folder):
        name = path.relative_to(folder).as_posix()
        if end and name.endswith(end):
            key = name[: -len(end)]
        elif not end and path.suffix.lower() in allowed:
            key = name[: -len(path.suffix)]
        else:
            continue
        if key in found:
            raise UserError(f"{path} and {found[key].name} have the same name: keep one of them")
        found[key] = path
    return dict(sorted(found.items()))


def matched(
    images: Mapping[str, Path], masks: Mapping[str, Path], image_folder: Path, folder: Path
) -> Listing:
    """Images and masks of the same key, and which lack their partner.

    Args:
        images: by key.
        masks: by key.
        image_folder: where the images were looked for.
        folder: where the masks were looked for.

    Raises:
        UserError: there is neither an image nor a mask.
    """
    if not images and not masks:
        raise UserError(f"{image_folder}: the split is empty: no image there, no mask in {folder} ({DOCS})")
    problems = []
    if alone := [path for key, path in images.items() if key not in masks]:
        problems.append(f"{alone[0]}: no mask for this image in {folder}{_more(alone, 'image')}")
    if alone := [path for key, path in masks.items() if key not in images]:
        problems.append(f"{alone[0]}: no image for this mask{_more(alone, 'mask')}")
    items = [Files(path, masks[key]) for key, path in images.items() if key in masks]
    return Listing(items, tuple(problems))


def _more(alone: Sequence[Path], word: str) -> str:
    return f" (and {len(alone) - 1} more such {word}s)" if len(alone) > 1 else ""


def not_there(root: Path, name: str, wanted: Sequence[str], below: Sequence[str] = ()) -> UserError:
    """What was looked for, and what is there instead.

    Args:
        root: the folder that the user gave.
        name: of the layout.
        wanted: folders, relative to the root, any of which would do.
        below: folders of the root in which they may lie too.
    """
    if not root.is_dir():
        return UserError(f"{root}: no such folder; give the folder of {name} as --data.root ({DOCS})")
    names = (path.name + "/" * path.is_dir() for path in root.iterdir() if not path.name.startswith("."))
    inside = sorted(names)
    shown = ", ".join(inside[:6]) + (f" and {len(inside) - 6} more" if len(inside) > 6 else "")
    places = " or ".join(["in it", *(f"in {folder}/" for folder in below if folder)])
    return UserError(
        f"{root}: not laid out as {name}: no {' or '.join(dict.fromkeys(wanted))} {places}; there is"
        f" {shown or 'nothing'} ({DOCS})"
    )


def _files(folder: Path) -> Iterator[Path]:
    """All files below a folder that are not hidden."""
    for base, folders, files in os.walk(folder, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield from (Path(base) / name for name in files if not name.startswith("."))

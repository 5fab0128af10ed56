"""Data sets whose split is a list in a file: PASCAL VOC's text files, COCO panoptic's JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from poodle_lightning.data import label_sets
from poodle_lightning.data.label_files import Array, Codes, colour_value, read_pair
from poodle_lightning.data.label_sources import (
    DOCS,
    Files,
    FileSource,
    Listing,
    Split,
    by_key,
    matched,
    not_there,
)
from poodle_lightning.types import IGNORE, UserError

_AUG_LISTS = ("train_aug.txt", "trainaug.txt")


class VocSource(FileSource):
    """PASCAL VOC 2012 segmentation, 21 classes with background; 255 is the border between objects.

    Training is ``train_aug``, 10,582 images: the list ``train_aug.txt`` (or ``trainaug.txt``), masks in
    ``SegmentationClassAug`` (Hariharan et al. 2011) or, where they are not there, in ``SegmentationClass``.
    ``val`` and ``train`` are VOC's own.

    Args:
        root: the folder that holds ``JPEGImages``, or one above it (``VOCdevkit/VOC2012``).
        train: ``train_aug`` or ``train`` (1,464 images).
    """

    def __init__(self, root: str | Path, train: str = "train_aug") -> None:
        published = dict(label_sets.PUBLISHED["voc"])
        if train == "train":
            published["train"] = label_sets.VOC_TRAIN
        super().__init__("voc", root, label_sets.VOC, Codes.plain(21, kind="palette"), published)
        self.train = train

    def find(self, split: Split) -> Listing:
        """See ``FileSource.find``.

        Raises:
            UserError: the folders or the list are not there, or the list is empty.
        """
        base = _base(self.root, ("", "VOC2012", "VOCdevkit/VOC2012"), "ImageSets/Segmentation", "voc")
        augmented = split == "train" and self.train == "train_aug"
        lists = _AUG_LISTS if augmented else (f"{split}.txt",)
        path = next((p for name in lists if (p := base / "ImageSets/Segmentation" / name).is_file()), None)
        if path is None:
            hint = "; without it, use voc_train: train" if augmented else ""
            raise UserError(f"{base / 'ImageSets/Segmentation' / lists[0]}: no such list{hint} ({DOCS})")
        # a line is a name, or the paths of image and mask
        names = [Path(line.split()[0]).stem for line in path.read_text().splitlines() if line.strip()]
        if not names:
            raise UserError(f"{path}: the split is empty: the list has no line")
        masks = _stems(base / "SegmentationClass", ".png")
        if augmented:
            masks = {**masks, **_stems(base / "SegmentationClassAug", ".png")}
        return _listed(names, _stems(base / "JPEGImages", ".jpg"), masks, path)


class CocoSource(FileSource):
    """COCO 2017 panoptic as semantic segmentation, 54 classes.

    All things are 0, the 53 kinds of stuff 1 to 53 in the order of their ids, pixels without a segment are
    ignored: the mapping of detectron2 (``datasets/prepare_panoptic_fpn.py``), made while reading from the
    panoptic PNGs, or read from the PNGs that its script wrote (``panoptic_stuff_{train,val}2017``).

    Args:
        root: the folder that holds ``train2017`` and ``val2017`` (or ``images/…``), or the one above.
    """

    def __init__(self, root: str | Path) -> None:
        classes = label_sets.COCO_SEMANTIC
        super().__init__("coco", root, classes, Codes.plain(54), label_sets.PUBLISHED["coco"])
        self._segments: dict[Split, _Segments] = {}

    def find(self, split: Split) -> Listing:
        """See ``FileSource.find``.

        Raises:
            UserError: the folders or the JSON file are not there, or the JSON file is damaged.
        """
        year = f"{split}2017"
        base = _base(self.root, ("", "coco"), year, "coco", also=f"images/{year}")
        images = next(path for path in (base / year, base / "images" / year) if path.is_dir())
        converted = base / f"panoptic_stuff_{year}"
        if converted.is_dir():
            found = by_key(images, ".jpg", ()), by_key(converted, ".png", ())
            return matched(*found, images, converted)
        places = [base / f"panoptic_{year}", base / "annotations" / f"panoptic_{year}"]
        folder = next((path for path in places if path.is_dir()), None)
        if folder is None:
            raise UserError(f"{places[0]}: no such folder (nor {converted.name}); unpack the masks ({DOCS})")
        files = [base / "annotations" / f"panoptic_{year}.json", base / f"panoptic_{year}.json"]
        path = next((path for path in files if path.is_file()), None)
        if path is None:
            raise UserError(f"{files[0]}: no such file; it says which class a segment has ({DOCS})")
        names, self._segments[split] = _read_panoptic(path)
        return _listed(names, _stems(images, ".jpg"), _stems(folder, ".png"), path)

    def read(self, split: Split, number: int) -> tuple[Array, Array]:
        """See ``LabelSource.read``."""
        files = self.listing(split).items[number]
        segments = self._segments.get(split)
        codes = self.codes if segments is None else segments.codes(files.mask.stem)
        return read_pair(files.image, files.mask, codes)


class _Segments:
    """The class of every segment of a split, in a few flat arrays: workers then share them."""

    def __init__(self, path: Path, annotations: Sequence[Any]) -> None:
        self.path = path
        self.place = {Path(a["file_name"]).stem: number for number, a in enumerate(annotations)}
        lengths = [len(a["segments_info"]) for a in annotations]
        self.ends = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        ids = [part["id"] for a in annotations for part in a["segments_info"]]
        self.ids = np.array(ids, np.int64)
        labels = label_sets.COCO_LABELS
        kinds = (part["category_id"] for a in annotations for part in a["segments_info"])
        self.labels = np.fromiter((labels[kind] for kind in kinds), np.uint8, len(ids))

    def codes(self, stem: str) -> Codes:
        """What the colours of one mask mean: id = r + 256 g + 65536 b; 0 is no segment."""
        part = slice(*self.ends[self.place[stem] : self.place[stem] + 2])
        labels = {0: IGNORE}
        for number, label in zip(self.ids[part].tolist(), self.labels[part].tolist(), strict=True):
            labels[colour_value((number & 255, number >> 8 & 255, number >> 16 & 255))] = label
        return Codes("colours", labels, f"the segments of {self.path.name}")


def _read_panoptic(path: Path) -> tuple[list[str], _Segments]:
    try:
        annotations = json.loads(path.read_bytes())["annotations"]
        segments = _Segments(path, annotations)
    except KeyError as error:
        what = (
            f"category {error} is none of COCO panoptic's"
            if isinstance(error.args[0], int)
            else f"no {error}"
        )
        raise UserError(f"{path}: {what}") from error
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{path}: cannot be read: {' '.join(str(error).split())}") from error
    if not annotations:
        raise UserError(f"{path}: the split is empty: it has no annotations")
    return sorted(segments.place), segments


def _base(root: Path, below: Sequence[str], wanted: str, name: str, also: str | None = None) -> Path:
    """The first folder that holds ``wanted`` (or ``also``)."""
    ends = [end for end in (wanted, also) if end]
    for part in below:
        if any((root / part / end).is_dir() for end in ends):
            return root / part
    raise not_there(root, name, ends, below)


def _stems(folder: Path, end: str) -> dict[str, Path]:
    return {path.stem: path for path in folder.iterdir() if path.suffix == end} if folder.is_dir() else {}


def _listed(names: Sequence[str], images: dict[str, Path], masks: dict[str, Path], path: Path) -> Listing:
    """The files of the names in a list; ``path`` is the list, for messages."""
    problems = []
    for what, there in (("image", images), ("mask", masks)):
        if lacking := [name for name in names if name not in there]:
            more = f" (and {len(lacking) - 1} more)" if len(lacking) > 1 else ""
            problems.append(f"{path}: no {what} for {lacking[0]}{more}")
    whole = [name for name in names if name in images and name in masks]
    return Listing([Files(images[name], masks[name]) for name in whole], tuple(problems))

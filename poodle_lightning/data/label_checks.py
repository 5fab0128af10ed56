"""What a labelled split holds, and everything that is wrong with it."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import numpy as np
from torch.utils.data import DataLoader, Dataset

from poodle_lightning.data.label_sources import LabelSource, Split
from poodle_lightning.data.order import single_thread
from poodle_lightning.types import IGNORE, ClassSet, UserError


@dataclass(frozen=True)
class Finding:
    """Something wrong with a split.

    Args:
        split: ``train`` or ``val``.
        text: one line, with the file where there is one.
        fatal: nothing can be measured as long as it is so; else the score is of something else than it says,
            e.g. of 998 of 1,000 images.
    """

    split: str
    text: str
    fatal: bool = True

    def __str__(self) -> str:
        return f"{self.split}: {self.text}"


@dataclass
class Survey:
    """A split's contents.

    Args:
        split: ``train`` or ``val``.
        classes: of the data set.
        images: pairs of image and mask.
        published: how many there should be, or None.
        sizes: height and width of images → how many.
        pixels: per class, and the ignored ones last; all 0 unless every mask was read.
        holding: images in which a class occurs, in the same order.
        findings: what is wrong, in the order of the files.
        read: whether every image and mask was read.
    """

    split: str
    classes: ClassSet
    images: int = 0
    published: int | None = None
    sizes: Counter[tuple[int, int]] = field(default_factory=Counter)
    pixels: list[int] = field(default_factory=list)
    holding: list[int] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)
    read: bool = False

    @property
    def absent(self) -> list[str]:
        """Classes without a pixel, if every mask was read."""
        counted = zip(self.classes.names, self.pixels, strict=False) if self.read else ()
        return [name for name, pixels in counted if pixels == 0]

    @property
    def ignored(self) -> float:
        """Share of the pixels that is ignored; 0 unless every mask was read."""
        return self.pixels[-1] / max(1, sum(self.pixels)) if self.pixels else 0.0


@dataclass(frozen=True)
class _Seen:
    """One image: height and width, pixels per class and ignored ones, or what is wrong."""

    size: tuple[int, int] | None = None
    pixels: np.ndarray | None = None
    wrong: str | None = None


class _Looks(Dataset[_Seen]):
    def __init__(self, source: LabelSource, split: Split, every_mask: bool) -> None:
        self.source, self.split, self.every_mask = source, split, every_mask
        self.names = source.names(split)

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, number: int) -> _Seen:
        try:
            return self._read(number) if self.every_mask else self._headers(number)
        except UserError as error:
            return _Seen(wrong=str(error))

    def _read(self, number: int) -> _Seen:
        image, labels = self.source.read(self.split, number)
        counts = np.bincount(labels.ravel(), minlength=IGNORE + 1)
        counts = np.append(counts[: len(self.source.classes)], counts[IGNORE])
        wrong = None if counts[:-1].any() else f"{self.names[number]}: every pixel is ignored"
        return _Seen((image.shape[0], image.shape[1]), counts, wrong)

    def _headers(self, number: int) -> _Seen:
        size, mask = self.source.sizes(self.split, number)
        if size == mask:
            return _Seen(size)
        said = f"the image is {size[1]}×{size[0]} px, its mask {mask[1]}×{mask[0]} px"
        return _Seen(size, wrong=f"{self.names[number]}: {said}")


def survey(source: LabelSource, split: Split, every_mask: bool = True, workers: int = 0) -> Survey:
    """Look at a whole split.

    Args:
        source: of the data set.
        split: ``train`` or ``val``.
        every_mask: read every image and mask, so that damaged files, strange labels, images without labels
            and classes without pixels are found; else only the list of files and the headers.
        workers: processes that read.
    """
    found = Survey(split, source.classes, published=source.published.get(split), read=every_mask)
    counts = np.zeros(len(source.classes) + 1, np.int64)
    holding = np.zeros_like(counts)
    try:
        looks = _Looks(source, split, every_mask)
        found.findings += [Finding(split, text) for text in source.problems(split)]
    except UserError as error:
        found.findings.append(Finding(split, str(error)))
        return found
    found.images = len(looks)
    if found.published is not None and found.images != found.published:
        text = f"{found.images:,} images with a mask, the published split has {found.published:,}"
        found.findings.append(Finding(split, text, fatal=False))
    seen: DataLoader[_Seen] = DataLoader(
        looks, batch_size=None, num_workers=workers, worker_init_fn=single_thread
    )
    for look in seen:
        if look.size is not None:
            found.sizes[look.size] += 1
        if look.pixels is not None:
            counts += look.pixels
            holding += look.pixels > 0
        if look.wrong is not None:
            found.findings.append(Finding(split, look.wrong))
    found.pixels, found.holding = counts.tolist(), holding.tolist()
    if absent := found.absent:
        text = f"no pixel of {', '.join(absent)} in {found.images:,} images"
        found.findings.append(Finding(split, text, fatal=False))
    return found

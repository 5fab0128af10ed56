"""How large and how frequent the classes of a labelled data set are, as in PooDLe's Table 10.

``python -m poodle_lightning.analysis.class_stats --source bdd100k --root bdd100k/`` prints the table.

The paper's first row, "average pixel percentage per image", is the mean over the images that *show* the
class: multiplied by its third row, the share of images with the class, it gives its second, the share of all
pixels. The second row adds up to 81 %, so ignored pixels count in all denominators. The thresholds of the
groups are unknown; statistics and groups leave (1.0 %, 2.1 %] for the size and (15.4 %, 30.5 %] for the
frequency, and the defaults here lie between.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Mapping
from typing import get_args

import torch
from torch import Tensor

from poodle_lightning.data.label_sources import SPLITS, Split
from poodle_lightning.data.labelled import LabelledDataModule, LabelledName
from poodle_lightning.types import ClassSet, UserError

SIZE_CUT = 0.015
"""A class with at least this mean share of its images is large; PooDLe's cut is above 0.010, up to 0.021."""
RARITY_CUT = 0.20
"""A class in at least this share of the images is common; PooDLe's cut is above 0.154, up to 0.305."""


class ClassStatistics:
    """Counts of a labelled data set, image by image.

    Args:
        classes: names of the label values; all other values are pixels without a class.
    """

    def __init__(self, classes: ClassSet) -> None:
        self.classes = classes
        self.images = 0
        self._all_pixels = 0
        self._holding = torch.zeros(len(classes), dtype=torch.int64)
        self._pixels = torch.zeros(len(classes), dtype=torch.int64)
        self._shares = torch.zeros(len(classes), dtype=torch.float64)

    def update(self, labels: Tensor) -> None:
        """Count images, ``(N, H, W)`` or ``(H, W)`` integers."""
        for one in labels.reshape(-1, *labels.shape[-2:]):
            values = one.flatten().long()
            counts = torch.bincount(values[(values >= 0) & (values < len(self.classes))].cpu())
            counts = torch.nn.functional.pad(counts, (0, len(self.classes) - len(counts)))
            self.images += 1
            self._all_pixels += values.numel()
            self._holding += counts > 0
            self._pixels += counts
            self._shares += counts.double() / values.numel()

    def share_in_images(self) -> dict[str, float]:
        """Mean share of an image's pixels, over the images that show the class; NaN where none does."""
        return self._named(self._shares / self._holding)

    def share_of_pixels(self) -> dict[str, float]:
        """Share of all pixels, ignored ones included."""
        return self._named(self._pixels.double() / self._all_pixels)

    def share_of_images(self) -> dict[str, float]:
        """Share of the images that show the class."""
        return self._named(self._holding.double() / self.images)

    def groups(
        self, size_cut: float = SIZE_CUT, rarity_cut: float = RARITY_CUT
    ) -> dict[str, tuple[str, ...]]:
        """Groups ``small``, ``large``, ``rare`` and ``common``; see :func:`grouped`."""
        return grouped(self.share_in_images(), self.share_of_images(), size_cut, rarity_cut)

    def markdown(self, size_cut: float = SIZE_CUT, rarity_cut: float = RARITY_CUT) -> str:
        """The table, one class per row, largest first, shares in percent."""
        large, common = (set(self.groups(size_cut, rarity_cut)[name]) for name in ("large", "common"))
        columns = (self.share_in_images(), self.share_of_pixels(), self.share_of_images())
        order = sorted(self.classes.names, key=lambda name: -_known(columns[0][name]))
        lines = [
            "| class | pixels of an image with it | of all pixels | of images | size | frequency |",
            "|---|---|---|---|---|---|",
        ]
        for name in order:
            shares = " | ".join(f"{100 * column[name]:.1f}" for column in columns).replace("nan", "–")
            size = "large" if name in large else "small"
            lines.append(f"| {name} | {shares} | {size} | {'common' if name in common else 'rare'} |")
        return "\n".join([*lines, "", f"{self.images:,} images, shares in %."])

    def _named(self, values: Tensor) -> dict[str, float]:
        return dict(zip(self.classes.names, values.tolist(), strict=True))


def class_statistics(labels: Iterable[Tensor], classes: ClassSet) -> ClassStatistics:
    """Statistics of label maps, each ``(H, W)`` or ``(N, H, W)``."""
    found = ClassStatistics(classes)
    for one in labels:
        found.update(one)
    return found


def grouped(
    share_in_images: Mapping[str, float],
    share_of_images: Mapping[str, float],
    size_cut: float = SIZE_CUT,
    rarity_cut: float = RARITY_CUT,
) -> dict[str, tuple[str, ...]]:
    """The groups of PooDLe, appendix H, from its statistics.

    Args:
        share_in_images: mean share of the pixels of an image with the class; NaN counts as small.
        share_of_images: share of images with the class.
        size_cut: from here on a class is ``large``, below ``small``.
        rarity_cut: from here on a class is ``common``, below ``rare``.
    """
    large = {name for name, share in share_in_images.items() if _known(share) >= size_cut}
    common = {name for name, share in share_of_images.items() if _known(share) >= rarity_cut}
    names = tuple(share_in_images)
    return {
        "small": tuple(name for name in names if name not in large),
        "large": tuple(name for name in names if name in large),
        "rare": tuple(name for name in names if name not in common),
        "common": tuple(name for name in names if name in common),
    }


def _known(share: float) -> float:
    return share if share == share else 0.0


def _of_split(data: LabelledDataModule, split: Split) -> ClassStatistics:
    numbers = data.numbers(split)
    maps = (torch.from_numpy(data.source.read(split, number)[1].copy()) for number in numbers)
    return class_statistics(maps, data.classes)


def main(args: list[str] | None = None) -> int:
    """Prints the table of a data set."""
    parser = argparse.ArgumentParser(description="Size and frequency of a data set's classes.")
    parser.add_argument("--source", default="folder", choices=get_args(LabelledName))
    parser.add_argument("--root", help="the folder; not for synthetic")
    parser.add_argument("--split", default="train", choices=SPLITS)
    parser.add_argument("--size-cut", type=float, default=SIZE_CUT, help="small below (default: %(default)s)")
    parser.add_argument(
        "--rarity-cut", type=float, default=RARITY_CUT, help="rare below (default: %(default)s)"
    )
    given = parser.parse_args(args)
    try:
        found = _of_split(LabelledDataModule(given.source, given.root), given.split)
    except UserError as error:
        parser.error(str(error))
    print(found.markdown(given.size_cut, given.rarity_cut))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

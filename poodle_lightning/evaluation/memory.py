"""A memory of labelled patches: what dense nearest-neighbour segmentation looks labels up in."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from poodle_lightning.data.image_classes import ImageClassDataModule
from poodle_lightning.evaluation.base import Evaluation
from poodle_lightning.evaluation.inference import padded
from poodle_lightning.nn.encoder import Encoder
from poodle_lightning.nn.patches import multiple_of
from poodle_lightning.ops.geometry import Size
from poodle_lightning.ops.knn import BUDGET, nearest
from poodle_lightning.ops.random import key_of, uniform
from poodle_lightning.types import IGNORE, Features, UserError


@dataclass(frozen=True)
class RetrievalRecipe:
    """How neighbours are stored and searched.

    Args:
        k: neighbours.
        temperature: of the softmax over their cosines.
        vectors: size of the memory; None keeps every patch. Every training image gets an equal share.
        sampling: which patches of an image a bounded memory keeps: ``rarity`` draws them with less weight the
            more patches of the image share their classes (the protocol), ``uniform`` draws evenly.
        ignored: ``left_out`` of the labels, or taken for the ``first_class``, as the public code does.
        seed: of the draws.
        budget: bytes of working memory of the search; changes the speed only.
    """

    k: int = 30
    temperature: float = 0.02
    vectors: int | None = None
    sampling: Literal["rarity", "uniform"] = "rarity"
    ignored: Literal["left_out", "first_class"] = "left_out"
    seed: int = 0
    budget: int = BUDGET

    def __post_init__(self) -> None:
        vectors = 1 if self.vectors is None else self.vectors
        if min(self.k, self.temperature, self.budget, vectors) <= 0:
            raise UserError("RetrievalRecipe: k, temperature, vectors and budget must be above 0")


def patch_counts(labels: Tensor, cells: Size, classes: int) -> Tensor:
    """Pixels per class in each cell of a map that covers the image.

    Args:
        labels: ``(B, h, w)`` integers; what is no class is not counted. Any size: a pixel belongs to the cell
            in which its centre lies.
        cells: height and width of the map.
        classes: number of classes C.

    Returns:
        ``(B, *cells, C)`` int64.
    """
    count, height, width = labels.shape
    rows, columns = (
        ((2 * torch.arange(pixels, device=labels.device) + 1) * into).div(2 * pixels, rounding_mode="floor")
        for pixels, into in ((height, cells[0]), (width, cells[1]))
    )
    image = torch.arange(count, device=labels.device).reshape(-1, 1, 1)
    cell = (image * cells[0] + rows[:, None]) * cells[1] + columns
    values = labels.long()
    counted = (values >= 0) & (values < classes)
    total = count * cells[0] * cells[1] * classes
    counts = torch.bincount((cell * classes + values)[counted], minlength=total)
    return counts.reshape(count, *cells, classes)


class Memory:
    """Patches of training images, with their labels.

    Args:
        classes: number of classes.
        recipe: what is kept, and how it is searched.
        images: training images in all, over all devices: what a bounded memory is shared among.
        seed: added to that of the recipe.

    Raises:
        UserError: the memory is smaller than the number of images.
    """

    def __init__(self, classes: int, recipe: RetrievalRecipe, images: int, seed: int = 0) -> None:
        self.classes, self.recipe, self.seed = classes, recipe, recipe.seed + seed
        self.share = None if recipe.vectors is None else recipe.vectors // max(1, images)
        if self.share == 0:
            raise UserError(
                f"RetrievalRecipe.vectors: {recipe.vectors} are fewer than the {images} training images: "
                "give more, or a smaller data.subset"
            )
        self._parts: list[tuple[int, Tensor, Tensor]] = []
        self.vectors = torch.empty(0, 0)
        self.labels = torch.empty(0, classes)

    def add(self, maps: Tensor, labels: Tensor, index: Tensor) -> None:
        """Take in images.

        Args:
            maps: ``(B, D, h, w)``.
            labels: ``(B, H, W)`` of any size, 255 = left out (see :meth:`taken`).
            index: ``(B,)`` numbers of the images, which order the memory and key the draws.

        Raises:
            UserError: a feature is not finite.
        """
        counts = patch_counts(labels, (maps.shape[-2], maps.shape[-1]), self.classes).flatten(1, 2)
        vectors = unit_rows(maps).unflatten(0, (len(maps), -1))
        for number, found, seen in zip(index.tolist(), vectors, counts, strict=True):
            kept = self._kept(seen, number)
            shares = seen[kept].float() / seen[kept].sum(dim=1, keepdim=True)
            self._parts.append((number, found[kept].cpu(), shares.cpu()))

    def taken(self, labels: Tensor) -> Tensor:
        """Labels of images as the memory takes them: what is ignored is left out, or the first class."""
        first = self.recipe.ignored == "first_class"
        return labels.masked_fill(labels == IGNORE, 0) if first else labels

    def _kept(self, counts: Tensor, number: int) -> Tensor:
        """Places of the patches of one image that are kept, in their order."""
        labelled = counts.sum(dim=1) > 0
        places = labelled.nonzero()[:, 0]
        if self.share is None or len(places) <= self.share:
            return places
        draws = uniform(key_of(self.seed, "memory", number).reshape(1), len(counts), dtype=torch.float64)[0]
        draws = draws.to(places.device)
        if self.recipe.sampling == "rarity":
            there = counts > 0
            # summed over the classes of a patch: in how many patches of the image each of them is
            draws = draws * (there * there.sum(dim=0)).sum(dim=1)
        order = draws[places].argsort(stable=True)
        return places[order[: self.share]].sort().values

    def finish(self, together: bool = True) -> Memory:
        """Put the images in the order of their numbers.

        Args:
            together: those of all devices; False where this process alone has all of them.

        Raises:
            UserError: there are fewer patches than neighbours are wanted.
        """
        self._parts.sort(key=lambda part: part[0])
        found = self._joined()
        owners, vectors, labels = gathered(found) if together else found
        order = owners.argsort(stable=True)
        if not torch.equal(owners[order], owners):
            vectors, labels = vectors[order], labels[order]
        if len(vectors) < self.recipe.k:
            raise UserError(
                f"the memory has {len(vectors)} labelled patches, {self.recipe.k} neighbours are wanted: "
                "give more training images, or a smaller recipe.k"
            )
        self.vectors, self.labels = vectors, labels
        return self

    def _joined(self) -> tuple[Tensor, Tensor, Tensor]:
        """All parts in their order, which are let go one by one: a large memory is never there twice."""
        counts = [len(part[1]) for part in self._parts]
        width = self._parts[0][1].shape[1] if self._parts else 0
        owners = torch.empty(sum(counts), dtype=torch.int64)
        vectors, labels = torch.empty(sum(counts), width), torch.empty(sum(counts), self.classes)
        start = 0
        for place, count in enumerate(counts):
            number, rows, shares = self._parts[place]
            self._parts[place] = (number, torch.empty(0, 0), torch.empty(0, 0))
            block = slice(start, start + count)
            owners[block], vectors[block], labels[block] = number, rows, shares
            start += count
        self._parts = []
        return owners, vectors, labels

    def to(self, device: torch.device) -> Memory:
        """Moved to a device, if it fits; else the search fetches it part by part."""
        try:
            self.vectors, self.labels = self.vectors.to(device), self.labels.to(device)
        except torch.OutOfMemoryError:
            self.vectors, self.labels = self.vectors.cpu(), self.labels.cpu()
        return self

    def shares(self, maps: Tensor) -> Tensor:
        """Share of each class in the neighbours' labels, ``(B, C, h, w)`` float32, of maps ``(B, D, h, w)``.

        Raises:
            UserError: a feature is not finite.
        """
        recipe = self.recipe
        queries = unit_rows(maps)
        cosines, places = nearest(queries, self.vectors, recipe.k, recipe.budget)
        weights = (cosines / recipe.temperature).softmax(dim=1)
        mixed = torch.empty(len(queries), self.classes, device=queries.device)
        for rows in torch.arange(len(queries)).split(max(1, recipe.budget // (8 * recipe.k * self.classes))):
            labels = self.labels[places[rows].to(self.labels.device)].to(queries.device)
            mixed[rows] = (weights[rows, :, None] * labels).sum(dim=1)
        return mixed.unflatten(0, (len(maps), *maps.shape[-2:])).permute(0, 3, 1, 2)

    def predict(self, maps: Tensor, size: Size) -> Tensor:
        """Classes ``(B, *size)`` int64 on the device of ``maps (B, D, h, w)``."""
        with torch.autocast(maps.device.type, enabled=False):
            shares = self.shares(maps)
            rows = [
                F.interpolate(one[None], size=size, mode="bilinear", align_corners=False).argmax(dim=1)
                for one in shares
            ]
        return torch.cat(rows)


def unit_rows(maps: Tensor) -> Tensor:
    """All cells of maps ``(B, D, h, w)`` as vectors of length 1, ``(B·h·w, D)`` float32.

    Raises:
        UserError: a feature is not finite.
    """
    rows = maps.float().permute(0, 2, 3, 1).flatten(0, 2)
    if not bool(rows.isfinite().all()):
        raise UserError("the encoder gives features that are not finite: nothing can be compared with them")
    return F.normalize(rows, dim=1)


def gathered(tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Rows of all processes one after the other, on the host; without ``torch.distributed`` as they are."""
    if not (dist.is_available() and dist.is_initialized()):
        return tensors
    # NCCL sends from GPUs only
    device = torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else "cpu"
    shapes: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(shapes, [tuple(part.shape) for part in tensors])
    whole = []
    for number, mine in enumerate(tensors):
        parts = []
        for source, all_shapes in enumerate(shapes):
            here = source == dist.get_rank()
            part = mine.to(device) if here else mine.new_empty(all_shapes[number], device=device)
            if part.numel():
                dist.broadcast(part.contiguous() if here else part, source)
                parts.append(part.cpu())
        whole.append(torch.cat(parts) if parts else mine)
    return tuple(whole)


def embed(
    encoder: Encoder, images: Tensor, layer: str | None, labels: tuple[int, int]
) -> tuple[Tensor, Size]:
    """A map of images, and the size of labels that would cover it.

    A ViT needs multiples of its patch: images are filled up at the right and bottom, and the map covers the
    filling as well.

    Args:
        encoder: as it is.
        images: ``(B, 3, H, W)`` uint8 on its device.
        layer: name of the map; None is the last.
        labels: height and width of the images' labels.

    Returns:
        ``(B, D, h, w)``, and the height and width of the labels with the filling.

    Raises:
        UserError: there is no such layer.
    """
    whole = padded(images.float() / 255.0, multiple_of(encoder), encoder.mean)
    features: Features = encoder(whole)
    if layer is not None and layer not in features.maps:
        known = ", ".join(features.maps)
        raise UserError(f"the encoder has no layer {layer!r}: set layer to one of {known}")
    pairs = zip(labels, whole.shape[-2:], images.shape[-2:], strict=True)
    height, width = (round(side * filled / seen) for side, filled, seen in pairs)
    return features.last if layer is None else features.maps[layer], (height, width)


def labelled_data(evaluation: Evaluation) -> Any:
    """The trainer's data module: a ``LabelledDataModule`` or one with the same loaders.

    Raises:
        UserError: it gives no images with a class per pixel.
    """
    data = getattr(evaluation.trainer, "datamodule", None)
    if not hasattr(data, "memory_dataloader") or isinstance(data, ImageClassDataModule):
        raise UserError(
            f"{type(evaluation).__name__} needs images with a class per pixel: give data: LabelledDataModule"
        )
    return data


def filled(labels: Tensor, size: Size) -> Tensor:
    """Labels ``(..., h, w)`` with ignored pixels at the right and bottom, up to ``size``."""
    return F.pad(labels, (0, size[1] - labels.shape[-1], 0, size[0] - labels.shape[-2]), value=IGNORE)

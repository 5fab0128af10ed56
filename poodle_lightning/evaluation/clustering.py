"""Clustering of dense features: how well groups found without labels agree with classes.

The protocol of Leopart (Ziegler and Asano 2022) and NeCo, as in vpariza/NeCo
(``experiments/overcluster/eval_overcluster.py``): features of the held-out images are standardised and
projected on 50 principal components; k-means (50 iterations, best of 5); cluster maps and masks at 100×100 by
nearest neighbour. K = number of classes: clusters and classes are matched one to one by the sum of IoU
(Hungarian). K above it (500): every cluster becomes the class that most of its pixels have (greedy, by
precision). Mean and deviation over 5 seeds.

Deviations: k-means takes all patches and starts by k-means++ (FAISS takes a sample of 256 per cluster and
random starts). ``miou`` leaves out a class that is neither in truth nor prediction (there it counts 0). Masks
come to 100×100 in one step from their own size (there by way of 448×448). The size of the images, 448×448
there, is ``data.test.size``.

Two passes over the images: the first for mean and covariance, the second keeps 50 numbers per patch.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from poodle_lightning.configured import spec
from poodle_lightning.evaluation.base import Evaluation, Scores
from poodle_lightning.evaluation.memory import embed, filled, gathered, labelled_data
from poodle_lightning.evaluation.metrics import Confusion
from poodle_lightning.nn.encoder import Encoder
from poodle_lightning.nn.observed import observed
from poodle_lightning.ops.geometry import Size
from poodle_lightning.ops.kmeans import kmeans
from poodle_lightning.ops.knn import BUDGET
from poodle_lightning.ops.matching import greedy, hungarian, merged
from poodle_lightning.ops.random import key_of
from poodle_lightning.types import ClassSet, LabelledBatch, UserError


@dataclass(frozen=True)
class ClusteringRecipe:
    """How features are clustered and matched.

    Args:
        clusters: K; None is the number of classes.
        components: principal components; at most the features' channels.
        iterations: of k-means.
        restarts: of k-means, of which the best counts.
        seeds: runs of all that, for mean and deviation.
        mask: height and width at which pixels are compared; None is the size of the mask's file.
        scope: clusters are found and matched over the whole ``dataset``, or in each ``image`` alone.
        unmatched: the class that clusters without one become; the protocol takes the first.
        seed: of the draws.
        budget: bytes of working memory for distances.
    """

    clusters: int | None = None
    components: int = 50
    iterations: int = 50
    restarts: int = 5
    seeds: int = 5
    mask: int | None = 100
    scope: Literal["dataset", "image"] = "dataset"
    unmatched: int = 0
    seed: int = 0
    budget: int = BUDGET

    def __post_init__(self) -> None:
        given = [number for number in (self.clusters, self.mask) if number is not None]
        numbers = (self.components, self.iterations, self.restarts, self.seeds, self.budget, *given)
        if min(numbers) < 1 or self.unmatched < 0:
            raise UserError("ClusteringRecipe: numbers must be 1 or more, unmatched 0 or more")


class Projection:
    """Standardisation and principal components from moments that are added up batch by batch."""

    def __init__(self) -> None:
        self.count = 0
        self._sum = self._outer = torch.zeros(())
        self.mean = self.axes = torch.zeros(())

    def update(self, rows: Tensor) -> None:
        """Take in features ``(N, D)``."""
        wide = rows.double()
        self.count += len(wide)
        self._sum = wide.sum(dim=0) + self._sum.to(wide.device)
        self._outer = wide.T @ wide + self._outer.to(wide.device)

    def finish(self, components: int) -> Projection:
        """Find the axes, of all devices' features together; a channel that never moves stays at 0."""
        if dist.is_available() and dist.is_initialized():
            count = torch.tensor(self.count, device=self._sum.device)
            for part in (count, self._sum, self._outer):
                dist.all_reduce(part)
            self.count = int(count)
        self.mean = self._sum / self.count
        covariance = self._outer / self.count - self.mean[:, None] * self.mean
        std = covariance.diag().clamp(min=0).sqrt()
        std = torch.where(std > 1e-6 * self.mean.abs().clamp(min=1e-12), std, torch.inf)
        _, vectors = torch.linalg.eigh(covariance / std[:, None] / std)
        axes = vectors[:, -components:].flip(1)
        # an axis has no direction of its own: the largest entry is made positive
        largest = axes.gather(0, axes.abs().argmax(dim=0, keepdim=True))
        self.axes = axes * largest.sign() / std[:, None]
        return self

    def __call__(self, rows: Tensor) -> Tensor:
        """``(N, components)`` float32."""
        return ((rows.double() - self.mean) @ self.axes).float()


@dataclass(frozen=True)
class ClusteredImage:
    """One image, ready to be clustered.

    Args:
        number: its place in the split.
        size: cells of its map.
        points: ``(h·w, D)`` float32.
        mask: ``(H, W)`` uint8.
    """

    number: int
    size: Size
    points: Tensor
    mask: Tensor


def nearest_resize(values: Tensor, size: Size) -> Tensor:
    """Maps ``(..., h, w)`` at another size; the rule of ``interpolate(mode="nearest")``, in integers."""
    rows, columns = (
        (torch.arange(into, device=values.device) * pixels).div(into, rounding_mode="floor")
        for pixels, into in zip(values.shape[-2:], size, strict=True)
    )
    return values[..., rows[:, None], columns]


def cluster_confusion(
    images: Sequence[ClusteredImage], classes: int, recipe: ClusteringRecipe, number: int = 0
) -> Confusion:
    """Cluster images, match the clusters to classes, and count.

    Args:
        images: in a fixed order.
        classes: how many.
        recipe: what is done.
        number: of the run; its draws are others.

    Raises:
        UserError: fewer clusters than classes, or fewer patches than clusters.
    """
    k = recipe.clusters or classes
    if k < classes or recipe.unmatched >= classes:
        raise UserError(
            f"ClusteringRecipe: clusters {k} must not be below the {classes} classes, unmatched must be one"
        )
    confusion = Confusion(classes)
    scopes: Iterable[Sequence[ClusteredImage]]
    scopes = [images] if recipe.scope == "dataset" else [[image] for image in images]
    for part in scopes:
        points = torch.cat([image.points for image in part])
        if len(points) < k:
            raise UserError(
                f"{k} clusters of {len(points)} patches: give more images, a finer map or fewer clusters"
            )
        label = 0 if recipe.scope == "dataset" else part[0].number
        key = key_of(recipe.seed, "clusters", number, label)
        labels = kmeans(points, k, key, recipe.iterations, recipe.restarts, recipe.budget).labels.cpu()
        confusion.merge(_matched(part, labels, classes, k, recipe))
    return confusion


def _matched(
    images: Sequence[ClusteredImage], labels: Tensor, classes: int, k: int, recipe: ClusteringRecipe
) -> Confusion:
    counts = torch.zeros(classes * k, dtype=torch.int64)
    ignored = 0
    for image, flat in zip(images, labels.split([len(image.points) for image in images]), strict=True):
        mask = image.mask.long()
        found = nearest_resize(flat.reshape(image.size), (mask.shape[0], mask.shape[1]))
        counted = mask < classes
        counts += torch.bincount(mask[counted] * k + found[counted], minlength=classes * k)
        ignored += int((~counted).sum())
    table = counts.reshape(classes, k)
    assignment = hungarian(table) if k == classes else greedy(table)
    state = Confusion(classes).state_dict()
    matrix = merged(table, assignment, recipe.unmatched).tolist()
    return Confusion.from_state(state | {"matrix": matrix, "images": len(images), "ignored": ignored})


class Clustering(Evaluation):
    """Clusters of the held-out images' features against the classes (see the module).

    Args:
        encoder: see ``Evaluation``.
        recipe: clusters, components, seeds.
        layer: name of the map that is read; None reads the last.
        output_stride: see ``Evaluation``.
        decoder: see ``Evaluation``.
        classes: see ``Evaluation``.
    """

    reads_training_images = False

    def __init__(
        self,
        encoder: str | Encoder | None = None,
        *,
        recipe: ClusteringRecipe | None = None,
        layer: str | None = None,
        output_stride: int | None = None,
        decoder: Literal["keep", "drop"] = "keep",
        classes: int | Sequence[str] | None = None,
    ) -> None:
        super().__init__(encoder, output_stride=output_stride, decoder=decoder, classes=classes)
        self.recipe, self.layer = recipe or ClusteringRecipe(), layer
        self.projection = Projection()
        self.runs: list[Confusion] = []
        self._images: list[ClusteredImage] = []

    def on_validation_start(self) -> None:
        """First pass: mean and covariance of the features."""
        data = labelled_data(self)
        self.projection, self._images = Projection(), []
        with observed(self.the_encoder()), self.trainer.precision_plugin.val_step_context():
            for batch in data.val_dataloader():
                self.projection.update(_rows(self._maps(batch)[0]).flatten(0, 1))
        self.projection.finish(self.recipe.components)

    def validation_step(self, batch: LabelledBatch, batch_idx: int) -> None:
        """Second pass: keeps the components of every patch, and the masks."""
        (maps, covered), side = self._maps(batch), self.recipe.mask
        size, labels = (maps.shape[-2], maps.shape[-1]), filled(batch.labels, covered)
        for number, rows, mask in zip(batch.index.tolist(), _rows(maps), labels, strict=True):
            small = mask if side is None else nearest_resize(mask, (side, side))
            self._images.append(ClusteredImage(number, size, self.projection(rows).cpu(), small.cpu()))

    def on_validation_epoch_end(self) -> None:
        """Clusters; the first device does it for all, with all devices' images."""
        images = [_moved(image, self.device) for image in _gathered(self._images)]
        self._images = []
        seed = getattr(getattr(self.trainer, "datamodule", None), "seed", 0)
        found: list[Any] = [None]
        if self.trainer.is_global_zero:
            count = len(self.the_classes())
            numbers = range(seed * self.recipe.seeds, (seed + 1) * self.recipe.seeds)
            found = [
                [cluster_confusion(images, count, self.recipe, number).state_dict() for number in numbers]
            ]
        states: list[dict[str, Any]] = self.trainer.strategy.broadcast(found)[0]
        self.runs = [Confusion.from_state(state) for state in states]
        self.log("val/miou", torch.tensor(self.scores().scores["miou"], device=self.device), sync_dist=True)

    def scores(self) -> Scores:
        """Means over the seeds, and the deviation of the mIoU (over n − 1).

        Raises:
            UserError: there was no validation yet.
        """
        if not self.runs:
            raise UserError("clustering has no result yet: validate it first")
        return clustering_scores(self.runs, self.the_classes(), self.recipe, self.layer)

    def _maps(self, batch: LabelledBatch) -> tuple[Tensor, Size]:
        size = (batch.labels.shape[-2], batch.labels.shape[-1])
        return embed(self.the_encoder(), batch.images.to(self.device), self.layer, size)


def clustering_scores(
    runs: Sequence[Confusion], classes: ClassSet, recipe: ClusteringRecipe, layer: str | None = None
) -> Scores:
    """Scores of several seeds."""
    each = [run.summary(classes.numbered()) for run in runs]
    scores = {name: statistics.fmean(one[name] for one in each) for name in each[0]}
    values = [one["miou"] for one in each]
    spread = statistics.stdev(values) if len(values) > 1 else float("nan")
    iou = torch.stack([run.iou() for run in runs]).nanmean(dim=0)
    k = recipe.clusters or len(classes)
    return Scores(
        protocol=f"clustering K={k}" + (" per image" if recipe.scope == "image" else ""),
        headline="miou",
        scores={"miou": scores.pop("miou"), "miou_std": spread, **scores},
        per_class={"iou": dict(zip(classes.names, iou.tolist(), strict=True))},
        counts=runs[0].counts() | {"clusters": k, "seeds": len(runs)},
        details={"miou_of_seeds": values, "recipe": spec(recipe), "layer": layer},
    )


def _rows(maps: Tensor) -> Tensor:
    """``(B, h·w, D)`` float32 of maps ``(B, D, h, w)``."""
    rows = maps.float().flatten(2).transpose(1, 2)
    if not bool(rows.isfinite().all()):
        raise UserError("the encoder gives features that are not finite: they cannot be clustered")
    return rows


def _moved(image: ClusteredImage, device: torch.device) -> ClusteredImage:
    return ClusteredImage(image.number, image.size, image.points.to(device), image.mask)


def _gathered(images: Sequence[ClusteredImage]) -> list[ClusteredImage]:
    """Those of all processes, in the order of their numbers."""
    sizes = torch.tensor([[i.number, *i.size, *i.mask.shape] for i in images], dtype=torch.int64)
    points = torch.cat([i.points for i in images]) if images else torch.empty(0, 0)
    masks = torch.cat([i.mask.flatten() for i in images]) if images else torch.empty(0, dtype=torch.uint8)
    sizes, points, masks = gathered((sizes, points, masks))
    found, at_point, at_mask = [], 0, 0
    for number, h, w, height, width in sizes.tolist():
        part = points[at_point : at_point + h * w]
        mask = masks[at_mask : at_mask + height * width].reshape(height, width)
        found.append(ClusteredImage(number, (h, w), part, mask))
        at_point, at_mask = at_point + h * w, at_mask + height * width
    return sorted(found, key=lambda image: image.number)

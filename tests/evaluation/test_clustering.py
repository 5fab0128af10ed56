"""Clustering against scikit-learn's pipeline of the same steps, and what it must find where it is easy."""

import lightning as L
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from sklearn.decomposition import PCA
from sklearn.preprocessing import StandardScaler
from tiny_models import tiny_encoder

from poodle_lightning.data.label_streets import StreetLabels
from poodle_lightning.data.labelled import LabelledDataModule
from poodle_lightning.evaluation.clustering import (
    ClusteredImage,
    Clustering,
    ClusteringRecipe,
    Projection,
    cluster_confusion,
    clustering_scores,
    nearest_resize,
)
from poodle_lightning.types import ClassSet, UserError

CLASSES = ClassSet(("a", "b", "c"), {"first": ("a",)})


def blobs(count=4, cells=(6, 8), apart=10.0, seed=0, mask=(30, 40)):
    """Images whose cells are blobs around one centre per class; the masks show the classes exactly."""
    generator = torch.Generator().manual_seed(seed)
    centres = apart * torch.eye(3, 5)
    images = []
    for number in range(count):
        truth = torch.randint(0, 3, cells, generator=generator)
        points = centres[truth.flatten()] + torch.randn(truth.numel(), 5, generator=generator)
        full = nearest_resize(truth, mask).to(torch.uint8)
        full[:2, :2] = 255
        images.append(ClusteredImage(number, cells, points, full))
    return images


@pytest.mark.parametrize("scope", ["dataset", "image"])
@pytest.mark.parametrize("clusters", [None, 7])
def test_separated_classes_are_found_whatever_their_clusters_are_called(scope, clusters):
    recipe = ClusteringRecipe(clusters=clusters, scope=scope)
    confusion = cluster_confusion(blobs(), 3, recipe)
    assert confusion.miou() > 0.999
    assert (confusion.images, confusion.ignored) == (4, 16)


def test_noise_is_matched_as_well_as_it_can_be():
    images = blobs(apart=0.0)
    confusion = cluster_confusion(images, 3, ClusteringRecipe(restarts=1))
    assert 0.1 < confusion.miou() < 0.4
    # no other one-to-one naming of the columns has a larger sum of IoU
    iou = [[_iou(confusion.matrix, row, column) for column in range(3)] for row in range(3)]
    rows, columns = linear_sum_assignment(np.array(iou), maximize=True)
    assert sum(iou[i][i] for i in range(3)) == pytest.approx(np.array(iou)[rows, columns].sum())


def _iou(matrix, row, column):
    both = int(matrix[row, column])
    return both / (int(matrix[row].sum()) + int(matrix[:, column].sum()) - both)


def test_many_clusters_never_hurt_pixel_accuracy():
    images = blobs(apart=1.5)
    few, many = (
        cluster_confusion(images, 3, ClusteringRecipe(clusters=k)).pixel_accuracy() for k in (None, 40)
    )
    assert many >= few


def test_projection_equals_scikit_learn():
    generator = torch.Generator().manual_seed(1)
    rows = torch.randn(300, 8, generator=generator) @ torch.randn(8, 8, generator=generator) + 50
    rows[:, 5] = 3.0  # never moves
    projection = Projection()
    for part in rows.split(70):
        projection.update(part)
    found = projection.finish(4)(rows)
    wanted = PCA(4, svd_solver="full").fit_transform(StandardScaler().fit_transform(rows.double().numpy()))
    wanted = torch.from_numpy(wanted)
    signs = (found.double() * wanted).sum(dim=0).sign()
    assert (found.double() - signs * wanted).abs().max() < 1e-5


def test_fewer_channels_than_components():
    projection = Projection()
    projection.update(torch.randn(20, 3, generator=torch.Generator().manual_seed(0)))
    assert projection.finish(50)(torch.ones(2, 3)).shape == (2, 3)


@pytest.mark.parametrize(("size", "into"), [((7, 5), (100, 100)), ((64, 96), (10, 17)), ((8, 8), (4, 16))])
def test_nearest_resize_is_pytorchs(size, into):
    values = torch.arange(size[0] * size[1]).reshape(size)
    wanted = F.interpolate(values[None, None].double(), size=into, mode="nearest")[0, 0].long()
    assert torch.equal(nearest_resize(values, into), wanted)


def test_scores_are_means_over_the_seeds():
    images, recipe = blobs(apart=2.0), ClusteringRecipe(restarts=1, seeds=3)
    runs = [cluster_confusion(images, 3, recipe, number) for number in range(3)]
    scores = clustering_scores(runs, CLASSES, recipe)
    values = [run.miou() for run in runs]
    assert scores.scores["miou"] == pytest.approx(np.mean(values))
    assert scores.scores["miou_std"] == pytest.approx(np.std(values, ddof=1))
    assert scores.scores["miou_first"] == pytest.approx(np.mean([float(run.iou()[0]) for run in runs]))
    assert next(iter(scores.scores)) == scores.headline == "miou"
    assert scores.details["miou_of_seeds"] == values


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"clusters": 2}, "clusters 2 must not be below the 3 classes"),
        ({"unmatched": 3}, "unmatched must be one"),
        ({"clusters": 500}, "500 clusters of 192 patches"),
        ({"clusters": 49, "scope": "image"}, "49 clusters of 48 patches"),
    ],
)
def test_what_does_not_fit_is_one_line(change, said):
    with pytest.raises(UserError, match=said):
        cluster_confusion(blobs(), 3, ClusteringRecipe(**change))


@pytest.mark.parametrize("wrong", [{"clusters": 0}, {"mask": 0}, {"seeds": 0}, {"unmatched": -1}])
def test_settings_out_of_range_are_refused(wrong):
    with pytest.raises(UserError, match="1 or more"):
        ClusteringRecipe(**wrong)


def test_module_clusters_the_held_out_images():
    streets = StreetLabels(train=1, val=3, size=(32, 64))
    labelled = LabelledDataModule("synthetic", synthetic=streets, num_workers=0)
    recipe = ClusteringRecipe(clusters=24, restarts=1, seeds=2, iterations=5)
    module = Clustering(tiny_encoder(output_stride=8).eval(), recipe=recipe)
    with pytest.raises(UserError, match="validate it first"):
        module.scores()
    trainer = L.Trainer(
        accelerator="cpu", devices=1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, use_distributed_sampler=False,
    )  # fmt: skip
    trainer.validate(module, datamodule=labelled, verbose=False)
    scores = module.scores()
    assert scores.counts["images"] == 3
    # every pixel of the 100×100 masks is counted or ignored
    assert scores.counts["labelled_pixels"] + scores.counts["ignored_pixels"] == 3 * 100 * 100
    assert 0 < scores.scores["miou"] < 1
    again = Clustering(tiny_encoder(output_stride=8).eval(), recipe=recipe)
    again.encoder.load_state_dict(module.encoder.state_dict())
    trainer.validate(again, datamodule=labelled, verbose=False)
    assert again.scores().details == scores.details

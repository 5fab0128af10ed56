"""k-means against scikit-learn."""

import pytest
import torch
from sklearn.cluster import KMeans
from sklearn.metrics import adjusted_rand_score

from poodle_lightning.ops.kmeans import _lloyd, kmeans
from poodle_lightning.ops.random import key_of


def blobs(count=60, k=6, width=5, apart=8.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    centres = apart * torch.randn(k, width, generator=generator)
    return (centres[:, None] + torch.randn(k, count, width, generator=generator)).flatten(0, 1)


def test_separated_blobs_are_found_as_by_scikit_learn():
    points = blobs()
    found = kmeans(points, 6, key_of(0))
    reference = KMeans(6, n_init=10, random_state=0, tol=0).fit(points.double().numpy())
    assert adjusted_rand_score(reference.labels_, found.labels.numpy()) == 1.0
    assert found.inertia == pytest.approx(reference.inertia_, rel=1e-6)


def test_lloyd_ends_where_scikit_learns_does_from_the_same_start():
    points = blobs(apart=1.0)
    start = points[::50][:6]
    reference = KMeans(6, init=start.double().numpy(), n_init=1, max_iter=300, tol=0).fit(
        points.double().numpy()
    )
    found = _lloyd(points, start, 300, budget=1 << 12)
    assert found.labels.tolist() == reference.labels_.tolist()
    assert found.inertia == pytest.approx(reference.inertia_, rel=1e-5)


def test_result_is_a_function_of_the_key_and_not_of_blocks():
    points = blobs(apart=1.0)
    one = kmeans(points, 9, key_of(3), restarts=2)
    again = kmeans(points, 9, key_of(3), restarts=2, budget=1)
    other = kmeans(points, 9, key_of(4), restarts=2)
    assert torch.equal(one.labels, again.labels)
    assert torch.equal(one.centres, again.centres)
    assert not torch.equal(one.labels, other.labels)


def test_more_restarts_are_never_worse():
    points = blobs(apart=2.0, k=12)
    runs = [kmeans(points, 12, key_of(5), restarts=count).inertia for count in (1, 3, 8)]
    assert runs == sorted(runs, reverse=True)
    assert runs[-1] < runs[0]


def test_every_cluster_has_points_even_from_equal_starts():
    points = torch.arange(8.0)[:, None]
    found = _lloyd(points, torch.zeros(4, 1), 50, budget=1 << 20)
    assert sorted(set(found.labels.tolist())) == [0, 1, 2, 3]


def test_equal_points_do_not_end_in_an_error():
    found = kmeans(torch.ones(10, 3), 4, key_of(0))
    assert found.inertia == 0.0


def test_fewer_points_than_clusters_are_refused():
    with pytest.raises(ValueError, match="5 clusters wanted of 4 points"):
        kmeans(torch.zeros(4, 2), 5, key_of(0))

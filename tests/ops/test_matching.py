"""Clusters to classes against all permutations, and against a loop."""

from itertools import permutations

import pytest
import torch

from poodle_lightning.ops.matching import greedy, hungarian, merged


def table(classes, clusters, seed):
    return torch.randint(0, 50, (classes, clusters), generator=torch.Generator().manual_seed(seed))


def iou(counts, klass, cluster):
    both = int(counts[klass, cluster])
    return both / (int(counts[klass].sum()) + int(counts[:, cluster].sum()) - both)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("classes", "clusters"), [(5, 5), (3, 5), (5, 3)])
def test_hungarian_is_the_best_of_all_permutations(classes, clusters, seed):
    counts = table(classes, clusters, seed)
    few, many = sorted((classes, clusters))
    pairs = [list(enumerate(chosen)) for chosen in permutations(range(many), few)]
    if clusters < classes:
        pairs = [[(klass, cluster) for cluster, klass in one] for one in pairs]
    best = max(sum(iou(counts, klass, cluster) for klass, cluster in one) for one in pairs)
    found = hungarian(counts).tolist()
    total = sum(iou(counts, klass, cluster) for cluster, klass in enumerate(found) if klass >= 0)
    assert total == pytest.approx(best, abs=1e-12)
    assert sorted(k for k in found if k >= 0) == sorted({k for k in found if k >= 0})
    assert found.count(-1) == max(0, clusters - classes)


def test_hungarian_of_empty_rows_and_columns():
    counts = torch.tensor([[0, 9, 0], [0, 0, 0], [4, 0, 0]])
    assert hungarian(counts).tolist() == [2, 0, 1]


def test_greedy_takes_the_class_of_highest_precision():
    counts = table(4, 30, 7)
    counts[:, 3] = torch.tensor([5, 9, 9, 1])  # a tie goes to the lower class
    counts[:, 4] = 0
    found = greedy(counts).tolist()
    for cluster, column in enumerate(counts.T.tolist()):
        assert found[cluster] == (-1 if not sum(column) else column.index(max(column)))


def test_merged_counts_are_those_of_relabelled_pixels():
    generator = torch.Generator().manual_seed(2)
    truth, cluster = (torch.randint(0, n, (400,), generator=generator) for n in (3, 6))
    counts = torch.bincount(truth * 6 + cluster, minlength=18).reshape(3, 6)
    assignment = torch.tensor([2, -1, 0, 1, 1, -1])
    for rest in (0, 2):
        guess = torch.tensor([rest if a < 0 else a for a in assignment.tolist()])[cluster]
        wanted = torch.bincount(truth * 3 + guess, minlength=9).reshape(3, 3)
        assert torch.equal(merged(counts, assignment, rest), wanted)

"""Exact search against a full float64 sort, whatever the blocks."""

import pytest
import torch
import torch.nn.functional as F
from sklearn.neighbors import NearestNeighbors

from poodle_lightning.ops.knn import nearest


def unit(count, width, seed):
    return F.normalize(torch.randn(count, width, generator=torch.Generator().manual_seed(seed)), dim=1)


def sorted_in_float64(queries, memory, k):
    """All pairs, rounded to float32, equal ones in the order of their places."""
    products = (queries.double() @ memory.double().T).float()
    places = products.argsort(dim=1, descending=True, stable=True)[:, :k]
    return products.gather(1, places), places


@pytest.fixture(scope="module")
def problem():
    queries, memory = unit(90, 24, 0), unit(1300, 24, 1)
    memory[400:480] = memory[3]  # more equal rows than there are spare candidates
    memory[700:704] = memory[8]
    queries[0], queries[1], queries[2] = memory[3], memory[8], -memory[3]
    queries[5] = 0.0  # all products are equal
    return queries, memory


@pytest.mark.parametrize("budget", [1 << 28, 1 << 19, 1])
@pytest.mark.parametrize("k", [1, 30])
def test_equals_a_full_sort_with_ties(problem, k, budget):
    queries, memory = problem
    queries = queries[:8] if budget == 1 else queries
    products, places = nearest(queries, memory, k, budget)
    wanted, at = sorted_in_float64(queries, memory, k)
    assert torch.equal(places, at)
    assert torch.equal(products, wanted)


def test_equal_rows_come_in_the_order_of_their_places(problem):
    queries, memory = problem
    assert nearest(queries[:1], memory, 30)[1][0].tolist() == [3, *range(400, 429)]
    assert nearest(queries[5:6], memory, 30)[1][0].tolist() == list(range(30))


def test_does_not_depend_on_how_queries_are_split(problem):
    queries, memory = problem
    whole = nearest(queries, memory, 10)
    for parts in (1, 7):
        found = [nearest(part, memory, 10) for part in queries.split(parts)]
        assert torch.equal(torch.cat([one[0] for one in found]), whole[0])
        assert torch.equal(torch.cat([one[1] for one in found]), whole[1])


def test_finds_the_neighbours_of_scikit_learn():
    queries, memory = unit(40, 16, 5), unit(500, 16, 6)
    reference = NearestNeighbors(n_neighbors=12, metric="cosine", algorithm="brute").fit(
        memory.double().numpy()
    )
    distances, places = reference.kneighbors(queries.double().numpy())
    products, found = nearest(queries, memory, 12, budget=1 << 16)
    assert found.tolist() == places.tolist()
    assert (1 - products.double() - torch.from_numpy(distances)).abs().max() < 1e-6


def test_unequal_lengths_and_negative_products():
    queries, memory = (
        torch.tensor([[1.0, 0.0]]),
        torch.tensor([[-3.0, 1.0], [-1.0, 2.0], [-0.0, 5.0], [2.0, 9.0]]),
    )
    products, places = nearest(queries, memory, 4)
    assert places.tolist() == [[3, 2, 1, 0]]
    assert products.tolist() == [[2.0, 0.0, -1.0, -3.0]]


def test_keeps_out_of_autocast_and_restores_the_precision(problem):
    queries, memory = problem
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            places = nearest(queries, memory, 30)[1]
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)
    assert torch.equal(places, sorted_in_float64(queries, memory, 30)[1])


@pytest.mark.parametrize(("width", "k", "said"), [(3, 1, r"\(2, 4\)"), (4, 6, "6 neighbours wanted of 5")])
def test_what_does_not_fit_is_refused(width, k, said):
    with pytest.raises(ValueError, match=said):
        nearest(torch.zeros(2, 4), torch.zeros(5, width), k)

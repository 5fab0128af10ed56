"""Inner products without interpolated vectors, against ``grid_sample``, loops and autograd."""

import pytest
import torch
import torch.nn.functional as F

from poodle_lightning.ops.dense import (
    add_neighbour_gradient,
    as_nodes,
    cell_products,
    corner_nodes,
    corner_weights,
    fold_cells,
    full_float32,
    locate,
    neighbour_products,
    pair_products,
    starts_of,
    weighted_sums,
)

CORNERS = ((0, 0), (0, 1), (1, 0), (1, 1))


@pytest.mark.parametrize("size", [(5, 7), (4, 2), (1, 4), (3, 1), (1, 1)])
def test_four_corners_with_their_weights_are_grid_sample_with_the_border_repeated(size):
    torch.manual_seed(0)
    maps = torch.randn(1, 3, *size, dtype=torch.float64)
    points = torch.rand(200, 2, dtype=torch.float64) * 3 - 1.5
    edges = torch.tensor([-1.0, -1 + 1 / size[1], 1 - 1 / size[0], 1.0, 7.0], dtype=torch.float64)
    points = torch.cat([points, torch.cartesian_prod(edges, edges)])
    cell, along_x, along_y = locate(points, size)
    nodes = as_nodes(maps)
    values = nodes.flatten(1, 2)[0][corner_nodes(cell, nodes.shape[2])]  # (4, P, C)
    ours = (values * corner_weights(along_x, along_y)[..., None]).sum(0)
    theirs = F.grid_sample(maps, points[None, None], padding_mode="border", align_corners=False)
    torch.testing.assert_close(ours, theirs[0, :, 0].T, rtol=0, atol=1e-13)
    assert cell.min() >= 0
    assert cell.max() < (nodes.shape[1] - 1) * (nodes.shape[2] - 1)


def test_a_point_that_is_no_number_falls_on_a_node():
    bad = torch.tensor([[float("nan"), 0.1], [float("inf"), -float("inf")], [0.1, float("nan")]])
    cell, along_x, along_y = locate(bad, (4, 6))
    assert ((cell >= 0) & (cell < 15)).all()
    assert torch.isfinite(corner_weights(along_x, along_y)).all()


def test_cell_products_are_those_of_the_four_corners():
    torch.manual_seed(1)
    nodes = torch.randn(2, 3, 4, 5, dtype=torch.float64)
    found = cell_products(neighbour_products(nodes))
    for image in range(2):
        for cell in range(6):
            row, column = divmod(cell, 3)
            corners = torch.stack([nodes[image, row + i, column + j] for i, j in CORNERS])
            torch.testing.assert_close(found[:, :, image, cell], corners @ corners.T)


def test_gradient_through_cell_products_is_that_of_autograd():
    torch.manual_seed(2)
    nodes = torch.randn(2, 4, 3, 5, dtype=torch.float64, requires_grad=True)
    found = cell_products(neighbour_products(nodes))
    weights = torch.randn_like(found)
    found.backward(weights)
    into = torch.zeros_like(nodes)
    with torch.no_grad():
        add_neighbour_gradient(into, fold_cells(weights, (4, 3)), nodes)
    torch.testing.assert_close(into, nodes.grad, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_pairs_and_weighted_sums_are_products_with_a_sparse_matrix(dtype):
    torch.manual_seed(3)
    x, y = torch.randn(6, 7, dtype=dtype), torch.randn(9, 7, dtype=dtype)
    there = torch.rand(6, 9) < 0.4
    there[2] = False  # a row without a pair
    sources, targets = there.nonzero().unbind(1)
    starts = starts_of(sources, 6)
    assert starts.tolist() == [0, *there.sum(1).cumsum(0).tolist()]
    tolerance = {"rtol": 0, "atol": 1e-5 if dtype == torch.float32 else 1e-13}
    products = pair_products(x, y, starts, targets)
    torch.testing.assert_close(products, (x @ y.T)[there], **tolerance)
    weights = torch.randn(len(targets), dtype=dtype)
    matrix = torch.zeros(6, 9, dtype=dtype)
    matrix[there] = weights
    torch.testing.assert_close(weighted_sums(y, weights, starts, targets), matrix @ y, **tolerance)
    in_turn = torch.stack([(weights[:, None] * y[targets])[sources == row].sum(0) for row in range(6)])
    torch.testing.assert_close(weighted_sums(y[targets], weights, starts), in_turn, **tolerance)


def test_as_nodes_is_free_for_channels_last_and_gives_repeated_sides_both_gradients():
    maps = torch.randn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last)
    assert as_nodes(maps).data_ptr() == maps.data_ptr()
    line = torch.randn(1, 3, 1, 5, requires_grad=True)
    nodes = as_nodes(line)
    assert nodes.shape == (1, 2, 5, 3)
    nodes.sum().backward()
    assert (line.grad == 2).all()


def test_full_float32_switches_tf32_off_and_on_again():
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    with full_float32():
        assert matmul.fp32_precision == before  # nothing to switch off
    torch.set_float32_matmul_precision("high")
    try:
        with full_float32():
            assert matmul.fp32_precision == "ieee"
        assert matmul.fp32_precision == "tf32"
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision("highest")

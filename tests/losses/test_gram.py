"""The dense loss in Gram form against the direct look-up: same loss, same gradients, far less moved."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from poodle_lightning.losses import gram, regression
from poodle_lightning.losses.regression import warped_distance
from poodle_lightning.ops.geometry import Affine, Chain, Flow

FORMS = ["cells", "all_pairs"]
GRID = (35, 54)


def smooth_flow(dtype):
    knots = torch.randn(2, 2, 3, 4, dtype=dtype) * 3
    return F.interpolate(knots, GRID, mode="bicubic", align_corners=True)


def torn_flow(dtype):
    return torch.randn(2, 2, *GRID, dtype=dtype) * 8


def constant_flow(dtype):
    return torch.tensor([3.0, -4.5], dtype=dtype).reshape(1, 2, 1, 1).repeat(2, 1, *GRID)


def affine(dtype, strength=0.15):
    moved = torch.randn(2, 3, 3, dtype=torch.float64) * strength
    moved[:, 2] = 0
    return Affine((torch.eye(3, dtype=torch.float64) + moved).to(dtype))


def problem(flow=smooth_flow, dtype=torch.float32, sizes=((5, 7), (6, 9)), channels=16):
    torch.manual_seed(0)
    p, z = (torch.randn(2, channels, *size, dtype=dtype) for size in sizes)
    to_z = affine(dtype) @ Flow.from_pixels(flow(dtype))
    return p, affine(dtype), z, to_z, GRID, torch.rand(2, *GRID) < 0.8


def results(p, to_p, z, to_z, size, visible, form):
    """Loss, and the gradients to both maps."""
    p, z = p.detach().clone().requires_grad_(), z.detach().clone().requires_grad_()
    loss = warped_distance(p, to_p, z, to_z, size, visible, form)
    (loss * 3).backward()
    return loss.detach(), p.grad, z.grad


def assert_same(case, form, tolerance=None):
    tolerance = tolerance or (1e-6 if case[0].dtype == torch.float32 else 1e-13)
    ours, direct = results(*case, form), results(*case, "direct")
    for mine, theirs in zip(ours, direct, strict=True):
        assert mine.dtype == theirs.dtype
        assert (mine - theirs).norm() <= tolerance * theirs.norm()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("flow", [smooth_flow, torn_flow, constant_flow])
def test_loss_and_gradients_are_those_of_the_direct_form(flow, dtype, form, monkeypatch):
    monkeypatch.setattr(regression, "PAIRS_PER_NODE", 10**6)
    assert_same(problem(flow, dtype), form)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("sizes", [((1, 6), (6, 1)), ((5, 1), (1, 1)), ((2, 2), (1, 3)), ((40, 3), (2, 60))])
def test_maps_of_one_row_or_column_and_finer_than_the_grid(sizes, form):
    assert_same(problem(dtype=torch.float64, sizes=sizes), form)


@pytest.mark.parametrize("form", FORMS)
def test_the_outermost_half_node_repeats_the_border(form):
    p, _, z, *_ = problem(dtype=torch.float64)
    whole = Affine.identity(2, dtype=torch.float64)
    assert_same((p, whole, z, whole, GRID, None), form)


@pytest.mark.parametrize("form", FORMS)
def test_any_kind_of_map_with_or_without_visibility(form):
    p, to_p, z, to_z, size, visible = problem(dtype=torch.float64)
    flow = Flow.from_pixels(smooth_flow(torch.float64))
    coarse = flow.resized((9, 11))  # not on the loss grid: it is sampled
    assert_same((p, flow, z, to_p, size, None), form)
    assert_same((p, Chain((to_p,)), z, coarse, size, visible), form)
    assert_same((p, to_z, z, Chain((to_p, coarse, to_p.inverse())), size, None), form)
    assert_same((p, to_p[0:1], z, Chain((flow, to_p[1:2])), size, visible), form)  # one row serves all


@pytest.mark.parametrize("form", FORMS)
def test_bfloat16_maps_are_cast_once_and_autocast_changes_nothing(form):
    p, to_p, z, to_z, size, visible = problem()
    narrow = (p.bfloat16(), to_p, z.bfloat16(), to_z, size, visible)
    wide = (p.bfloat16().float(), to_p, z.bfloat16().float(), to_z, size, visible)
    loss, to_narrow, _ = results(*narrow, form)
    same, to_wide, _ = results(*wide, form)
    assert torch.equal(loss, same)
    assert torch.equal(to_narrow, to_wide.bfloat16())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = results(*wide, form)
    assert torch.equal(inside[0], same)
    assert torch.equal(inside[1], to_wide)


@pytest.mark.parametrize("form", FORMS)
def test_groups_of_images_and_blocks_of_pixels_change_nothing(form, monkeypatch):
    case = problem(dtype=torch.float64)
    whole = results(*case, form)
    monkeypatch.setattr(regression, "ALL_PAIRS_BYTES", 1)
    monkeypatch.setattr(gram, "_BLOCK", 50)
    for mine, before in zip(results(*case, form), whole, strict=True):
        torch.testing.assert_close(mine, before, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("form", FORMS)
def test_neighbours_that_cancel_keep_the_loss_bounded(form):
    """Between v and −v a look-up is as short as one likes, and its square is what subtraction leaves."""
    torch.manual_seed(3)
    opposite = torch.randn(2, 16, 1, 1) * torch.tensor([1.0, -1.0]).repeat(4).reshape(1, 1, 1, 8)
    _, to_p, z, to_z, size, visible = problem()
    for noise, tolerance in ((0.3, 1e-5), (1e-2, 1e-3)):
        p = opposite + noise * torch.randn(2, 16, 5, 8)
        assert_same((p, to_p, z, to_z, size, visible), form, tolerance)
    # the middle one of 35 columns is right between two of 8: nothing is left there, and no direction
    whole = Affine.identity(2)
    middle = torch.zeros(2, 27, 35, dtype=torch.bool)
    middle[:, :, 17] = True
    case = (opposite.expand(2, 16, 5, 8), whole, z, whole, (27, 35))
    loss, to_map, _ = results(*case, middle, form)
    assert abs(loss - 2) < 1e-3
    assert torch.isfinite(to_map).all()
    assert_same((*case, ~middle), form, 1e-4)


@pytest.mark.parametrize("form", FORMS)
def test_zero_vectors_are_at_distance_two(form):
    p, *rest = problem()
    assert results(torch.zeros_like(p), *rest, form)[0] == 2


@pytest.mark.parametrize("form", FORMS)
def test_a_coordinate_that_is_no_number_is_masked(form):
    p, to_p, z, _, size, visible = problem()
    broken = smooth_flow(torch.float32)
    broken[0, :, 5:9] = float("nan")
    case = (p, to_p, z, Flow.from_pixels(broken), size, visible)
    loss, to_map, _ = results(*case, form)
    assert torch.isfinite(loss)
    assert torch.isfinite(to_map).all()
    shut = visible.clone()
    shut[0, 5:9] = False
    mended = Flow.from_pixels(broken.nan_to_num(0.0))
    torch.testing.assert_close(loss, results(p, to_p, z, mended, size, shut, form)[0])


@pytest.mark.parametrize("form", FORMS)
def test_repeating_gives_the_same_bits(form):
    case = problem(torn_flow)
    first, again = results(*case, form), results(*case, form)
    assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))


@pytest.mark.parametrize("form", FORMS)
def test_only_what_needs_a_gradient_gets_one_and_only_once(form):
    p, to_p, z, to_z, size, visible = problem()
    alone = warped_distance(p, to_p, z, to_z, size, visible, form)
    assert not alone.requires_grad
    leaf = z.clone().requires_grad_()
    loss = warped_distance(p, to_p, leaf, to_z, size, visible, form)
    (gradient,) = torch.autograd.grad(loss.square(), leaf, create_graph=True)
    assert torch.equal(loss.detach(), alone)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


# ---- images whose motion is torn
def test_a_torn_image_is_worked_directly_and_its_neighbour_by_cells(monkeypatch):
    torch.manual_seed(6)
    size = (128, 192)
    flow = F.interpolate(torch.randn(2, 2, 3, 4).double() * 9, size, mode="bicubic", align_corners=True)
    flow[1] += torch.randn(2, *size) * 60
    p, z = torch.randn(2, 4, 16, 24).double(), torch.randn(2, 4, 16, 24).double()
    case = (p, affine(torch.float64, 0.05), z, Flow.from_pixels(flow), size, None)
    calls = []
    plain = regression._sum_direct
    monkeypatch.setattr(regression, "PAIRS_PER_NODE", 64)
    monkeypatch.setattr(regression, "_sum_direct", lambda *a: calls.append(len(a[0])) or plain(*a))
    assert_same(case, "cells")
    assert calls == [1, 2]  # the torn image; then both, as the reference


def test_pairs_of_nodes_are_counted():
    """Against sets in Python: which (node, node) pairs the pixels of an image touch."""
    torch.manual_seed(4)
    points = [torch.rand(300, 2, dtype=torch.float64) * 2.2 - 1.1 for _ in range(2)]
    mask = torch.rand(300) < 0.7
    touched = set()
    for x, y in zip(points[0][mask].tolist(), points[1][mask].tolist(), strict=True):
        corners = []
        for (at_x, at_y), (rows, columns) in ((x, (3, 4)), (y, (5, 2))):
            column = min(max((at_x + 1) * columns / 2 - 0.5, 0), columns - 1)
            row = min(max((at_y + 1) * rows / 2 - 0.5, 0), rows - 1)
            column, row = min(int(column), columns - 2), min(int(row), rows - 2)
            corners.append([(row + i) * columns + column + j for i in (0, 1) for j in (0, 1)])
        touched |= {(i, j) for i in corners[0] for j in corners[1]}
    pairs = gram.pair_cells((points[0], points[1]), mask, (3, 4), (5, 2), 64)
    sources = torch.arange(12).repeat_interleave(pairs.node_starts.diff())
    assert set(zip(sources.tolist(), pairs.targets.tolist(), strict=True)) == touched
    assert pairs.starts[-1] == mask.sum()
    find = partial(gram.pair_cells, (points[0], points[1]), mask, (3, 4), (5, 2))
    exact = -(-len(touched) // 12)
    assert find(exact) is not None
    assert find(exact - 1) is None


# ---- what is moved
class Outputs(TorchDispatchMode):
    """Names of the operations, and the most elements that one of them wrote."""

    def __init__(self):
        super().__init__()
        self.names, self.most = set(), 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.names.add(func.overloadpacket.__name__)
        dense = [t for t in tree_leaves(result) if isinstance(t, torch.Tensor) and t.layout == torch.strided]
        self.most = max([self.most, *(t.numel() for t in dense)])
        return result


READS = {
    "_local_scalar_dense",
    "item",
    "nonzero",
    "_unique2",
    "unique_consecutive",
    "masked_select",
    "_to_cpu",
}


def large_problem():
    torch.manual_seed(5)
    size, channels = (64, 96), 64
    p, z = torch.randn(1, channels, 8, 12), torch.randn(1, channels, 8, 12)
    flow = F.interpolate(torch.randn(1, 2, 2, 3) * 4, size, mode="bicubic", align_corners=True)
    return p, affine(torch.float32)[0:1], z, Flow.from_pixels(flow), size, torch.rand(1, *size) < 0.9


@pytest.mark.parametrize("form", [*FORMS, "direct"])
def test_no_tensor_has_channels_times_pixels_values(form):
    case = large_problem()
    with Outputs() as seen:
        results(*case, form)
    whole = 64 * 64 * 96
    assert (seen.most < whole) == (form != "direct")


def test_all_pairs_reads_nothing_back():
    case = large_problem()
    with Outputs() as seen:
        results(*case, "all_pairs")
    assert not seen.names & READS
    with Outputs() as seen:
        results(*case, "cells")
    assert seen.names & READS  # the counter sees them where they are
    with FakeTensorMode(allow_non_fake_inputs=True):  # tensors without values: a read would raise
        assert results(*case, "all_pairs")[1].shape == case[0].shape


@pytest.mark.parametrize("form", FORMS)
def test_a_feature_that_is_no_number_shows_in_the_loss_though_no_pixel_reads_it(form):
    """The run must stop before the optimiser moves: the gradient is no number either."""
    p, to_p, z, to_z, size, _ = problem()
    nothing = torch.zeros(len(p), *size, dtype=torch.bool)
    assert float(warped_distance(p, to_p, z, to_z, size, nothing, form)) == 0.0
    p[0, 0, 0, 0] = torch.nan
    assert warped_distance(p, to_p, z, to_z, size, nothing, form).isnan()


@pytest.mark.parametrize("form", FORMS)
def test_visibility_of_another_shape_is_refused(form):
    p, to_p, z, to_z, size, _ = problem()
    with pytest.raises(ValueError, match="visible must be"):
        warped_distance(p, to_p, z, to_z, size, torch.ones(1, *size, dtype=torch.bool), form)

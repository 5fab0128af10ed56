import math

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from poodle_lightning.losses import regression
from poodle_lightning.losses.regression import cosine_distance, masked_mean, warped_distance
from poodle_lightning.ops.geometry import Affine, Flow


def bilinear(map_chw, x, y):
    """Value of a map at extent coordinates, one point, float64, clamped at the border."""
    _, height, width = map_chw.shape
    px = min(max((x + 1) * width / 2 - 0.5, 0.0), width - 1.0)
    py = min(max((y + 1) * height / 2 - 0.5, 0.0), height - 1.0)
    x0, y0 = int(px), int(py)
    x1, y1 = min(x0 + 1, width - 1), min(y0 + 1, height - 1)
    fx, fy = px - x0, py - y0
    top = (1 - fx) * map_chw[:, y0, x0] + fx * map_chw[:, y0, x1]
    return (1 - fy) * top + fy * ((1 - fx) * map_chw[:, y1, x0] + fx * map_chw[:, y1, x1])


def dense_loss_by_loops(p, to_p, z, to_z_affine, flow_px, visible):
    """The formula, pixel by pixel in Python floats: Σ M ‖p̂ − ẑ‖² / Σ M, then the mean over images."""
    batch, height, width = visible.shape
    total = 0.0
    for i in range(batch):
        loss, count = 0.0, 0
        a, b = to_p.matrix[i].tolist(), to_z_affine.matrix[i].tolist()
        for row in range(height):
            for column in range(width):
                x, y = (2 * column + 1) / width - 1, (2 * row + 1) / height - 1
                px, py = a[0][0] * x + a[0][1] * y + a[0][2], a[1][0] * x + a[1][1] * y + a[1][2]
                mx = x + float(flow_px[i, 0, row, column]) * 2 / width
                my = y + float(flow_px[i, 1, row, column]) * 2 / height
                zx, zy = b[0][0] * mx + b[0][1] * my + b[0][2], b[1][0] * mx + b[1][1] * my + b[1][2]
                if not (visible[i, row, column] and max(map(abs, (px, py, mx, my, zx, zy))) <= 1):
                    continue
                left, right = bilinear(p[i], px, py), bilinear(z[i], zx, zy)
                cosine = float(left @ right) / math.sqrt(float(left @ left) * float(right @ right))
                loss, count = loss + 2 - 2 * cosine, count + 1
        total += loss / count if count else 0.0
    return total / batch


@pytest.fixture
def case():
    torch.manual_seed(0)
    p, z = torch.randn(2, 5, 3, 4, dtype=torch.float64), torch.randn(2, 5, 4, 6, dtype=torch.float64)
    to_p = Affine(
        torch.eye(3).double() + torch.randn(2, 3, 3).double() * 0.1 * torch.tensor([[1], [1], [0.0]])
    )
    to_z = Affine(
        torch.eye(3).double() + torch.randn(2, 3, 3).double() * 0.1 * torch.tensor([[1], [1], [0.0]])
    )
    flow = torch.randn(2, 2, 8, 12, dtype=torch.float64) * 1.5
    return p, to_p, z, to_z, flow, torch.rand(2, 8, 12) < 0.8


FORMS = ["cells", "all_pairs", "direct"]


@pytest.mark.parametrize("form", ["auto", *FORMS])
def test_dense_loss_equals_the_formula_in_loops(case, form):
    p, to_p, z, to_z, flow, visible = case
    ours = warped_distance(p, to_p, z, to_z @ Flow.from_pixels(flow), (8, 12), visible, form)
    assert abs(float(ours) - dense_loss_by_loops(p, to_p, z, to_z, flow, visible)) < 1e-12


@pytest.mark.parametrize("form", FORMS)
def test_dense_loss_in_float32_and_bfloat16_inputs(case, form):
    p, to_p, z, to_z, flow, visible = case
    narrow = lambda x: x.to(torch.bfloat16)  # noqa: E731
    where = Affine(to_z.matrix.float()) @ Flow.from_pixels(flow.float())
    single = Affine(to_p.matrix.float())
    ours = warped_distance(narrow(p), single, narrow(z), where, (8, 12), visible, form)
    exact = dense_loss_by_loops(narrow(p).double(), to_p, narrow(z).double(), to_z, flow, visible)
    assert ours.dtype == torch.float32
    assert abs(float(ours) - exact) < 1e-5


def test_chunks_of_rows_change_neither_loss_nor_gradient(case, monkeypatch):
    p, to_p, z, to_z, flow, visible = case
    where = to_z @ Flow.from_pixels(flow)
    results = []
    for limit in (1 << 24, 2 * 5 * 12 * 3):
        monkeypatch.setattr(regression, "CPU_CHUNK_VALUES", limit)
        leaf = p.clone().requires_grad_()
        loss = warped_distance(leaf, to_p, z, where, (8, 12), visible, form="direct")
        loss.backward()
        results.append((loss.detach(), leaf.grad))
    assert torch.allclose(results[0][0], results[1][0], atol=1e-13)
    assert torch.allclose(results[0][1], results[1][1], atol=1e-13)


@pytest.mark.parametrize("form", FORMS)
def test_gradients_to_both_maps_are_those_of_finite_differences(case, form):
    p, to_p, z, to_z, flow, visible = case
    where = to_z @ Flow.from_pixels(flow)
    p, z = p[:, :2, :2, :3].clone().requires_grad_(), z[:, :2, :3, :2].clone().requires_grad_()
    assert torch.autograd.gradcheck(
        lambda p, z: warped_distance(p, to_p, z, where, (8, 12), visible, form), (p, z)
    )


@pytest.mark.parametrize("form", FORMS)
def test_image_without_a_valid_pixel_counts_zero(case, form):
    p, to_p, z, to_z, flow, visible = case
    where = to_z @ Flow.from_pixels(flow)
    none = visible.clone()
    none[1] = False
    p = p.clone().requires_grad_()
    both = warped_distance(p, to_p, z, where, (8, 12), none, form)
    both.backward()
    assert (p.grad[1] == 0).all()
    assert p.grad[0].abs().max() > 1e-4
    p = p.detach()
    first = dense_loss_by_loops(p[:1], to_p[:1], z[:1], to_z[:1], flow[:1], visible[:1])
    assert abs(both.item() - first / 2) < 1e-12


@pytest.mark.parametrize("form", FORMS)
def test_splitting_the_batch_and_averaging_is_the_whole(case, form):
    p, to_p, z, to_z, flow, visible = case
    halves = [
        warped_distance(p[i : i + 1], to_p[i : i + 1], z[i : i + 1],
                        to_z[i : i + 1] @ Flow.from_pixels(flow[i : i + 1]), (8, 12), visible[i : i + 1],
                        form)
        for i in range(2)
    ]  # fmt: skip
    whole = warped_distance(p, to_p, z, to_z @ Flow.from_pixels(flow), (8, 12), visible, form)
    assert torch.allclose(torch.stack(halves).mean(), whole, atol=1e-14)


def test_a_coordinate_map_that_needs_a_gradient_gets_it(case):
    p, to_p, z, to_z, flow, visible = case
    flow = flow.clone().requires_grad_()
    where = to_z @ Flow.from_pixels(flow)
    warped_distance(p, to_p, z, where, (8, 12), visible).backward()
    assert flow.grad.abs().max() > 1e-4
    with pytest.raises(ValueError, match="form='cells' gives a coordinate map no gradient"):
        warped_distance(p, to_p, z, where, (8, 12), visible, form="cells")
    with torch.no_grad():
        warped_distance(p, to_p, z, where, (8, 12), visible, form="cells")


def test_the_form_follows_the_device():
    p, image = torch.zeros(1, 4, 64, 128), (512, 1024)
    assert regression._best_form(p, p, image) == "cells"
    assert regression._best_form(p, p, (64, 128)) == "direct"  # too small to be worth its operations
    assert regression._best_form(p.to("meta"), p.to("meta"), image) == "direct"
    with FakeTensorMode():  # shapes on a device that need not be there
        p = torch.zeros(1, 4, 64, 128, device="cuda")
        large = torch.zeros(1, 4, 256, 256, device="cuda")
    assert regression._best_form(p, p, image) == "all_pairs"
    assert regression._best_form(large, large, image) == "direct"


def test_cosine_distance_is_squared_euclid_of_unit_vectors():
    p, z = torch.randn(7, 9).double(), torch.randn(7, 9).double()
    units = p / p.norm(dim=1, keepdim=True) - z / z.norm(dim=1, keepdim=True)
    assert torch.allclose(cosine_distance(p, z), (units**2).sum(1), atol=1e-14)


def test_cosine_distance_stays_float32_under_autocast():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert (
            cosine_distance(torch.randn(2, 3).bfloat16(), torch.randn(2, 3).bfloat16()).dtype == torch.float32
        )


def test_masked_mean_is_per_image_first():
    values = torch.tensor([[[1.0, 3.0]], [[10.0, 20.0]]])
    mask = torch.tensor([[[True, True]], [[True, False]]])
    assert masked_mean(values, mask) == (2.0 + 10.0) / 2

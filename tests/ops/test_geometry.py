import math

import kornia.augmentation as K
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.ndimage import map_coordinates

from poodle_lightning.ops.geometry import (
    Affine,
    Chain,
    Flow,
    extent_to_pixels,
    on_loss_grid,
    pixel_grid,
    pixels_to_extent,
    pull,
    pull_boxes,
    trace_grid,
    warp_into_view,
)


def random_affines(count: int, dtype=torch.float32, spread: float = 0.3) -> Affine:
    generator = torch.Generator().manual_seed(3)
    angle = (torch.rand(count, generator=generator, dtype=torch.float64) - 0.5) * math.pi / 2
    scale = torch.rand(count, generator=generator, dtype=torch.float64) * 1.5 + 0.5
    shift = (torch.rand(count, 2, generator=generator, dtype=torch.float64) - 0.5) * spread
    flip = torch.where(torch.rand(count, generator=generator) < 0.5, 1.0, -1.0).double()
    zero, one = torch.zeros(count).double(), torch.ones(count).double()
    rows = [flip * scale * angle.cos(), -scale * angle.sin(), shift[:, 0],
            flip * scale * angle.sin(), scale * angle.cos(), shift[:, 1], zero, zero, one]  # fmt: skip
    return Affine(torch.stack(rows, dim=-1).reshape(count, 3, 3).to(dtype))


def bilinear_reference(image: np.ndarray, points_px: np.ndarray) -> np.ndarray:
    """scipy's order-1 interpolation in float64; points (..., 2) as (x, y) pixels, clamped at the border."""
    height, width = image.shape[-2:]
    x = np.clip(points_px[..., 0], 0, width - 1)
    y = np.clip(points_px[..., 1], 0, height - 1)
    return np.stack([map_coordinates(channel, [y, x], order=1, mode="nearest") for channel in image])


@pytest.mark.parametrize("size", [(8, 16), (64, 128), (512, 1024)])
def test_identity_is_exact_at_powers_of_two(size):
    x = torch.rand(1, 2, *size)
    values, seen = pull(x, Affine.identity(1), size)
    assert torch.equal(values, x)
    assert seen.all()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-4), (torch.float64, 1e-9)])
@pytest.mark.parametrize("size", [(5, 7), (101, 333), (54, 1920)])
def test_identity_at_other_sizes(size, dtype, tolerance):
    x = torch.rand(1, 1, *size, dtype=dtype)
    values, seen = pull(x, Affine.identity(1, dtype=dtype), size)
    assert (values - x).abs().max() <= tolerance
    assert seen.all()


@pytest.mark.parametrize("shift", [(3, 0), (-5, 2), (0, 7)])
def test_integer_shift_by_flow_reads_the_shifted_pixel(shift):
    dx, dy = shift
    x = torch.rand(1, 3, 32, 64)
    field = torch.zeros(1, 2, 32, 64)
    field[:, 0], field[:, 1] = dx, dy
    values, seen = pull(x, Flow.from_pixels(field), (32, 64))
    for row in range(32):
        for column in range(64):
            inside = 0 <= row + dy < 32 and 0 <= column + dx < 64
            assert bool(seen[0, row, column]) is inside
            if inside:
                assert torch.equal(values[0, :, row, column], x[0, :, row + dy, column + dx])


def test_flow_units_round_trip():
    field = torch.randn(2, 2, 24, 40)
    assert torch.allclose(Flow.from_pixels(field).to_pixels(), field, atol=1e-6)


def test_thousand_transforms_invert():
    maps = random_affines(1000)
    size = (512, 1024)
    points = pixel_grid((8, 8)).expand(1000, 8, 8, 2)
    back = maps.inverse()(maps(points))
    error = (extent_to_pixels(back, size) - extent_to_pixels(points, size)).norm(dim=-1).max()
    assert error <= 1e-3


def test_composition_is_first_right_then_left():
    a, b = random_affines(6)[:3], random_affines(6)[3:]
    points = torch.rand(3, 5, 5, 2) * 2 - 1
    assert torch.allclose((a @ b)(points), a(b(points)), atol=1e-6)
    flow = Flow(torch.randn(3, 2, 9, 9) * 0.05)
    chain = a @ flow @ b
    assert isinstance(chain, Chain)
    expected = a(b(points) + flow.at(b(points)))
    assert torch.allclose(chain.trace(points)[0], expected, atol=1e-6)


def test_composed_pull_equals_float64_reference():
    torch.manual_seed(0)
    image = torch.rand(1, 2, 30, 44, dtype=torch.float64)
    affine = random_affines(2, torch.float64)[:1]
    field = torch.randn(1, 2, 20, 26, dtype=torch.float64) * 2
    values, seen = pull(image, affine @ Flow.from_pixels(field), (20, 26))
    xs, ys = np.meshgrid(np.arange(26.0), np.arange(20.0))
    moved_x = (xs + field[0, 0].numpy() + 0.5) * 2 / 26 - 1
    moved_y = (ys + field[0, 1].numpy() + 0.5) * 2 / 20 - 1
    m = affine.matrix[0].numpy()
    read_x = m[0, 0] * moved_x + m[0, 1] * moved_y + m[0, 2]
    read_y = m[1, 0] * moved_x + m[1, 1] * moved_y + m[1, 2]
    points = np.stack([(read_x + 1) * 44 / 2 - 0.5, (read_y + 1) * 30 / 2 - 0.5], axis=-1)
    expected = bilinear_reference(image[0].numpy(), points)
    assert np.abs(values[0].numpy() - expected).max() < 1e-12
    inside = (abs(moved_x) <= 1) & (abs(moved_y) <= 1) & (abs(read_x) <= 1) & (abs(read_y) <= 1)
    assert (seen[0].numpy() == inside).all()


def test_seen_is_false_where_any_frame_on_the_way_is_left():
    right = torch.zeros(1, 2, 4, 8)
    right[:, 0] = 6.0
    shrink = Affine(torch.diag(torch.tensor([0.1, 0.1, 1.0]))[None])
    _, seen = pull(torch.rand(1, 1, 4, 8), shrink @ Flow.from_pixels(right), (4, 8))
    assert seen[0, :, :2].all()
    assert not seen[0, :, 2:].any()  # back inside the second frame, but outside the first


def test_rows_are_the_rows_of_the_whole():
    x = torch.rand(2, 3, 16, 24)
    where = random_affines(2) @ Flow(torch.randn(2, 2, 16, 24) * 0.1)
    whole, seen = pull(x, where, (16, 24))
    part, seen_part = pull(x, where, (16, 24), rows=slice(5, 11))
    assert torch.equal(part, whole[:, :, 5:11])
    assert torch.equal(seen_part, seen[:, 5:11])


def test_traced_points_are_those_that_are_pulled():
    torch.manual_seed(7)
    x, flow = torch.rand(2, 3, 8, 12), Flow(torch.randn(2, 2, 16, 24) * 0.3)
    values, seen = pull(x, flow, (16, 24), rows=slice(3, 9))
    points, inside_frame = trace_grid(flow, (16, 24), 2, slice(3, 9), device=x.device, dtype=torch.float32)
    rows, columns = torch.meshgrid(torch.arange(3, 9), torch.arange(24), indexing="ij")
    centres = torch.stack([(columns + 0.5) / 12 - 1, (rows + 0.5) / 8 - 1])
    expected = (centres + flow.displacement[:, :, 3:9]).permute(0, 2, 3, 1)
    torch.testing.assert_close(points, expected)
    assert torch.equal(inside_frame, seen)
    assert torch.equal(inside_frame, (points.abs() <= 1 + 5e-7).all(-1))
    read = F.grid_sample(x, points, padding_mode="border", align_corners=False)
    torch.testing.assert_close(values, read)


def test_one_map_serves_every_stride():
    """A linear image averaged to stride 8 is the same linear function: both read alike under one map."""
    size = (64, 128)
    ramp = pixel_grid(size, dtype=torch.float64).permute(2, 0, 1)[None]
    coarse = torch.nn.functional.avg_pool2d(ramp, 8)
    where = Affine(torch.tensor([[[0.5, 0.1, 0.05], [-0.1, 0.6, 0.02], [0, 0, 1]]], dtype=torch.float64))
    fine_read, _ = pull(ramp, where, (16, 32))
    coarse_read, _ = pull(coarse, where, (16, 32))
    assert (fine_read - coarse_read).abs().max() < 1e-12


def test_kornia_matrix_becomes_the_view_kornia_drew():
    torch.manual_seed(1)
    clean = torch.nn.functional.interpolate(torch.rand(4, 3, 8, 16), size=(64, 128), mode="bicubic")
    augment = K.AugmentationSequential(
        K.RandomAffine(degrees=30.0, scale=(0.7, 1.3), translate=(0.1, 0.1), p=1.0, align_corners=False),
        K.RandomHorizontalFlip(p=0.5),
        data_keys=["input"],
    )
    clean = torch.nn.functional.pad(clean[:, :, 2:-2, 2:-2], (2, 2, 2, 2))  # zero border: padding is alike
    drawn = augment(clean)
    to_clean = Affine.from_kornia(augment.transform_matrix, clean=(64, 128), view=(64, 128))
    ours, seen = pull(clean, to_clean, (64, 128))
    assert (ours - drawn).abs().max() < 2e-4
    assert 0.3 < seen.float().mean() < 1


def test_box_reads_its_corners():
    boxes = torch.tensor([[-0.5, -1.0, 0.5, 0.25]])
    corners = torch.tensor([[[[-1.0, -1.0], [1.0, 1.0]]]])
    assert torch.allclose(Affine.box(boxes)(corners)[0, 0], torch.tensor([[-0.5, -1.0], [0.5, 0.25]]))


def test_boxes_of_an_image_are_pulled_as_one_by_one():
    x = torch.rand(3, 2, 20, 30)
    boxes = random_affines(12)
    values, seen = pull_boxes(x, boxes, (5, 7))
    for row in range(12):
        alone, alone_seen = pull(x[row // 4 : row // 4 + 1], boxes[row : row + 1], (5, 7))
        assert torch.allclose(values[row], alone[0], atol=1e-6)
        assert torch.equal(seen[row], alone_seen[0])


def test_flow_through_a_window_is_the_same_motion_in_other_units():
    """A constant shift by (6, −4) px seen in a window that shows 16×32 px as 8×16 is (3, −2) px."""
    field = torch.tensor([6.0, -4.0]).reshape(1, 2, 1, 1).expand(1, 2, 64, 128)
    window = Affine.box(torch.tensor([[-0.5, -0.5, 0.0, 0.0]]))
    seen_in = Flow.from_pixels(field).through(window, (8, 16))
    expected = torch.tensor([3.0, -2.0]).reshape(1, 2, 1, 1).expand(1, 2, 8, 16)
    assert torch.allclose(seen_in.to_pixels(), expected, atol=1e-4)


def test_flow_has_no_inverse():
    assert not hasattr(Flow(torch.zeros(1, 2, 4, 4)), "inverse")


def test_warp_orders_agree_without_an_affine_and_differ_with_one():
    flow = Flow(torch.randn(1, 2, 16, 16) * 0.1)
    points = pixel_grid((16, 16))[None]
    identity = Affine.identity(1)
    same = [warp_into_view(identity, flow, order).trace(points)[0] for order in ("paper", "code")]
    assert torch.allclose(*same, atol=1e-5)
    turned = random_affines(1)
    other = [warp_into_view(turned, flow, order).trace(points)[0] for order in ("paper", "code")]
    assert (other[0] - other[1]).abs().max() > 1e-2


def test_autocast_changes_nothing():
    x, where = torch.rand(1, 2, 32, 64), random_affines(1)
    plain, _ = pull(x, where @ Flow(torch.full((1, 2, 32, 64), 0.013)), (32, 64))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside, _ = pull(x, where.inverse().inverse() @ Flow(torch.full((1, 2, 32, 64), 0.013)), (32, 64))
    assert inside.dtype == torch.float32
    assert (plain - inside).abs().max() < 1e-4


def test_maps_compose_in_float32_under_autocast():
    a, b = random_affines(4)[:2], random_affines(4)[2:]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = a @ b
    assert torch.equal(inside.matrix, (a @ b).matrix)


def test_bfloat16_matrices_are_refused():
    with pytest.raises(TypeError, match="autocast"):
        Affine(torch.eye(3, dtype=torch.bfloat16)[None])


def test_loss_grid_of_stride_two_samples_the_motion_at_its_cells():
    ramp = pixel_grid((8, 16)).permute(2, 0, 1)[None] * 0.1
    size, motion, visible = on_loss_grid(Flow(ramp), torch.ones(1, 8, 16, dtype=torch.bool), 2)
    assert size == (4, 8)
    assert visible.shape == (1, 4, 8)
    assert torch.allclose(motion.displacement[0].permute(1, 2, 0), pixel_grid((4, 8)) * 0.1, atol=1e-6)


def test_pixel_units_round_trip():
    points = torch.rand(10, 2) * 30
    assert torch.allclose(extent_to_pixels(pixels_to_extent(points, (20, 31)), (20, 31)), points, atol=1e-5)
    assert torch.allclose(pixels_to_extent(torch.tensor([0.0, 0.0]), (10, 20)), torch.tensor([-0.95, -0.9]))

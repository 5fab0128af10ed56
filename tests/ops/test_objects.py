import pytest
import torch
from device_reads import DeviceReads
from side_by_side import in_two
from torch.utils._python_dispatch import TorchDispatchMode

from poodle_lightning.ops.objects import (
    enlarge,
    hard_masks,
    prototypes,
    refine,
    soft_masks,
    track,
)

B, T, K, N, D = 3, 2, 2, 6, 4


def make(seed=0):
    """Attention of [CLS] to the patches, queries, patch tokens, keys of all frames."""
    torch.manual_seed(seed)
    attention = torch.randn(B, K, N + 1, dtype=torch.float64).softmax(dim=2)[:, :, 1:]
    queries, patches = torch.randn(2, B, N, D, dtype=torch.float64)
    return attention, queries, patches, 2 * torch.randn(B, T, N, D, dtype=torch.float64)


def prototypes_by_loops(attention, queries):
    out = torch.zeros(B, K, D, dtype=torch.float64)
    for b in range(B):
        for i in range(K):
            for j in range(N):
                out[b, i] += attention[b, i, j] * queries[b, j]
    return out


def refined_by_loops(objects, patches, epsilon, rounds, times, normalise):
    """``times``: what the plan of mass 1 is multiplied with."""
    out = torch.zeros(B, K, D, dtype=torch.float64)
    for b in range(B):
        tokens = [row / row.square().sum().sqrt() if normalise else row for row in patches[b]]
        plan = [[float(torch.exp(objects[b, i] @ token / epsilon)) for token in tokens] for i in range(K)]
        for _ in range(rounds):
            plan = [[value / sum(row) / K for value in row] for row in plan]
            mass = [sum(plan[i][j] for i in range(K)) for j in range(N)]
            plan = [[plan[i][j] / mass[j] / N for j in range(N)] for i in range(K)]
        for i in range(K):
            for j in range(N):
                out[b, i] += times * plan[i][j] * tokens[j]
    return out


def tracked_by_loops(objects, keys):
    out = torch.zeros(B, T, K, N, dtype=torch.float64)
    for b in range(B):
        for t in range(T):
            for i in range(K):
                scores = [float(objects[b, i] @ keys[b, t, j]) / D**0.5 for j in range(N)]
                exponentials = torch.tensor(scores, dtype=torch.float64).exp()
                out[b, t, i] = exponentials / exponentials.sum()
    return out


def masked_by_loops(tracks):
    """One threshold per time and object: the mean of all clips' directions."""
    out = torch.zeros(tracks.shape, dtype=torch.bool)
    for t in range(T):
        for i in range(K):
            rows = [row / row.square().sum().sqrt() for row in tracks[:, t, i]]
            threshold = sum(float(value) for row in rows for value in row) / (len(rows) * N)
            for b, row in enumerate(rows):
                for j in range(N):
                    out[b, t, i, j] = float(row[j]) > threshold
    return out


def test_prototypes_equal_loops():
    attention, queries, _, _ = make()
    torch.testing.assert_close(prototypes(attention, queries), prototypes_by_loops(attention, queries))


@pytest.mark.parametrize(("mass", "times"), [("patch", N), ("total", 1)])
@pytest.mark.parametrize("normalise", [True, False])
def test_refined_prototypes_equal_loops(mass, times, normalise):
    attention, queries, patches, _ = make()
    objects = prototypes(attention, queries)
    found = refine(objects, patches, epsilon=0.2, iterations=5, mass=mass, normalise=normalise)
    torch.testing.assert_close(found, refined_by_loops(objects, patches, 0.2, 5, times, normalise))


def test_defaults_are_the_codes():
    attention, queries, patches, _ = make()
    objects = prototypes(attention, queries)
    wanted = refined_by_loops(objects, patches, 0.05, 30, N, normalise=True)
    torch.testing.assert_close(refine(objects, patches), wanted)


def test_tracks_equal_loops():
    attention, queries, _, keys = make()
    objects = prototypes(attention, queries)
    found = track(objects, keys)
    torch.testing.assert_close(found, tracked_by_loops(objects, keys))
    torch.testing.assert_close(found.sum(dim=3), torch.ones(B, T, K, dtype=torch.float64))


def test_the_whole_way_from_heads_to_masks_equals_loops():
    attention, queries, patches, keys = make(1)
    wanted = prototypes_by_loops(attention, queries)
    wanted = refined_by_loops(wanted, patches, 0.05, 30, N, normalise=True)
    wanted = masked_by_loops(tracked_by_loops(wanted, keys))
    found = hard_masks(track(refine(prototypes(attention, queries), patches), keys))
    assert found.dtype == torch.bool
    assert torch.equal(found, wanted)
    assert 0 < wanted.sum() < wanted.numel()


def spread_tracks():
    """Clips of unlike sharpness: what is above the batch's mean differs from what is above a clip's own."""
    torch.manual_seed(0)
    sharpness = torch.tensor([0.1, 0.5, 2.0, 8.0])[:, None, None, None]
    return (torch.randn(4, T, K, 40) * sharpness).softmax(dim=3)


def test_the_threshold_is_of_a_time_and_an_object_over_the_batch():
    tracks = spread_tracks()
    found = hard_masks(tracks)
    alone = torch.cat([hard_masks(clip) for clip in tracks.split(1)])
    assert not torch.equal(found, alone)
    one_time = hard_masks(tracks[:, :1, 1:])  # other times and objects do not matter
    assert torch.equal(found[:, :1, 1:], one_time)


def test_two_processes_mask_their_halves_as_one_masks_the_whole():
    tracks = spread_tracks()
    halves = in_two(lambda rank: hard_masks(tracks[2 * rank : 2 * rank + 2]))
    assert torch.equal(torch.cat(halves), hard_masks(tracks))
    assert not torch.equal(halves[0], hard_masks(tracks[:2]))


def test_soft_masks():
    tracks = torch.tensor([0.1, 0.4, 0.3, 0.2]).reshape(1, 1, 1, 4)
    torch.testing.assert_close(soft_masks(tracks).flatten(), torch.tensor([0.25, 1.0, 0.75, 0.5]))
    assert torch.equal(soft_masks(tracks, scale="none"), tracks)


def test_enlarged_hard_masks_are_blocks():
    masks = torch.rand(2, 3, 2, 3, 5) < 0.5
    found = enlarge(masks, (12, 20), "nearest")
    assert found.dtype == torch.float32
    for i in range(2):
        for t in range(3):
            for k in range(2):
                wanted = torch.kron(masks[i, t, k].float(), torch.ones(4, 4))
                assert torch.equal(found[i, t, k], wanted)


def test_enlarged_soft_masks_are_bilinear():
    """Between the centres of patches, linear; outside the outermost centres, constant."""
    mask = torch.rand(3, 4, dtype=torch.float64)
    found = enlarge(mask.reshape(1, 1, 1, 3, 4), (6, 16), "bilinear")[0, 0, 0]
    for row in range(6):
        for column in range(16):
            y = min(max((row + 0.5) / 2 - 0.5, 0), 2)
            x = min(max((column + 0.5) / 4 - 0.5, 0), 3)
            y0, x0 = min(int(y), 1), min(int(x), 2)
            fy, fx = y - y0, x - x0
            top = (1 - fx) * mask[y0, x0] + fx * mask[y0, x0 + 1]
            bottom = (1 - fx) * mask[y0 + 1, x0] + fx * mask[y0 + 1, x0 + 1]
            torch.testing.assert_close(found[row, column], (1 - fy) * top + fy * bottom)


def whole_way(attention, queries, patches, keys):
    tracks = track(refine(prototypes(attention, queries), patches), keys)
    hard, soft = hard_masks(tracks), soft_masks(tracks)
    grids = (part.unflatten(3, (2, 3)) for part in (hard, soft))
    return [enlarge(grid, (4, 6), mode) for grid, mode in zip(grids, ("nearest", "bilinear"), strict=True)]


def test_autocast_changes_nothing():
    inputs = [part.float() for part in make()]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = whole_way(*inputs)
    for one, other in zip(found, whole_way(*inputs), strict=True):
        assert one.dtype == torch.float32
        assert torch.equal(one, other)


class Products(TorchDispatchMode):
    """What cuBLAS is told about float32 at every matrix product."""

    def __init__(self):
        super().__init__()
        self.told = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket.__name__ in ("mm", "bmm"):
            self.told.append(torch.backends.cuda.matmul.fp32_precision)
        return func(*args, **(kwargs or {}))


def test_products_are_float32_where_the_network_may_use_tf32():
    """The softmax of Eq. 4 has a temperature of 0.05: it would make 1e-3 into 2e-2."""
    matmul = torch.backends.cuda.matmul
    before, matmul.fp32_precision = matmul.fp32_precision, "tf32"
    try:
        with Products() as products:
            whole_way(*(part.float() for part in make()))
        assert matmul.fp32_precision == "tf32"
    finally:
        matmul.fp32_precision = before
    assert products.told == ["ieee"] * 4


def test_reads_nothing_back():
    inputs = [part.float() for part in make()]
    with DeviceReads(inputs) as reads:
        whole_way(*inputs)
    assert reads.found == []

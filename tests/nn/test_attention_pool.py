import pytest
import torch

from poodle_lightning.nn.attention_pool import AttentionPool


def test_pools_as_the_formula_cell_by_cell():
    torch.manual_seed(0)
    pool = AttentionPool(6, 5).double()
    maps = torch.randn(3, 6, 4, 7, dtype=torch.float64)
    first, _, last = pool.attend
    for n in range(3):
        scores = {}
        for i in range(4):
            for j in range(7):
                inner = first.weight[:, :, 0, 0] @ maps[n, :, i, j] + first.bias
                scores[i, j] = (last.weight[0, :, 0, 0] @ inner.clamp(min=0)).exp()
        total = sum(scores.values())
        wanted = sum(score / total * maps[n, :, i, j] for (i, j), score in scores.items())
        torch.testing.assert_close(pool(maps)[n], wanted)
        torch.testing.assert_close(pool.weights(maps)[n, 2, 3], scores[2, 3] / total)


def test_equal_scores_are_the_mean():
    pool = AttentionPool(4)
    assert pool.attend[0].out_channels == 4
    torch.nn.init.zeros_(pool.attend[2].weight)
    maps = torch.randn(2, 4, 3, 5)
    torch.testing.assert_close(pool(maps), maps.mean(dim=(2, 3)))


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float32])
def test_weights_are_float32_under_autocast(kind):
    pool, maps = AttentionPool(4), torch.randn(2, 4, 9, 9).to(kind)
    with torch.autocast("cpu", torch.bfloat16):
        weights, pooled = pool.weights(maps), pool(maps)
    assert weights.dtype == pooled.dtype == torch.float32
    torch.testing.assert_close(weights.sum(dim=(1, 2)), torch.ones(2))

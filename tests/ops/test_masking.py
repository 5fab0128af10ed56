import math

import numpy as np
import pytest
import torch
from device_reads import DeviceReads
from scipy import stats

from poodle_lightning.ops.masking import (
    attention_masks,
    block_masks,
    mask_ratios,
    masked_tokens,
    random_keep,
    ratios_fit,
    shown_again,
)
from poodle_lightning.ops.random import fold, uniform

KEYS = fold(torch.arange(400), "images")
ASPECT = (0.3, 1 / 0.3)


def blocks_one_by_one(key, ratio, grid, aspect):
    """BEiT's generator in iBOT's form for one image: plain Python, the same numbers in the same order."""
    height, width = grid
    mask = np.zeros(grid, dtype=bool)
    wanted, turn, blocks = ratio * height * width, 0, []
    while mask.sum() < wanted:
        missing = wanted - mask.sum()
        tries = uniform(fold(key, "block", turn), 40, dtype=torch.float64).reshape(10, 4).tolist()
        for a, b, c, d in tries:
            least = (min(height, width) // 3) ** 2
            area = least + (missing - least) * a
            tilt = math.exp(math.log(aspect[0]) + (math.log(aspect[1]) - math.log(aspect[0])) * b)
            tall, wide = round(math.sqrt(area * tilt)), round(math.sqrt(area / tilt))
            if tall >= height or wide >= width:
                continue
            top, left = int(c * (height - tall + 1)), int(d * (width - wide + 1))
            new = tall * wide - mask[top : top + tall, left : left + wide].sum()
            if 0 < new <= missing:
                mask[top : top + tall, left : left + wide] = True
                blocks.append((tall, wide))
                break
        else:
            break
        turn += 1
    return mask, blocks


@pytest.mark.parametrize("grid", [(14, 14), (8, 8), (4, 9), (1, 5), (2, 2)])
def test_blocks_of_a_batch_equal_blocks_one_by_one(grid):
    keys = KEYS[:60]
    ratios = (mask_ratios(keys) * 64).round() / 64  # of 8 x 8 patches a whole number
    found = block_masks(keys, ratios, grid)
    assert found.shape == (60, *grid)
    assert found.dtype == torch.bool
    for key, ratio, mask in zip(keys, ratios.tolist(), found.numpy(), strict=True):
        assert np.array_equal(mask, blocks_one_by_one(key, ratio, grid, ASPECT)[0])


def test_blocks_never_hide_more_than_wanted_and_come_near():
    grid = (14, 14)
    for ratio in (0.0, 0.1, 0.3, 0.5, 1.0):
        counts = block_masks(KEYS, torch.full((400,), ratio), grid).sum(dim=(1, 2))
        assert counts.max() <= ratio * 196
        assert counts.float().mean() >= 0.75 * ratio * 196


def test_blocks_are_rectangles_of_the_drawn_shape():
    """The first block of an image, seen alone by wanting no more than it."""
    shapes = []
    for key in KEYS[:100]:
        mask, blocks = blocks_one_by_one(key, 0.3, (14, 14), ASPECT)
        assert mask.sum() <= 0.3 * 196
        shapes.append(blocks[0])
    found = block_masks(KEYS[:100], torch.full((100,), 0.3), (14, 14))
    for mask, (tall, wide) in zip(found, shapes, strict=True):
        windows = mask.float()[None, None]
        full = torch.nn.functional.avg_pool2d(windows, (tall, wide), stride=1)
        assert full.max() == 1  # a full rectangle of that shape is in it
        assert 0.25 <= tall / wide <= 4  # rounded to patches


def test_blocks_do_not_depend_on_the_batch():
    keys, ratios = KEYS[:21], mask_ratios(KEYS[:21])
    whole = block_masks(keys, ratios, (14, 14))
    parts = [block_masks(keys[i : i + 7], ratios[i : i + 7], (14, 14)) for i in (0, 7, 14)]
    assert torch.equal(whole, torch.cat(parts))
    assert torch.equal(ratios, torch.cat([mask_ratios(keys[:3]), mask_ratios(keys[3:])]))
    assert not torch.equal(whole, block_masks(KEYS[21:42], ratios, (14, 14)))


def test_ratios_of_ibot():
    """Half of the images hide nothing, the others a uniform share between 10 and 50 %."""
    keys = fold(torch.arange(4000), "ratios")
    ratios = mask_ratios(keys)
    assert ratios.dtype == torch.float64
    zero = (ratios == 0).double().mean()
    assert abs(zero - 0.5) < 0.04
    rest = ratios[ratios > 0].numpy()
    assert stats.kstest(rest, stats.uniform(0.1, 0.4).cdf).pvalue > 1e-3
    assert (mask_ratios(keys, (0.3,), (0.0,)) == 0.3).all()
    for bad in (((0.3,), (0.4,)), ((0.9,), (0.2,)), ((0.3, 0.3), (0.1,)), ((), ()), ((-0.1,), (0.0,))):
        assert not ratios_fit(*bad)
        with pytest.raises(ValueError, match="leave the interval"):
            mask_ratios(keys, *bad)


def attended(n=40, images=30):
    """Attention without ties, and how many patches to hide: none, all, and in between."""
    torch.manual_seed(0)
    attention = torch.stack([torch.randperm(n) for _ in range(images)]).float() / 1000
    counts = torch.randint(0, n + 1, (images,))
    counts[:2] = torch.tensor([0, n])
    return attention, counts


@pytest.mark.parametrize("mode", ["high", "low"])
def test_attention_masks_equal_sorting_by_hand(mode):
    attention, counts = attended()
    found = attention_masks(attention, KEYS[:30], counts, mode)
    for row, count, mask in zip(attention.tolist(), counts.tolist(), found.tolist(), strict=True):
        order = sorted(range(40), key=lambda j: row[j], reverse=mode == "high")
        assert {j for j in range(40) if mask[j]} == set(order[:count])


def test_hints_are_drawn_from_the_most_attended():
    attention, counts = attended()
    found = attention_masks(attention, KEYS[:30], counts, "hint", show=0.2, hint_from=0.25)
    for row, count, mask in zip(attention.tolist(), counts.tolist(), found.tolist(), strict=True):
        order = sorted(range(40), key=lambda j: -row[j])
        shown = [j for j in order[:count] if not mask[j]]
        assert len(shown) == int(0.2 * count)
        assert shown_again(torch.tensor([count]), 40, 0.2, 0.25).item() == len(shown)
        assert set(shown) <= set(order[:10])
        assert not any(mask[j] for j in order[count:])


def test_hints_are_as_likely_at_every_rank():
    attention = torch.arange(40.0, 0.0, -1.0).expand(400, 40)  # the rank is the place
    found = attention_masks(attention, KEYS, torch.full((400,), 20), "hint", show=0.1, hint_from=0.2)
    shown = (~found[:, :8]).sum(dim=0)
    assert shown.sum() == 400 * 2
    assert found[:, 8:20].all()
    assert stats.chisquare(shown.numpy()).pvalue > 1e-3


def test_hints_of_few_hidden_patches():
    """No more can be shown than are hidden, nor than there are to draw from."""
    attention, _ = attended()
    keys, counts = KEYS[:30], torch.full((30,), 3)
    assert not attention_masks(attention, keys, counts, "hint", show=1.0, hint_from=0.5).any()
    left = attention_masks(attention, keys, torch.full((30,), 20), "hint", show=1.0, hint_from=0.1)
    assert (left.sum(dim=1) == 16).all()
    assert shown_again(torch.tensor([20, 3, 0]), 40, 1.0, 0.1).tolist() == [4, 3, 0]


def test_random_masks_forget_the_attention():
    attention = torch.arange(40.0).expand(400, 40)
    found = attention_masks(attention, KEYS, torch.full((400,), 10), "random")
    assert (found.sum(dim=1) == 10).all()
    assert stats.chisquare(found.sum(dim=0).numpy()).pvalue > 1e-3
    assert torch.equal(found, attention_masks(-attention, KEYS, torch.full((400,), 10), "random"))


@pytest.mark.parametrize("mode", ["high", "low", "hint", "random"])
def test_attention_masks_do_not_depend_on_the_batch(mode):
    attention, counts = attended()
    whole = attention_masks(attention, KEYS[:30], counts, mode)
    for part in (slice(0, 11), slice(11, 30)):
        assert torch.equal(whole[part], attention_masks(attention[part], KEYS[:30][part], counts[part], mode))


@pytest.mark.parametrize("mode", ["high", "low", "hint", "random"])
def test_masks_read_nothing_back(mode):
    attention, counts = attended()
    with DeviceReads([attention]) as reads:
        mask = attention_masks(attention, KEYS[:30], counts, mode)
        reads.mark(mask)
        masked_tokens(mask, int(counts.sum()))
    assert reads.found == []


def test_kept_patches():
    kept = random_keep(KEYS, 196, 0.75)
    assert kept.shape == (400, 49)
    assert kept.dtype == torch.int64
    assert all(len(set(row)) == 49 and set(row) <= set(range(196)) for row in kept.tolist())
    assert stats.chisquare(torch.bincount(kept.flatten(), minlength=196).numpy()).pvalue > 1e-3
    assert (kept.diff(dim=1) < 0).any()  # not sorted: the order is drawn too
    assert torch.equal(kept, torch.cat([random_keep(KEYS[:7], 196, 0.75), random_keep(KEYS[7:], 196, 0.75)]))
    assert random_keep(KEYS[:1], 10, 0.75).shape == (1, int(10 * (1 - 0.75)))
    assert random_keep(KEYS[:1], 10, 0.0).sort().values.tolist() == [list(range(10))]
    for share in (1.0, 0.95, -0.2):
        with pytest.raises(ValueError, match="of 10 patches leaves"):
            random_keep(KEYS[:1], 10, share)


def test_masked_tokens_are_listed_in_order_with_their_weight():
    """One by one: nothing but the masked ones, and their images' means."""
    torch.manual_seed(0)
    mask = torch.rand(5, 12) < torch.tensor([0.0, 0.2, 0.5, 0.8, 1.0])[:, None]
    values = torch.rand(5, 12)
    places = [(i, j) for i in range(5) for j in range(12) if mask[i, j]]
    index, weight = masked_tokens(mask, len(places))
    assert index.dtype == torch.int64
    assert index.tolist() == [12 * i + j for i, j in places]
    each = [[float(values[i, j]) for j in range(12) if mask[i, j]] for i in range(5)]
    assert weight.tolist() == pytest.approx([1 / len(each[i]) / 5 for i, _ in places])
    mean = sum(sum(row) / len(row) for row in each if row) / 5
    assert float((values.flatten()[index] * weight).sum()) == pytest.approx(mean, rel=1e-5)


def test_where_nothing_is_masked_one_row_of_no_weight_is_left():
    index, weight = masked_tokens(torch.zeros(3, 4, dtype=torch.bool), 0)
    assert index.shape == weight.shape == (1,)
    assert weight.item() == 0

import numpy as np
import pytest
import torch
from scipy import stats

from poodle_lightning.ops.random import (
    bernoulli,
    drawn_from,
    fold,
    key_of,
    normal,
    permutation,
    randint,
    uniform,
)


def splitmix_finaliser(x: int) -> int:
    """Plain Python integers, from the published constants."""
    mask = (1 << 64) - 1
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & mask
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & mask
    return x ^ (x >> 31)


def test_uniform_equals_plain_integer_arithmetic():
    key = 123456789
    drawn = uniform(torch.tensor([key]), 4, dtype=torch.float64)[0]
    for count in range(1, 5):
        bits = splitmix_finaliser((key + count * 0x9E3779B97F4A7C15) & ((1 << 64) - 1))
        assert drawn[count - 1].item() == (bits >> 11) / (1 << 53)


def test_known_output_of_splitmix64():
    """The published generator's first output for seed 1234567 is 6457827717110365317."""
    assert splitmix_finaliser((1234567 + 0x9E3779B97F4A7C15) & ((1 << 64) - 1)) == 6457827717110365317


def test_draws_do_not_depend_on_the_batch():
    keys = fold(torch.arange(10), "view")
    whole = uniform(keys, 5)
    parts = torch.cat([uniform(keys[:3], 5), uniform(keys[3:], 5)])
    assert torch.equal(whole, parts)


def test_labels_and_order_matter():
    key = key_of(0, 1, 2)
    others = [key_of(0, 2, 1), key_of(1, 1, 2), fold(key, "a"), fold(key, "b"), fold(key, 0), fold(key, 1)]
    assert len({int(k) for k in [key, *others]}) == len(others) + 1


def test_uniform_passes_kolmogorov_smirnov_over_keys_and_counters():
    across_keys = uniform(torch.stack([key_of(0, 0, i) for i in range(4000)]), 1)[:, 0].numpy()
    across_counters = uniform(key_of(7)[None], 4000)[0].numpy()
    for sample in (across_keys, across_counters):
        assert stats.kstest(sample, "uniform").pvalue > 1e-3
        assert abs(np.corrcoef(sample[:-1], sample[1:])[0, 1]) < 0.05


def test_uniform_stays_below_its_upper_end():
    drawn = uniform(key_of(3)[None], 100_000, 0.25, 0.2500001)
    assert drawn.min() >= 0.25
    assert drawn.max() < np.float32(0.2500001)


def test_normal_is_standard():
    assert stats.kstest(normal(key_of(1)[None], 4000)[0].numpy(), "norm").pvalue > 1e-3


def test_randint_and_bernoulli_are_even():
    counts = torch.bincount(randint(key_of(2)[None], 7, 7000)[0], minlength=7)
    assert stats.chisquare(counts.numpy()).pvalue > 1e-3
    assert abs(bernoulli(key_of(4)[None], 0.3, 10_000).float().mean() - 0.3) < 0.02
    assert not bernoulli(key_of(4)[None], 0.0, 100).any()
    assert bernoulli(key_of(4)[None], 1.0, 100).all()


def test_permutations_are_permutations():
    drawn = permutation(torch.stack([key_of(i) for i in range(600)]), 3)
    assert (drawn.sort(dim=1).values == torch.arange(3)).all()
    orders = (drawn * torch.tensor([9, 3, 1])).sum(1)
    assert stats.chisquare(orders.unique(return_counts=True)[1].numpy()).pvalue > 1e-3
    assert len(orders.unique()) == 6


def test_randint_refuses_an_empty_range():
    with pytest.raises(ValueError, match="high >= 1"):
        randint(key_of(0)[None], 0)


def test_only_generators_that_draw_are_seeded_and_all_go_on_as_they_were(monkeypatch):
    """Of a machine with two devices, played by two generators, the first one is another process's."""
    here, there = (torch.Generator().manual_seed(seed) for seed in (3, 4))
    devices = type("Devices", (), {"default_generators": (here, there)})
    monkeypatch.setattr(torch, "get_device_module", lambda device: devices)
    monkeypatch.setattr(torch, "manual_seed", None)  # it seeds every device
    every = [torch.default_generator, here, there]
    before = [generator.get_state() for generator in every]
    drawn = []
    for _ in range(2):
        with drawn_from(key_of(0, "a")[None], torch.device("cuda", 1)):
            drawn.append([torch.rand(1).item(), torch.rand(1, generator=there).item()])
            assert torch.equal(here.get_state(), before[1])
        assert all(torch.equal(one.get_state(), state) for one, state in zip(every, before, strict=True))
    assert drawn[0] == drawn[1]
    with pytest.raises(ZeroDivisionError), drawn_from(key_of(0, "b")[None], torch.device("cpu")):
        assert torch.rand(1).item() / 0 != drawn[0][0]
    assert torch.equal(torch.get_rng_state(), before[0])

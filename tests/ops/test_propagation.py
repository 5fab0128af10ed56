"""Label propagation against loops in float64 and against numbers of the public scripts."""

import math
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from poodle_lightning.ops.propagation import propagate

DINO = {"topk": 5, "temperature": 0.1, "window": "square", "ties": "keep"}
VFS = {"topk": 10, "temperature": 0.07, "window": "circle", "ties": "drop"}
# facebookresearch/dino (04c0ad9), label_propagation with a window of 1, first label; xvjiarui/VFS (87ca362),
# masked_attention_efficient with neighbor_range 4, second label; both of `waves()`
OF_DINO = [
    [0.108404, 0.766475, 0.935269, 0.139614, 0.742749],
    [0.899759, 0.715843, 0.962943, 0.162579, 0.738266],
    [0.952668, 0.166722, 0.754894, 0.312006, 0.678165],
    [0.95648, 0.238549, 0.696501, 0.960754, 0.308384],
]
OF_VFS = [
    [0.796948, 0.935544, 0.192521, 0.788071, 0.943706],
    [0.110809, 0.949515, 0.268257, 0.744964, 0.950346],
    [0.229432, 0.760205, 0.871306, 0.610049, 0.970826],
    [0.260006, 0.717784, 0.9615, 0.256395, 0.689811],
]


def wave(step, *shape):
    return torch.sin(torch.arange(math.prod(shape), dtype=torch.float32) * step).reshape(shape)


def waves():
    return unit(wave(1.3, 4, 5, 3)), unit(wave(0.7, 2, 4, 5, 3)), wave(2.1, 2, 4, 5, 2).abs()


def noise(frames=3, height=7, width=9, dims=6, labels=3):
    generator = torch.Generator().manual_seed(frames)
    features = unit(torch.randn(frames + 1, height, width, dims, generator=generator))
    return features[0], features[1:], torch.rand(frames, height, width, labels, generator=generator)


def unit(features):
    return F.normalize(features, dim=-1)


def looped(queries, keys, labels, topk, temperature, radius, window, ties):
    """The formula, cell by cell, in float64."""
    height, width, _ = queries.shape
    found = torch.zeros(height, width, labels.shape[-1], dtype=torch.float64)
    for y in range(height):
        for x in range(width):
            near = []
            for frame in range(len(keys)):
                for v in range(height):
                    for u in range(width):
                        far = max(abs(v - y), abs(u - x)) if window == "square" else math.hypot(v - y, u - x)
                        inside = radius is None or (far <= radius if window == "square" else far < radius)
                        if inside:
                            product = float(queries[y, x].double() @ keys[frame, v, u].double())
                            near.append((product, labels[frame, v, u].double()))
            near.sort(key=lambda pair: -pair[0])
            best = near[:topk]
            if ties == "keep":
                best = [pair for pair in near if pair[0] >= best[-1][0]]
            weights = [math.exp(product / temperature) for product, _ in best]
            total = sum(weight * label for weight, (_, label) in zip(weights, best, strict=True))
            found[y, x] = total / sum(weights)
    return found


def test_the_numbers_of_the_public_scripts():
    queries, keys, labels = waves()
    dino = propagate(queries, keys, labels, radius=1, **DINO)
    assert torch.allclose(dino[..., 0], torch.tensor(OF_DINO), atol=2e-6)
    vfs = propagate(queries, keys, labels, radius=2, **VFS)
    assert torch.allclose(vfs[..., 1], torch.tensor(OF_VFS), atol=2e-6)


@pytest.mark.parametrize("settings", [DINO, VFS])
@pytest.mark.parametrize(("frames", "radius"), [(1, 2), (3, 3), (2, None)])
def test_is_the_loop(settings, frames, radius):
    given = noise(frames)
    wanted = looped(*given, radius=radius, **settings)
    for budget in (1, 30_000, 1 << 26):  # tiles of one cell, of several, the whole frame
        found = propagate(*given, radius=radius, budget=budget, **settings)
        assert found.dtype == torch.float32
        assert (found - wanted).abs().max() < 1e-5


def test_fewer_cells_than_wanted_are_all_taken():
    queries, keys, labels = noise(1, 3, 3)
    wanted = looped(queries, keys, labels, 50, 0.1, 1, "square", "keep")
    for ties in ("keep", "drop"):
        settings = {"topk": 50, "temperature": 0.1, "ties": ties}
        found = propagate(queries, keys, labels, radius=1, **settings)
        assert (found - wanted).abs().max() < 1e-5


def test_what_is_as_good_as_the_last_is_kept_or_dropped():
    """One query, four equal cells of which two are asked for: DINO's script takes all, VFS's takes two."""
    one = torch.ones(1, 4, 1)
    labels = torch.eye(4).reshape(1, 1, 4, 4)
    kept = propagate(one, one[None], labels, topk=2, temperature=0.1)
    assert torch.allclose(kept, torch.full((1, 4, 4), 0.25))
    dropped = propagate(one, one[None], labels, topk=2, temperature=0.1, ties="drop")
    assert ((dropped == 0.5).sum(dim=-1) == 2).all()


def test_labels_move_with_their_features():
    """A frame moved by two cells takes its labels with it, and one cell too small a window loses them."""
    generator = torch.Generator().manual_seed(0)
    features = unit(torch.randn(8, 12, 16, generator=generator))
    labels = F.one_hot(torch.randint(0, 3, (8, 12), generator=generator), 3).float()
    moved, wanted = features.roll(2, dims=1), labels.roll(2, dims=1)
    settings = {"topk": 1, "temperature": 0.1}
    found = propagate(moved, features[None], labels[None], radius=2, **settings)
    assert torch.equal(found[:, 2:], wanted[:, 2:])
    assert not torch.equal(propagate(moved, features[None], labels[None], radius=1, **settings), found)


class _Live(TorchDispatchMode):
    """The most bytes that were alive at once, of what is made."""

    def __init__(self, *given):
        super().__init__()
        self.sizes = {part.untyped_storage()._cdata: 0 for part in given}
        self.now = self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        for part in found if isinstance(found, tuple | list) else (found,):
            if isinstance(part, torch.Tensor) and part.untyped_storage()._cdata not in self.sizes:
                storage = part.untyped_storage()
                self.sizes[storage._cdata] = storage.nbytes()
                self.now += storage.nbytes()
                weakref.finalize(storage, self._freed, storage._cdata)
        self.peak = max(self.peak, self.now)
        return found

    def _freed(self, place):
        self.now -= self.sizes.pop(place)


@pytest.mark.parametrize("ties", ["keep", "drop"])
def test_a_frame_of_480p_at_stride_8_stays_in_its_budget(ties):
    """A third of the products of the dense form, and a twentieth of its 1.2 GB of products."""
    queries, keys, labels = noise(8, 60, 104, 4, 3)
    budget = 1 << 26
    dense = 2 * 4 * 8 * (60 * 104) ** 2
    with FlopCounterMode(display=False) as counter, _Live(queries, keys, labels) as live:
        propagate(queries, keys, labels, topk=5, temperature=0.1, radius=12, budget=budget, ties=ties)
    of_labels = 2 * 3 * 8 * (60 * 104) ** 2 if ties == "keep" else 0
    assert counter.get_total_flops() <= (dense + of_labels) / 3
    assert 4 * 8 * 60 * 104 < live.peak <= budget  # the lower bound: something was counted


@pytest.mark.parametrize(
    "wrong", [{"topk": 0}, {"temperature": 0.0}, {"radius": 0}, {"labels": torch.zeros(3, 7, 8, 2)}]
)
def test_what_makes_no_sense_is_refused(wrong):
    queries, keys, labels = noise()
    labels = wrong.pop("labels", labels)
    with pytest.raises(ValueError, match=r"above 0|must be"):
        propagate(queries, keys, labels, **{"topk": 2, "temperature": 0.1, **wrong})

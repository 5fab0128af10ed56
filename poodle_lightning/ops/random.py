"""Counter-based randomness: every draw is a pure function of a key, never of a generator's state.

A key is a 64-bit integer. ``fold`` derives a new key from a key and labels; ``bits`` turns a key and a
counter into 64 well-mixed bits (the finaliser of SplitMix64: Steele, Lea and Flood 2014, "Fast splittable
pseudorandom number generators"). A sample's key is ``fold(seed, epoch, index)``, so what is drawn for it
cannot depend on the number of workers, on prefetching, on how a batch is split or on a restart.

Keys live on the host: the draws are a handful of numbers per image, and a value that decides control flow
(which colour operation comes first) is then known without reading anything back from a GPU. They are worked
on in numpy: a draw is one operation to torch, whatever it takes to mix its bits.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

Label = int | str
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_NUMPY = {torch.float32: np.float32, torch.float64: np.float64}


def _mix(x: np.ndarray) -> np.ndarray:
    """SplitMix64's finaliser, elementwise on uint64 (wrap-around arithmetic)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _as_uint64(key: Tensor) -> np.ndarray:
    return np.atleast_1d(key.cpu().numpy()).astype(np.int64, copy=False).view(np.uint64)


def _label(label: Label) -> np.uint64:
    number = zlib.crc32(label.encode()) + (1 << 40) if isinstance(label, str) else label
    return np.uint64(number & 0xFFFFFFFFFFFFFFFF)


def fold(key: Tensor, *labels: Label) -> Tensor:
    """Derive a key from a key and labels.

    Args:
        key: ``(...,)`` int64 on the host.
        labels: integers, or words such as ``"colour"`` (hashed by CRC-32), applied in order.

    Returns:
        Keys of the same shape, int64.
    """
    state = _as_uint64(key)
    with np.errstate(over="ignore"):
        for label in labels:
            state = _mix((state ^ _mix(np.atleast_1d(_label(label) + _GOLDEN))) + _GOLDEN)
    return torch.from_numpy(state.view(np.int64).reshape(tuple(key.shape)).copy())


def key_of(seed: int, *labels: Label) -> Tensor:
    """The key of a seed and labels, e.g. ``key_of(seed, epoch, index)``; shape ``()`` int64."""
    return fold(torch.tensor(seed, dtype=torch.int64), *labels)


def uniform(
    key: Tensor, count: int = 1, low: float = 0.0, high: float = 1.0, *, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Uniform numbers in ``[low, high)``.

    Args:
        key: ``(B,)`` int64 on the host.
        count: numbers per key.
        low: lower end.
        high: upper end.
        dtype: of the result, float32 or float64; 53 bits are drawn, so float64 is fully random too.

    Returns:
        ``(B, count)`` on the host.
    """
    state = _as_uint64(key).reshape(-1)
    counter = np.arange(1, count + 1, dtype=np.uint64)
    with np.errstate(over="ignore"):
        bits = _mix(state[:, None] + counter * _GOLDEN)
    unit = (bits >> np.uint64(11)).astype(np.float64) / float(1 << 53)
    drawn = (low + (high - low) * unit).astype(_NUMPY[dtype], copy=False)
    if high > low:  # rounding to float32 may reach the open end; keep the interval half-open
        np.minimum(drawn, drawn.dtype.type(np.nextafter(np.float32(high), np.float32(low))), out=drawn)
    return torch.from_numpy(drawn)


def randint(key: Tensor, high: int, count: int = 1) -> Tensor:
    """Integers uniform in ``0 … high−1``; ``(B, count)`` int64 on the host."""
    if high < 1:
        raise ValueError(f"randint needs high >= 1, not {high}")
    return (uniform(key, count, dtype=torch.float64) * high).long().clamp_(max=high - 1)


def bernoulli(key: Tensor, p: float, count: int = 1) -> Tensor:
    """True with probability ``p``; ``(B, count)`` bool on the host."""
    return uniform(key, count) < p


def permutation(key: Tensor, size: int) -> Tensor:
    """One permutation of ``0 … size−1`` per key; ``(B, size)`` int64 on the host."""
    return uniform(key, size, dtype=torch.float64).argsort(dim=1, stable=True)


def normal(key: Tensor, count: int = 1) -> Tensor:
    """Standard normal numbers by Box and Muller's transform; ``(B, count)`` float32 on the host."""
    u = uniform(fold(key, "radius"), count, dtype=torch.float64)
    v = uniform(fold(key, "angle"), count, dtype=torch.float64)
    radius = (-2.0 * torch.log1p(-u)).sqrt()
    return (radius * (2.0 * math.pi * v).cos()).float()


@contextmanager
def drawn_from(key: Tensor, device: torch.device) -> Iterator[None]:
    """What torch draws inside, on the host and on a device, follows from a key ``(1,)``.

    Both generators go on as if nothing had been drawn, and no other is touched. States lie on the host, those
    of a device's generator too: nothing is read back.
    """
    generators = [torch.default_generator]
    if device.type == "mps":
        generators.append(torch.mps._get_default_mps_generator())
    elif device.type != "cpu":
        generators.append(torch.get_device_module(device).default_generators[device.index])
    states = [generator.get_state() for generator in generators]
    try:
        for generator in generators:
            generator.manual_seed(int(key))
        yield
    finally:
        for generator, state in zip(generators, states, strict=True):
            generator.set_state(state)

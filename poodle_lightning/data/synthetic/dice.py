"""Draws for building a scene: a stream of numbers that is a pure function of a key."""

from __future__ import annotations

import math
from collections.abc import Iterator

from torch import Tensor

from poodle_lightning.ops.random import Label, fold, uniform

Colour = tuple[float, float, float]
_BLOCK = 128


class Dice:
    """Numbers drawn one after the other from a key; ``fork`` starts an independent stream.

    Args:
        key: ``()`` int64, see ``poodle_lightning.ops.random``.
    """

    def __init__(self, key: Tensor) -> None:
        self._key = key
        self._stream = self._numbers()

    def _numbers(self) -> Iterator[float]:
        block = 0
        while True:
            yield from uniform(fold(self._key, block).reshape(1), _BLOCK)[0].tolist()
            block += 1

    def fork(self, *labels: Label) -> Dice:
        """An independent stream named by labels, whatever was drawn before."""
        return Dice(fold(self._key, "fork", *labels))

    def real(self, low: float = 0.0, high: float = 1.0) -> float:
        """Uniform in ``[low, high)``."""
        return low + (high - low) * next(self._stream)

    def chance(self, p: float) -> bool:
        """True with probability ``p``."""
        return next(self._stream) < p

    def whole(self, high: int) -> int:
        """Uniform in ``0 … high − 1``."""
        return min(int(next(self._stream) * high), high - 1)

    def sign(self) -> int:
        """−1 or 1."""
        return 1 if self.chance(0.5) else -1

    def count(self, mean: float) -> int:
        """A number of events: Poisson, by multiplying uniforms (Knuth)."""
        limit, product, events = math.exp(-mean), next(self._stream), 0
        while product > limit:
            product *= next(self._stream)
            events += 1
        return events

    def offset(self) -> tuple[float, float]:
        """Where on the noise table a surface starts."""
        return self.real(0, 100), self.real(0, 100)

    def colour(
        self,
        saturation: tuple[float, float] = (0.0, 0.6),
        value: tuple[float, float] = (0.15, 0.9),
        hue: tuple[float, float] = (0.0, 1.0),
        free: float = 0.4,
    ) -> Colour:
        """A colour: hue in the given range, or, with probability ``free``, any hue at all.

        Free hues are what keeps colour alone from telling the class.
        """
        low, high = (0.0, 1.0) if self.chance(free) else hue
        return hsv(self.real(low, high) % 1.0, self.real(*saturation), self.real(*value))


def hsv(hue: float, saturation: float, value: float) -> Colour:
    """RGB in [0, 1] of hue (0 … 1), saturation and value (Smith 1978)."""

    def channel(shift: float) -> float:
        k = (shift + hue * 6.0) % 6.0
        return value - value * saturation * max(0.0, min(k, 4.0 - k, 1.0))

    return channel(5.0), channel(3.0), channel(1.0)

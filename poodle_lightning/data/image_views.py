"""What a network is shown of a whole image: crops, mirror images, RandAugment, random erasing."""

from __future__ import annotations

import functools
import math
import random
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from poodle_lightning.data.label_files import Array
from poodle_lightning.nn.encoder import IMAGENET_MEAN, IMAGENET_STD
from poodle_lightning.ops.random import bernoulli, fold, normal, randint, uniform
from poodle_lightning.types import UserError

Filter = Literal["bilinear", "bicubic"]
_FILTERS = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
_WORD = re.compile(r"rand(-[a-z]+\d+(\.\d+)?)*")
_TRIES = 10  # torchvision's RandomResizedCrop, timm's RandomErasing
_ERASED_AREA = (0.02, 1 / 3)  # shares of the view; Zhong et al. (2020) have 0.02 to 0.4, timm 1/3
_ERASED_ASPECT = 0.3


@dataclass(frozen=True)
class ImageViews:
    """What a network is shown of an image; the defaults are DINO's ``eval_linear.py``.

    Args:
        size: height and width, px.
        resize: the short side in a test, before the centre is cut out.
        scale: share of the image's area that a random crop covers.
        ratio: its width over height.
        flip: probability of a mirror image.
        filter: of PIL, brings a random crop to ``size``; ``bicubic`` in finetuning (DeiT).
        test_filter: brings the short side to ``resize`` in a test.
        randaugment: timm's word for a policy (Cubuk et al., 2020), ``rand-m9-mstd0.5-inc1`` in DeiT: two
            operations, each with probability 0.5, of magnitude 9 ± 0.5. None: none.
        erase: probability that a rectangle of a random view is filled with noise (Zhong et al., 2020), normal
            per value in the units of a network's input. Views are then float16 from 0 to 255, and the noise
            may lie outside.

    Raises:
        UserError: numbers out of range, or a policy that timm does not know.
    """

    size: int = 224
    resize: int = 256
    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: float = 0.5
    filter: Filter = "bilinear"
    test_filter: Filter = "bicubic"
    randaugment: str | None = None
    erase: float = 0.0

    def __post_init__(self) -> None:
        if not 1 <= self.size <= self.resize:
            raise UserError(f"views: size {self.size} must be from 1 to resize, {self.resize}")
        if not 0 <= self.erase <= 1:
            raise UserError(f"views: erase {self.erase} is a probability: set it from 0 to 1")
        if self.randaugment is not None:
            _policy(self.randaugment, self.size, self.filter)

    def test(self, image: Array) -> Array:
        """Short side to ``resize``, then the centre; ``(size, size, 3)`` uint8."""
        height, width = image.shape[:2]
        short = min(height, width)
        whole = [int(self.resize * side / short) for side in (width, height)]
        made = np.asarray(Image.fromarray(image).resize((whole[0], whole[1]), _FILTERS[self.test_filter]))
        top, left = (round((side - self.size) / 2) for side in made.shape[:2])
        return made[top : top + self.size, left : left + self.size]

    def train(self, image: Array, key: Tensor) -> Array:
        """A random crop at ``size``, mirrored or not, changed and partly erased where that is asked for.

        Args:
            image: ``(H, W, 3)`` uint8.
            key: ``()``, all that is drawn is a function of it.

        Returns:
            ``(size, size, 3)`` uint8; float16 with ``erase``.
        """
        key = key.reshape(1)
        top, left, height, width = self.box((image.shape[0], image.shape[1]), fold(key, "crop"))
        part = Image.fromarray(np.ascontiguousarray(image[top : top + height, left : left + width]))
        part = part.resize((self.size, self.size), _FILTERS[self.filter])
        if bool(bernoulli(fold(key, "flip"), self.flip)[0, 0]):
            part = part.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        if self.randaugment is not None:
            with global_draws(fold(key, "randaugment")):
                part = _policy(self.randaugment, self.size, self.filter)(part)
        made: Array = np.asarray(part)
        return _erased(made, fold(key, "erase"), self.erase) if self.erase else made

    def box(self, size: tuple[int, int], key: Tensor) -> tuple[int, int, int, int]:
        """Top, left, height and width of a random crop: area uniform, aspect uniform in its logarithm.

        The first of ten draws that lies inside, else the largest centred crop of an allowed aspect, as
        torchvision's ``RandomResizedCrop`` has it.
        """
        rows, columns = size
        low, high = (math.log(end) for end in self.ratio)
        draws = uniform(key, 2 * _TRIES, dtype=torch.float64)[0].reshape(_TRIES, 2).tolist()
        for number, (area, aspect) in enumerate(draws):
            target = rows * columns * (self.scale[0] + area * (self.scale[1] - self.scale[0]))
            ratio = math.exp(low + aspect * (high - low))
            width, height = round(math.sqrt(target * ratio)), round(math.sqrt(target / ratio))
            if 0 < width <= columns and 0 < height <= rows:
                place = fold(key, "place", number)
                top = int(randint(fold(place, "top"), rows - height + 1))
                return top, int(randint(fold(place, "left"), columns - width + 1)), height, width
        height, width = rows, columns
        if columns / rows < self.ratio[0]:
            height = round(columns / self.ratio[0])
        elif columns / rows > self.ratio[1]:
            width = round(rows * self.ratio[1])
        return (rows - height) // 2, (columns - width) // 2, height, width


# ---- RandAugment
@functools.lru_cache(maxsize=8)
def _policy(word: str, size: int, resampling: Filter) -> Callable[[Image.Image], Image.Image]:
    """RandAugment by timm, with what timm's training transforms give it.

    Raises:
        UserError: timm does not know the policy.
    """
    from timm.data import auto_augment

    settings = {
        "translate_const": int(0.45 * size),
        "img_mean": tuple(round(255 * mean) for mean in IMAGENET_MEAN),
        "interpolation": _FILTERS[resampling],
    }
    try:
        if not _WORD.fullmatch(word):  # timm skips a part without a number in silence
            raise ValueError(word)
        made: Callable[[Image.Image], Image.Image] = auto_augment.rand_augment_transform(word, settings)
    except (AssertionError, ValueError, LookupError) as error:
        raise UserError(
            f"views: timm has no policy randaugment {word!r}: write it like rand-m9-mstd0.5-inc1"
        ) from error
    for operation in getattr(made, "ops", ()):
        if operation.aug_fn is auto_augment.posterize:
            operation.aug_fn = _posterized
    return made


def _posterized(image: Image.Image, bits: int, **_: Any) -> Image.Image:
    """The highest bits of every channel; of magnitude 10 none is left.

    timm's takes it from Pillow, whose newer versions refuse 0 bits.
    """
    if bits >= 8:
        return image
    kept = 0xFF & ~((1 << (8 - bits)) - 1)
    return image.point([value & kept for value in range(256)] * len(image.getbands()))


@contextmanager
def global_draws(key: Tensor) -> Iterator[None]:
    """What Python's and NumPy's global generators draw inside (timm's do) as a function of a key ``(1,)``.

    Both are as before afterwards.
    """
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002  # timm draws from this one
    number = int(key) & (2**63 - 1)
    random.seed(number)
    np.random.seed(number & (2**32 - 1))  # noqa: NPY002
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002


# ---- random erasing
def _erased(image: Array, key: Tensor, probability: float) -> Array:
    """``image`` as float16, with probability ``probability`` a rectangle of noise in it."""
    made: Array = image.astype(np.float16)
    if bool(bernoulli(fold(key, "whether"), probability)[0, 0]):
        box = erased_box((image.shape[0], image.shape[1]), fold(key, "box"))
        if box is not None:
            top, left, height, width = box
            noise: Any = normal(fold(key, "noise"), height * width * 3).reshape(height, width, 3).numpy()
            drawn = 255 * (np.array(IMAGENET_MEAN) + np.array(IMAGENET_STD) * noise)
            made[top : top + height, left : left + width] = drawn
    return made


def erased_box(size: tuple[int, int], key: Tensor) -> tuple[int, int, int, int] | None:
    """Top, left, height and width of the erased rectangle, as timm's ``RandomErasing`` draws it.

    Its area is uniform from 2 % to a third of the view, its aspect uniform in the logarithm from 0.3 to
    1/0.3; the first of ten draws that is smaller than the view in both directions, None where there is none.
    """
    rows, columns = size
    low, high = _ERASED_AREA
    draws = uniform(key, 2 * _TRIES, dtype=torch.float64)[0].reshape(_TRIES, 2).tolist()
    for number, (area, aspect) in enumerate(draws):
        target = rows * columns * (low + area * (high - low))
        ratio = math.exp(math.log(_ERASED_ASPECT) * (1 - 2 * aspect))
        height, width = round(math.sqrt(target * ratio)), round(math.sqrt(target / ratio))
        if height < rows and width < columns:
            place = fold(key, "place", number)
            top = int(randint(fold(place, "top"), rows - height + 1))
            return top, int(randint(fold(place, "left"), columns - width + 1)), height, width
    return None

"""Every number of the street benchmark, in one flat record that is written beside each result."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields, replace
from typing import Any

METHODS = ("poodle", "flowe", "sdm_only", "pooled_only", "supervised")
"""What is trained: PooDLe, FlowE, PooDLe's dense loss alone with its SDM, its pooled loss alone, labels."""

# First street of each part; a part is far smaller than the distance to the next one.
FIRST_STREET = {"pairs": 0, "readout": 1_000_000, "test": 2_000_000, "val": 3_000_000}
SEEDS = 3
"""Seeds of every method in the end."""
CURVE = {"poodle": (2.0, 3), "flowe": (2.0, 3), "sdm_only": (2.0, 3), "pooled_only": (5.0, 1)}
"""Further budgets in units of the frozen one, and their seeds. 5 gives the pooled loss PooDLe's compute."""
SEARCH_SEED = 100
"""Seed of the search's runs; the final ones have 0, 1, 2, …"""


@dataclass(frozen=True)
class Setting:
    """One way to run the benchmark. Fields are plain so that ``--try name=value`` can set each.

    Args:
        pairs: of frames to train on.
        streets: from which the pairs are; each gives pairs / streets of them.
        height: of the frames, px; they are twice as wide.
        difficulty: of the streets, "easy" or "hard".
        gap_low: shortest time between a pair's frames, seconds.
        gap_high: longest.
        crop: height of the training crop, px; twice as wide.
        area_low: smallest share of the frame that a crop covers.
        area_high: largest.
        depth: of the ResNet.
        width: channels of its stem.
        stem_pool: whether it has the first pooling.
        dims: channels of the SDM, equal to those of the dilated encoder that FlowE is read from.
        sdm_hidden: channels of its 3×3 convolutions.
        hidden: of projectors and predictors.
        out: of projectors and predictors.
        loss_stride: of the dense losses.
        degrees: rotation of the dense views.
        scale_low: smallest magnification of the dense views.
        scale_high: largest.
        flip: probability that a dense view is mirrored.
        shift: of the dense views, share of width and height.
        outside: what the dense views show beyond the crop.
        brightness: of the colour recipe; contrast is equal.
        saturation: of the colour recipe.
        hue: of the colour recipe.
        blur: largest standard deviation of the blur in px; 0 leaves it out.
        subcrops: K.
        subcrop: side, px.
        subcrop_low: smallest share of the crop that a subcrop covers.
        subcrop_high: largest.
        pooled_share: weight of the pooled loss in PooDLe; the dense one has the rest.
        steps: of the optimiser.
        batch: pairs per step.
        lr: AdamW's.
        warmup: steps.
        predictor_rate: learning rate of the predictors, in units of ``lr``.
        weight_decay: AdamW's.
        ema: momentum of the target at the first step; 1 at the last.
        readout_frames: labelled frames on which the linear readout is fitted.
        test_frames: labelled frames on which it is scored, of the validation or the test split.
        readout_steps: of the linear readout.
    """

    pairs: int = 1600
    streets: int = 1600
    height: int = 96
    difficulty: str = "easy"
    gap_low: float = 0.4
    gap_high: float = 0.6
    crop: int = 64
    area_low: float = 0.4
    area_high: float = 0.7
    depth: int = 10
    width: int = 24
    stem_pool: bool = False
    dims: int = 192
    sdm_hidden: int = 48
    hidden: int = 512
    out: int = 64
    loss_stride: int = 2
    degrees: float = 10.0
    scale_low: float = 0.7
    scale_high: float = 1.2
    flip: float = 0.5
    shift: float = 0.0
    outside: str = "black"
    brightness: float = 0.8
    saturation: float = 0.8
    hue: float = 0.25
    blur: float = 2.0
    subcrops: int = 4
    subcrop: int = 32
    subcrop_low: float = 0.04
    subcrop_high: float = 0.2
    pooled_share: float = 0.5
    steps: int = 700
    batch: int = 16
    lr: float = 2e-3
    warmup: int = 50
    predictor_rate: float = 1.0
    weight_decay: float = 1e-2
    ema: float = 0.98
    readout_frames: int = 300
    test_frames: int = 300
    readout_steps: int = 600

    @property
    def frame(self) -> tuple[int, int]:
        """Height and width of the frames."""
        return self.height, 2 * self.height

    @property
    def crop_size(self) -> tuple[int, int]:
        """Height and width of the training crops."""
        return self.crop, 2 * self.crop

    def changed(self, changes: dict[str, str]) -> Setting:
        """With some fields given as text.

        Raises:
            ValueError: there is no such field, or its value cannot be read.
        """
        kinds = {field.name: type(getattr(self, field.name)) for field in fields(self)}
        if strange := sorted(set(changes) - set(kinds)):
            raise ValueError(f"{', '.join(strange)}: no setting; there are {', '.join(kinds)}")
        read: dict[str, Any] = {}
        for name, text in changes.items():
            read[name] = text == "True" if kinds[name] is bool else kinds[name](text)
        return replace(self, **read)

    def longer(self, factor: float) -> Setting:
        """With another number of steps, and the warm-up's share of them kept."""
        return replace(self, steps=round(self.steps * factor), warmup=round(self.warmup * factor))

    def plain(self) -> dict[str, Any]:
        """All fields."""
        return asdict(self)


CPU = Setting(
    steps=350, warmup=35, shift=0.2, outside="border", flip=0.0, predictor_rate=3.0, brightness=0.4,
    saturation=0.6, blur=0.7,
)  # fmt: skip
GPU = replace(
    CPU, pairs=6000, streets=6000, height=192, difficulty="hard", crop=128, depth=18, width=64, dims=512,
    sdm_hidden=128, hidden=2048, out=256, loss_stride=4, blur=1.4, subcrops=6, subcrop=64, steps=600,
    batch=64, warmup=60, readout_frames=500, test_frames=500,
)  # fmt: skip
TOY = Setting(
    pairs=6, streets=6, height=32, crop=16, width=4, dims=32, sdm_hidden=8, hidden=16, out=8, subcrops=2,
    subcrop=16, steps=4, batch=3, warmup=1, readout_frames=4, test_frames=4, readout_steps=5,
)  # fmt: skip
SIZES = {"cpu": CPU, "gpu": GPU, "toy": TOY}
"""``toy`` only shows in seconds that everything runs."""

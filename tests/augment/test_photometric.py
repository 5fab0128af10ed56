import pytest
import torch
import torchvision.transforms.v2.functional as TF

from poodle_lightning.augment import photometric
from poodle_lightning.augment.photometric import Colour, recolour
from poodle_lightning.ops.random import key_of

NOTHING = {
    "brightness": 0.0,
    "contrast": 0.0,
    "saturation": 0.0,
    "hue": 0.0,
    "jitter": 1.0,
    "gray": 0.0,
    "blur": 0.0,
}


def images(count=3, size=(24, 32)):
    torch.manual_seed(0)
    return torch.rand(count, 3, *size)


def keys(count, seed=0):
    return torch.stack([key_of(seed, i) for i in range(count)])


@pytest.mark.parametrize(
    ("number", "reference", "factor"),
    [(0, TF.adjust_brightness, 1.6), (0, TF.adjust_brightness, 0.3), (1, TF.adjust_contrast, 1.7),
     (1, TF.adjust_contrast, 0.2), (2, TF.adjust_saturation, 1.8), (2, TF.adjust_saturation, 0.1),
     (3, TF.adjust_hue, 0.2), (3, TF.adjust_hue, -0.2)],
)  # fmt: skip
def test_each_operation_is_torchvisions(number, reference, factor):
    x = images()
    ours = photometric._JITTER[number](x, torch.full((3,), factor))
    # grey weights differ in the fourth digit (0.2989 in torchvision, 0.299 in Kornia)
    assert (ours - reference(x, factor)).abs().max() < 2e-3


def test_order_and_factors_are_those_drawn():
    """One image, the four operations applied one by one with torchvision, in the order of the draw."""
    from poodle_lightning.ops.random import fold, permutation, uniform

    x, key = images(1), keys(1, 9)
    recipe = Colour(jitter=1.0, gray=0.0, blur=0.0)
    jitter = fold(key, "jitter")
    order = permutation(fold(jitter, "order"), 4)[0].tolist()
    draw = uniform(fold(jitter, "factors"), 4, -1.0, 1.0)[0].tolist()
    operations = [TF.adjust_brightness, TF.adjust_contrast, TF.adjust_saturation, TF.adjust_hue]
    expected = x
    for number in order:
        factor = draw[number] * recipe.factors[number] + (0.0 if number == 3 else 1.0)
        expected = operations[number](expected, factor)
    assert (recipe(x, key) - expected).abs().max() < 5e-3


def test_grayscale_and_solarise():
    x = images(2)
    gray = Colour(**{**NOTHING, "gray": 1.0})(x, keys(2))
    assert (gray - TF.rgb_to_grayscale(x, 3)).abs().max() < 2e-3
    inverted = Colour(**NOTHING, solarize=1.0)(x, keys(2))
    assert torch.allclose(inverted, torch.where(x < 0.5, x, 1 - x))


def test_blur_equals_a_wide_gaussian_in_float64():
    x = images(1, (40, 60))
    recipe = Colour(**{**NOTHING, "blur": 1.0, "sigma": (1.5, 1.5)})
    wide = TF.gaussian_blur(x.double(), [31, 31], [1.5, 1.5])
    assert (recipe(x, keys(1)) - wide).abs().max() < 1e-4


def test_frequencies_follow_the_recipe():
    x = images(1).expand(400, -1, -1, -1)
    changed = lambda recipe: ((recipe(x, keys(400)) - x).abs().amax((1, 2, 3)) > 1e-4).float().mean()  # noqa: E731
    assert abs(changed(Colour(gray=0.0, blur=0.0, jitter=0.8)) - 0.8) < 0.06
    assert abs(changed(Colour(**{**NOTHING, "gray": 0.2})) - 0.2) < 0.06
    assert abs(changed(Colour(**{**NOTHING, "blur": 0.5, "sigma": (1.0, 2.0)})) - 0.5) < 0.08
    assert changed(Colour(**NOTHING)) == 0


def test_draws_do_not_depend_on_the_batch_and_stay_in_range():
    x = images(5)
    whole = Colour()(x, keys(5))
    parts = torch.cat([Colour()(x[:2], keys(5)[:2]), Colour()(x[2:], keys(5)[2:])])
    assert torch.equal(whole, parts)
    assert whole.min() >= 0
    assert whole.max() <= 1


def test_frames_of_a_clip_get_colours_of_their_own():
    x = images(1).expand(2, -1, -1, -1)[None]
    out = recolour(Colour(jitter=1.0), x, keys(1))
    assert (out[0, 0] - out[0, 1]).abs().max() > 1e-2


def test_float32_under_autocast_and_input_untouched():
    x = images(2)
    before = x.clone()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = Colour()(x, keys(2))
    assert inside.dtype == torch.float32
    assert torch.equal(inside, Colour()(x, keys(2)))
    assert torch.equal(x, before)


def test_impossible_hue_is_refused():
    with pytest.raises(ValueError, match="hue"):
        Colour(hue=0.7)

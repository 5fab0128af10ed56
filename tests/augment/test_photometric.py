import math

import kornia.enhance as enhance
import pytest
import torch
from device_reads import DeviceReads
from kornia.color import rgb_to_grayscale
from kornia.filters import gaussian_blur2d

from poodle_lightning.augment import photometric
from poodle_lightning.augment.photometric import Colour, recolour
from poodle_lightning.ops.random import bernoulli, fold, key_of, permutation, uniform

NOTHING = {
    "brightness": 0.0,
    "contrast": 0.0,
    "saturation": 0.0,
    "hue": 0.0,
    "jitter": 1.0,
    "gray": 0.0,
    "blur": 0.0,
}
RECIPES = {
    "poodle": {},
    "everything": {"jitter": 1.0, "gray": 0.5, "blur": 1.0, "solarize": 0.5},
    "byol": {"brightness": 0.4, "contrast": 0.4, "saturation": 0.2, "hue": 0.1, "blur": 1.0},
    "wide": {"brightness": 1.6, "contrast": 1.6, "saturation": 1.6, "jitter": 1.0},  # factors below 0 are 0
    "no contrast": {"contrast": 0.0, "jitter": 1.0, "blur": 0.0},
}


def images(count=3, size=(24, 32)):
    """Noise on top of large patches, some of them grey, black and white."""
    torch.manual_seed(0)
    patches = torch.nn.functional.interpolate(torch.rand(count, 3, 4, 4), size)
    x = (patches + torch.rand(count, 3, *size)) / 2
    x[:, :, :4, :8] = torch.tensor([0.0, 0.3, 0.5, 1.0]).repeat_interleave(2)
    return x


def keys(count, seed=0):
    return torch.stack([key_of(seed, i) for i in range(count)])


@pytest.fixture
def in_groups(monkeypatch):
    """As on a GPU: images with the same operation together."""
    monkeypatch.setattr(photometric, "one_by_one", lambda device: False)


def by_kornia(colour: Colour, x: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """One image with Kornia's operations one after the other, from draws made here."""
    jitter, blur = fold(key, "jitter"), fold(key, "blur")
    factors = uniform(fold(jitter, "factors"), 4, -1.0, 1.0) * torch.tensor(colour.factors)
    factors[:, :3] = (factors[:, :3] + 1.0).clamp(min=0.0)
    operations = [
        enhance.adjust_brightness_accumulative,
        enhance.adjust_contrast_with_mean_subtraction,
        enhance.adjust_saturation_with_gray_subtraction,
        lambda image, turns: enhance.adjust_hue(image, 2 * math.pi * turns),
    ]
    if bernoulli(jitter, colour.jitter).item():
        for number in permutation(fold(jitter, "order"), 4)[0].tolist():
            if colour.factors[number] > 0:
                x = operations[number](x, factors[:, number])
    if bernoulli(fold(key, "gray"), colour.gray).item():
        x = rgb_to_grayscale(x).expand(-1, 3, -1, -1)
    if bernoulli(blur, colour.blur).item():
        sigma = uniform(fold(blur, "sigma"), 1, *colour.sigma)
        side = 2 * min(math.ceil(4 * colour.sigma[1]), min(x.shape[-2:]) - 1) + 1
        x = gaussian_blur2d(x, (side, side), sigma.expand(-1, 2))
    if bernoulli(fold(key, "solarize"), colour.solarize).item():
        x = enhance.solarize(x)
    return x


@pytest.mark.parametrize("name", RECIPES)
def test_a_seed_gives_what_kornia_gives_for_it(name):
    colour, x = Colour(**RECIPES[name]), images(24)
    expected = torch.cat([by_kornia(colour, x[n : n + 1], keys(24)[n : n + 1]) for n in range(24)])
    assert (colour(x, keys(24)) - expected).abs().max() < 1e-5
    assert (expected - x).abs().mean() > 0.02


@pytest.mark.parametrize("name", RECIPES)
def test_groups_give_what_single_images_give(name, monkeypatch):
    colour, x = Colour(**RECIPES[name]), images(24)
    single = colour(x, keys(24))
    monkeypatch.setattr(photometric, "one_by_one", lambda device: False)
    # the blur is cut at the reach of the largest sigma, not of the image's own
    assert (colour(x, keys(24)) - single).abs().max() < 1e-5


def test_groups_are_few_whatever_the_batch_and_read_nothing_back(in_groups):
    x = images(64, (8, 8))
    found = []
    for count in (16, 64):
        with DeviceReads([x]) as reads:
            Colour(solarize=0.5)(x[:count], keys(count))
        assert reads.found == []
        found.append(len(list(photometric._groups(x, Colour().draw(keys(count)).steps))))
    assert found[1] <= 17  # 4 places × 4 operations, and greyscale


def test_blocks_do_not_show(monkeypatch):
    x, colour = images(6), Colour(jitter=1.0, gray=0.0)
    whole = colour(x, keys(6))
    monkeypatch.setattr(photometric, "_BLOCK", 100)  # 768 pixels: seven blocks and a rest
    assert (colour(x, keys(6)) - whole).abs().max() < 1e-6


def test_frequencies_follow_the_recipe():
    x = images(1).expand(400, -1, -1, -1)
    changed = lambda recipe: ((recipe(x, keys(400)) - x).abs().amax((1, 2, 3)) > 1e-4).float().mean()  # noqa: E731
    assert abs(changed(Colour(gray=0.0, blur=0.0, jitter=0.8)) - 0.8) < 0.06
    assert abs(changed(Colour(**{**NOTHING, "gray": 0.2})) - 0.2) < 0.06
    assert abs(changed(Colour(**{**NOTHING, "blur": 0.5, "sigma": (1.0, 2.0)})) - 0.5) < 0.08
    assert changed(Colour(**NOTHING)) == 0


def test_draws_do_not_depend_on_the_batch_and_stay_in_range():
    x = images(5)
    for form in ("exact", "matrix"):
        colour = Colour(form=form)
        whole = colour(x, keys(5))
        parts = torch.cat([colour(x[:2], keys(5)[:2]), colour(x[2:], keys(5)[2:])])
        assert torch.allclose(whole, parts, atol=0 if form == "exact" else 1e-6)
        assert whole.min() >= 0
        assert whole.max() <= 1


def test_frames_of_a_clip_get_colours_of_their_own():
    x = images(1).expand(2, -1, -1, -1)[None]
    out = recolour(Colour(jitter=1.0), x, keys(1))
    assert (out[0, 0] - out[0, 1]).abs().max() > 1e-2


@pytest.mark.parametrize("form", ["exact", "matrix"])
def test_float32_under_autocast_and_input_untouched(form):
    x = images(2)
    before = x.clone()
    colour = Colour(form=form)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = colour(x, keys(2))
    assert inside.dtype == torch.float32
    assert torch.equal(inside, colour(x, keys(2)))
    assert torch.equal(x, before)
    assert colour(x.half(), keys(2)).dtype == torch.float32


def test_any_memory_layout_gives_the_same():
    x = images(4)
    last = x.contiguous(memory_format=torch.channels_last)
    assert torch.equal(Colour(jitter=1.0)(x, keys(4)), Colour(jitter=1.0)(last, keys(4)))


@pytest.mark.parametrize("form", ["exact", "matrix"])
@pytest.mark.parametrize("alone", [True, False])
def test_nothing_to_do_and_no_image_at_all(form, alone, monkeypatch):
    monkeypatch.setattr(photometric, "one_by_one", lambda device: alone)
    x = images(4)
    assert torch.equal(Colour(jitter=0.0, gray=0.0, blur=0.0, form=form)(x, keys(4)), x)
    assert Colour(form=form)(x[:0], keys(4)[:0]).shape == (0, 3, 24, 32)


# ---- the approximation
def steps_in_float64(pixel, mean, steps):
    """The steps without clamps on one pixel and on the mean colour, hue as a rotation in YIQ."""
    luma = torch.tensor(photometric.operations.GRAY, dtype=torch.float64)
    for number, factor in steps:
        if number == 0:
            pixel, mean = pixel * factor, mean * factor
        elif number == 1:
            level = mean @ luma
            pixel, mean = (factor * c + (1 - factor) * level for c in (pixel, mean))
        elif number in (2, 4):
            factor = 0.0 if number == 4 else factor
            pixel, mean = (factor * c + (1 - factor) * (c @ luma) for c in (pixel, mean))
        else:
            to = torch.from_numpy(photometric._TO_YIQ)
            angle = -2 * math.pi * factor
            turned = []
            for colour in (pixel, mean):
                y, i, q = (to @ colour).tolist()
                chroma = complex(i, q) * complex(math.cos(angle), math.sin(angle))
                turned.append(torch.linalg.solve(to, torch.tensor([y, chroma.real, chroma.imag]).double()))
            pixel, mean = turned
    return pixel


def test_the_matrix_is_the_steps_folded_in_the_order_of_the_draw():
    x = images(12)
    colour = Colour(jitter=1.0, blur=0.0, gray=0.3, form="matrix")
    out = colour(x, keys(12))
    for row, steps in enumerate(colour.draw(keys(12)).steps):
        mean = x[row].double().mean((1, 2))
        for place in ((0, 0), (11, 20), (23, 31)):
            expected = steps_in_float64(x[row, :, *place].double(), mean, steps).clamp(0, 1)
            assert (out[row, :, *place] - expected).abs().max() < 1e-5


def test_several_contrasts_fold_too():
    steps = [(1, 0.6), (3, 0.1), (1, 1.3), (2, 0.5)]
    pixel, mean = torch.rand(2, 3, dtype=torch.float64)
    m, n = map(torch.from_numpy, photometric._fold_matrix(steps))
    assert torch.allclose(m @ pixel + n @ mean, steps_in_float64(pixel, mean, steps), atol=1e-12)


def test_the_matrix_is_exact_where_nothing_clamps_and_hue_stays():
    x = 0.4 + 0.2 * images(12)
    recipe = {"brightness": 0.2, "contrast": 0.2, "saturation": 0.2, "hue": 0.0, "jitter": 1.0, "blur": 0.5}
    exact, matrix = (Colour(**recipe, form=form)(x, keys(12)) for form in ("exact", "matrix"))
    assert (exact - matrix).abs().max() < 1e-5
    assert (exact - x).abs().mean() > 0.01


def test_the_matrix_turns_the_hue_the_right_way_round_and_is_only_near():
    x = 0.3 + 0.4 * images(40)
    recipe = {**NOTHING, "hue": 0.1}
    exact, matrix = (Colour(**recipe, form=form)(x, keys(40)) for form in ("exact", "matrix"))
    off, moved = (exact - matrix).abs().mean(), (exact - x).abs().mean()
    assert 1e-3 < off < 1.1 * moved
    off_the_wrong_way = (exact - 2 * x + matrix).abs().mean()  # to first order, the other direction
    assert off < 0.6 * off_the_wrong_way


@pytest.mark.parametrize(("wrong", "name"), [({"hue": 0.7}, "hue"), ({"form": "fast"}, "form")])
def test_impossible_settings_are_refused(wrong, name):
    with pytest.raises(ValueError, match=name):
        Colour(**wrong)

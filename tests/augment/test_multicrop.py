import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from device_reads import DeviceReads

from poodle_lightning.augment import photometric
from poodle_lightning.augment.geometric import ResizedCrop
from poodle_lightning.augment.multicrop import MultiCrop
from poodle_lightning.augment.photometric import Colour
from poodle_lightning.configured import build, spec
from poodle_lightning.ops.geometry import Affine
from poodle_lightning.ops.random import key_of
from poodle_lightning.types import Clip

SIZE = (24, 40)
PLAIN = Colour(0.0, 0.0, 0.0, 0.0, jitter=0.0, gray=0.0, blur=0.0)
INVERTED = Colour(0.0, 0.0, 0.0, 0.0, jitter=0.0, gray=0.0, blur=0.0, solarize=1.0)
LARGE, SMALL = ResizedCrop((10, 12), (0.4, 1.0)), ResizedCrop((6, 6), (0.05, 0.4))


def make(batch=2, count=3, size=SIZE, aspect=None, still=False):
    """A clip of noise; ``still``: all its frames are the same picture."""
    generator = torch.Generator().manual_seed(0)
    shape = (batch, 1 if still else count, 3, *size)
    frames = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
    return Clip(
        frames=frames.expand(batch, count, 3, *size).contiguous(),
        window=Affine.identity(batch),
        size=size,
        times=torch.arange(count).double().expand(batch, count),
        index=torch.arange(batch),
        key=torch.stack([key_of(5, 0, i) for i in range(batch)]),
        aspect=None if aspect is None else torch.tensor(aspect),
    )


def small(**kwargs):
    plain = {"large": LARGE, "small": SMALL, "locals": 4, "colours": (), "local_colour": PLAIN}
    return MultiCrop(**{**plain, **kwargs})


def rows(affine, crops, clips, count):
    """Matrices ``(crops, clips, frames, 3, 3)``."""
    return affine.matrix.reshape(crops, clips, count, 3, 3)


def test_shapes_and_values():
    crops = MultiCrop(small=SMALL, large=LARGE, views=3, locals=4)(make())
    assert crops.large.shape == (3, 6, 3, 10, 12)
    assert crops.small.shape == (4, 6, 3, 6, 6)
    assert (len(crops.large_to_clean), len(crops.small_to_clean)) == (18, 24)
    for part in (crops.large, crops.small):
        assert part.dtype == torch.float32
        assert part.is_contiguous()
        assert part.min() >= -1e-6
        assert part.max() <= 1 + 1e-6


def test_defaults_are_dinos():
    crop = MultiCrop()
    assert (crop.views, crop.locals) == (2, 8)
    assert (crop.large.size, crop.large.area, crop.large.flip) == ((224, 224), (0.4, 1.0), 0.5)
    assert (crop.small.size, crop.small.area, crop.small.flip) == ((96, 96), (0.05, 0.4), 0.5)
    assert crop.large.ratio == crop.small.ratio == (3 / 4, 4 / 3)
    recipes = [*crop.colours, crop.local_colour]
    assert [recipe.blur for recipe in recipes] == [1.0, 0.1, 0.5]
    assert [recipe.solarize for recipe in recipes] == [0.0, 0.2, 0.0]
    for recipe in recipes:
        assert (recipe.factors, recipe.jitter, recipe.gray) == ((0.4, 0.4, 0.2, 0.1), 0.8, 0.2)
        assert recipe.sigma == (0.1, 2.0)


def test_every_crop_shows_what_its_map_says():
    """Each pixel by itself in float64, from the bytes of the frame."""
    clip = make()
    crops = small()(clip)
    frames = clip.frames.flatten(0, 1).double().numpy() / 255
    for pixels, to_clean in ((crops.large, crops.large_to_clean), (crops.small, crops.small_to_clean)):
        matrices = to_clean.matrix.double().numpy().reshape(len(pixels), len(frames), 3, 3)
        expected = np.empty(pixels.shape)
        height, width = pixels.shape[-2:]
        for crop, image, row, column in np.ndindex(len(pixels), len(frames), height, width):
            place = np.array([(2 * column + 1) / width - 1, (2 * row + 1) / height - 1, 1.0])
            x, y, _ = matrices[crop, image] @ place
            expected[crop, image, :, row, column] = bilinear(frames[image], x, y)
        np.testing.assert_allclose(pixels.numpy(), expected, atol=2e-5)


def bilinear(frame, x, y):
    """Value of ``(3, H, W)`` at a point of its extent, border values outside."""
    height, width = frame.shape[1:]
    x = min(max((x + 1) * width / 2 - 0.5, 0), width - 1)
    y = min(max((y + 1) * height / 2 - 0.5, 0), height - 1)
    left, top = min(int(x), width - 2), min(int(y), height - 2)
    dx, dy = x - left, y - top
    upper = (1 - dx) * frame[:, top, left] + dx * frame[:, top, left + 1]
    lower = (1 - dx) * frame[:, top + 1, left] + dx * frame[:, top + 1, left + 1]
    return (1 - dy) * upper + dy * lower


def test_large_crops_are_clip_wide_and_small_ones_each_frames_own():
    crops = small()(make())
    large, local = rows(crops.large_to_clean, 2, 2, 3), rows(crops.small_to_clean, 4, 2, 3)
    assert torch.equal(large, large[:, :, :1].expand_as(large))
    different = large[:, :, 0].flatten(0, 1)
    assert len({tuple(matrix.flatten().tolist()) for matrix in different}) == 4  # views × clips
    assert len({tuple(matrix.flatten().tolist()) for matrix in local.flatten(0, 2)}) == 4 * 2 * 3


def test_every_frame_by_itself_where_asked_for():
    crops = small(clip_wide=False)(make())
    assert len({tuple(m.flatten().tolist()) for m in crops.large_to_clean.matrix}) == 2 * 2 * 3


def test_the_split_of_a_batch_changes_nothing():
    clip, crop = make(batch=3, aspect=[1.0, 2.0, 0.5]), MultiCrop(LARGE, SMALL, locals=3)
    whole = crop(clip)
    for number in range(3):
        part, mine = crop(clip[number : number + 1]), slice(3 * number, 3 * number + 3)
        assert torch.equal(part.large, whole.large[:, mine])
        assert torch.equal(part.small, whole.small[:, mine])
        for one, all_ in (
            (part.large_to_clean, whole.large_to_clean),
            (part.small_to_clean, whole.small_to_clean),
        ):
            assert torch.equal(one.matrix, all_.matrix.reshape(-1, 9, 3, 3)[:, mine].flatten(0, 1))


def test_colours_are_each_frames_own():
    clip = make(still=True)
    plain = small()(clip).large.unflatten(1, (2, 3))
    assert torch.equal(plain, plain[:, :, :1].expand_as(plain))
    coloured = small(colours=(Colour(jitter=1.0, gray=0.0, blur=0.0),))(clip).large.unflatten(1, (2, 3))
    for view in range(2):
        for number in range(2):
            for one, other in ((0, 1), (1, 2), (0, 2)):
                assert (coloured[view, number, one] - coloured[view, number, other]).abs().max() > 0.02
    assert (coloured[0] - coloured[1]).abs().max() > 0.02


def test_every_view_gets_its_own_recipe():
    clip = make()
    plain = small(views=3)(clip)
    found = small(views=3, colours=(PLAIN, INVERTED, PLAIN), local_colour=INVERTED)(clip)
    inverted = torch.where(plain.large >= 0.5, 1 - plain.large, plain.large)
    for view, expected in enumerate((plain.large, inverted, plain.large)):
        assert torch.equal(found.large[view], expected[view])
    assert torch.equal(found.small, torch.where(plain.small >= 0.5, 1 - plain.small, plain.small))


@pytest.mark.parametrize(
    ("arguments", "calls"),
    [
        ({"colours": None}, [6, 6, 24]),  # the two recipes of DINO, then the small crops
        ({"colours": (Colour(),), "views": 5}, [30, 24]),
        ({"colours": (Colour(), Colour(blur=0.1), Colour()), "views": 3}, [12, 6, 24]),
        ({"colours": (), "locals": 0}, []),
    ],
)
def test_colour_and_sampling_are_few_calls(arguments, calls, monkeypatch):
    seen, sampled = [], []
    call, sample = Colour.__call__, torch.nn.functional.grid_sample
    monkeypatch.setattr(Colour, "__call__", lambda self, x, keys: seen.append(len(x)) or call(self, x, keys))
    monkeypatch.setattr(
        torch.nn.functional, "grid_sample", lambda *x, **kwargs: sampled.append(1) or sample(*x, **kwargs)
    )
    small(**arguments)(make())
    assert seen == calls
    assert len(sampled) == (2 if arguments.get("locals") == 0 else 3)  # the clip's own, then one each


def test_area_and_ratio_are_those_of_the_picture_before_it_was_squeezed():
    aspects = [0.5, 1.0, 16 / 9]
    clip = make(batch=3, count=40, size=(16, 16), aspect=aspects)
    crops = small(
        large=ResizedCrop((8, 8), (0.3, 0.5), fit="redraw"),
        small=ResizedCrop((8, 8), (0.05, 0.2), fit="redraw"),
        clip_wide=False,
    )(clip)
    for to_clean, count, (low, high) in (
        (crops.large_to_clean, 2, (0.3, 0.5)),
        (crops.small_to_clean, 4, (0.05, 0.2)),
    ):
        share = rows(to_clean, count, 3, 40)
        width, height = share[..., 0, 0].abs(), share[..., 1, 1]
        assert (width * height).min() >= low - 1e-5
        assert (width * height).max() <= high + 1e-5
        ratio = width / height * torch.tensor(aspects)[:, None]
        assert ratio.min() >= 3 / 4 - 1e-4
        assert ratio.max() <= 4 / 3 + 1e-4
        # each image has its own: all of the range is used in each
        assert (ratio.amin(dim=(0, 2)) < 0.85).all()
        assert (ratio.amax(dim=(0, 2)) > 1.18).all()


def test_an_unsqueezed_picture_has_the_shape_of_its_size():
    clip = make()
    found = small()(clip)
    given = small()(replace(clip, aspect=torch.full((2,), SIZE[1] / SIZE[0])))
    torch.testing.assert_close(found.large_to_clean.matrix, given.large_to_clean.matrix)
    torch.testing.assert_close(found.small_to_clean.matrix, given.small_to_clean.matrix)


def test_maps_stay_on_the_host():
    """Nothing on the device reads them; torch's device without memory stands for one."""
    crops = small()(make().to("meta"))
    assert (crops.large.device.type, crops.small.device.type) == ("meta", "meta")
    for to_clean in (crops.large_to_clean, crops.small_to_clean):
        assert to_clean.matrix.device.type == "cpu"


def test_no_small_crops():
    crops = small(locals=0, views=1)(make())
    assert crops.large.shape == (1, 6, 3, 10, 12)
    assert crops.small is crops.small_to_clean is None


def test_nothing_depends_on_the_global_random_state_or_on_autocast():
    crop, clip = MultiCrop(LARGE, SMALL), make()
    torch.manual_seed(1)
    state, first = torch.get_rng_state(), crop(clip)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    with torch.autocast("cpu", torch.bfloat16):
        second = crop(clip)
    assert torch.equal(first.large, second.large)
    assert torch.equal(first.small, second.small)


def test_other_keys_other_crops():
    crop, clip = small(), make()
    other = crop(replace(clip, key=clip.key + 1))
    assert (
        not torch.isclose(crop(clip).large_to_clean.matrix, other.large_to_clean.matrix).all(-1).all(-1).any()
    )


def test_nothing_is_read_back(monkeypatch):
    """In the form of a GPU, whose crops are those of a CPU up to the blur's reach."""
    crop, clip = MultiCrop(LARGE, SMALL), make(aspect=[1.0, 2.0])
    on_host = crop(clip)
    monkeypatch.setattr(photometric, "one_by_one", lambda device: False)
    with DeviceReads([clip.frames, clip.window.matrix]) as reads:
        found = crop(clip)
    assert reads.found == []
    torch.testing.assert_close(found.large, on_host.large, rtol=0, atol=1e-4)
    torch.testing.assert_close(found.small, on_host.small, rtol=0, atol=1e-4)


def test_spec_builds_an_equal_one():
    crop, clip = MultiCrop(LARGE, SMALL, views=1, locals=2, colours=(Colour(),), clip_wide=False), make()
    again = build(spec(crop))
    assert torch.equal(crop(clip).large, again(clip).large)
    assert torch.equal(crop(clip).small, again(clip).small)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"views": 0}, "views >= 1 and locals >= 0, not 0 and 8"),
        ({"locals": -1}, "views >= 1 and locals >= 0, not 2 and -1"),
        ({"views": 3, "colours": (Colour(), Colour())}, "2 colours for 3 views"),
    ],
)
def test_impossible_numbers_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        MultiCrop(**arguments)


def test_places_are_spread_over_the_frame():
    """Centres of small crops reach every side, and half of the crops are mirrored."""
    matrices = small(locals=50)(make(count=10)).small_to_clean.matrix
    centres = matrices[:, :2, 2]
    assert (centres.amax(dim=0) > 0.6).all()
    assert (centres.amin(dim=0) < -0.6).all()
    assert centres.mean(dim=0).abs().max() < 0.05
    mirrored = (matrices[:, 0, 0] < 0).double().mean()
    assert mirrored == pytest.approx(0.5, abs=3 * math.sqrt(0.25 / len(matrices)))

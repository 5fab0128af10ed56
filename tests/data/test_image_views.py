"""Views of whole images: against torchvision and timm, and as functions of their key alone."""

import random

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data.auto_augment import posterize, rand_augment_transform
from timm.data.random_erasing import RandomErasing
from torchvision.transforms import CenterCrop, Compose, RandomResizedCrop, Resize
from torchvision.transforms import functional as TF
from torchvision.transforms.functional import InterpolationMode

from poodle_lightning.data.image_views import ImageViews, _policy, erased_box, global_draws
from poodle_lightning.nn.encoder import IMAGENET_MEAN, IMAGENET_STD
from poodle_lightning.ops.random import bernoulli, fold, key_of
from poodle_lightning.types import UserError

POLICY = "rand-m9-mstd0.5-inc1"


def picture(height, width, seed):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.mark.parametrize("size", [(300, 431), (431, 300), (256, 256), (90, 64)])
def test_test_view_is_torchvisions(size):
    image = picture(*size, seed=0)
    wanted = Compose([Resize(256, InterpolationMode.BICUBIC), CenterCrop(224)])(Image.fromarray(image))
    assert np.array_equal(ImageViews().test(image), np.asarray(wanted))


def test_train_view_is_torchvisions_for_the_same_box():
    views, image = ImageViews(size=32, resize=32), picture(90, 140, seed=1)
    mirrored = 0
    for number in range(6):
        key = key_of(0, number)
        box = views.box((90, 140), fold(key.reshape(1), "crop"))
        wanted = TF.resized_crop(Image.fromarray(image), *box, [32, 32], InterpolationMode.BILINEAR)
        if bool(bernoulli(fold(key.reshape(1), "flip"), 0.5)):
            wanted, mirrored = TF.hflip(wanted), mirrored + 1
        assert np.array_equal(views.train(image, key), np.asarray(wanted))
    assert 0 < mirrored < 6


def test_boxes_have_torchvisions_distribution():
    views = ImageViews()
    ours = torch.tensor([views.box((300, 400), key_of(5, i).reshape(1)) for i in range(1500)]).double()
    torch.manual_seed(0)
    image = torch.empty(3, 300, 400)
    theirs = torch.tensor(
        [RandomResizedCrop.get_params(image, [0.08, 1.0], [3 / 4, 4 / 3]) for _ in range(1500)]
    )
    theirs = theirs.double()
    assert (ours[:, :2] >= 0).all()
    assert (ours[:, 0] + ours[:, 2] <= 300).all()
    assert (ours[:, 1] + ours[:, 3] <= 400).all()
    for column in range(4):
        spread = theirs[:, column].std()
        assert (ours[:, column].mean() - theirs[:, column].mean()).abs() < 5 * spread / 1500**0.5 * 2**0.5
        assert ours[:, column].std() == pytest.approx(float(spread), rel=0.1)


@pytest.mark.parametrize("size", [(10, 1000), (1000, 10)])
def test_an_image_without_room_gives_the_largest_centred_crop(size):
    top, left, height, width = ImageViews(scale=(0.9, 1.0)).box(size, key_of(0).reshape(1))
    wanted = (10, 13) if size[0] == 10 else (13, 10)
    assert (height, width) == wanted
    assert (top, left) == ((size[0] - height) // 2, (size[1] - width) // 2)


@pytest.mark.parametrize("filter", ["bilinear", "bicubic"])
def test_the_filter_is_that_of_pil(filter):
    image = picture(90, 70, seed=3)
    views = ImageViews(size=32, resize=32, scale=(1.0, 1.0), ratio=(7 / 9, 7 / 9), flip=0.0, filter=filter)
    wanted = TF.resize(Image.fromarray(image), [32, 32], InterpolationMode(filter))
    assert np.array_equal(views.train(image, key_of(0)), np.asarray(wanted))
    test = ImageViews(size=32, resize=40, test_filter=filter).test(image)
    chain = Compose([Resize(40, InterpolationMode(filter)), CenterCrop(32)])
    assert np.array_equal(test, np.asarray(chain(Image.fromarray(image))))


def test_randaugment_is_timms_with_the_draws_of_the_key():
    views, plain = ImageViews(size=24, resize=24, randaugment=POLICY), ImageViews(size=24, resize=24)
    theirs = rand_augment_transform(
        POLICY,
        {"translate_const": 10, "img_mean": (124, 116, 104), "interpolation": Image.Resampling.BILINEAR},
    )
    image, changed = picture(50, 60, seed=4), 0
    for number in range(12):
        key = key_of(1, number)
        before = plain.train(image, key)
        seed = int(fold(key.reshape(1), "randaugment")) & (2**63 - 1)
        random.seed(seed)
        np.random.seed(seed & (2**32 - 1))  # noqa: NPY002  # timm draws from it
        wanted = np.asarray(theirs(Image.fromarray(before)))
        found = views.train(image, key)
        assert np.array_equal(found, wanted)
        assert np.array_equal(found, views.train(image, key))
        changed += not np.array_equal(found, before)
    assert 4 < changed < 12  # two operations of probability 0.5


def test_posterizing_keeps_the_highest_bits_and_none_of_them_is_black():
    """Pillow refuses 0 bits since 13; timm draws them where the magnitude is 10."""
    (operation,) = [op for op in _policy(POLICY, 24, "bicubic").ops if op.name == "PosterizeIncreasing"]
    assert operation.aug_fn is not posterize
    image = picture(20, 30, seed=6)
    for bits in range(9):
        found = np.asarray(operation.aug_fn(Image.fromarray(image), bits))
        assert np.array_equal(found, image & (255 & ~(2 ** (8 - bits) - 1)))
        if bits:
            assert np.array_equal(found, np.asarray(posterize(Image.fromarray(image), bits)))
    # a view that draws the operation at its full strength
    views = ImageViews(size=24, resize=24, randaugment=POLICY)
    assert views.train(image, key_of(0, 0, 99, 0)).shape == (24, 24, 3)


def test_randaugment_leaves_the_global_generators_alone():
    random.seed(3)
    np.random.seed(3)  # noqa: NPY002
    wanted = random.random(), np.random.rand()  # noqa: NPY002
    random.seed(3)
    np.random.seed(3)  # noqa: NPY002
    ImageViews(size=8, resize=8, randaugment=POLICY).train(picture(20, 20, 0), key_of(0))
    with pytest.raises(ZeroDivisionError), global_draws(key_of(5)):
        random.random(), np.random.rand(), 1 / 0  # noqa: NPY002
    assert (random.random(), np.random.rand()) == wanted  # noqa: NPY002


def test_erased_boxes_have_timms_distribution():
    ours = [erased_box((40, 56), key_of(2, number).reshape(1)) for number in range(1500)]
    ours = np.array([box for box in ours if box is not None], np.float64)
    random.seed(0)
    theirs = []
    erase = RandomErasing(1.0, mode="const", device="cpu")
    for _ in range(1500):
        rows, columns = np.nonzero(erase(torch.ones(1, 40, 56))[0].numpy() == 0)
        height, width = np.ptp(rows) + 1, np.ptp(columns) + 1
        theirs.append((rows.min(), columns.min(), height, width))
    theirs = np.array(theirs, np.float64)
    assert (ours[:, 0] + ours[:, 2] <= 40).all()
    assert (ours[:, 1] + ours[:, 3] <= 56).all()
    for column in range(4):
        spread = theirs[:, column].std()
        assert abs(ours[:, column].mean() - theirs[:, column].mean()) < 5 * spread * (2 / 1500) ** 0.5
        assert ours[:, column].std() == pytest.approx(spread, rel=0.1)


def test_what_is_erased_is_normal_where_the_network_sees_it():
    plain = ImageViews(size=96, resize=96, scale=(0.9, 1.0))
    views = ImageViews(size=96, resize=96, scale=(0.9, 1.0), erase=0.5)
    image = picture(100, 100, seed=5) // 2 + 64
    noise, erased = [], 0
    for number in range(60):
        before, found = plain.train(image, key_of(3, number)), views.train(image, key_of(3, number))
        assert found.dtype == np.float16
        changed = (found != before).any(axis=2)
        if not changed.any():
            assert np.array_equal(found, before)
            continue
        erased += 1
        rows, columns = np.nonzero(changed)
        part = found[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
        noise.append(((part.astype(np.float64) / 255 - IMAGENET_MEAN) / IMAGENET_STD).reshape(-1, 3))
    assert 15 < erased < 45
    drawn = np.concatenate(noise)
    assert np.abs(drawn.mean(axis=0)).max() < 0.05
    assert np.abs(drawn.std(axis=0) - 1).max() < 0.05
    assert np.abs(np.corrcoef(drawn.T) - np.eye(3)).max() < 0.05
    assert np.abs(drawn).max() > 3.0  # not cut at black and white


@pytest.mark.parametrize("word", ["auto", "rand-m9-x3", "rand-mfoo"])
def test_a_policy_that_timm_does_not_know_is_one_line(word):
    with pytest.raises(UserError, match="timm has no policy randaugment"):
        ImageViews(randaugment=word)


def test_a_crop_larger_than_the_image_after_resizing_is_refused():
    with pytest.raises(UserError, match="from 1 to resize"):
        ImageViews(size=300)
    with pytest.raises(UserError, match=r"erase 1\.5 is a probability"):
        ImageViews(erase=1.5)

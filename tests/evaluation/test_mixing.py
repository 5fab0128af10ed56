"""Mixup and CutMix against closed forms, loops and timm's targets."""

import numpy as np
import pytest
import torch
from scipy.stats import beta, kstest
from timm.data.mixup import cutmix_bbox_and_lam, mixup_target

from poodle_lightning.evaluation.mixing import Mix, Mixing, mixed
from poodle_lightning.ops.random import key_of
from poodle_lightning.types import UserError


def key(*labels):
    return key_of(0, *labels).reshape(1)


def batch(count=5, size=(6, 8)):
    draw = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 4, (count,), generator=draw)
    return torch.rand(count, 3, *size, generator=draw), labels


def loop(images, labels, classes, mix, smoothing):
    """Image by image and class by class, in float64."""
    count = len(images)
    pixels, targets = images.double().clone(), torch.zeros(count, classes, dtype=torch.float64)
    for one in range(count):
        other = count - 1 - one
        for row in range(images.shape[2]):
            for column in range(images.shape[3]):
                if mix.box is None:
                    share = mix.share
                else:
                    top, bottom, left, right = mix.box
                    share = 0.0 if top <= row < bottom and left <= column < right else 1.0
                own, its = images[one, :, row, column].double(), images[other, :, row, column].double()
                pixels[one, :, row, column] = share * own + (1 - share) * its
        for who, weight in ((one, mix.share), (other, 1 - mix.share)):
            targets[one] += weight * smoothing / classes
            targets[one, labels[who]] += weight * (1 - smoothing)
    return pixels, targets


@pytest.mark.parametrize("mixing", [Mixing(cutmix=0.0), Mixing(mixup=0.0), Mixing(), Mixing(probability=0.0)])
def test_images_and_targets_are_those_of_a_loop(mixing):
    images, labels = batch()
    before = images.clone()
    for number in range(8):
        mix = mixing.draw(key(number), (6, 8))
        found, targets = mixing(images, labels, 4, key(number))
        pixels, wanted = loop(images, labels, 4, mix, 0.1)
        assert (found.double() - pixels).abs().max() < 1e-6
        assert (targets.double() - wanted).abs().max() < 1e-6
        assert targets.sum(dim=1) == pytest.approx(torch.ones(5), abs=1e-6)
    assert torch.equal(images, before)


@pytest.mark.parametrize("share", [1.0, 0.3])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_targets_are_timms(share, smoothing):
    _, labels = batch(6)
    found = Mixing(smoothing=smoothing).targets(labels, 7, Mix(share))
    assert torch.allclose(found, mixup_target(labels, 7, share, smoothing), atol=1e-7)


def test_a_cut_has_the_share_of_what_is_inside():
    mixing = Mixing(mixup=0.0)
    clipped = 0
    for number in range(50):
        mix = mixing.draw(key("cut", number), (9, 14))
        top, bottom, left, right = mix.box
        assert 0 <= top <= bottom <= 9
        assert 0 <= left <= right <= 14
        assert mix.share == pytest.approx(1 - (bottom - top) * (right - left) / (9 * 14))
        clipped += 0 in (top, left) or bottom == 9 or right == 14
        ones = torch.ones(1, 1, 9, 14)
        cut = mixed(torch.cat([ones, 0 * ones]), mix)
        assert float(cut[0].mean()) == pytest.approx(mix.share, abs=1e-6)
    assert clipped > 10


def test_cut_boxes_have_timms_distribution():
    mixing = Mixing(mixup=0.0)
    draws = [mixing.draw(key("box", number), (32, 48)) for number in range(2000)]
    ours = np.array([(*draw.box, draw.share) for draw in draws])
    np.random.seed(0)  # noqa: NPY002  # timm draws from it
    theirs = []
    for lam in np.random.beta(1.0, 1.0, 2000):  # noqa: NPY002
        (top, bottom, left, right), share = cutmix_bbox_and_lam((32, 48), lam)
        theirs.append((top, bottom, left, right, share))
    theirs = np.array(theirs)
    for column in range(5):
        spread = theirs[:, column].std()
        assert abs(ours[:, column].mean() - theirs[:, column].mean()) < 5 * spread * (2 / 2000) ** 0.5
        assert ours[:, column].std() == pytest.approx(spread, rel=0.1)


@pytest.mark.parametrize("alpha", [0.8, 0.2, 3.0])
def test_shares_of_mixup_are_beta(alpha):
    mixing = Mixing(mixup=alpha, cutmix=0.0)
    shares = [mixing.draw(key("beta", number), (4, 4)).share for number in range(2000)]
    assert kstest(shares, beta(alpha, alpha).cdf).pvalue > 1e-3


def test_how_often_it_cuts_and_mixes():
    draws = [Mixing(switch=0.3, probability=0.6).draw(key("often", n), (32, 32)) for n in range(2000)]
    cut = np.mean([draw.box is not None for draw in draws])
    still = np.mean([draw.box is None and draw.share == 1.0 for draw in draws])
    assert cut == pytest.approx(0.18, abs=0.035)
    assert still == pytest.approx(0.4, abs=0.045)


def test_draws_are_functions_of_the_key():
    assert Mixing().draw(key(1), (8, 8)) == Mixing().draw(key(1), (8, 8))
    assert Mixing().draw(key(1), (8, 8)) != Mixing().draw(key(2), (8, 8))


@pytest.mark.parametrize("wrong", [{"mixup": -0.1}, {"smoothing": 1.5}, {"switch": -1.0}])
def test_numbers_out_of_range_are_refused(wrong):
    with pytest.raises(UserError, match="mixing"):
        Mixing(**wrong)

"""Windows against a loop over pixels, and against the image in one piece."""

import pytest
import torch

from poodle_lightning.evaluation.inference import Sliding, WholeImage, padded
from poodle_lightning.nn.encoder import DecodedEncoder
from poodle_lightning.nn.patches import multiple_of
from poodle_lightning.nn.resnet import ResNet
from poodle_lightning.nn.sdm import SDM
from poodle_lightning.nn.timm_encoder import TimmEncoder
from poodle_lightning.nn.vit import ViT
from poodle_lightning.types import UserError


def images(height=23, width=37, batch=2):
    return torch.rand(batch, 3, height, width, generator=torch.Generator().manual_seed(0))


def by_pixel(x):
    """A network that looks at one pixel only: windows cannot matter."""
    return torch.cat([x, x.square()], dim=1)


def by_place(x):
    """A network that knows where in its window it is."""
    rows = torch.arange(x.shape[-2], dtype=torch.float32)[:, None].expand(x.shape[-2:])
    return torch.stack([rows + image[0] for image in x])[:, None]


@pytest.mark.parametrize("crop", [(8, 8), (8, 16), (64, 64), (23, 37)])
@pytest.mark.parametrize("windows", [1, 3, 100])
def test_equals_the_whole_image_for_a_network_without_context(crop, windows):
    x = images()
    found = Sliding(crop, (5, 7), windows)(by_pixel, x)
    torch.testing.assert_close(found, WholeImage()(by_pixel, x), rtol=1e-6, atol=1e-7)


def test_a_constant_network_gives_exactly_its_constant():
    def network(x):
        return torch.full((len(x), 2, *x.shape[-2:]), 3.0)

    assert (Sliding((8, 8), (5, 5))(network, images()) == 3.0).all()


@pytest.mark.parametrize("size", [(23, 37), (8, 8), (6, 30), (9, 8)])
def test_equals_mmsegs_loop(size):
    """``slide_inference`` of mmseg, pixel by pixel."""
    crop, stride, (height, width) = (8, 8), (5, 6), size
    x = images(height, width, 1)
    total, count = torch.zeros(height, width), torch.zeros(height, width)
    for i in range(max(height - crop[0] + stride[0] - 1, 0) // stride[0] + 1):
        for j in range(max(width - crop[1] + stride[1] - 1, 0) // stride[1] + 1):
            bottom, right = min(i * stride[0] + crop[0], height), min(j * stride[1] + crop[1], width)
            top, left = max(bottom - crop[0], 0), max(right - crop[1], 0)
            for row in range(top, bottom):
                for column in range(left, right):
                    total[row, column] += row - top + x[0, 0, row, column]
                    count[row, column] += 1
    found = Sliding(crop, stride, windows=4)(by_place, x)
    torch.testing.assert_close(found[0, 0], total / count)


def test_nothing_depends_on_the_batch():
    x = images(batch=3)
    together = Sliding((8, 8), (5, 5))(by_place, x)
    alone = torch.cat([Sliding((8, 8), (5, 5))(by_place, x[i : i + 1]) for i in range(3)])
    assert torch.equal(together, alone)


@pytest.mark.parametrize(
    ("crop", "stride", "windows"), [((8, 8), (9, 8), 1), ((0, 8), (1, 1), 1), ((8, 8), (8, 8), 0)]
)
def test_settings_that_leave_gaps_are_refused(crop, stride, windows):
    with pytest.raises(UserError, match="sliding"):
        Sliding(crop, stride, windows)


def test_what_encoders_need():
    small = ResNet(10, width=8)
    assert multiple_of(small) == (1, 1)
    assert multiple_of(DecodedEncoder(small, SDM(small.channels, dims=32))) == (1, 1)
    with torch.device("meta"):
        assert multiple_of(ViT(patch=8, dim=8, depth=1, heads=2, image_size=(16, 16))) == (8, 8)
        assert multiple_of(TimmEncoder("deit_tiny_patch16_224")) == (16, 16)


def test_padding_is_the_mean_colour_at_the_right_and_bottom():
    x, colour = images(5, 9), torch.tensor([0.1, 0.2, 0.3]).reshape(3, 1, 1)
    found = padded(x, (4, 4), colour)
    assert found.shape == (2, 3, 8, 12)
    torch.testing.assert_close(found[..., :5, :9], x)
    torch.testing.assert_close(found[..., 5:, :], colour.expand(2, 3, 3, 12))
    assert padded(x, (5, 3), colour) is x

"""Principal components against NumPy's SVD and on planted structure."""

import numpy as np
import pytest
import torch

from poodle_lightning.draw.pca import fit


@pytest.fixture(scope="module")
def maps():
    generator = torch.Generator().manual_seed(4)
    scale = torch.tensor([9.0, 5.0, 3.0, 1.0, 0.5, 0.1]).reshape(1, 6, 1, 1)
    mix = torch.linalg.qr(torch.randn(6, 6, generator=generator))[0]
    return torch.einsum("ij,bjhw->bihw", mix, torch.randn(4, 6, 8, 10, generator=generator) * scale) + 2.0


def test_directions_equal_numpy_svd(maps):
    rows = maps.movedim(1, -1).reshape(-1, 6).double().numpy()
    centred = rows - rows.mean(0)
    _, singular, right = np.linalg.svd(centred, full_matrices=False)
    found = fit(maps)
    for k in range(3):
        assert abs(float(found.directions[:, k] @ torch.from_numpy(right[k]))) == pytest.approx(1.0, abs=1e-9)
        assert found.directions[:, k].abs().max() == found.directions[:, k].max()
    assert found.share.numpy() == pytest.approx((singular**2 / (singular**2).sum())[:3], abs=1e-9)


def test_colours_fill_the_range_over_the_set(maps):
    colours = fit(maps, cut=0.0).rgb(maps)
    assert colours.shape == (4, 3, 8, 10)
    for k in range(3):
        assert colours[:, k].min() == pytest.approx(0.0, abs=1e-6)
        assert colours[:, k].max() == pytest.approx(1.0, abs=1e-6)


def test_same_feature_same_colour_in_every_image(maps):
    set_of_two = torch.cat([maps[:1], maps[:1].flip(-1)])
    colours = fit(maps).rgb(set_of_two)
    assert torch.allclose(colours[0], colours[1].flip(-1))


def test_two_regions_get_two_colours():
    planted = torch.zeros(1, 5, 4, 8)
    planted[:, 3, :, 4:] = 1.0
    colours = fit(planted).rgb(planted)
    assert (colours[0, 0, :, :4] == 0).all()
    assert (colours[0, 0, :, 4:] == 1).all()


def test_fewer_than_three_channels():
    colours = fit(torch.rand(1, 2, 4, 4, generator=torch.Generator().manual_seed(0)))
    assert colours.directions.shape == (2, 3)
    assert colours.rgb(torch.rand(1, 2, 4, 4)).shape == (1, 3, 4, 4)

import math

import numpy as np
import pytest
import timm
import torch
from torch.nn import functional

from poodle_lightning.configured import build, spec
from poodle_lightning.nn.vit import ViT
from poodle_lightning.types import UserError

SIZES = {"patch": 8, "dim": 64, "depth": 3, "heads": 2, "image_size": (32, 48)}


def pair(class_token=True, **kwargs):
    """Our network and timm's with the same random weights, both in eval mode."""
    torch.manual_seed(0)
    reference = timm.models.VisionTransformer(
        img_size=(32, 48),
        patch_size=8,
        embed_dim=64,
        depth=3,
        num_heads=2,
        num_classes=10,
        class_token=class_token,
        global_pool="token" if class_token else "avg",
        fc_norm=False,
        dynamic_img_size=True,
    ).eval()
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
        reference.pos_embed.normal_()
    ours = ViT(**SIZES, class_token=class_token, **kwargs).eval()
    left = ours.load_state_dict(reference.state_dict(), strict=False)
    assert left.missing_keys == []
    assert sorted(left.unexpected_keys) == ["head.bias", "head.weight"]
    return ours, reference


@pytest.mark.parametrize("class_token", [True, False])
@pytest.mark.parametrize("size", [(32, 48), (48, 32), (40, 72)])
def test_equals_timm(class_token, size):
    ours, reference = pair(class_token)
    images = torch.rand(2, 3, *size)
    with torch.no_grad():
        found = ours(images)
        last, maps = reference.forward_intermediates((images - ours.mean) / ours.std)
        # timm's list holds the tokens before the final norm; ours says the last map is behind it
        maps[-1] = last[:, reference.num_prefix_tokens :].transpose(1, 2).reshape(maps[-1].shape)
        vector = reference.forward_head(last, pre_logits=True)
    assert list(found.maps) == list(ours.channels) == ["block0", "block1", "block2"]
    for ours_map, theirs in zip(found.maps.values(), maps, strict=True):
        assert ours_map.shape == (2, 64, size[0] // 8, size[1] // 8)
        torch.testing.assert_close(ours_map, theirs, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.vector, vector, rtol=1e-5, atol=1e-5)
    assert found.strides == ours.strides == {"block0": 8, "block1": 8, "block2": 8}
    assert ours.vector_dim == found.vector.shape[1] == 64


def cubic(distance, a=-0.75):
    d = abs(distance)
    if d <= 1:
        return (a + 2) * d**3 - (a + 3) * d**2 + 1
    return a * (d**3 - 5 * d**2 + 8 * d - 4) if d < 2 else 0.0


def interpolated(grid, size):
    """DINO's position embeddings cell by cell, float64: bicubic at the scale (size + 0.1) / old size."""
    out = np.zeros((*size, grid.shape[-1]))
    for row in range(size[0]):
        for column in range(size[1]):
            y, x = (
                (index + 0.5) * old / (new + 0.1) - 0.5
                for index, old, new in zip((row, column), grid.shape, size, strict=False)
            )
            for j in range(math.floor(y) - 1, math.floor(y) + 3):
                for i in range(math.floor(x) - 1, math.floor(x) + 3):
                    cell = grid[min(max(j, 0), grid.shape[0] - 1), min(max(i, 0), grid.shape[1] - 1)]
                    out[row, column] += cubic(y - j) * cubic(x - i) * cell
    return out


@pytest.mark.parametrize("size", [(5, 9), (2, 3), (4, 7)])
def test_positions_as_dino_interpolates_them(size):
    ours, _ = pair(pos_interp="dino")
    assert torch.equal(ours.positions(4, 6), ours.pos_embed)
    with torch.no_grad():
        found = ours.positions(*size)[0]
    grid = ours.pos_embed[0, 1:].detach().double().reshape(4, 6, 64).numpy()
    expected = interpolated(grid, size).reshape(-1, 64)
    np.testing.assert_allclose(found[1:].numpy(), expected, atol=1e-5)
    assert torch.equal(found[0], ours.pos_embed[0, 0])
    with torch.no_grad():
        other = pair(pos_interp="timm")[0].positions(*size)[0]
    assert (found - other).abs().max() > 1e-3


def test_dino_positions_enter_the_features():
    ours, reference = pair(pos_interp="dino")
    images = torch.rand(1, 3, 40, 72)
    grid = ours.pos_embed[0, 1:].detach().double().reshape(4, 6, 64).numpy()
    patches = torch.from_numpy(interpolated(grid, (5, 9)).reshape(1, -1, 64)).float()
    reference.pos_embed = torch.nn.Parameter(torch.cat([ours.pos_embed[:, :1].detach(), patches], dim=1))
    reference.patch_embed.set_input_size((40, 72))
    with torch.no_grad():
        expected = reference.forward_features((images - ours.mean) / ours.std)[:, 0]
        torch.testing.assert_close(ours(images).vector, expected, rtol=1e-5, atol=1e-5)


def test_spec_builds_an_equal_network():
    ours = ViT(**SIZES, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5), drop_path=0.1)
    again = build(spec(ours))
    again.load_state_dict(ours.state_dict())
    images = torch.rand(1, 3, 32, 48)
    with torch.no_grad():
        assert torch.equal(again.eval()(images).vector, ours.eval()(images).vector)
    assert again.mean.flatten().tolist() == [0.5, 0.5, 0.5]


def test_weights_from_a_file(tmp_path):
    ours, reference = pair()
    torch.save({"model": reference.state_dict()}, tmp_path / "w.pth")
    found = ViT(**SIZES, weights=str(tmp_path / "w.pth"))
    assert torch.equal(found.blocks[2].mlp.fc2.weight, ours.blocks[2].mlp.fc2.weight)
    with pytest.raises(UserError, match="another architecture"):
        ViT(**{**SIZES, "depth": 2}, weights=str(tmp_path / "w.pth"))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: ViT(**SIZES)(torch.rand(1, 3, 32, 44)),
            "patches of 8 pixels cannot take 32x44.*multiples of 8",
        ),
        (lambda: ViT(**SIZES)(torch.rand(1, 3, 30, 48)), "patches of 8 pixels cannot take 30x48"),
        (lambda: ViT(**{**SIZES, "image_size": (32, 50)}), "cannot take 32x50"),
        (lambda: ViT(**{**SIZES, "heads": 3}), "dim=64 is no multiple of heads=3"),
        (lambda: ViT(**SIZES, pos_interp="bilinear"), "pos_interp='bilinear'.*timm or dino"),
    ],
)
def test_what_does_not_fit(call, message):
    with pytest.raises(UserError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)


def test_gradients_reach_every_parameter():
    ours = ViT(**SIZES)
    features = ours(torch.rand(2, 3, 40, 48))
    loss = functional.mse_loss(features.vector, torch.randn(2, 64)) + features.last.square().mean()
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in ours.parameters())

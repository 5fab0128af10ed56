import math
from functools import partial

import numpy as np
import pytest
import torch
from timm.layers import Attention
from torch.nn import functional
from vit_twins import SIZES, antialiased, interpolated, pair, timms_last_block

from poodle_lightning.configured import build, spec
from poodle_lightning.nn.vit import ViT
from poodle_lightning.types import UserError


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


@pytest.mark.parametrize("size", [(5, 9), (2, 3), (4, 7), (9, 4), (11, 17), (1, 6)])
@pytest.mark.parametrize(("patch", "image_size"), [(8, (32, 48)), (16, (112, 112))])
@pytest.mark.parametrize(
    ("pos_interp", "formula"),
    [("dino", interpolated), ("timm", antialiased), ("mae", partial(interpolated, extra=0.0))],
)
def test_positions_as_dino_timm_and_mae_interpolate_them(pos_interp, formula, patch, image_size, size):
    ours = ViT(
        patch=patch, dim=16, depth=1, heads=1, image_size=image_size, mlp_ratio=1.0, pos_interp=pos_interp
    )
    with torch.no_grad():
        ours.pos_embed.normal_(generator=torch.Generator().manual_seed(0))
        found = ours.positions(*size)[0]
    native = (image_size[0] // patch, image_size[1] // patch)
    assert ours.positions(*native) is ours.pos_embed
    grid = ours.pos_embed[0, 1:].detach().double().reshape(*native, 16).numpy()
    np.testing.assert_allclose(found[1:].numpy(), formula(grid, size).reshape(-1, 16), atol=1e-5)
    assert torch.equal(found[0], ours.pos_embed[0, 0])
    other = interpolated if formula is antialiased else antialiased
    assert np.abs(found[1:].numpy() - other(grid, size).reshape(-1, 16)).max() > 1e-2


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


def test_the_start_is_dinos():
    """Normal with deviation 0.02, [CLS] too (timm: 1e-6); of 768 numbers it is known to 2.6 %."""
    torch.manual_seed(0)
    ours = ViT(patch=8, dim=768, depth=1, heads=2, image_size=(32, 48))
    block = ours.blocks[0]
    for drawn in (ours.cls_token, ours.pos_embed, block.attn.qkv.weight, block.mlp.fc2.weight):
        assert abs(float(drawn.mean())) < 4 * 0.02 / math.sqrt(drawn.numel())
        assert float(drawn.std()) == pytest.approx(0.02, rel=4 * 0.71 / math.sqrt(drawn.numel()))
    assert not block.attn.qkv.bias.any()
    assert not block.mlp.fc2.bias.any()


def test_weights_from_a_file(tmp_path):
    ours, reference = pair()
    torch.save({"model": reference.state_dict()}, tmp_path / "w.pth")
    found = ViT(**SIZES, weights=str(tmp_path / "w.pth"))
    assert torch.equal(found.blocks[2].mlp.fc2.weight, ours.blocks[2].mlp.fc2.weight)
    assert torch.equal(found.cls_token, ours.cls_token)
    with pytest.raises(UserError, match="another architecture"):
        ViT(**{**SIZES, "depth": 2}, weights=str(tmp_path / "w.pth"))


def test_a_mask_token_out_of_a_file(tmp_path):
    """It is taken where a file has one; timm's have none, and MAE's is the decoder's."""
    theirs = pair()[1].state_dict()
    for name, extra, expected in (
        ("timm", {}, 0.0),
        ("own", {"mask_token": torch.ones(1, 64)}, 1.0),
        ("MAE", {"mask_token": torch.ones(1, 1, 32)}, 0.0),
    ):
        torch.save({"model": theirs | extra}, tmp_path / f"{name}.pth")
        found = ViT(**SIZES, mask_token=True, weights=str(tmp_path / f"{name}.pth"))
        assert torch.equal(found.mask_token, torch.full((1, 64), expected))
        assert ViT(**SIZES, weights=str(tmp_path / f"{name}.pth")).mask_token is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"patch": 16}, "w.pth'?: made for patches of 8x8 pixels, ViT has patch=16: set patch=8"),
        (
            {"image_size": (64, 64)},
            r"w.pth'?: has 25 position embeddings, ViT with image_size=\(64, 64\) has 65: set image_size",
        ),
        ({"class_token": False}, "w.pth'? is of another architecture"),
    ],
)
def test_weights_of_another_geometry(tmp_path, change, message):
    torch.save(pair()[1].state_dict(), tmp_path / "w.pth")
    with pytest.raises(UserError, match=message) as caught:
        ViT(**{**SIZES, **change}, weights=str(tmp_path / "w.pth"))
    assert "\n" not in str(caught.value)


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
        (lambda: ViT(**SIZES, last_heads=5), "dim=64 is no multiple of last_heads=5"),
        (lambda: ViT(**SIZES, last_heads=-2), "dim=64 is no multiple of last_heads=-2"),
        (lambda: ViT(**SIZES, positions="none"), "positions='none'.*learned or sincos"),
        (lambda: ViT(**{**SIZES, "dim": 6}, positions="sincos"), "multiple of 4, not 6"),
        (lambda: ViT(**SIZES, pos_interp="bilinear"), "pos_interp='bilinear'.*timm or dino"),
        (lambda: ViT(**SIZES).look(torch.rand(1, 3, 32, 44)), "cannot take 32x44"),
        (
            lambda: ViT(**SIZES).look(torch.rand(1, 3, 32, 48), heads=5),
            "dim=64 cannot be split into 5 heads: choose a divisor of 64",
        ),
        (lambda: ViT(**SIZES).look(torch.rand(1, 3, 32, 48), heads=0), "cannot be split into 0 heads"),
        (
            lambda: ViT(**SIZES)(torch.rand(1, 3, 32, 48), torch.ones(1, 4, 6, dtype=torch.bool)),
            "no mask token.*set mask_token=True",
        ),
        (
            lambda: ViT(**SIZES, mask_token=True)(
                torch.rand(1, 3, 32, 48), torch.ones(1, 6, 4, dtype=torch.bool)
            ),
            r"mask of \(1, 6, 4\) torch.bool does not fit 1 images of 4x6 patches of 8 pixels",
        ),
        (
            lambda: ViT(**SIZES, mask_token=True)(torch.rand(1, 3, 32, 48), torch.ones(1, 4, 6)),
            r"mask of \(1, 4, 6\) torch.float32 does not fit .*make it bool",
        ),
        (lambda: ViT(**SIZES).tokens(torch.rand(1, 3, 30, 48)), "cannot take 30x48"),
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


@pytest.mark.parametrize("size", [(32, 48), (40, 24)])
def test_masked_patches_show_the_token(size):
    """timm's network, in which the embeddings of masked patches are replaced one by one."""
    ours, reference = pair()
    masked = ViT(**SIZES, mask_token=True).eval()
    token = torch.randn(1, 64, generator=torch.Generator().manual_seed(1))
    masked.load_state_dict(ours.state_dict() | {"mask_token": token})
    images, (height, width) = torch.rand(2, 3, *size), (size[0] // 8, size[1] // 8)
    mask = torch.rand(2, height, width, generator=torch.Generator().manual_seed(2)) < 0.4

    def replace(_module, _inputs, found):
        found = found.clone()
        for image in range(2):
            for row in range(height):
                for column in range(width):
                    if mask[image, row, column]:
                        found[image, row, column] = token[0]
        return found

    handle = reference.patch_embed.register_forward_hook(replace)
    with torch.no_grad():
        expected = reference.forward_features((images - ours.mean) / ours.std)
        found = masked(images, mask)
        nothing = masked(images, torch.zeros_like(mask))
    handle.remove()
    torch.testing.assert_close(found.vector, expected[:, 0], rtol=1e-5, atol=1e-5)
    cells = expected[:, 1:].transpose(1, 2).reshape(2, 64, height, width)
    torch.testing.assert_close(found.last, cells, rtol=1e-5, atol=1e-5)
    assert torch.equal(nothing.last, masked(images).last)


def test_the_mask_token_is_one_parameter_more_and_learns():
    plain, masked = ViT(**SIZES), ViT(**SIZES, mask_token=True)
    assert masked.state_dict().keys() - plain.state_dict().keys() == {"mask_token"}
    assert masked.mask_token.shape == (1, 64)
    assert not masked.mask_token.any()
    assert build(spec(masked)).mask_token is not None
    images, mask = torch.rand(2, 3, 32, 48), torch.zeros(2, 4, 6, dtype=torch.bool)
    mask[1, 2, 3] = True
    masked(images, mask).last.square().mean().backward()
    assert masked.mask_token.grad.abs().max() > 0


@pytest.mark.parametrize("class_token", [True, False])
@pytest.mark.parametrize("size", [(32, 48), (40, 24)])
def test_tokens_of_the_patches_that_are_kept(class_token, size):
    """MAE's encoder image by image with timm's parts: positions first, then the kept patches."""
    ours, reference = pair(class_token)
    images = torch.rand(2, 3, *size)
    count = (size[0] // 8) * (size[1] // 8)
    keep = torch.rand(2, count, generator=torch.Generator().manual_seed(1)).argsort(dim=1)[:, :5]
    with torch.no_grad():
        found, whole, plain = ours.tokens(images, keep), ours.tokens(images), ours(images)
        positions = ours.positions(size[0] // 8, size[1] // 8)
        for i in range(2):
            patches = reference.patch_embed((images[i : i + 1] - ours.mean) / ours.std).flatten(1, 2)
            rows = [patches[0, j] + positions[0, j + class_token] for j in keep[i].tolist()]
            if class_token:
                rows.insert(0, reference.cls_token[0, 0] + positions[0, 0])
            expected = reference.norm(reference.blocks(torch.stack(rows)[None]))
            torch.testing.assert_close(found[i : i + 1], expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(whole[:, class_token:], plain.last.flatten(2).transpose(1, 2))
    with pytest.raises(ValueError, match=r"keep must be \(2, K\), not \(1, 5\)"):
        ours.tokens(images, keep[:1])


@pytest.mark.parametrize("heads", [1, 16, 32])
@pytest.mark.parametrize("size", [(32, 48), (40, 72)])
def test_other_heads_in_the_last_block(heads, size):
    """timm's network whose last block is made anew with that many heads, from the same weights."""
    ours, reference = pair(last_heads=heads)
    old = reference.blocks[2].attn
    with torch.no_grad():
        images = torch.rand(2, 3, *size)
        before = reference.forward_features((images - ours.mean) / ours.std)
        reference.blocks[2].attn = Attention(64, num_heads=heads, qkv_bias=True)
        reference.blocks[2].attn.load_state_dict(old.state_dict())
        expected = reference.forward_features((images - ours.mean) / ours.std)
        found, looked, rows = ours(images), ours.look(images), ours.look(images, rows=1)
    attention, _, _ = timms_last_block(reference, (images - ours.mean) / ours.std)
    assert (expected - before).abs().max() > 1e-3
    for features in (found, looked, rows):
        torch.testing.assert_close(features.vector, expected[:, 0], rtol=1e-5, atol=1e-5)
        cells = features.last.flatten(2).transpose(1, 2)
        torch.testing.assert_close(cells, expected[:, 1:], rtol=1e-5, atol=1e-5)
    assert looked.attention.shape[1] == heads
    torch.testing.assert_close(looked.attention, attention, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(rows.attention, attention[:, :, :1], rtol=1e-5, atol=1e-6)


def test_other_heads_in_the_last_block_change_no_name_and_are_remembered():
    plain, split = ViT(**SIZES), ViT(**SIZES, last_heads=16)
    shapes = [{k: v.shape for k, v in network.state_dict().items()} for network in (plain, split)]
    assert shapes[0] == shapes[1]
    again = build(spec(split))
    assert [block.attn.num_heads for block in again.blocks] == [2, 2, 16]
    assert [block.attn.head_dim for block in again.blocks] == [32, 32, 4]
    assert [block.attn.scale for block in again.blocks] == pytest.approx([32**-0.5, 32**-0.5, 0.5])


def test_fixed_positions_are_maes():
    """The formula of each channel by itself: columns first, sines before cosines; [CLS] has zeros."""
    ours = ViT(**SIZES, positions="sincos")
    for row in range(4):
        for column in range(6):
            for channel in range(64):
                place = column if channel < 32 else row
                angle = place / 10000 ** (channel % 16 / 16)
                wave = math.cos(angle) if channel % 32 >= 16 else math.sin(angle)
                assert float(ours.pos_embed[0, 1 + 6 * row + column, channel]) == pytest.approx(
                    wave, abs=1e-6
                )
    assert not ours.pos_embed[0, 0].any()
    assert ViT(**SIZES, class_token=False, positions="sincos").pos_embed.shape == (1, 24, 64)


def test_fixed_positions_stand_in_the_state_dict_but_are_not_trained(tmp_path):
    learned, fixed = pair()[0], ViT(**SIZES, positions="sincos")
    assert list(fixed.state_dict()) != []
    assert fixed.state_dict().keys() == learned.state_dict().keys()
    assert "pos_embed" not in dict(fixed.named_parameters())
    images = torch.rand(2, 3, 40, 48)
    fixed(images).last.square().mean().backward()
    assert fixed.cls_token.grad is not None
    torch.save(learned.state_dict(), tmp_path / "w.pth")
    again = ViT(**SIZES, positions="sincos", weights=str(tmp_path / "w.pth")).eval()
    with torch.no_grad():
        assert torch.equal(again(images).vector, learned(images).vector)
    assert torch.equal(build(spec(fixed)).pos_embed, fixed.pos_embed)


def test_the_smallest_network_works():
    ours = ViT(
        patch=8, dim=24, depth=2, heads=3, image_size=(32, 32), last_heads=6, positions="sincos"
    ).eval()
    found = ours.look(torch.rand(2, 3, 48, 32), rows=1)
    assert found.attention.shape == (2, 6, 1, 25)
    assert found.last.shape == (2, 24, 6, 4)

import pytest
import torch
from tiny_models import tiny_encoder
from torch.nn import functional

from poodle_lightning.configured import build, spec
from poodle_lightning.nn.encoder import DecodedEncoder
from poodle_lightning.nn.fpn import FPN, SemanticFPN
from poodle_lightning.nn.resnet import ResNet
from poodle_lightning.types import UserError

RESNET50 = {"layer1": 256, "layer2": 512, "layer3": 1024, "layer4": 2048}
SIZES = [(64, 96), (47, 93), (33, 200)]


def pyramid(weights, prefix, maps):
    """Lin et al., section 3: lateral connections added to what comes from above, nearest, then 3x3."""
    found, above = {}, None
    for i, name in reversed(list(enumerate(maps))):
        inner, outer = (f"{prefix}pyramid.{kind}_blocks.{i}.0." for kind in ("inner", "layer"))
        lateral = functional.conv2d(maps[name], weights[f"{inner}weight"], weights[f"{inner}bias"])
        if above is not None:
            height, width = lateral.shape[2:]
            row = torch.arange(height) * above.shape[2] // height
            column = torch.arange(width) * above.shape[3] // width
            lateral = lateral + above[:, :, row][:, :, :, column]
        above = lateral
        found[name] = functional.conv2d(
            lateral, weights[f"{outer}weight"], weights[f"{outer}bias"], padding=1
        )
    return {name: found[name] for name in maps}


def enlarged(z, size):
    """Bilinear, pixel centres at halves, one direction after the other."""
    for dim in (2, 3):
        old, new = z.shape[dim], size[dim - 2]
        at = ((torch.arange(new, dtype=z.dtype) + 0.5) * old / new - 0.5).clamp(0, old - 1)
        low = at.floor().long().clamp(max=max(old - 2, 0))
        share = (at - low).view(-1, *(1,) * (3 - dim))
        high = (low + 1).clamp(max=old - 1)
        z = (1 - share) * z.index_select(dim, low) + share * z.index_select(dim, high)
    return z


def semantic(weights, maps, groups):
    """Kirillov et al. 2019, Fig. 3: levels go up by convolution, GroupNorm, ReLU, twice the size."""
    levels = pyramid(weights, "fpn.", maps)
    names, total = list(levels), 0
    for level, name in enumerate(names):
        z = levels[name]
        for step in range(max(1, level)):
            place = f"branches.{level}.{step}."
            z = functional.conv2d(z, weights[f"{place}0.weight"], padding=1)
            grouped = z.unflatten(1, (groups, -1))
            mean = grouped.mean(dim=(2, 3, 4), keepdim=True)
            var = ((grouped - mean) ** 2).mean(dim=(2, 3, 4), keepdim=True)
            z = ((grouped - mean) / (var + 1e-5).sqrt()).flatten(1, 2)
            z = z * weights[f"{place}1.weight"][:, None, None] + weights[f"{place}1.bias"][:, None, None]
            z = z.clamp(min=0)
            if level > 0:
                z = enlarged(z, levels[names[level - 1 - step]].shape[2:])
        total = total + z
    return total


def stirred(module):
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return module


@pytest.mark.parametrize("size", SIZES)
def test_the_pyramid_equals_the_layers_by_hand(size):
    torch.manual_seed(0)
    encoder = tiny_encoder().double().eval()
    fpn = stirred(FPN(encoder.channels, dims=12).double())
    maps = encoder(torch.rand(2, 3, *size, dtype=torch.float64)).maps
    found, wanted = fpn(maps), pyramid(dict(fpn.named_parameters()), "", maps)
    assert list(found) == ["layer1", "layer2", "layer3", "layer4"]
    for name, level in found.items():
        assert level.shape == (2, 12, *maps[name].shape[2:])
        torch.testing.assert_close(level, wanted[name])


@pytest.mark.parametrize("stride", [32, 8])
@pytest.mark.parametrize("size", SIZES)
def test_the_semantic_branch_equals_the_layers_by_hand(size, stride):
    """Also behind a dilated encoder, of which three levels have one size."""
    torch.manual_seed(0)
    encoder = tiny_encoder(output_stride=stride).double().eval()
    decoder = stirred(SemanticFPN(encoder.channels, dims=8, pyramid=12, groups=4).double())
    features = encoder(torch.rand(2, 3, *size, dtype=torch.float64))
    found = decoder(features)
    assert list(found.maps) == ["semantic"]
    assert found.strides == {"semantic": 4}
    assert found.last.shape == (2, 8, *features.maps["layer1"].shape[2:])
    torch.testing.assert_close(found.last, semantic(dict(decoder.named_parameters()), features.maps, 4))
    levels = decoder.fpn(features.maps)
    assert torch.equal(decoder.join(levels, features.strides).last, found.last)


def test_all_weights_learn():
    encoder = tiny_encoder().eval()
    decoder = SemanticFPN(encoder.channels, dims=8, pyramid=12, groups=4)
    decoder(encoder(torch.rand(2, 3, 64, 64))).last.square().sum().backward()
    assert [
        name for name, p in decoder.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0
    ] == []


def test_parameters_of_the_published_sizes():
    """1x1 and 3x3 convolutions with bias; in the branch 1, 1, 2 and 3 convolutions without, and GroupNorm."""
    laterals = sum(256 * c + 256 for c in RESNET50.values())
    pyramids = laterals + 4 * (9 * 256 * 256 + 256)
    branch = 4 * 9 * 256 * 128 + 3 * 9 * 128 * 128 + 7 * 2 * 128
    assert sum(p.numel() for p in FPN(RESNET50).parameters()) == pyramids
    assert sum(p.numel() for p in SemanticFPN(RESNET50).parameters()) == pyramids + branch
    assert (round(pyramids / 1e6, 2), round((pyramids + branch) / 1e6, 2)) == (3.34, 4.97)


def test_a_decoded_encoder_has_the_map_at_stride_4():
    encoder = ResNet(10, width=8).eval()
    decoder = SemanticFPN(encoder.channels, dims=32, pyramid=16)
    both = DecodedEncoder(encoder, decoder)
    images = torch.rand(1, 3, 64, 96)
    found = both(images)
    assert list(found.maps) == ["layer1", "layer2", "layer3", "layer4", "semantic"]
    assert (both.channels["semantic"], both.strides["semantic"]) == (32, 4)
    assert found.last.shape == (1, 32, 16, 24)
    again = build(spec(both))
    again.load_state_dict(both.state_dict())
    assert torch.equal(again.eval()(images).last, found.last)


def test_wrong_settings_are_refused():
    with pytest.raises(UserError, match="needs at least one map"):
        FPN({})
    with pytest.raises(UserError, match="dims=100 must be a multiple of groups=32"):
        SemanticFPN(RESNET50, dims=100)

import pytest
import torch
from tiny_models import tiny_encoder
from torch import nn
from torch.nn import functional

from poodle_lightning.nn.encoder import DecodedEncoder
from poodle_lightning.nn.pixpro_fpn import HeadedFPN
from poodle_lightning.nn.resnet import ResNet
from poodle_lightning.types import UserError


def by_hand(decoder, maps):
    """Lin et al.'s pyramid from its weights, then the head's four steps, from the deepest to the finest."""
    weights = dict(decoder.named_parameters())
    buffers = dict(decoder.named_buffers())
    names, found, above = list(maps), {}, None
    for i in reversed(range(len(names))):
        inner, outer = (f"fpn.pyramid.{kind}_blocks.{i}.0" for kind in ("inner", "layer"))
        lateral = functional.conv2d(maps[names[i]], weights[f"{inner}.weight"], weights[f"{inner}.bias"])
        if above is not None:
            lateral = lateral + above.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
        above = lateral
        z = functional.conv2d(lateral, weights[f"{outer}.weight"], weights[f"{outer}.bias"], padding=1)
        for conv, norm in ((0, 1), (3, 4)):
            z = functional.conv2d(z, weights[f"head.{conv}.weight"], padding=1)
            mean, var = (buffers[f"head.{norm}.running_{what}"][:, None, None] for what in ("mean", "var"))
            scale, shift = (weights[f"head.{norm}.{what}"][:, None, None] for what in ("weight", "bias"))
            z = (z - mean) / (var + 1e-5).sqrt() * scale + shift
            z = z.clamp(min=0) if conv == 0 else z
        found[names[i]] = z
    return found


def test_all_levels_equal_the_layers_by_hand():
    torch.manual_seed(0)
    encoder = tiny_encoder().double().eval()
    decoder = HeadedFPN(encoder.channels, dims=12).double().eval()
    features = encoder(torch.rand(2, 3, 64, 96, dtype=torch.float64))
    found, wanted = decoder.pyramid(features.maps), by_hand(decoder, features.maps)
    assert list(found) == ["layer1", "layer2", "layer3", "layer4"]
    for name, level in found.items():
        torch.testing.assert_close(level, wanted[name])
    last = decoder(features)
    torch.testing.assert_close(last.maps["fpn"], wanted["layer1"])
    assert last.strides == {"fpn": 4}


def test_fewer_levels_train_what_they_need_alone():
    torch.manual_seed(0)
    encoder = tiny_encoder().eval()
    decoder = HeadedFPN(encoder.channels, dims=12, levels=("layer4", "layer2"))
    maps = decoder.pyramid(encoder(torch.rand(2, 3, 64, 96)).maps)
    assert {name: level.shape[2:] for name, level in maps.items()} == {"layer2": (8, 12), "layer4": (2, 3)}
    sum(level.square().sum() for level in maps.values()).backward()
    for name, parameter in decoder.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name
    frozen = {name for name, parameter in decoder.named_parameters() if not parameter.requires_grad}
    assert frozen == {"fpn.pyramid.layer_blocks.1.0.weight", "fpn.pyramid.layer_blocks.1.0.bias"}


def test_with_its_encoder_it_is_an_encoder():
    encoder = tiny_encoder()
    both = DecodedEncoder(encoder, HeadedFPN(encoder.channels, dims=12, levels=["layer3", "layer4"])).eval()
    assert (both.channels["fpn"], both.strides["fpn"]) == (12, 16)
    assert both(torch.rand(1, 3, 64, 96)).maps["fpn"].shape == (1, 12, 4, 6)


def test_parameters_on_resnet50_by_formula():
    channels, dims = (256, 512, 1024, 2048), 256
    pyramid = sum(count * dims + dims for count in channels) + 4 * (dims * dims * 9 + dims)
    head = 2 * (dims * dims * 9 + 2 * dims)
    with torch.device("meta"):
        decoder = HeadedFPN(ResNet(50).channels)
    assert sum(p.numel() for p in decoder.parameters()) == pyramid + head
    assert [type(layer).__name__ for layer in decoder.head if not isinstance(layer, nn.Conv2d)] == [
        "BatchNorm2d",
        "ReLU",
        "BatchNorm2d",
    ]


@pytest.mark.parametrize("levels", [[], ["layer5"]])
def test_levels_that_the_encoder_has_not_are_refused(levels):
    with pytest.raises(UserError, match=r"levels=\[.*\] must be among the encoder's layers \['layer1'"):
        HeadedFPN(tiny_encoder().channels, levels=levels)

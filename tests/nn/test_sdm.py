import pytest
import torch
import torchvision
from torch import nn
from torch.nn import functional

from poodle_lightning.analysis.flops import trainable_parameters
from poodle_lightning.nn.heads import MLP, ConvMLP
from poodle_lightning.nn.resnet import ResNet
from poodle_lightning.nn.sdm import SDM
from poodle_lightning.types import Features, UserError


def pyramid(channels=(8, 16, 32, 64), size=(64, 96), batch=2):
    generator = torch.Generator().manual_seed(0)
    maps = {
        f"layer{i + 1}": torch.randn(
            batch, c, -(-size[0] // 2 ** (i + 2)), -(-size[1] // 2 ** (i + 2)), generator=generator
        )
        for i, c in enumerate(channels)
    }
    return Features(maps=maps, strides={f"layer{i + 1}": 2 ** (i + 2) for i in range(len(channels))})


def test_parameters_of_the_paper():
    with torch.device("meta"):
        encoder = ResNet(50)
        decoder = SDM(encoder.channels)
        heads = nn.ModuleList(
            [kind(a, 4096, 256) for kind in (ConvMLP, MLP) for a in (encoder.vector_dim, 256)]
        )
    assert trainable_parameters(encoder) / 1e6 == pytest.approx(23.51, abs=0.005)
    assert trainable_parameters(decoder) / 1e6 == pytest.approx(6.43, abs=0.01)
    assert trainable_parameters(nn.ModuleList([encoder, decoder, heads])) / 1e6 == pytest.approx(
        53.1, abs=0.05
    )
    # By hand: two blocks (three convolutions, three BatchNorms), two laterals with bias.
    block = 2048 * 256 + 9 * 256 * 256 + 256 * 2048 + 2 * (256 + 256 + 2048)
    assert trainable_parameters(decoder) == 2 * block + (1024 + 1) * 2048 + (512 + 1) * 2048


@pytest.mark.parametrize("train", [False, True])
def test_equals_the_formula_with_torchvision_blocks(train):
    """z = Bottleneck(z); bilinear x2; z = z + lateral, with torchvision's Bottleneck and scale_factor."""
    torch.manual_seed(0)
    decoder = SDM([8, 16, 32, 64], dims=64, hidden=8).train(train)
    blocks = [torchvision.models.resnet.Bottleneck(64, 16, base_width=32).train(train) for _ in range(2)]
    for theirs, ours in zip(blocks, decoder.blocks, strict=True):
        theirs.load_state_dict(ours.state_dict())
    features = pyramid()
    with torch.no_grad():
        found = decoder(features)
        z = features.maps["layer4"]
        for block, lateral, name in zip(blocks, decoder.laterals, ("layer3", "layer2"), strict=True):
            z = functional.interpolate(block(z), scale_factor=2, mode="bilinear", align_corners=False)
            z = (
                z
                + torch.einsum("oc,bchw->bohw", lateral.weight[:, :, 0, 0], features.maps[name])
                + lateral.bias[:, None, None]
            )
    torch.testing.assert_close(found.last, z, rtol=1e-5, atol=1e-5)
    assert (list(found.maps), found.strides) == (["sdm"], {"sdm": 8})


def test_without_laterals_only_the_deepest_map_matters():
    decoder = SDM([8, 16, 32, 64], dims=64, lateral=False).eval()
    a, b = pyramid(), pyramid()
    for name in ("layer1", "layer2", "layer3"):
        b.maps[name].mul_(3)
    assert torch.equal(decoder(a).last, decoder(b).last)
    assert not any("laterals" in name for name, _ in decoder.named_parameters())
    b.maps["layer4"].mul_(3)
    assert not torch.allclose(decoder(a).last, decoder(b).last)


def test_without_top_down_no_block_is_left():
    decoder = SDM([8, 16, 32, 64], dims=64, top_down=False)
    features = pyramid()
    up = functional.interpolate(features.maps["layer4"], scale_factor=2, mode="bilinear", align_corners=False)
    up = functional.interpolate(
        up + decoder.laterals[0](features.maps["layer3"]),
        scale_factor=2,
        mode="bilinear",
        align_corners=False,
    )
    torch.testing.assert_close(decoder(features).last, up + decoder.laterals[1](features.maps["layer2"]))
    assert sorted(name for name, _ in decoder.named_parameters()) == [
        f"laterals.{i}.{kind}" for i in range(2) for kind in ("bias", "weight")
    ]
    assert list(SDM([64, 64, 64], dims=64, top_down=False, lateral=False).parameters()) == []


@pytest.mark.parametrize("size", [(65, 97), (33, 50), (64, 64), (31, 200)])
def test_odd_sizes_end_on_the_finer_map(size):
    features = pyramid(size=size)
    found = SDM([8, 16, 32, 64], dims=32)(features)  # 64 → 32 by the 1x1 convolution in front
    assert found.last.shape == (2, 32, *features.maps["layer2"].shape[-2:])


@pytest.mark.parametrize(("blocks", "level", "stride"), [(1, "layer3", 16), (3, "layer1", 4)])
def test_other_numbers_of_blocks(blocks, level, stride):
    features = pyramid()
    found = SDM({"a": 8, "b": 16, "c": 32, "d": 64}, dims=64, blocks=blocks)(features)
    assert found.last.shape[-2:] == features.maps[level].shape[-2:]
    assert found.strides == {"sdm": stride}


def test_hidden_is_exact_where_the_ratio_is_not_binary():
    for hidden in range(1, 40):
        assert SDM([4, 4, 96], dims=96, hidden=hidden, blocks=1).blocks[0].conv2.weight.shape[:2] == (
            hidden,
            hidden,
        )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"channels": [8, 16], "blocks": 2}, "needs 3 maps"),
        ({"channels": [8, 16, 32], "dims": 30}, "multiple of 4"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(UserError, match=message):
        SDM(**arguments)

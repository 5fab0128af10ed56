import pytest
import timm
import torch
import torchvision
from torch.nn import functional

from poodle_lightning.nn.encoder import IMAGENET_MEAN, IMAGENET_STD
from poodle_lightning.nn.resnet import ResNet
from poodle_lightning.types import UserError

LAYERS = ("layer1", "layer2", "layer3", "layer4")


def reference_maps(model, images):
    """Maps of torchvision's network, on images normalised by torchvision's own function."""
    x = torchvision.transforms.functional.normalize(images, IMAGENET_MEAN, IMAGENET_STD)
    x = model.maxpool(model.relu(model.bn1(model.conv1(x))))
    maps = {}
    for name in LAYERS:
        x = maps[name] = getattr(model, name)(x)
    return maps


def torchvision_pair(depth, **kwargs):
    torch.manual_seed(depth)
    reference = getattr(torchvision.models, f"resnet{depth}")(**kwargs)
    for module in reference.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.weight.data.uniform_(0.2, 0.6)
            module.running_mean.normal_(0, 0.1)
    return reference


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize(
    ("depth", "output_stride", "replace"),
    [
        (18, 32, None),
        (34, 32, None),
        (50, 32, None),
        (50, 16, [False, False, True]),
        (50, 8, [False, True, True]),
        (50, 4, [True, True, True]),
    ],
)
def test_equals_torchvision(depth, output_stride, replace, train):
    reference = torchvision_pair(depth, replace_stride_with_dilation=replace).train(train)
    ours = ResNet(depth, output_stride=output_stride).train(train)
    loaded = ours.load_state_dict(reference.state_dict(), strict=False)
    assert loaded.missing_keys == []
    assert sorted(loaded.unexpected_keys) == ["fc.bias", "fc.weight"]
    images = torch.rand(2, 3, 65, 96, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = reference_maps(reference, images)
        found = ours(images)
    assert list(found.maps) == list(LAYERS)
    for name in LAYERS:
        torch.testing.assert_close(found.maps[name], expected[name], rtol=1e-5, atol=1e-5)
        assert found.maps[name].shape[1] == ours.channels[name]
        assert found.maps[name].shape[-1] == 96 // ours.strides[name] == 96 // found.strides[name]
    torch.testing.assert_close(found.vector, expected["layer4"].mean(dim=(2, 3)), rtol=1e-5, atol=1e-5)
    assert ours.vector_dim == found.vector.shape[1]


@pytest.mark.parametrize(
    ("depth", "output_stride"), [(10, 4), (10, 8), (10, 16), (18, 4), (34, 8), (50, 4), (50, 8), (101, 4)]
)
def test_dilated_network_holds_the_undilated_one(depth, output_stride):
    """What dilation is for: every 2nd (4th, 8th) cell of the last stages has the stride-32 net's values."""
    torch.manual_seed(0)
    plain = ResNet(depth, width=8).eval()
    dilated = ResNet(depth, output_stride=output_stride, width=8).eval()
    dilated.load_state_dict(plain.state_dict())
    assert dilated.strides == {name: min(plain.strides[name], output_stride) for name in LAYERS}
    images = torch.rand(1, 3, 64, 96, dtype=torch.float64)
    with torch.no_grad():
        fine, coarse = dilated.double()(images).maps, plain.double()(images).maps
    assert fine["layer4"].shape[-2:] == (64 // output_stride, 96 // output_stride)
    for name in LAYERS:
        step = plain.strides[name] // dilated.strides[name]
        torch.testing.assert_close(fine[name][..., ::step, ::step], coarse[name])


@pytest.mark.parametrize("output_stride", [8, 16, 32])
@pytest.mark.parametrize("depth", [18, 34])
def test_small_networks_dilate_like_timms(depth, output_stride):
    reference = timm.create_model(f"resnet{depth}", pretrained=False, output_stride=output_stride).eval()
    ours = ResNet(depth, output_stride=output_stride).eval()
    assert ours.load_state_dict(reference.state_dict(), strict=False).missing_keys == []
    images = torch.rand(1, 3, 64, 64)
    normalised = torchvision.transforms.functional.normalize(images, IMAGENET_MEAN, IMAGENET_STD)
    with torch.no_grad():
        found, expected = ours(images).maps["layer4"], reference.forward_features(normalised)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("name", "depth"), [("resnet18", 18), ("resnet50", 50)])
def test_timm_keys_load_with_nothing_missing(name, depth):
    reference = timm.create_model(name, pretrained=False).eval()
    ours = ResNet(depth).eval()
    loaded = ours.load_state_dict(reference.state_dict(), strict=False)
    assert loaded.missing_keys == []
    assert sorted(loaded.unexpected_keys) == ["fc.bias", "fc.weight"]
    images = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        expected = reference.forward_features(
            torchvision.transforms.functional.normalize(images, IMAGENET_MEAN, IMAGENET_STD)
        )
        torch.testing.assert_close(ours(images).maps["layer4"], expected, rtol=1e-5, atol=1e-5)


def test_weights_from_a_file(tmp_path):
    reference = torchvision.models.resnet18()
    torch.save(reference.state_dict(), tmp_path / "w.pth")
    ours = ResNet(18, weights=str(tmp_path / "w.pth"))
    assert torch.equal(ours.layer4[1].conv2.weight, reference.layer4[1].conv2.weight)
    torch.save({"state_dict": reference.state_dict(), "epoch": 3}, tmp_path / "w2.pth")
    assert torch.equal(ResNet(18, weights=str(tmp_path / "w2.pth")).conv1.weight, reference.conv1.weight)


def test_weights_by_name_come_from_torchvision(monkeypatch):
    reference = torchvision.models.resnet50()
    asked = []

    def fetch(url, *args, **kwargs):
        asked.append(url)
        return reference.state_dict()

    monkeypatch.setattr(torchvision.models._api, "load_state_dict_from_url", fetch)
    ours = ResNet(50, weights="IMAGENET1K_V2")
    assert asked == [torchvision.models.ResNet50_Weights.IMAGENET1K_V2.url]
    assert torch.equal(ours.layer4[2].conv3.weight, reference.layer4[2].conv3.weight)


def test_weights_without_network(monkeypatch):
    def fail(*args, **kwargs):
        raise OSError("no route")

    monkeypatch.setattr(torchvision.models._api, "load_state_dict_from_url", fail)
    with pytest.raises(UserError, match=r"IMAGENET1K_V1.*no route.*give the path"):
        ResNet(18, weights="IMAGENET1K_V1")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"depth": 20}, "depth 20.*18, 34"),
        ({"output_stride": 2}, "output_stride 2 is not offered: choose 4, 8, 16 or 32"),
        ({"depth": 18, "weights": "IMAGENET1K_V9"}, "no such file.*IMAGENET1K_V1"),
        ({"depth": 10, "weights": "IMAGENET1K_V1"}, "resnet10 are: none"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(UserError, match=message):
        ResNet(**arguments)


def test_without_stem_pool_strides_halve():
    encoder = ResNet(10, width=8, stem_pool=False)
    features = encoder(torch.rand(1, 3, 32, 32))
    assert encoder.strides == {"layer1": 2, "layer2": 4, "layer3": 8, "layer4": 16}
    assert [m.shape[-1] for m in features.maps.values()] == [16, 8, 4, 2]
    assert [m.shape[1] for m in features.maps.values()] == [8, 16, 32, 64] == list(encoder.channels.values())
    dilated = ResNet(10, width=8, stem_pool=False, output_stride=8)
    assert [m.shape[-1] for m in dilated(torch.rand(1, 3, 32, 32)).maps.values()] == [16, 8, 8, 8]


def test_gradients_reach_every_parameter():
    encoder = ResNet(10, width=8)
    features = encoder(torch.rand(2, 3, 32, 32))
    functional.mse_loss(features.vector, torch.randn(2, encoder.vector_dim)).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in encoder.parameters())


@pytest.mark.parametrize("depth", [18, 50])
def test_blocks_begin_as_their_shortcuts_where_asked_for(depth):
    plain = torchvision.models.get_model(f"resnet{depth}", weights=None, zero_init_residual=True)
    made = ResNet(depth, width=64, zero_init_residual=True)
    zeros = {name for name, value in plain.named_parameters() if value.ndim == 1 and not value.any()}
    mine = {name for name, value in made.named_parameters() if value.ndim == 1 and not value.any()}
    assert {name for name in zeros if name.endswith("weight")} == {n for n in mine if n.endswith("weight")}
    assert ResNet(depth).layer1[0].bn2.weight.all()

import copy

import torch

from poodle_lightning.nn.encoder import IMAGENET_MEAN, IMAGENET_STD, DecodedEncoder
from poodle_lightning.nn.resnet import ResNet
from poodle_lightning.nn.sdm import SDM


def test_as_one_encoder():
    encoder = ResNet(10, width=8)
    both = DecodedEncoder(encoder, SDM(encoder.channels, dims=32)).eval()
    images = torch.rand(1, 3, 64, 96)
    with torch.no_grad():
        alone, found = encoder(images), both(images)
        decoded = both.decoder(alone)
    assert list(found.maps) == ["layer1", "layer2", "layer3", "layer4", "sdm"] == list(both.channels)
    assert torch.equal(found.maps["layer4"], alone.maps["layer4"])
    assert torch.equal(found.maps["sdm"], decoded.last)
    assert torch.equal(found.vector, alone.vector)
    assert both.vector_dim == encoder.vector_dim == found.vector.shape[1]
    assert found.strides == both.strides
    assert {k.partition(".")[0] for k in both.state_dict()} == {"encoder", "decoder"}


def test_normalisation_is_no_part_of_the_weights():
    encoder = ResNet(10, width=8)
    assert not {"mean", "std"} & set(encoder.state_dict())
    grey = torch.tensor(IMAGENET_MEAN).reshape(1, 3, 1, 1).expand(1, 3, 32, 32)
    encoder.eval()
    seen = []
    encoder.conv1.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    encoder(grey)
    encoder(grey + torch.tensor(IMAGENET_STD).reshape(1, 3, 1, 1))
    torch.testing.assert_close(seen[0], torch.zeros(1, 3, 32, 32))
    torch.testing.assert_close(seen[1], torch.ones(1, 3, 32, 32))


def test_decoded_encoder_stands_where_its_encoder_stands():
    """Built around modules that have moved already, it needs no move of its own."""
    encoder = ResNet(10, width=8).double()
    both = DecodedEncoder(encoder, SDM(encoder.channels, dims=32).double())
    assert both.mean.dtype == torch.float64
    found = both(torch.rand(2, 3, 64, 64, dtype=torch.float64))
    assert {m.dtype for m in found.maps.values()} == {torch.float64}
    meta = copy.deepcopy(encoder).to("meta")
    assert DecodedEncoder(meta, SDM(meta.channels, dims=32)).std.device.type == "meta"


def test_normalisation_stays_fp32_under_autocast():
    encoder = ResNet(10, width=8).eval()
    seen = []
    encoder.bn1.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].dtype))
    encoder.conv1.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        encoder(torch.rand(1, 3, 32, 32))
    assert seen == [torch.float32, torch.bfloat16]

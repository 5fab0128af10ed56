import logging

import pytest
import torch
from fvcore.nn import FlopCountAnalysis
from torch import nn

from poodle_lightning.analysis.flops import main, multiply_adds, paper_networks, trainable_parameters
from poodle_lightning.nn.encoder import DecodedEncoder
from poodle_lightning.nn.heads import MLP, ConvMLP
from poodle_lightning.nn.resnet import ResNet
from poodle_lightning.nn.sdm import SDM

logging.getLogger("fvcore").setLevel(logging.ERROR)


class LastMap(nn.Module):
    """fvcore traces, and a trace returns tensors only; the vector keeps the pooling in the graph."""

    def __init__(self, encoder):
        super().__init__()
        self.encoder = encoder

    def forward(self, x):
        features = self.encoder(x)
        return features.last, features.vector


def fvcore_count(module, *shape):
    analysis = FlopCountAnalysis(module, torch.zeros(shape)).unsupported_ops_warnings(False)
    return analysis.uncalled_modules_warnings(False).tracer_warnings("none").total()


def decoded(**kwargs):
    encoder = ResNet(**kwargs)
    return DecodedEncoder(encoder, SDM(encoder.channels, dims=64))


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize(
    "make",
    [
        lambda: ResNet(50, width=16),
        lambda: ResNet(18, output_stride=8, width=64),
        lambda: ResNet(10, width=8, stem_pool=False),
        lambda: decoded(depth=10, width=8),
    ],
)
def test_equal_to_fvcore(make, train):
    module = LastMap(make()).train(train)
    before = {k: v.clone() for k, v in module.state_dict().items()}
    found = multiply_adds(module, 2, 3, 64, 96)
    assert found > 0
    assert all(torch.equal(before[k], v) for k, v in module.state_dict().items())
    assert found == fvcore_count(module, 2, 3, 64, 96)


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize(
    ("module", "shape"),
    [
        (MLP(6, 10, 4), (8, 6)),
        (ConvMLP(6, 10, 4), (2, 6, 3, 5)),
        (nn.Conv2d(6, 8, 3, groups=2, stride=2), (2, 6, 9, 9)),
        (nn.BatchNorm2d(3, affine=False), (2, 3, 4, 4)),
        (nn.LayerNorm(6), (2, 5, 6)),
        (nn.LayerNorm(6, elementwise_affine=False), (2, 5, 6)),
        (nn.Linear(6, 7, bias=False), (2, 5, 6)),
        (nn.AdaptiveAvgPool2d(2), (2, 3, 8, 8)),
    ],
)
def test_single_operations_equal_fvcore(module, shape, train):
    module.train(train)
    assert multiply_adds(module, *shape) == fvcore_count(module, *shape) > 0


def test_transposed_convolution_by_hand():
    # Each of 2*5*5 input cells of 6 channels meets a kernel of 8 channels times 3*3.
    assert multiply_adds(nn.ConvTranspose2d(6, 8, 3), 2, 6, 5, 5) == 2 * 5 * 5 * 6 * 8 * 9


@pytest.mark.parametrize("name", ["ResNet-50", "ResNet-50 + SDM", "ResNet-50, stride 8"])
def test_the_papers_numbers(name):
    module, paper = paper_networks()[name]
    assert {"ResNet-50": 43.3, "ResNet-50 + SDM": 60.5, "ResNet-50, stride 8": 200.7}[name] == paper
    assert multiply_adds(module.train(), 1, 3, 512, 1024) / 1e9 == pytest.approx(paper, rel=1e-3)


def test_trainable_parameters_count_shared_ones_once_and_frozen_ones_not():
    layer = nn.Linear(3, 2)
    frozen = nn.Linear(10, 10).requires_grad_(False)
    assert trainable_parameters(nn.Sequential(layer, layer, frozen)) == 3 * 2 + 2


def test_table(capsys):
    assert main([]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4
    assert "43.3" in lines[1]
    assert "60.5" in lines[2]
    assert "200.7" in lines[3]


def test_bad_size(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["--input", "512"])
    assert caught.value.code == 2
    assert "512x1024" in capsys.readouterr().err

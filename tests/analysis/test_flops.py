import logging

import pytest
import torch
from fvcore.nn import FlopCountAnalysis
from torch import nn
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

from poodle_lightning.analysis.flops import (
    counted,
    main,
    multiply_adds,
    paper_networks,
    trainable_parameters,
)
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
        (nn.Upsample(scale_factor=2), (2, 3, 4, 4)),
        (nn.Upsample(scale_factor=2, mode="bilinear"), (2, 3, 4, 4)),
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


def test_the_pyramids_number_is_met_within_a_percent():
    module, paper = paper_networks()["ResNet-50 + FPN"]
    assert paper == 124.4
    assert multiply_adds(module.train(), 1, 3, 512, 1024) / 1e9 == pytest.approx(paper, rel=1e-2)


def test_trainable_parameters_count_shared_ones_once_and_frozen_ones_not():
    layer = nn.Linear(3, 2)
    frozen = nn.Linear(10, 10).requires_grad_(False)
    assert trainable_parameters(nn.Sequential(layer, layer, frozen)) == 3 * 2 + 2


def test_table(capsys):
    assert main([]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 5
    for line, paper in zip(lines[1:], ("43.3", "60.5", "124.4", "200.7"), strict=True):
        assert paper in line


def test_bad_size(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["--input", "512"])
    assert caught.value.code == 2
    assert "512x1024" in capsys.readouterr().err


def products_of(module, *shape, image_gradient=False, device="cpu"):
    """Multiply-adds of one call, and of the backward pass behind it."""
    module = module.to(device)
    inputs = torch.randn(shape, device=device, requires_grad=image_gradient)
    with counted() as forward:
        result = module(inputs)
    with counted() as backward:
        result.sum().backward()
    return forward.total, backward.total


NETS = {  # module, shape of its input, multiply-adds of its first layer and of the others by hand
    "linear": (nn.Sequential(nn.Linear(6, 10), nn.ReLU(), nn.Linear(10, 4)), (8, 6), 8 * 60, 8 * 40),
    "linear of maps": (nn.Sequential(nn.Linear(6, 7, bias=False)), (2, 5, 6), 2 * 5 * 42, 0),
    "convolution": (
        nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Conv2d(8, 5, 3, stride=2)),
        (2, 3, 9, 9),
        2 * 81 * 8 * 27,
        2 * 16 * 5 * 72,
    ),
    "groups": (
        nn.Sequential(nn.Conv2d(6, 8, 3, groups=2), nn.Conv2d(8, 8, 1, groups=8)),
        (2, 6, 7, 7),
        2 * 25 * 8 * 27,
        2 * 25 * 8,
    ),
    "transposed": (
        nn.Sequential(nn.ConvTranspose2d(6, 8, 3), nn.Conv2d(8, 2, 1)),
        (2, 6, 5, 5),
        2 * 25 * 6 * 72,
        2 * 49 * 16,
    ),
}


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("name", NETS)
def test_backward_is_twice_forward_less_the_gradient_to_the_images(name, device):
    module, shape, first, others = NETS[name]
    assert products_of(module, *shape, device=device) == (first + others, first + 2 * others)
    found = products_of(module, *shape, image_gradient=True, device=device)
    assert found == (first + others, 2 * (first + others))


def test_a_frozen_layer_costs_no_gradient_to_its_weight():
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 5, 1).requires_grad_(False), nn.Conv2d(5, 6, 1))
    cells = 2 * 7 * 7
    forward, backward = products_of(net, 2, 3, 7, 7)
    assert (forward, backward) == (cells * (12 + 20 + 30), cells * (12 + 20 + 2 * 30))


@pytest.mark.parametrize("device", ["cpu", "meta"])  # another kernel on each
def test_attention_by_hand(device):
    q, k, v = (
        torch.randn(2, 3, n, e, device=device, requires_grad=True) for n, e in ((5, 8), (7, 8), (7, 8))
    )
    with counted() as forward:
        result = functional.scaled_dot_product_attention(q, k, v)
    with counted() as backward:
        result.sum().backward()
    once = 2 * 3 * 5 * 7 * (8 + 8)
    assert (forward.total, backward.total) == (once, 2 * once)


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")
@pytest.mark.parametrize("layout", ["coo", "csr"])
def test_a_sparse_factor_counts_its_stored_values(layout):
    matrix = torch.sparse_coo_tensor(
        torch.tensor([[0, 1, 1], [2, 0, 2]]),
        torch.ones(3),
        (40, 30),
        is_coalesced=True,
        check_invariants=True,
    )
    matrix = matrix if layout == "coo" else matrix.to_sparse_csr()
    dense = torch.randn(30, 4, requires_grad=True)
    with counted() as work:
        (matrix @ dense).sum().backward()
    assert work.total == 2 * 3 * 4
    with counted() as work, torch.no_grad():
        torch.randn(5, 40) @ matrix
        torch.addmm(torch.zeros(40, 4), matrix, dense)
        torch.sparse.mm(matrix, dense)
    assert work.total == 5 * 3 + 2 * 3 * 4


def test_other_products():
    a, b = torch.randn(2, 3, 4), torch.randn(2, 4, 5)
    with counted() as work:
        torch.baddbmm(torch.zeros(2, 3, 5), a, b)
        torch.einsum("bij,bjk->bik", a, b)
        a[0] @ b[0, :, 0]
        (a + 1).exp().sum()  # no product
    assert work.total == 2 * 60 + 2 * 60 + 12


def test_training_step_of_a_resnet_equals_pytorchs_counter():
    images = torch.randn(2, 3, 33, 40)
    encoder = ResNet(18, width=16)
    with counted() as ours:
        encoder(images).vector.sum().backward()
    with FlopCounterMode(display=False) as theirs:
        encoder(images).vector.sum().backward()
    assert 2 * ours.total == theirs.get_total_flops() > 0

import copy

import pytest
import torch
import torchvision
from torch import nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

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


# ---- the projector's first convolution before the last upsampling
def pair_of_graphs(dtype=torch.float64, bias=True, size=(65, 97), **switches):
    """A decoder and a projector, their maps, and both orders of the graph."""
    torch.manual_seed(0)
    decoder = SDM([8, 16, 32, 64], dims=32, **switches).to(dtype)
    projector = ConvMLP(32, 24, 6, bias=bias).to(dtype)
    with torch.no_grad():  # so that a bias that is left out is seen
        for name, parameter in [*decoder.named_parameters(), *projector.named_parameters()]:
            if name.endswith("bias"):
                parameter.normal_()
    features = pyramid(size=size)
    maps = {name: value.to(dtype).requires_grad_() for name, value in features.maps.items()}
    return decoder, projector, Features(maps=maps, strides=features.strides)


def outcome(call, decoder, projector, features):
    """Result, every gradient and every buffer of a fresh copy."""
    decoder, projector = copy.deepcopy(decoder), copy.deepcopy(projector)
    leaves = {name: value.detach().clone().requires_grad_() for name, value in features.maps.items()}
    result = call(decoder, projector, Features(maps=leaves, strides=features.strides))
    weights = torch.randn(result.shape, generator=torch.Generator().manual_seed(1)).to(result.dtype)
    (result.square() * weights).sum().backward()
    both = nn.ModuleList([decoder, projector])
    gradients = {name: p.grad for name, p in both.named_parameters()}
    gradients |= {name: value.grad for name, value in leaves.items()}
    return {"result": result.detach(), **gradients}, dict(both.named_buffers())


def plain(decoder, projector, features):
    return projector(decoder(features).last)


def commuted(decoder, projector, features):
    return decoder(features, projector).last


def worst(found, expected):
    """Largest difference of any tensor, relative to the norm of the expected one."""
    assert found.keys() == expected.keys()
    missing = {name for name, value in expected.items() if value is None}
    assert missing == {name for name, value in found.items() if value is None}
    return max(
        float((found[name] - value).double().norm() / value.double().norm().clamp(min=1e-9))
        for name, value in expected.items()
        if value is not None
    )


SWITCHES = [
    *({"blocks": n} for n in (1, 2, 3)),
    {"top_down": False},
    {"lateral": False},
    {"lateral": False, "blocks": 1},
    {"bias": False},
    {"bias": False, "lateral": False},
    *({"size": size} for size in ((64, 64), (33, 50), (31, 200))),
]


@pytest.mark.parametrize("switches", SWITCHES, ids=str)
def test_commuted_projector_equals_the_plain_order_in_float64(switches):
    setting = pair_of_graphs(**switches)
    expected, buffers = outcome(plain, *setting)
    found, kept = outcome(commuted, *setting)
    # in front of a BatchNorm the gradient of a bias is 0: relative to nothing, its rounding means nothing
    zero = {name for name, value in expected.items() if value is not None and value.norm() < 1e-9}
    assert zero <= {"1.0.bias", "0.entry.bias", *(f"0.laterals.{i}.bias" for i in range(3))}
    assert all(found[name].norm() < 1e-9 for name in zero)
    expected, found = ({k: v for k, v in part.items() if k not in zero} for part in (expected, found))
    assert worst(found, expected) < 1e-12
    assert worst(kept, buffers) < 1e-12


def test_commuted_projector_in_float32():
    setting = pair_of_graphs(torch.float32)
    (expected, _), (found, _) = (outcome(order, *setting) for order in (plain, commuted))
    kept = {name for name, value in expected.items() if value is not None and value.norm() > 1e-3}
    assert len(kept) > 30
    assert worst({k: found[k] for k in kept}, {k: expected[k] for k in kept}) < 1e-5


def test_commuted_projector_in_evaluation_mode():
    decoder, projector, features = pair_of_graphs()
    plain(decoder, projector, features)  # running statistics that are not those of a new layer
    decoder.eval(), projector.eval()
    with torch.no_grad():
        expected, found = (order(decoder, projector, features) for order in (plain, commuted))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_commuted_projector_under_autocast():
    setting = pair_of_graphs(torch.float32)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        narrow, commuted_narrow = plain(*setting), commuted(*setting)
    with torch.no_grad():
        exact = plain(*setting)
    assert commuted_narrow.dtype == narrow.dtype == torch.bfloat16
    error = (commuted_narrow - exact).norm() / exact.norm()
    assert error < 1.5 * (narrow - exact).norm() / exact.norm() < 0.03


def test_commuted_projector_with_bfloat16_weights():
    setting = pair_of_graphs(torch.bfloat16)
    with torch.no_grad():
        found, expected = commuted(*setting), plain(*setting)
    assert found.dtype == torch.bfloat16
    assert (found - expected).norm() / expected.norm() < 0.05


class Shapes(TorchDispatchMode):
    """The shapes of everything that is made."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        for part in made if isinstance(made, tuple | list) else [made]:
            if isinstance(part, torch.Tensor):
                self.seen.add(tuple(part.shape))
        return made


def test_the_wide_map_is_never_made():
    decoder, projector, features = pair_of_graphs(torch.float32)
    wide = (2, 32, *features.maps["layer2"].shape[-2:])
    shapes = {}
    for order in (plain, commuted):
        with Shapes() as shapes[order]:
            order(decoder, projector, features).sum().backward()
    assert wide in shapes[plain].seen
    assert wide not in shapes[commuted].seen


class Doubled(nn.Conv2d):
    def forward(self, maps):
        return 2 * super().forward(maps)


def hooked(layer):
    layer.register_forward_hook(lambda module, given, result: 2 * result)
    return layer


@pytest.mark.parametrize(
    "change",
    [
        lambda d, p: p.__setitem__(0, nn.Conv2d(32, 24, 3, padding=1)),
        lambda d, p: p.__setitem__(0, Doubled(32, 24, 1)),
        lambda d, p: p.__setitem__(0, nn.Sequential(nn.Conv2d(32, 24, 1), nn.Tanh())),
        lambda d, p: d.laterals.__setitem__(1, nn.Conv2d(16, 32, 1, groups=4)),
        lambda d, p: d.laterals.__setitem__(1, nn.Identity()),
        lambda d, p: hooked(p[0]),
        lambda d, p: hooked(d.laterals[1]),
        lambda d, p: hooked(p),
        lambda d, p: nn.utils.parametrizations.weight_norm(p[0]),
    ],
)
def test_replaced_parts_do_what_they_do(change):
    decoder, projector, features = pair_of_graphs(torch.float32)
    change(decoder, projector)
    if isinstance(decoder.laterals[1], nn.Identity):
        features.maps["layer2"] = torch.randn(2, 32, *features.maps["layer2"].shape[-2:])
    expected = plain(decoder, projector, features)
    torch.testing.assert_close(commuted(decoder, projector, features), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("order", [plain, commuted])
def test_recompute_changes_nothing(order):
    decoder, projector, features = pair_of_graphs()
    expected = outcome(order, decoder, projector, features)
    decoder.recompute = projector.recompute = True
    found = outcome(order, decoder, projector, features)
    for mine, theirs in zip(found, expected, strict=True):
        assert all(value is None or torch.equal(mine[name], value) for name, value in theirs.items())

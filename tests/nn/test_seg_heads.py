"""Heads against naive re-computation, closed-form counts and MMSegmentation's names."""

import pytest
import torch
from torch import nn
from torch.nn import functional

from poodle_lightning.nn.seg_heads import FCN, LinearHead, ViTLinear
from poodle_lightning.nn.upernet import UPerNet
from poodle_lightning.types import Features, UserError

PYRAMID = {"layer1": 4, "layer2": 6, "layer3": 8, "layer4": 10}
STRIDES = {"layer1": 4, "layer2": 8, "layer3": 16, "layer4": 32}
BLOCKS = {f"block{i}": 6 for i in range(12)}
EVEN = dict.fromkeys(BLOCKS, 16)


def features(channels=PYRAMID, strides=STRIDES, batch=2, size=(64, 96), seed=0):
    made = torch.Generator().manual_seed(seed)
    maps = {
        name: torch.randn(batch, count, size[0] // strides[name], size[1] // strides[name], generator=made)
        for name, count in channels.items()
    }
    return Features(maps, dict(strides))


def ready(head, channels=PYRAMID, strides=STRIDES, classes=5):
    torch.manual_seed(1)
    head.build(channels, strides, classes)
    for module in head.modules():
        if isinstance(module, nn.BatchNorm2d):  # not the identity, so that leaving it out is seen
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
            if module.affine:
                nn.init.normal_(module.weight)
                nn.init.normal_(module.bias)
    return head.eval()


def block(state, name, x, dilation=1):
    """Convolution, BatchNorm with running statistics and ReLU, written out."""
    weight = state[f"{name}.conv.weight"]
    x = functional.conv2d(x, weight, padding=weight.shape[-1] // 2 * dilation, dilation=dilation)
    mean, var, scale, shift = (
        state[f"{name}.bn.{part}"][:, None, None]
        for part in ("running_mean", "running_var", "weight", "bias")
    )
    return ((x - mean) / (var + 1e-5).sqrt() * scale + shift).clamp(min=0)


def up(x, size):
    return functional.interpolate(x, size=size, mode="bilinear", align_corners=False)


def test_linear_head_is_one_matrix_per_cell():
    head, found = ready(LinearHead("layer2")), features()
    expected = (
        torch.einsum("bchw,kc->bkhw", found.maps["layer2"], head.conv_seg.weight[..., 0, 0])
        + (head.conv_seg.bias[:, None, None])
    )
    torch.testing.assert_close(head(found), expected)
    assert set(head.state_dict()) == {"conv_seg.weight", "conv_seg.bias"}
    assert sum(p.numel() for p in head.parameters()) == 5 * (6 + 1)


def test_linear_head_reads_the_last_map_by_default():
    head, found = ready(LinearHead(kernel=3)), features()
    assert head.conv_seg.weight.shape == (5, 10, 3, 3)
    expected = functional.conv2d(found.maps["layer4"], head.conv_seg.weight, head.conv_seg.bias, padding=1)
    torch.testing.assert_close(head(found), expected)


def test_linear_head_with_norm():
    head, found = ready(LinearHead(1, norm=True)), features()
    x = found.maps["layer2"] - head.bn.running_mean[:, None, None]
    x = x / (head.bn.running_var + 1e-5).sqrt()[:, None, None]
    torch.testing.assert_close(head(found), functional.conv2d(x, head.conv_seg.weight, head.conv_seg.bias))


def test_vit_linear():
    head, found = ready(ViTLinear(norm=True), BLOCKS, EVEN), features(BLOCKS, EVEN)
    wide = torch.cat([found.maps[f"block{i}"] for i in (3, 5, 7, 11)], dim=1)
    wide = (wide - head.bn.running_mean[:, None, None]) / ((head.bn.running_var + 1e-5).sqrt()[:, None, None])
    expected = functional.conv2d(wide, head.conv_seg.weight, head.conv_seg.bias)
    torch.testing.assert_close(head(found), expected)
    assert sum(p.numel() for p in head.parameters()) == 5 * (4 * 6 + 1)


def test_fcn():
    head, found = ready(FCN(channels=7)), features()
    state = head.state_dict()
    x = block(state, "convs.0", found.maps["layer4"], 6)
    expected = functional.conv2d(block(state, "convs.1", x, 6), state["conv_seg.weight"], head.conv_seg.bias)
    torch.testing.assert_close(head(found), expected)
    assert head.convs[0].conv.weight.shape == (7, 10, 3, 3)


def naive_upernet(state, maps, pools):
    """mmseg's ``UPerHead.forward`` and ``PPM.forward``, written out."""
    deepest = maps[-1]
    size = deepest.shape[-2:]
    pooled = [
        up(block(state, f"psp_modules.{i}.1", functional.adaptive_avg_pool2d(deepest, side)), size)
        for i, side in enumerate(pools)
    ]
    levels = [block(state, f"lateral_convs.{i}", maps[i]) for i in range(3)]
    levels.append(block(state, "bottleneck", torch.cat([deepest, *pooled], dim=1)))
    for i in (3, 2, 1):
        levels[i - 1] = levels[i - 1] + up(levels[i], levels[i - 1].shape[-2:])
    fused = [block(state, f"fpn_convs.{i}", levels[i]) for i in range(3)] + [levels[3]]
    wide = torch.cat([up(level, levels[0].shape[-2:]) for level in fused], dim=1)
    x = block(state, "fpn_bottleneck", wide)
    return functional.conv2d(x, state["conv_seg.weight"], state["conv_seg.bias"])


def test_upernet():
    head, found = ready(UPerNet(channels=8)), features()
    expected = naive_upernet(head.state_dict(), list(found.maps.values()), (1, 2, 3, 6))
    assert expected.shape == (2, 5, 16, 24)
    torch.testing.assert_close(head(found), expected, rtol=1e-5, atol=1e-5)


def test_upernet_of_a_vit():
    head = ready(UPerNet([3, 5, 7, 11], channels=8, vit_pyramid=True), BLOCKS, EVEN)
    nn.init.normal_(head.pyramid.norm.weight)
    found, state = features(BLOCKS, EVEN), head.state_dict()
    taps = [found.maps[f"block{i}"] for i in (3, 5, 7, 11)]
    for i in range(3):
        mean, var = taps[i].mean(1, keepdim=True), taps[i].var(1, unbiased=False, keepdim=True)
        scale, shift = (state[f"pyramid.norm.{name}"][:, None, None] for name in ("weight", "bias"))
        taps[i] = (taps[i] - mean) / (var + 1e-6).sqrt() * scale + shift
    x = functional.conv_transpose2d(taps[0], state["pyramid.fpn1.0.weight"], head.pyramid.fpn1[0].bias, 2)
    mean, var, scale, shift = (
        state[f"pyramid.fpn1.1.{part}"][:, None, None]
        for part in ("running_mean", "running_var", "weight", "bias")
    )
    x = functional.gelu((x - mean) / (var + 1e-5).sqrt() * scale + shift)
    four = functional.conv_transpose2d(x, state["pyramid.fpn1.3.weight"], head.pyramid.fpn1[3].bias, 2)
    two = functional.conv_transpose2d(taps[1], state["pyramid.fpn2.0.weight"], head.pyramid.fpn2[0].bias, 2)
    maps = [four, two, taps[2], functional.max_pool2d(taps[3], 2)]
    assert [x.shape[-1] for x in maps] == [24, 12, 6, 3]
    expected = naive_upernet(state, maps, (1, 2, 3, 6))
    torch.testing.assert_close(head(found), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("classes", [19, 150])
def test_upernet_has_mmsegs_parameters_and_names(classes):
    """Counts from mmseg's ``uper_head.py``: no bias in convolutions, two numbers per channel of a norm."""
    dims, width, pools = (256, 512, 1024, 2048), 512, (1, 2, 3, 6)
    with torch.device("meta"):
        head = UPerNet()
        head.build(dict(zip(STRIDES, dims, strict=True)), STRIDES, classes)

    def conv_module(inside, kernel):
        return inside * width * kernel**2 + 2 * width

    expected = (
        len(pools) * conv_module(dims[3], 1)
        + conv_module(dims[3] + len(pools) * width, 3)
        + sum(conv_module(count, 1) for count in dims[:3])
        + 3 * conv_module(width, 3)
        + conv_module(4 * width, 3)
        + classes * (width + 1)
    )
    assert sum(p.numel() for p in head.parameters()) == expected
    names = {f"psp_modules.{i}.1" for i in range(4)} | {"bottleneck", "fpn_bottleneck"}
    names |= {f"{part}.{i}" for part in ("lateral_convs", "fpn_convs") for i in range(3)}
    tails = ["conv.weight"]
    tails += [f"bn.{part}" for part in ("weight", "bias", "running_mean", "running_var")]
    tails += ["bn.num_batches_tracked"]
    keys = {f"{name}.{tail}" for name in names for tail in tails}
    assert set(head.state_dict()) == keys | {"conv_seg.weight", "conv_seg.bias"}


HEADS = [
    (lambda: LinearHead(dropout=0.0), PYRAMID, STRIDES),
    (lambda: ViTLinear((0, 11)), BLOCKS, EVEN),
    (lambda: FCN(channels=4), PYRAMID, STRIDES),
    (lambda: FCN("layer3", channels=4, convs=1, dilation=1), PYRAMID, STRIDES),
    (lambda: UPerNet(channels=4, dropout=0.0), PYRAMID, STRIDES),
    (lambda: UPerNet((3, 5, 7, 11), channels=4, dropout=0.0, vit_pyramid=True), BLOCKS, EVEN),
]


@pytest.mark.parametrize(("make", "channels", "strides"), HEADS)
def test_gradients_reach_all_parameters(make, channels, strides):
    head = ready(make(), channels, strides).train()
    logits = head(features(channels, strides))
    functional.cross_entropy(logits, torch.randint(5, logits[:, 0].shape)).backward()
    for name, parameter in head.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize(
    ("head", "channels", "strides", "message"),
    [
        (LinearHead(max_stride=8), PYRAMID, STRIDES, "layer4 has stride 32.* 8 or less.*output_stride 8"),
        (LinearHead("layer5"), PYRAMID, STRIDES, "no map 'layer5': choose from layer1"),
        (ViTLinear(), PYRAMID, STRIDES, "4 maps, none at place 5"),
        (UPerNet(), BLOCKS, EVEN, "all have stride 16.*vit_pyramid true"),
        (UPerNet(vit_pyramid=True), PYRAMID, STRIDES, "set it to false"),
    ],
)
def test_a_head_that_does_not_fit_is_refused(head, channels, strides, message):
    with pytest.raises(UserError, match=message):
        head.build(channels, strides, 5)


def test_a_head_that_makes_no_sense_is_refused():
    for make in (lambda: LinearHead(kernel=2), lambda: FCN(convs=0), lambda: UPerNet(["layer1"])):
        with pytest.raises(UserError):
            make()


def test_upernet_refuses_a_single_training_image():
    head = ready(UPerNet(channels=4)).train()
    with pytest.raises(UserError, match="batch_size 2"):
        head(features(batch=1))

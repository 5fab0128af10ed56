"""Files as other projects write them, made here from torchvision's and timm's networks; outputs agree."""

import argparse
import copy
from functools import lru_cache

import pytest
import timm
import torch
import torchvision
from torch import nn
from torch.nn import functional
from torchvision.models.resnet import BasicBlock, Bottleneck

from poodle_lightning.nn.encoder import DecodedEncoder
from poodle_lightning.nn.foreign import FORMATS, infer, title, translate
from poodle_lightning.nn.resnet import ResNet
from poodle_lightning.nn.vit import ViT
from poodle_lightning.nn.weights import load_state
from poodle_lightning.types import UserError


def shaken(make, seed=0, **kwargs):
    """A network with weights and BatchNorm buffers that no other network has by chance."""
    torch.manual_seed(seed)
    network = make(**kwargs)
    for tensor in network.state_dict().values():
        if tensor.is_floating_point():
            tensor.add_(0.02 * torch.randn_like(tensor))
    return network.eval()


@lru_cache
def resnet(seed=0):
    return shaken(torchvision.models.ResNet, seed, block=BasicBlock, layers=[1, 1, 1, 1])


def transformer(seed=0, dim=64, heads=1, size=32, patch=8, **kwargs):
    sizes = {"img_size": size, "patch_size": patch, "embed_dim": dim, "depth": 2, "num_heads": heads}
    return shaken(timm.models.VisionTransformer, seed, **sizes, num_classes=5, **kwargs)


def under(prefix, network, head=None):
    """The network's state dict with a prefix; ``head`` is another name for its classifier."""
    state = network.state_dict()
    names = {k: k if head is None else k.replace("fc.", head).replace("head.", head) for k in state}
    return {prefix + names[k]: v for k, v in state.items()}


def vector(network, images):
    """What the network feeds its classifier."""
    headless = copy.deepcopy(network)
    headless.fc = headless.head = nn.Identity()
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    with torch.no_grad():
        return headless(torchvision.transforms.functional.normalize(images, mean, std))


def loaded(content, network=None):
    found = translate(content, network, "x.pth")
    encoder = infer(found, "x.pth")
    load_state(encoder, found.state, "x.pth")
    return found, encoder.eval()


def same(encoder, reference, size=64):
    images = torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        torch.testing.assert_close(encoder(images).vector, vector(reference, images), rtol=1e-5, atol=1e-5)


def fails(call, message):
    with pytest.raises(UserError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def contrastive(query, key, wrap="state_dict"):
    """A file with two copies and a queue; the names follow."""
    state = under(f"module.{query}", resnet(0), "fc.0.") | under(f"module.{key}", resnet(1), "fc.0.")
    return {wrap: state | {"module.queue": torch.zeros(8, 8)}, "epoch": 3, "optimizer": {"state": {}}}


def densecl(second_queue=True):
    state = (
        under("backbone.", resnet(0)) | under("encoder_q.0.", resnet(0)) | under("encoder_k.0.", resnet(1))
    )
    queues = {"queue": torch.zeros(8, 8)} | ({"queue2": torch.zeros(8, 8)} if second_queue else {})
    return {"state_dict": state | queues, "meta": {"epoch": 200}}


def pair(online, teacher, extra=None):
    student = under("module.backbone.", online) | {"module.head.mlp.0.weight": torch.zeros(2, 2)}
    return {
        "student": student | (extra or {}),
        "teacher": under("backbone.", teacher) | {"head.mlp.0.weight": torch.zeros(2, 2)},
        "args": argparse.Namespace(arch="vit_small"),
        "epoch": 1,
    }


# What the file holds, the row it belongs to, and which network of it is the default: seed 0 is the one that
# learns by gradients, seed 1 its moving average.
RESNETS = {
    "plain": (lambda: under("", resnet()), "torchvision/timm names", 0),
    "DenseCL backbone": (
        lambda: {"state_dict": under("", resnet()), "author": "DenseCL"},
        "torchvision/timm names",
        0,
    ),
    "SwAV": (
        lambda: (
            under("module.", resnet())
            | {"module.projection_head.0.weight": torch.zeros(1), "module.prototypes.weight": torch.zeros(1)}
        ),
        "SwAV",
        0,
    ),
    "VICReg": (
        lambda: {
            "model": under("module.backbone.", resnet()) | {"module.projector.0.weight": torch.zeros(1)}
        },
        "backbone.*",
        0,
    ),
    "MoCo": (lambda: contrastive("encoder_q.", "encoder_k."), "MoCo", 0),
    "MoCo-v3": (lambda: contrastive("base_encoder.", "momentum_encoder."), "MoCo-v3", 0),
    "PixPro": (lambda: contrastive("encoder.", "encoder_k.", "model"), "PixPro", 0),
    "FlowE": (lambda: contrastive("encoder.", "target_encoder.", "model"), "FlowE", 0),
    "solo-learn": (lambda: contrastive("backbone.", "momentum_backbone."), "solo-learn", 0),
    "PooDLe without decoder": (lambda: contrastive("backbone.", "teacher_backbone.", "model"), "PooDLe", 0),
    "DenseCL": (densecl, "DenseCL", 0),
    "OpenSelfSup": (lambda: densecl(second_queue=False), "OpenSelfSup MoCo", 0),
    "DINO": (lambda: pair(resnet(0), resnet(1)), "DINO", 1),
}
TWO = [
    name
    for name, (make, _, _) in RESNETS.items()
    if name not in ("plain", "DenseCL backbone", "SwAV", "VICReg")
]


@pytest.mark.parametrize("name", RESNETS)
def test_resnets_of_every_format(name):
    make, row, seed = RESNETS[name]
    found, encoder = loaded(make())
    assert found.format.name == row
    assert type(encoder) is ResNet
    assert encoder.state_dict().keys() == found.state.keys()
    assert not any(key.startswith(("fc", "head")) for key in found.state)
    same(encoder, resnet(seed))


@pytest.mark.parametrize("name", TWO)
def test_both_networks_of_a_file(name):
    content = RESNETS[name][0]()
    for network, seed in (("online", 0), ("teacher", 1)):
        found, encoder = loaded(content, network)
        assert found.network == network
        same(encoder, resnet(seed))


def test_what_is_left_over_is_named():
    found, _ = loaded(contrastive("encoder_q.", "encoder_k."))
    whole = len(resnet().state_dict())
    assert len(found.leftover) == 2 + whole + 1  # the query's head, the key network, the queue
    assert {"encoder_q.fc.0.weight", "encoder_k.conv1.weight", "queue"} <= set(found.leftover)


@pytest.mark.parametrize(
    ("content", "row"),
    [
        (lambda: under("", transformer()), "torchvision/timm names"),
        (
            lambda: {
                "model": under("", transformer())
                | under("decoder_blocks.0.", nn.Linear(2, 2))
                | {"decoder_pos_embed": torch.zeros(1, 17, 8), "mask_token": torch.zeros(1, 1, 8)}
            },
            "MAE",
        ),
        (lambda: pair(transformer(1), transformer(0)), "DINO"),
        (
            lambda: pair(
                transformer(1), transformer(0), {"module.backbone.masked_embed": torch.zeros(1, 64)}
            ),
            "iBOT",
        ),
        (lambda: {"state_dict": under("module.base_encoder.", transformer(), "head.0.")}, "MoCo-v3"),
    ],
)
def test_transformers_of_every_format(content, row):
    found, encoder = loaded(content())
    assert found.format.name == row
    assert type(encoder) is ViT
    assert encoder.init_args["pos_interp"] == ("dino" if row in ("DINO", "iBOT") else "timm")
    assert encoder.init_args["image_size"] == (32, 32)
    same(encoder, transformer(), size=32)


@pytest.mark.parametrize(
    ("arguments", "prefix", "heads"),
    [
        ({"dim": 192, "heads": 3, "patch": 16}, "", 3),
        ({"dim": 384, "heads": 6}, "", 6),
        ({"dim": 384, "heads": 12}, "base_encoder.", 12),  # MoCo-v3's ViT-S
        ({"dim": 1280, "heads": 16, "patch": 16}, "", 16),  # ViT-H
        ({"class_token": False, "global_pool": "avg", "fc_norm": False}, "", 1),
        ({"qkv_bias": False, "mlp_ratio": 3.0, "size": 48}, "", 1),
    ],
)
def test_sizes_of_transformers(arguments, prefix, heads):
    reference = transformer(**arguments)
    _, encoder = loaded(under(prefix, reference))
    assert encoder.init_args["heads"] == heads
    same(encoder, reference, arguments.get("size", 32))


class Authors(nn.Module):
    """The network of agentic-learning-ai-lab/poodle from its description, with its names, on a ResNet-18."""

    def __init__(self, hidden_factor=0.5, dims=512):
        super().__init__()
        self.backbone = torchvision.models.resnet18()
        del self.backbone.fc
        width = int(64 * hidden_factor)
        self.decoder_blocks = nn.ModuleList(Bottleneck(dims, dims // 4, base_width=width) for _ in range(2))
        self.decoder_laterals = nn.ModuleList(nn.Conv2d(c, dims, 1) for c in (256, 128))

    def forward(self, x):
        net, maps = self.backbone, []
        x = net.maxpool(net.relu(net.bn1(net.conv1(x))))
        for layer in (net.layer1, net.layer2, net.layer3, net.layer4):
            x = layer(x)
            maps.append(x)
        for i, (block, lateral) in enumerate(zip(self.decoder_blocks, self.decoder_laterals, strict=True)):
            x = functional.interpolate(block(x), scale_factor=2, mode="bilinear", align_corners=False)
            x = x + lateral(maps[-i - 2])
        return x


def authors_file(**kwargs):
    online, teacher = shaken(Authors, 0, **kwargs), shaken(Authors, 1, **kwargs)
    state = online.state_dict() | {f"teacher_{k}": v for k, v in teacher.state_dict().items()}
    state |= under("dense_projector.", nn.Linear(2, 2)) | under("pooled_predictor.", nn.Linear(2, 2))
    state |= under("flow_model.fnet.", nn.Linear(2, 2)) | under("teacher_pooled_projector.", nn.Linear(2, 2))
    return {"model": state, "optimizer": {}, "epoch": 100}, {"online": online, "teacher": teacher}


@pytest.mark.parametrize(
    ("network", "expected"), [(None, "online"), ("online", "online"), ("teacher", "teacher")]
)
@pytest.mark.parametrize("factor", [0.5, 1.0])
def test_the_poodle_authors_file(network, expected, factor):
    content, networks = authors_file(hidden_factor=factor)
    found, encoder = loaded(content, network)
    assert (found.format.name, found.network) == ("PooDLe", expected)
    assert type(encoder) is DecodedEncoder
    assert title(encoder) == "ResNet-18 + SDM"
    images = torch.rand(1, 3, 64, 96, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        reference = networks[expected]((images - encoder.mean) / encoder.std)
        maps = encoder(images).maps
    assert reference.shape == (1, 512, 8, 12)
    torch.testing.assert_close(maps["sdm"], reference, rtol=1e-5, atol=1e-5 * float(reference.abs().max()))
    bare = found.without_decoder()
    assert bare.state.keys() == networks["online"].backbone.state_dict().keys()
    assert len(bare.state) + len(bare.leftover) == len(found.state) + len(found.leftover)


def test_the_paper_sizes_are_recognised():
    """ResNet-50 with its decoder of 2048 channels, and wider and deeper ones, by shapes alone."""
    with torch.device("meta"):
        net = torchvision.models.resnet50()
        blocks = nn.ModuleList(Bottleneck(2048, 512, base_width=32) for _ in range(2))
        laterals = nn.ModuleList(nn.Conv2d(c, 2048, 1) for c in (1024, 512))
        state = under("backbone.", net) | under("decoder_blocks.", blocks)
        state |= under("decoder_laterals.", laterals)
        found = translate({"model": state})
        encoder = infer(found)
        assert encoder.state_dict().keys() == found.state.keys()
        assert all(encoder.state_dict()[k].shape == found.state[k].shape for k in found.state)
        assert title(encoder) == "ResNet-50 + SDM"
        for depth in (34, 101):
            whole = under("", getattr(torchvision.models, f"resnet{depth}")())
            assert title(infer(translate(whole))) == f"ResNet-{depth}"
        wide = ResNet(50, width=128).state_dict()
        assert title(infer(translate(wide))) == "ResNet-50, width 128"
        assert title(infer(translate(timm.create_model("vit_base_patch16_224").state_dict()))) == (
            "ViT-B/16, 12 heads"
        )


def without(state, *names):
    return {key: value for key, value in state.items() if key not in names}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (lambda: {"a.weight": torch.ones(1)}, "no key matches a ResNet .*first key is 'a.weight'"),
        (lambda: {"epoch": 1}, "no key matches .*it holds no tensors"),
        (lambda: {"model": nn.Linear(1, 1)}, "no key matches .*it holds no tensors"),
        (
            lambda: without(under("", resnet()), "layer4.0.bn2.weight"),
            "lacks 1 keys, first 'layer4.0.bn2.weight'",
        ),
        (lambda: without(under("", resnet()), "conv1.weight"), "no 'conv1.weight', where a ResNet"),
        (
            lambda: under("", resnet()) | {"conv1.weight": torch.ones(64, 3, 3, 3)},
            r"'conv1.weight' \(64, 3, 3, 3\), where a ResNet",
        ),
        (
            lambda: under("", resnet()) | {"layer3.0.conv1.weight": torch.ones(256, 128, 1, 1)},
            r"'layer3.0.conv1.weight' should have the shape \(256, 128, 3, 3\)",
        ),
        (
            lambda: {k: v for k, v in under("", resnet()).items() if not k.startswith("layer4")},
            r"\(1, 1, 1, 0\) blocks .* no depth",
        ),
        (lambda: under("", transformer(init_values=0.1)), "excess 4 keys, first 'blocks.0.ls1.gamma'"),
        (
            lambda: under("", transformer(reg_tokens=2)),
            "19 position embeddings",
        ),
        (
            lambda: under("", transformer(pos_embed="none")),
            "no plain vision transformer, it lacks 'pos_embed'",
        ),
        (lambda: under("", transformer(size=(32, 48))), "25 position embeddings .* ViT.image_size"),
        (
            lambda: under("", transformer(dim=96, heads=3)),
            "96 channels are no multiple of 64.*ViT.dim=96, heads",
        ),
        (lambda: authors_file(dims=256)[0], "decoder changes the number of channels .512 in the encoder"),
    ],
)
def test_what_is_not_recognised(content, message):
    text = fails(lambda: loaded(content()), message)
    assert text.startswith("x.pth")


def test_a_network_that_is_not_there():
    fails(
        lambda: loaded(under("", resnet()), "teacher"),
        "x.pth .torchvision/timm names. holds no teacher network",
    )
    content = contrastive("encoder_q.", "encoder_k.")
    content["state_dict"] = {k: v for k, v in content["state_dict"].items() if "encoder_k" not in k}
    fails(lambda: loaded(content, "teacher"), "x.pth .MoCo. holds no teacher network")
    only = pair(resnet(0), resnet(1))
    del only["teacher"]
    assert loaded(only)[0].network == "online"


def test_every_row_is_tried_here():
    tried = {row for _, row, _ in RESNETS.values()} | {"MAE", "iBOT"}
    assert {row.name for row in FORMATS} - tried == {"encoder.*", "student/teacher"}
    same(loaded(under("encoder.", resnet()))[1], resnet())
    same(loaded({"student": under("", resnet(0)), "teacher": under("", resnet(1))})[1], resnet(1))

import copy

import pytest
import torch
from tiny_models import make_clip, tiny_encoder, tiny_recipe

from poodle_lightning.augment.geometric import ResizedCrop
from poodle_lightning.losses.contrastive import across_views
from poodle_lightning.methods.vito import VITO
from poodle_lightning.nn.timm_encoder import TimmEncoder
from poodle_lightning.types import UserError


def tiny(encoder=None, **kwargs):
    torch.manual_seed(0)
    sizes = {"hidden": 16, "out": 8, "crop": ResizedCrop((64, 64), (0.4, 1.0)), "recipe": tiny_recipe()}
    return VITO(encoder or tiny_encoder(), **{**sizes, **kwargs}).double().eval()


def pooled_by_hand(network, image):
    """Each scale's weighted mean cell by cell, behind each other, then the projector."""
    maps, parts = network.encoder(image[None]).maps, []
    for layer, pool in network.pools.items():
        cells = maps[layer][0].flatten(1).t()
        first, _, last = pool.attend
        inner = (cells @ first.weight[:, :, 0, 0].t() + first.bias).clamp(min=0)
        mask = (inner @ last.weight[0, :, 0, 0]).exp()
        parts.append(sum(m * cell for m, cell in zip(mask, cells, strict=True)) / mask.sum())
    return network.projector(torch.cat(parts)[None])[0]


def test_loss_and_gradients_equal_the_formula():
    method = tiny()
    twin, clip = copy.deepcopy(method), make_clip(frames=3)
    loss = method.losses(clip)["contrast"]
    loss.backward()
    views = twin.views(clip)
    z, t = (
        torch.stack([torch.stack([pooled_by_hand(network, image) for image in view]) for view in views])
        for network in (twin.online, twin.target.module)
    )
    wanted = across_views(z, t)
    wanted.backward()
    torch.testing.assert_close(loss, wanted)
    for one, other in zip(method.online.parameters(), twin.online.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad)


@pytest.mark.parametrize("attention", [True, False])
@pytest.mark.parametrize("scales", [("layer4",), ("layer3", "layer4")])
def test_gradients_reach_everything_online(scales, attention):
    method = tiny(scales=scales, attention=attention)
    method.losses(make_clip(frames=1))["contrast"].backward()
    assert [n for n, p in method.online.named_parameters() if not p.grad.abs().sum() > 0] == []
    assert all(p.grad is None for p in method.target.parameters())


def test_without_attention_at_one_scale_it_is_moclr():
    method = tiny(scales=("layer4",), attention=False)
    images = torch.rand(2, 3, 64, 64, dtype=torch.float64)
    wanted = method.online.projector(method.online.encoder(images).vector)
    torch.testing.assert_close(method.online.pooled(images), wanted)


def test_published_sizes():
    method = VITO()
    assert [pool.attend[0].weight.shape[:2] for pool in method.online.pools.values()] == [
        (1024, 1024),
        (2048, 2048),
    ]
    assert method.online.projector[0].weight.shape == (4096, 3072)
    assert (method.count, method.crop.area) == (3, (0.4, 1.0))
    assert not any(block.bn3.weight.any() for block in method.online.encoder.layer4)


def test_swin_is_trained_whole():
    encoder = TimmEncoder("swin_tiny_patch4_window7_224", norm=True)
    method = tiny(encoder, scales=("layers2", "layers3"), views=2).float()
    method.losses(make_clip(frames=1))["contrast"].backward()
    assert [n for n, p in method.online.named_parameters() if p.grad is None] == []


def test_look_shows_views_and_weights():
    method, clip = tiny(), make_clip(frames=3)
    look = method.look(clip)
    assert look.large.shape == (2, 3, 3, 64, 64)
    assert {layer: tuple(w.shape) for layer, w in look.pooling.items()} == {
        "layer3": (2, 3, 4, 4),
        "layer4": (2, 3, 2, 2),
    }
    maps = method.online.encoder(look.large[1, 2][None].double()).maps
    torch.testing.assert_close(
        look.pooling["layer3"][1, 2], method.online.pools["layer3"].weights(maps["layer3"])[0]
    )
    assert tiny(attention=False).look(clip).pooling is None


@pytest.mark.parametrize("scales", [("layer3",), ("layer4", "layer4"), ("stage4", "layer4")])
def test_scales_that_do_not_fit_are_refused(scales):
    with pytest.raises(UserError, match=r"model\.scales=.* does not fit the encoder: name layers of layer1"):
        tiny(scales=scales)

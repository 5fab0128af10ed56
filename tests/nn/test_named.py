import pytest
import timm
import torch
import torchvision

from poodle_lightning.nn.named import is_name, named
from poodle_lightning.nn.resnet import ResNet
from poodle_lightning.nn.timm_encoder import TimmEncoder
from poodle_lightning.nn.vit import ViT
from poodle_lightning.types import UserError


def fails(source, message):
    with pytest.raises(UserError, match=message) as caught:
        named(source)
    assert "\n" not in str(caught.value)


@pytest.fixture
def published(monkeypatch):
    """What torchvision and timm would fetch, made here; the last file asked for is kept."""
    asked = []

    def of_torchvision(url, *args, **kwargs):
        asked.append(url)
        torch.manual_seed(1)
        return torchvision.models.resnet18().state_dict()

    def of_timm(name, *args, **kwargs):
        asked.append(name)
        torch.manual_seed(2)
        architecture = name.removeprefix("timm/").partition(".")[0]
        return timm.create_model(architecture).state_dict()

    monkeypatch.setattr(torchvision.models._api, "load_state_dict_from_url", of_torchvision)
    monkeypatch.setattr("timm.models._builder.load_state_dict_from_hf", of_timm)
    return asked


def same(found, reference):
    images = torch.rand(1, 3, 224, 224)
    with torch.no_grad():
        expected = reference.eval()((images - found.mean) / found.std)
        torch.testing.assert_close(found.eval()(images).vector, expected, rtol=1e-5, atol=1e-5)


def test_torchvision(published):
    torch.manual_seed(1)
    reference = torchvision.models.resnet18()
    reference.fc = torch.nn.Identity()
    for source in (
        "torchvision:resnet18",
        "torchvision:resnet18:IMAGENET1K_V1",
        "torchvision:resnet18:DEFAULT",
    ):
        found = named(source)
        assert type(found) is ResNet
        same(found, reference)
    assert published == [torchvision.models.ResNet18_Weights.IMAGENET1K_V1.url] * 3


def test_untrained_asks_nobody(published):
    assert named("torchvision:resnet50:untrained").init_args["depth"] == 50
    assert type(named("timm:resnet18:untrained")) is ResNet
    assert type(named("timm:resnet18.a1_in1k:untrained")) is ResNet
    assert type(named("timm:resnet18d:untrained")) is TimmEncoder
    assert published == []


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("resnet18", ResNet),
        ("vit_tiny_patch16_224", ViT),  # mean and deviation 0.5
        ("deit_tiny_patch16_224", ViT),
        ("vit_medium_patch16_gap_240.sw_in12k", TimmEncoder),  # no class token: pooled, then normed
        ("mobilenetv3_small_050", TimmEncoder),
    ],
)
def test_timm(published, name, kind):
    found = named(f"timm:{name}")
    assert type(found) is kind
    reference = timm.create_model(
        name, pretrained=True, num_classes=0, **({"dynamic_img_size": True} if "gap" in name else {})
    )
    same(found, reference)
    cfg = timm.get_pretrained_cfg(name)
    assert found.mean.flatten().tolist() == pytest.approx(cfg.mean)
    assert found.std.flatten().tolist() == pytest.approx(cfg.std)


@pytest.mark.parametrize(
    "name",
    [
        "eva02_tiny_patch14_224",  # rotary positions
        "vit_small_patch14_reg4_dinov2",  # register tokens, layer scale
        "deit3_small_patch16_224",  # positions without the class token
        "vit_base_patch32_clip_224",  # norm before the blocks, QuickGELU in some
        "deit_tiny_distilled_patch16_224",  # a second token
        "resnet18d",  # another stem
        "vit_small_patch16_18x2_224",  # parallel blocks
        "vit_so400m_patch14_siglip_gap_384",  # no whole number of patches
    ],
)
def test_near_relatives_stay_timms(name):
    with torch.device("meta"):  # only the class matters; nothing is computed
        assert type(named(f"timm:{name}:untrained")) is TimmEncoder


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("torchvision:resnet51", "resnet51 is not offered: did you mean resnet50"),
        ("torchvision:vgg", "vgg is not offered: choose from resnet18"),
        (
            "torchvision:resnet50:IMAGENET1K_V3",
            "no weights 'IMAGENET1K_V3' for resnet50: did you mean IMAGENET1K_V",
        ),
        ("torchvision:resnet50:trained", "'trained' for resnet50: did you mean untrained"),
        ("timm:vit_smal_patch16_224.dino", "no model.*did you mean .*vit_small_patch16_224.dino"),
        ("timm:vit_small_patch16_224.dinoo", "no model.*did you mean vit_small_patch16_224.dino"),
        ("timm:resnet18:IMAGENET1K_V1", "write timm:resnet18.TAG or timm:resnet18:untrained"),
    ],
)
def test_unknown_names(source, message):
    fails(source, message)


def test_without_network(monkeypatch):
    def refuse(*args, **kwargs):
        raise OSError("no route")

    monkeypatch.setattr(torchvision.models._api, "load_state_dict_from_url", refuse)
    monkeypatch.setattr("timm.models._builder.load_state_dict_from_hf", refuse)
    fails("torchvision:resnet18", "IMAGENET1K_V1.*no route.*download them elsewhere and give the path")
    fails("timm:vit_tiny_patch16_224", "timm:vit_tiny_patch16_224 could not be fetched .no route.: download")


def test_what_is_a_name():
    assert is_name("timm:x")
    assert is_name("torchvision:x")
    assert not is_name("owner/name")
    assert not is_name("runs/timm.ckpt")

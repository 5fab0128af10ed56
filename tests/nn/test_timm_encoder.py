import pytest
import timm
import torch

from poodle_lightning.configured import build, spec
from poodle_lightning.nn.timm_encoder import TimmEncoder
from poodle_lightning.types import UserError


def fails(call, message):
    with pytest.raises(UserError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)


# small members of four families: convolutions, windows with attention, a ResNet variant, a wide last layer
@pytest.mark.parametrize(
    ("name", "size", "strides"),
    [
        ("convnext_atto", (64, 96), [4, 8, 16, 32]),
        ("swin_tiny_patch4_window7_224", (224, 224), [4, 8, 16, 32]),
        ("resnet14t", (64, 96), [2, 4, 8, 16, 32]),
        ("mobilenetv3_small_050", (64, 96), [2, 4, 8, 16, 32]),
    ],
)
def test_maps_are_what_timms_stages_give(name, size, strides):
    torch.manual_seed(0)
    ours = TimmEncoder(name).eval()
    reference = timm.create_model(name, num_classes=0).eval()
    reference.load_state_dict(ours.model.state_dict())
    seen = []
    for stage in reference.feature_info:
        module = reference.get_submodule(stage["module"])
        module.register_forward_hook(lambda module, inputs, output: seen.append(output.clone()))
    images = torch.rand(2, 3, *size)
    with torch.no_grad():
        found = ours(images)
        vector = reference((images - ours.mean) / ours.std)
    assert list(found.maps) == list(ours.channels) == list(found.strides)
    assert list(ours.strides.values()) == strides
    for layer, expected in zip(found.maps, seen, strict=True):
        cells = tuple(side // ours.strides[layer] for side in size)
        assert found.maps[layer].shape == (2, ours.channels[layer], *cells)
        if expected.shape[-1] == ours.channels[layer]:  # Swin has its channels last
            expected = expected.permute(0, 3, 1, 2)
        torch.testing.assert_close(found.maps[layer], expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.vector, vector, rtol=1e-5, atol=1e-5)
    assert found.vector.shape[1] == ours.vector_dim


def test_takes_other_sizes_where_the_model_can():
    found = TimmEncoder("swin_tiny_patch4_window7_224").eval()(torch.rand(1, 3, 256, 224))
    assert found.last.shape == (1, 768, 8, 7)


def test_swins_deepest_map_may_be_what_its_vector_is_the_mean_of():
    plain = TimmEncoder("swin_tiny_patch4_window7_224").eval()
    normed = TimmEncoder("swin_tiny_patch4_window7_224", norm=True).eval()
    normed.load_state_dict(plain.state_dict())
    with torch.no_grad():
        one, other = (encoder(torch.rand(1, 3, 64, 64)) for encoder in (plain, normed))
    assert one.maps.keys() == other.maps.keys() == {f"layers{k}" for k in range(4)}
    torch.testing.assert_close(other.vector, other.last.mean(dim=(2, 3)), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(one.vector, one.last.mean(dim=(2, 3)), atol=1e-2)


def test_colours_are_those_of_the_weights():
    assert TimmEncoder("mobilenetv3_small_050.lamb_in1k").mean.flatten()[0].item() == pytest.approx(0.485)
    half = TimmEncoder("mixer_s32_224")
    assert half.mean.flatten().tolist() == half.std.flatten().tolist() == [0.5, 0.5, 0.5]


def test_dilation():
    plain, dilated = TimmEncoder("resnet14t").eval(), TimmEncoder("resnet14t", output_stride=8).eval()
    dilated.load_state_dict(plain.state_dict())
    assert list(dilated.strides.values()) == [2, 4, 8, 8, 8]
    images = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        fine, coarse = dilated(images).maps["layer2"], plain(images).maps["layer2"]
    torch.testing.assert_close(fine, coarse)
    fails(lambda: TimmEncoder("resnet14t", output_stride=4), "resnet14t cannot be dilated to output_stride 4")
    fails(lambda: TimmEncoder("mobilenetv3_small_050", output_stride=8), "cannot be dilated.*choose a ResNet")


def test_weights_from_a_file_and_spec(tmp_path):
    reference = timm.create_model("mobilenetv3_small_050")
    torch.save(reference.state_dict(), tmp_path / "w.pth")
    ours = TimmEncoder("mobilenetv3_small_050", weights=str(tmp_path / "w.pth"))
    assert torch.equal(ours.model.conv_stem.weight, reference.conv_stem.weight)
    again = build(spec(ours))
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), ours.parameters(), strict=True))
    fails(lambda: TimmEncoder("convnext_atto", str(tmp_path / "w.pth")), "no key matches")


def test_weights_without_network(monkeypatch):
    def refuse(*args, **kwargs):
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr("timm.models._builder.load_state_dict_from_hf", refuse)
    fails(
        lambda: TimmEncoder("convnext_atto", "pretrained"),
        "weights of timm:convnext_atto could not be fetched .no route.: download them",
    )


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("convnext_attoo", "no model 'convnext_attoo': did you mean .*convnext_atto"),
        ("convnext_atto.d3_in1k", "no model 'convnext_atto.d3_in1k': did you mean convnext_atto.d2_in1k"),
        ("%%%%", r"no model '%%%%': timm.list_models\(\) names all"),
    ],
)
def test_unknown_names(name, message):
    fails(lambda: TimmEncoder(name), message)

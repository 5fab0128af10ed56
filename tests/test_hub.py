import argparse
import json
import logging

import pytest
import torch
import torchvision
from safetensors.torch import load_file
from torch import nn

from poodle_lightning.configured import spec
from poodle_lightning.hub import dilate, export_torchvision, from_pretrained, load_encoder, save_pretrained
from poodle_lightning.nn.encoder import DecodedEncoder
from poodle_lightning.nn.resnet import ResNet
from poodle_lightning.nn.sdm import SDM
from poodle_lightning.nn.timm_encoder import TimmEncoder
from poodle_lightning.nn.vit import ViT
from poodle_lightning.types import UserError


def bare(**kwargs):
    torch.manual_seed(0)
    encoder = ResNet(**{"depth": 10, "width": 8, **kwargs})
    encoder(torch.rand(2, 3, 32, 32))  # moves BatchNorm's buffers off their start
    return encoder


def decoded():
    encoder = bare()
    return DecodedEncoder(encoder, SDM(encoder.channels, dims=32))


def assert_same(found, expected):
    assert type(found) is type(expected)
    assert not found.training
    ours, theirs = found.state_dict(), expected.state_dict()
    assert list(ours) == list(theirs)
    assert all(torch.equal(ours[k], theirs[k]) for k in ours)
    images = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        a, b = found(images), expected.eval()(images)
    assert all(torch.equal(a.maps[k], b.maps[k]) for k in b.maps)
    assert torch.equal(a.vector, b.vector)


def fails(call, message):
    with pytest.raises(UserError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)


@pytest.fixture
def checkpoint(tmp_path):
    """A file as a run writes it, for an encoder with its decoder or without."""

    def write(encoder, name="run.ckpt", **changes):
        path = tmp_path / name
        prefixes = {"encoder": "online.encoder."}
        if isinstance(encoder, DecodedEncoder):
            prefixes["decoder"] = "online.decoder."
            state = {f"online.{k}": v for k, v in encoder.state_dict().items()}
        else:
            state = {f"online.encoder.{k}": v for k, v in encoder.state_dict().items()}
        state |= {f"target.module.{k.partition('.')[2]}": v + 1 for k, v in state.items()}
        state["predictor.weight"] = torch.zeros(1)
        described = {
            "format": 1,
            "version": "0.1.0",
            "method": {},
            "backbone": spec(encoder),
            "prefixes": prefixes,
        }
        content = {"state_dict": state, "poodle_lightning": described | changes, "optimizer_states": []}
        torch.save(content, path)
        return path

    return write


@pytest.mark.parametrize("make", [bare, decoded])
def test_folder_gives_the_same_encoder(make, tmp_path):
    encoder = make()
    folder = save_pretrained(encoder, tmp_path / "a" / "b")
    assert sorted(p.name for p in folder.iterdir()) == ["README.md", "config.json", "model.safetensors"]
    assert_same(from_pretrained(folder), encoder)
    assert_same(load_encoder(str(folder)), encoder)
    assert type(encoder).__name__ in (folder / "README.md").read_text()
    save_pretrained(encoder, folder, card="# mine\n")
    assert (folder / "README.md").read_text() == "# mine\n"


def test_memory_layout_does_not_matter(tmp_path):
    encoder = bare().to(memory_format=torch.channels_last)
    found = from_pretrained(save_pretrained(encoder, tmp_path))
    assert_same(found.to(memory_format=torch.channels_last), encoder)


@pytest.mark.parametrize("make", [bare, decoded])
def test_checkpoint_gives_the_online_encoder(make, checkpoint):
    encoder = make()
    assert_same(from_pretrained(checkpoint(encoder)), encoder)


def test_first_weights_are_not_fetched_again(tmp_path, monkeypatch, checkpoint):
    state = torchvision.models.resnet18().state_dict()
    monkeypatch.setattr(torchvision.models._api, "load_state_dict_from_url", lambda *args, **kwargs: state)
    encoder = ResNet(18, weights="IMAGENET1K_V1")

    def refuse(*args, **kwargs):
        raise AssertionError("asked the network")

    monkeypatch.setattr(torchvision.models._api, "load_state_dict_from_url", refuse)
    assert_same(from_pretrained(save_pretrained(encoder, tmp_path / "x")), encoder)
    assert "IMAGENET1K_V1" not in (tmp_path / "x" / "config.json").read_text()
    assert_same(from_pretrained(checkpoint(encoder)), encoder)


def test_name_on_the_hub(tmp_path, monkeypatch):
    import huggingface_hub

    encoder = bare()
    folder = save_pretrained(encoder, tmp_path / "cached")
    asked = []

    def fetch(name, **kwargs):
        asked.append(name)
        if name == "owner/encoder":
            return str(folder)
        raise OSError("404 Client Error\n\nmore lines")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    assert_same(from_pretrained("owner/encoder"), encoder)
    fails(lambda: from_pretrained("owner/other"), "owner/other is neither here.*404 Client Error")
    fails(lambda: from_pretrained(tmp_path / "no" / "such"), "does not exist")
    fails(lambda: from_pretrained("word"), "word does not exist")
    assert asked == ["owner/encoder", "owner/other"]


def test_missing_files(tmp_path):
    fails(lambda: from_pretrained(tmp_path / "no.ckpt"), "no.ckpt is not a file")
    (tmp_path / "empty").mkdir()
    fails(lambda: from_pretrained(tmp_path / "empty"), "no config.json")
    folder = save_pretrained(bare(), tmp_path / "x")
    (folder / "model.safetensors").unlink()
    fails(lambda: from_pretrained(folder), "model.safetensors is not a file")


@pytest.mark.parametrize("keep", [0.0, 0.3, 0.9])
def test_truncated_files(tmp_path, checkpoint, keep):
    folder = save_pretrained(bare(), tmp_path / "x")
    for path in (checkpoint(bare()), folder / "model.safetensors"):
        content = path.read_bytes()
        path.write_bytes(content[: int(keep * len(content))])
        fails(
            lambda place=path: from_pretrained(place if place.suffix == ".ckpt" else folder),
            f"{path.name} is truncated",
        )
    (folder / "config.json").write_text('{"format": 1, "enc')
    fails(lambda: from_pretrained(folder), "config.json is truncated")


def test_other_architecture(tmp_path, checkpoint):
    folder = save_pretrained(bare(), tmp_path / "x")
    config = json.loads((folder / "config.json").read_text())
    config["encoder"]["init_args"]["width"] = 16
    (folder / "config.json").write_text(json.dumps(config))
    fails(
        lambda: from_pretrained(folder),
        r"another architecture: 'conv1.weight'.*\(16, 3, 7, 7\).*\(8, 3, 7, 7\)",
    )
    path = checkpoint(bare(), backbone=spec(ResNet(18, width=8)))
    fails(lambda: from_pretrained(path), "another architecture: it lacks .* keys, first 'layer1.1")
    path = checkpoint(ResNet(18, width=8), backbone=spec(bare()))
    fails(lambda: from_pretrained(path), "another architecture: it has in excess .* keys, first 'layer1.1")


def test_wrong_keys(tmp_path, checkpoint):
    path = checkpoint(bare(), prefixes={"encoder": "student.encoder."})
    fails(lambda: from_pretrained(path), r"holds no key student.encoder.\*")
    path = checkpoint(bare(), prefixes={"encoder": "target."})
    fails(lambda: from_pretrained(path), "no key matches the encoder.*'conv1.weight'.*'module.")
    torch.save({"a.weight": torch.ones(1)}, tmp_path / "w.pth")
    fails(lambda: from_pretrained(tmp_path / "w.pth"), "does not describe its encoder")
    fails(lambda: load_encoder(tmp_path / "w.pth", bare()), "no key matches the encoder.*'a.weight'")
    torch.save([1], tmp_path / "list.pth")
    fails(lambda: load_encoder(tmp_path / "list.pth", bare()), "holds a list")
    torch.save({"a": 1}, tmp_path / "none.pth")
    fails(lambda: load_encoder(tmp_path / "none.pth", bare()), "no tensors")


def test_nothing_in_a_file_is_executed(tmp_path):
    torch.save({"model": nn.Linear(1, 1)}, tmp_path / "objects.ckpt")
    fails(lambda: from_pretrained(tmp_path / "objects.ckpt"), "could run code")
    folder = save_pretrained(bare(), tmp_path / "x")
    config = json.loads((folder / "config.json").read_text())
    for class_path, message in (
        ("os.system", "outside the allowed"),
        ("poodle_lightning.nn.optim.Recipe", "not an encoder"),
    ):
        (folder / "config.json").write_text(json.dumps(config | {"encoder": {"class_path": class_path}}))
        fails(lambda: from_pretrained(folder), message)


def test_other_format(tmp_path, checkpoint):
    fails(lambda: from_pretrained(checkpoint(bare(), format=2, version="9.0")), "format 2 .*9.0.*update")
    folder = save_pretrained(bare(), tmp_path / "x")
    (folder / "config.json").write_text("[]")
    fails(lambda: from_pretrained(folder), "does not describe an encoder")


def test_bare_state_dict_of_torchvision(tmp_path):
    reference = torchvision.models.resnet18()
    torch.save(reference.state_dict(), tmp_path / "w.pth")
    described = {"class_path": "poodle_lightning.nn.resnet.ResNet", "init_args": {"depth": 18}}
    found = load_encoder(tmp_path / "w.pth", described)
    given = ResNet(18)
    assert load_encoder(tmp_path / "w.pth", given) is given
    for encoder in (found, given):
        assert torch.equal(encoder.layer4[1].conv2.weight, reference.layer4[1].conv2.weight)
        assert not encoder.training
    fails(lambda: load_encoder(tmp_path / "w.pth", ResNet(34)), "another architecture")


@pytest.mark.parametrize("name", ["w.pth", "sub/w.safetensors"])
@pytest.mark.parametrize("with_decoder", [False, True])
def test_export_for_torchvision(tmp_path, name, with_decoder):
    encoder = ResNet(50).eval()
    whole = DecodedEncoder(encoder, SDM(encoder.channels, dims=32)) if with_decoder else encoder
    path = export_torchvision(whole, tmp_path / name)
    state = load_file(path) if path.suffix == ".safetensors" else torch.load(path, weights_only=True)
    reference = torchvision.models.resnet50().eval()
    loaded = reference.load_state_dict(state, strict=False)
    assert sorted(loaded.missing_keys) == ["fc.bias", "fc.weight"]
    assert loaded.unexpected_keys == []
    reference.fc = nn.Identity()
    images = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        expected = reference((images - encoder.mean) / encoder.std)
        torch.testing.assert_close(encoder(images).vector, expected, rtol=1e-5, atol=1e-5)
    assert [p.name for p in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [({}, "width=8"), ({"width": 64}, "depth=10"), ({"width": 64, "stem_pool": False}, "stem_pool")],
)
def test_export_of_what_torchvision_has_not(tmp_path, kwargs, message):
    fails(lambda: export_torchvision(bare(**kwargs), tmp_path / "w.pth"), f"no ResNet with {message}")


def test_export_with_a_strange_ending(tmp_path):
    fails(lambda: export_torchvision(ResNet(18), tmp_path / "w.onnx"), "unknown ending '.onnx'")


def test_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    fails(lambda: save_pretrained(bare(), tmp_path / "file"), "cannot be written")


def small_vit():
    return ViT(patch=8, dim=64, depth=2, heads=1, image_size=(32, 32))


@pytest.fixture
def dino(tmp_path):
    """A checkpoint as DINO writes it: two networks with heads, and settings that are no plain data."""
    student, teacher = small_vit(), small_vit()
    torch.save(
        {
            "student": {f"module.backbone.{k}": v for k, v in student.state_dict().items()},
            "teacher": {f"backbone.{k}": v for k, v in teacher.state_dict().items()}
            | {f"head.mlp.{i}.weight": torch.zeros(2, 2) for i in range(3)},
            "optimizer": {"state": {}},
            "args": argparse.Namespace(arch="vit_small"),
        },
        tmp_path / "dino_vits.pth",
    )
    return tmp_path / "dino_vits.pth", student, teacher


def test_file_of_another_project(dino, caplog):
    path, student, teacher = dino
    with caplog.at_level(logging.INFO, logger="poodle_lightning"):
        found = load_encoder(path)
    teacher.init_args["pos_interp"] = "dino"
    assert spec(found) == spec(teacher)
    assert_same_weights(found, teacher)
    assert caplog.messages == [
        "dino_vits.pth: DINO teacher, ViT-64x2/8, 1 head: 30 of 30 keys matched, "
        "33 of the file left over (student.backbone.*, teacher.head.*)"
    ]
    assert_same_weights(load_encoder(str(path), network="online"), student)
    given = small_vit()
    assert load_encoder(path, given) is given
    assert_same_weights(given, teacher)
    assert_same_weights(load_encoder(path, spec(given), network="online"), student)


def assert_same_weights(found, expected):
    assert not found.training
    ours, theirs = found.state_dict(), expected.state_dict()
    assert list(ours) == list(theirs)
    assert all(torch.equal(ours[k], theirs[k]) for k in ours)


def test_file_of_the_poodle_authors(tmp_path, caplog):
    """Their names around our own network; that the functions agree is tests/nn/test_foreign.py's."""
    encoder = ResNet(18)
    whole = DecodedEncoder(encoder, SDM(encoder.channels, dims=512, hidden=64)).eval()
    names = {
        "encoder.": "backbone.",
        "decoder.blocks.": "decoder_blocks.",
        "decoder.laterals.": "decoder_laterals.",
    }
    state = {
        next(new + k[len(old) :] for old, new in names.items() if k.startswith(old)): v
        for k, v in whole.state_dict().items()
    }
    state["flow_model.fnet.conv1.weight"] = torch.zeros(1)
    torch.save({"model": state, "epoch": 100}, tmp_path / "checkpoint-100.pth")
    with caplog.at_level(logging.INFO, logger="poodle_lightning"):
        found = load_encoder(tmp_path / "checkpoint-100.pth")
    assert_same(found, whole)
    assert caplog.messages[0].startswith("checkpoint-100.pth: PooDLe online, ResNet-18 + SDM: ")
    assert caplog.messages[0].endswith(" keys matched, 1 of the file left over (flow_model.*)")
    bare = load_encoder(tmp_path / "checkpoint-100.pth", ResNet(18))
    assert_same(bare, encoder.eval())
    fails(
        lambda: load_encoder(tmp_path / "checkpoint-100.pth", network="teacher"), "holds no teacher network"
    )
    fails(lambda: load_encoder(tmp_path / "checkpoint-100.pth", small_vit()), "no key matches the encoder")


def test_foreign_files_that_do_not_load(tmp_path, dino):
    path, _, _ = dino
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    fails(lambda: load_encoder(path), "dino_vits.pth is truncated")
    torch.save({"a.weight": torch.ones(1)}, tmp_path / "w.pth")
    fails(lambda: load_encoder(tmp_path / "w.pth"), "w.pth: no key matches a ResNet or a vision transformer")
    torch.save({"model": nn.Linear(1, 1)}, tmp_path / "whole.pth")
    fails(lambda: load_encoder(tmp_path / "whole.pth"), "whole.pth: no key matches.*no tensors")
    fails(lambda: load_encoder(tmp_path / "whole.pth", bare()), "whole.pth holds no tensors")
    fails(lambda: load_encoder(tmp_path / "no.pth"), "no.pth does not exist: give a folder, a file")
    state = torchvision.models.resnet18().state_dict()
    torch.save({"model": state | {"layer2.0.conv1.weight": torch.ones(1)}}, tmp_path / "shape.pth")
    fails(
        lambda: load_encoder(tmp_path / "shape.pth"), r"'layer2.0.conv1.weight' should have the shape \(128"
    )
    del state["layer3.0.bn1.bias"]
    torch.save(state, tmp_path / "lacks.pth")
    fails(lambda: load_encoder(tmp_path / "lacks.pth"), "lacks 1 keys, first 'layer3.0.bn1.bias'")


def test_own_files_by_load_encoder(tmp_path, checkpoint):
    assert_same(load_encoder(checkpoint(decoded())), decoded_again := decoded().eval())
    assert_same(load_encoder(save_pretrained(decoded_again, tmp_path / "x")), decoded_again)


def test_a_network_cannot_be_chosen_where_there_is_one(tmp_path, checkpoint):
    torch.save(bare().state_dict() | {"more": torch.ones(1)}, tmp_path / "w.pth")
    for source in (
        checkpoint(bare()),
        save_pretrained(bare(), tmp_path / "x"),
        "torchvision:resnet18:untrained",
    ):
        fails(
            lambda place=source: load_encoder(place, network="teacher"),
            "'teacher' is for files of other projects",
        )
    fails(
        lambda: load_encoder(tmp_path / "w.pth", bare(), network="teacher"),
        "w.pth .* holds no teacher network",
    )


def test_names_of_torchvision_and_timm(tmp_path):
    found = load_encoder("torchvision:resnet18:untrained")
    assert type(found) is ResNet
    assert not found.training
    for name, kind in (("timm:vit_tiny_patch16_224", ViT), ("timm:mobilenetv3_small_050", TimmEncoder)):
        encoder = from_pretrained(f"{name}:untrained")
        assert type(encoder) is kind
        again = from_pretrained(save_pretrained(encoder, tmp_path / kind.__name__))
        assert_same_weights(again, encoder)
        assert spec(again) == spec(encoder)
    fails(lambda: load_encoder("torchvision:resnet52"), "did you mean resnet50")
    fails(lambda: from_pretrained("timm:resnet5o"), "did you mean .*resnet50")


@pytest.mark.parametrize("output_stride", [4, 8, 16, 32])
def test_dilate(output_stride):
    encoder = bare().eval()
    encoder.conv1.weight.requires_grad_(False)
    found = dilate(encoder, output_stride)
    assert_same_weights(found, encoder)
    assert (found.conv1.weight.requires_grad, found.bn1.weight.requires_grad) == (False, True)
    assert found.strides["layer4"] == output_stride
    assert encoder.strides["layer4"] == 32
    images = torch.rand(1, 3, 64, 64)
    step = 32 // output_stride
    with torch.no_grad():
        fine, coarse = found(images).last, encoder(images).last
    torch.testing.assert_close(fine[..., ::step, ::step], coarse, rtol=1e-4, atol=1e-4)
    assert dilate(found.double().train(), 32).training
    assert dilate(found, 32).conv1.weight.dtype == torch.float64


def test_dilate_forgets_first_weights(monkeypatch):
    state = torchvision.models.resnet18().state_dict()
    monkeypatch.setattr(
        torchvision.models._api, "load_state_dict_from_url", lambda *args, **kwargs: dict(state)
    )
    encoder = ResNet(18, weights="IMAGENET1K_V1")
    encoder.conv1.weight.data.zero_()
    assert not dilate(encoder, 8).conv1.weight.any()


def test_dilate_a_network_of_timm():
    encoder = TimmEncoder("resnet14t")
    found = dilate(encoder, 8)
    assert list(found.strides.values()) == [2, 4, 8, 8, 8]
    assert torch.equal(found.model.layer4[0].conv1.weight, encoder.model.layer4[0].conv1.weight)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (decoded, "DecodedEncoder cannot be dilated to output_stride 4: dilate its encoder"),
        (small_vit, "ViT cannot be dilated to output_stride 4: read it at its own strides"),
        (lambda: TimmEncoder("mobilenetv3_small_050"), "mobilenetv3_small_050 cannot be dilated"),
        (lambda: TimmEncoder("resnet14t"), "timm:resnet14t cannot be dilated to output_stride 4"),
    ],
)
def test_what_cannot_be_dilated(make, message):
    fails(lambda: dilate(make(), 4), message)


def test_dilate_to_a_stride_that_is_not_offered():
    fails(lambda: dilate(bare(), 2), "output_stride 2 is not offered: choose 4, 8, 16 or 32")


def test_the_folder_of_a_run_means_its_last_checkpoint(checkpoint, tmp_path, caplog):
    encoder = decoded()
    run = tmp_path / "2026-01-02_03-04-05"
    (run / "checkpoints").mkdir(parents=True)
    checkpoint(encoder).rename(run / "checkpoints" / "last.ckpt")
    with caplog.at_level(logging.INFO, "poodle_lightning"):
        assert_same(load_encoder(run), encoder)
    assert f"DecodedEncoder, all {len(encoder.state_dict())} keys matched" in caplog.text
    fails(lambda: from_pretrained(tmp_path), "no config.json and no checkpoints/last.ckpt")

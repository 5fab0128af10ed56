"""Classifiers: the same answer as torchvision's own pipeline, files of weights, and label sets."""

from __future__ import annotations

from urllib.error import URLError

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torchvision import models

from poodle_lightning.data.frame_classes import load_classifier, outputs_of
from poodle_lightning.data.titles import TitleClass, read_classes
from poodle_lightning.types import UserError


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A ResNet-18 whose answers depend on the image: its outputs are centred on such images."""
    torch.manual_seed(3)
    model = models.resnet18(num_classes=12).eval()
    shown = models.ResNet18_Weights.IMAGENET1K_V1.transforms()
    with torch.no_grad():
        scores = model(torch.stack([shown(torch.from_numpy(frame).permute(2, 0, 1)) for frame in frames()]))
        model.fc.bias -= scores.mean(0)
    path = tmp_path_factory.mktemp("weights") / "small.pt"
    torch.save({"state_dict": {f"module.{key}": value for key, value in model.state_dict().items()}}, path)
    return path


def frames(count=6):
    rng = np.random.default_rng(0)
    return [
        np.kron(rng.integers(0, 256, (5, 8, 3), dtype=np.uint8), np.ones((40, 40, 1), np.uint8))
        for _ in range(count)
    ]


def test_a_file_answers_as_torchvisions_own_pipeline(weights):
    classifier = load_classifier(str(weights))
    assert classifier.outputs == 12
    model = models.resnet18(num_classes=12)
    state = torch.load(weights, weights_only=True)["state_dict"]
    model.load_state_dict({key.removeprefix("module."): value for key, value in state.items()})
    shown = models.ResNet18_Weights.IMAGENET1K_V1.transforms()
    given = frames()
    batch = torch.stack([shown(torch.from_numpy(frame).permute(2, 0, 1)) for frame in given])
    with torch.no_grad():
        expected = model.eval()(batch).argmax(1)
    images = torch.stack([classifier.shrink(frame) for frame in given])
    assert images.shape == (6, 3, 224, 224)
    assert images.dtype == torch.uint8
    found = classifier.top1(images, batch=4)
    assert found.tolist() == expected.tolist()
    assert len(set(found.tolist())) > 1
    named = load_classifier(f"torchvision:resnet18:{weights}")
    assert named.top1(images).tolist() == expected.tolist()
    assert named.fingerprint() == classifier.fingerprint()


def test_another_weight_is_another_fingerprint(weights):
    one, other = load_classifier(str(weights)), load_classifier(str(weights))
    with torch.no_grad():
        next(other.model.parameters()).add_(1)
    assert one.fingerprint() != other.fingerprint()


@pytest.mark.parametrize("ending", ["pt", "safetensors"])
@pytest.mark.parametrize("name", ["test_resnet", "test_vit"])
def test_timm_by_a_file(tmp_path, name, ending):
    import timm

    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=5)
    file = tmp_path / f"t.{ending}"
    # safetensors orders the tensors by their names
    (torch.save if ending == "pt" else save_file)(model.state_dict(), file)
    classifier = load_classifier(f"timm:{name}:{file}")
    assert all(
        torch.equal(one, model.state_dict()[key]) for key, one in classifier.model.state_dict().items()
    )
    shown = timm.data.resolve_model_data_config(model)
    assert classifier.outputs == 5
    assert classifier.sight.crop == shown["input_size"][-1]
    assert classifier.sight.mean == tuple(shown["mean"])


def test_a_resnet_whose_tensors_are_in_another_order(tmp_path, weights):
    state = torch.load(weights, weights_only=True)["state_dict"]
    save_file(
        {key.removeprefix("module."): value for key, value in state.items()}, tmp_path / "r.safetensors"
    )
    for source in ("{}", "torchvision:resnet18:{}"):
        classifier = load_classifier(source.format(tmp_path / "r.safetensors"))
        assert classifier.outputs == 12
        assert classifier.fingerprint() == load_classifier(str(weights)).fingerprint()


def test_a_network_without_classes_is_no_classifier(monkeypatch):
    import timm

    monkeypatch.setattr(
        timm, "create_model", lambda name, pretrained: timm.models.create_model(name, num_classes=0)
    )
    with pytest.raises(UserError, match="timm:test_vit: has no last layer: it is no classifier"):
        load_classifier("timm:test_vit")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("none.pt", "there is no file none.pt"),
        ("torchvision:resnat50", "torchvision has no such classifier"),
        ("torchvision:resnet50:IMAGENET1K_V9", "no file IMAGENET1K_V9; give a file, or one of IMAGENET1K_V1"),
        ("timm:nothing", "timm has no such model"),
        ("timm:resnet50.nothing:none.pt", "timm has no such model"),
        ("timm:test_resnet:none.pt", "there is no file none.pt"),
    ],
)
def test_unknown_classifiers(source, message):
    with pytest.raises(UserError, match=message):
        load_classifier(source)


@pytest.mark.parametrize(
    "error", [URLError("no route"), RuntimeError("no central directory"), OSError("full\ndisk")]
)
@pytest.mark.parametrize("library", ["torchvision", "timm"])
def test_weights_that_cannot_be_fetched(monkeypatch, error, library):
    def failing(*_, **__):
        raise error

    monkeypatch.setattr(models, "get_model", failing)
    monkeypatch.setattr("timm.create_model", failing)
    with pytest.raises(
        UserError, match=f"{library}:resnet18: its weights cannot be fetched .*:FILE$"
    ) as told:
        load_classifier(f"{library}:resnet18")
    assert "\n" not in str(told.value)


def test_files_that_are_no_classifier(tmp_path, weights):
    state = models.resnet18(num_classes=2).state_dict()
    torch.save({k: v for k, v in state.items() if not k.startswith("fc")}, tmp_path / "bare.pt")
    with pytest.raises(UserError, match=r"bare\.pt: has no last layer"):
        load_classifier(str(tmp_path / "bare.pt"))
    torch.save({"weight": torch.zeros(3)}, tmp_path / "other.pt")
    with pytest.raises(UserError, match=r"other\.pt: is no ResNet"):
        load_classifier(str(tmp_path / "other.pt"))
    with pytest.raises(UserError, match="another architecture"):
        load_classifier(f"torchvision:resnet34:{weights}")
    with pytest.raises(UserError, match="--device nonsense"):
        load_classifier(str(weights), "nonsense")


def named(*names, wnid=None, index=None):
    return TitleClass(wnid or names[0], names, wnid, index)


def test_which_output_is_whose():
    assert outputs_of(read_classes("imagenet"), 1000) == list(range(1000))
    known = models.ResNet18_Weights.IMAGENET1K_V1.meta["categories"]
    some = [named("tabby cat"), named("x", wnid="n02099601"), named("anything", index=7)]
    assert outputs_of(some, 1000) == [known.index("tabby"), known.index("golden retriever"), 7]
    assert outputs_of([named("a"), named("b"), named("c")], 3) == [0, 1, 2]
    # one of ImageNet's two cranes, by its place in the whole list
    names = [TitleClass(one.key, one.names) for one in read_classes("imagenet")]
    assert outputs_of(names, 1000) == list(range(1000))


def test_in_a_larger_release_imagenets_classes_are_other_outputs():
    from timm.data import ImageNetInfo

    wnids = ImageNetInfo("imagenet-22k").label_names()
    some = read_classes("imagenet")[:50]
    assert outputs_of(some, 21841) == [wnids.index(one.wnid) for one in some]


@pytest.mark.parametrize(
    ("classes", "outputs", "message"),
    [
        ([named("a"), named("b")], 3, "it has 3 outputs, --classes 2 classes"),
        ([named("a", index=5)], 5, "its output 5 by --classes, but it has 5"),
        ([named("a", index=1), named("b", index=1)], 5, "a and b are the same output of the classifier, 1"),
        ([named("unicorn")], 1000, "another label set: unicorn is no class of its imagenet-1k"),
        ([named("x", wnid="n00000000")], 1000, r"n00000000 \(x\) is no class"),
        (read_classes("imagenet"), 1001, "it has 1001 outputs, --classes 1000 classes"),
        (
            [named("tabby", wnid="n02123045", index=281)],
            21841,
            "output 281 by --classes, but in its imagenet",
        ),
        ([named("crane")], 1000, "crane may be any of the outputs 134, 517"),
    ],
)
def test_another_label_set(classes, outputs, message):
    with pytest.raises(UserError, match=message):
        outputs_of(classes, outputs)

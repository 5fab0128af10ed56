"""The linear readout against scikit-learn and closed forms; its baselines; and that it disturbs nothing."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression

from poodle_lightning.evaluation.linear_readout import (
    LinearHead,
    ReadoutRecipe,
    linear_readout,
    position_prior,
    predict,
    same_architecture_random,
)
from poodle_lightning.nn.encoder import Encoder
from poodle_lightning.nn.resnet import ResNet
from poodle_lightning.ops.geometry import pixel_grid, sample
from poodle_lightning.types import ClassSet, Features, UserError

CLASSES = ClassSet(("red", "green", "blue"), {"warm": ("red",), "cold": ("green", "blue")})


class Shrink(Encoder):
    """The image itself at half size, and a parameter so that it has a device."""

    def __init__(self) -> None:
        super().__init__({"rgb": 3, "grey": 1}, {"rgb": 2, "grey": 2})
        self.scale = torch.nn.Parameter(torch.ones(()))
        self.norm = torch.nn.BatchNorm2d(3)

    def features(self, normalised: torch.Tensor) -> Features:
        rgb = F.avg_pool2d(self.norm(normalised), 2) * self.scale
        return Features({"grey": rgb.mean(dim=1, keepdim=True), "rgb": rgb}, self.strides)


def labelled(count, seed, noise=60.0):
    """Blocks of three classes whose colour is red, green or blue plus noise; some pixels ignored."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randint(0, 3, (count, 4, 6), generator=generator, dtype=torch.uint8)
    labels = coarse.repeat_interleave(4, 1).repeat_interleave(4, 2)
    clean = F.one_hot(labels.long(), 3).permute(0, 3, 1, 2) * 100.0 + 80.0
    images = clean + torch.randn(clean.shape, generator=generator) * noise
    labels = labels.masked_fill(torch.rand(labels.shape, generator=generator) < 0.1, 255)
    return images.clamp(0, 255).to(torch.uint8), labels


@pytest.fixture(scope="module")
def data():
    return labelled(40, 0), labelled(10, 1)


RECIPE = ReadoutRecipe(steps=150, images=16, pixels=1024)


@pytest.fixture(scope="module")
def readout(data):
    return linear_readout(Shrink(), *data, CLASSES, RECIPE)


def test_as_good_as_scikit_learn_on_all_pixels(data, readout):
    encoder = Shrink().eval()

    def rows(images, labels):
        up = F.interpolate(encoder(images.float() / 255).last, scale_factor=2, mode="bilinear")
        keep = labels != 255
        return up.permute(0, 2, 3, 1)[keep].detach().numpy(), labels[keep].numpy()

    reference = LogisticRegression(C=1e6).fit(*rows(*data[0])).score(*rows(*data[1]))
    assert reference > 0.7
    assert readout.confusion.pixel_accuracy() == pytest.approx(reference, abs=0.01)


def test_result_names_classes_and_groups(data, readout):
    assert list(readout.per_class()) == ["red", "green", "blue"]
    numbers = readout.summary()
    assert numbers["miou_warm"] == pytest.approx(readout.per_class()["red"])
    assert numbers["miou_cold"] == pytest.approx(np.mean([readout.per_class()[c] for c in ("green", "blue")]))
    assert readout.confusion.images == 10
    assert readout.confusion.ignored == int((data[1][1] == 255).sum())


def test_reading_features_at_a_pixel_is_upsampling_logits():
    generator = torch.Generator().manual_seed(2)
    features = torch.randn(2, 5, 4, 6, generator=generator)
    head = LinearHead(torch.randn(5, generator=generator), torch.rand(5, generator=generator) + 0.5, 3)
    with torch.no_grad():
        head.weight.copy_(torch.randn(3, 5, generator=generator))
        head.bias.copy_(torch.randn(3, generator=generator))
        at_pixels = head.at_points(
            sample(features, pixel_grid((16, 24)).expand(2, -1, -1, -1)).movedim(1, -1)
        )
        assert torch.allclose(at_pixels.movedim(-1, 1), head(features, (16, 24)), atol=1e-5)


def test_kept_or_computed_each_time_is_the_same(data, readout):
    again = linear_readout(Shrink(), *data, CLASSES, ReadoutRecipe(150, 16, 1024, keep_bytes=0))
    assert torch.equal(again.confusion.matrix, readout.confusion.matrix)


def test_standardised_features_have_mean_0_and_deviation_1(data, readout):
    with torch.no_grad():
        found = Shrink().eval()(data[0][0].float() / 255).last
        rows = (found.movedim(1, -1) - readout.head.mean) / readout.head.std
    assert rows.mean(dim=(0, 1, 2)).abs().max() < 1e-5
    assert (rows.std(dim=(0, 1, 2), correction=0) - 1).abs().max() < 1e-5


def test_nothing_is_disturbed(data):
    encoder = Shrink().train()
    encoder.norm.eval()
    before = [p.clone() for p in encoder.state_dict().values()]
    state = torch.get_rng_state()
    first = linear_readout(encoder, *data, CLASSES, ReadoutRecipe(steps=3))
    assert torch.equal(torch.get_rng_state(), state)
    assert encoder.training
    assert not encoder.norm.training
    assert all(torch.equal(a, b) for a, b in zip(before, encoder.state_dict().values(), strict=True))
    assert encoder.scale.grad is None
    assert first.head.weight.grad is not None


def test_layer_and_seed_matter(data, readout):
    grey = linear_readout(Shrink(), *data, CLASSES, RECIPE, layer="grey")
    # the mean of the channels cannot tell the three colours apart
    assert grey.confusion.miou() < readout.confusion.miou() - 0.2
    other = linear_readout(Shrink(), *data, CLASSES, ReadoutRecipe(150, 16, 1024, seed=1))
    assert not torch.equal(other.head.weight, readout.head.weight)


def test_predictions_are_those_that_were_scored(data, readout):
    guess = predict(Shrink(), readout.head, data[1][0])
    keep = data[1][1] != 255
    right = (guess[keep] == data[1][1][keep].long()).double().mean()
    assert float(right) == pytest.approx(readout.confusion.pixel_accuracy())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x, y: ((x[0].float(), x[1]), y), "uint8"),
        (lambda x, y: ((x[0], x[1][:, 1:]), y), "labels must be"),
        (lambda x, y: (x, (y[0], y[1].clamp(max=9))), "label value 9"),
    ],
)
def test_bad_input_is_named(data, change, message):
    with pytest.raises(ValueError, match=message):
        linear_readout(Shrink(), *change(*data), CLASSES, RECIPE)


def test_unknown_layer_is_named(data):
    with pytest.raises(ValueError, match="grey, rgb"):
        linear_readout(Shrink(), *data, CLASSES, RECIPE, layer="layer9")


def test_position_prior_equals_a_naive_loop():
    generator = np.random.default_rng(5)
    train = generator.integers(0, 4, (7, 3, 5)).astype(np.uint8)
    test = generator.integers(0, 4, (4, 3, 5)).astype(np.uint8)
    train[generator.random(train.shape) < 0.2] = 255
    train[:, 1, 1] = 255
    labels, counts = np.unique(train[train != 255], return_counts=True)
    matrix = np.zeros((4, 4), dtype=int)
    for i in range(3):
        for j in range(5):
            here = [int(v) for v in train[:, i, j] if v != 255]
            guess = max(sorted(set(here)), key=here.count) if here else int(labels[counts.argmax()])
            for truth in test[:, i, j]:
                matrix[truth, guess] += 1
    found = position_prior(torch.from_numpy(train), torch.from_numpy(test), 4)
    assert found.matrix.tolist() == matrix.tolist()


def test_random_twin_has_the_same_shape_and_other_weights(monkeypatch):
    torch.manual_seed(2)  # another test may have left the seed of a twin
    encoder = ResNet(depth=10, width=8)
    state, of_gpus = torch.get_rng_state(), []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", of_gpus.append)
    first, second, other = (same_architecture_random(encoder, seed) for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), state)
    assert of_gpus == []
    own, twin = encoder.state_dict(), first.state_dict()
    assert {k: v.shape for k, v in own.items()} == {k: v.shape for k, v in twin.items()}
    assert not torch.equal(own["conv1.weight"], twin["conv1.weight"])
    assert torch.equal(twin["conv1.weight"], second.state_dict()["conv1.weight"])
    assert not torch.equal(twin["conv1.weight"], other.state_dict()["conv1.weight"])
    assert not first.training


def test_random_twin_of_a_pretrained_encoder_reads_no_weights(tmp_path):
    encoder = ResNet(depth=10, width=8)
    torch.save(encoder.state_dict(), tmp_path / "own.pth")
    pretrained = ResNet(depth=10, width=8, weights=str(tmp_path / "own.pth"))
    (tmp_path / "own.pth").unlink()
    twin = same_architecture_random(pretrained)
    assert twin.init_args["weights"] is None
    assert not torch.equal(twin.conv1.weight, pretrained.conv1.weight)


def test_features_that_are_not_finite_are_refused():
    encoder = ResNet(10, width=8)
    with torch.no_grad():
        encoder.layer4[0].bn1.weight.fill_(float("inf"))
    images = torch.randint(0, 255, (2, 3, 32, 32), dtype=torch.uint8)
    part = (images, torch.zeros(2, 32, 32, dtype=torch.uint8))
    with pytest.raises(UserError, match="not finite"):
        linear_readout(encoder, part, part, CLASSES)

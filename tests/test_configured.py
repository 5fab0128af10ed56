import copy
import dataclasses
import enum
import inspect
import json
import pickle
from collections import Counter

import numpy as np
import pytest
import torch
from torch import nn

from poodle_lightning.configured import Configured, build, spec
from poodle_lightning.nn.encoder import DecodedEncoder
from poodle_lightning.nn.optim import Recipe
from poodle_lightning.nn.resnet import ResNet
from poodle_lightning.nn.sdm import SDM
from poodle_lightning.types import UserError


class Plain(nn.Module, Configured):
    def __init__(self, a, b=2, *, c=(1, 2), **rest):
        super().__init__()
        self.layer = nn.Linear(1, 1)


class Child(Plain):
    pass


class Greedy(Configured):
    def __init__(self, *parts):
        self.parts = parts


@dataclasses.dataclass
class Numbers:
    one: float = 1.0
    sums: tuple = (1,)
    derived: int = dataclasses.field(default=0, init=False)


class Colour(enum.StrEnum):
    RED = "red"


@pytest.mark.parametrize("kind", [Plain, Child])
def test_arguments_are_kept_with_defaults(kind):
    made = kind(1, c=5, extra=None)
    assert made.init_args == {"a": 1, "b": 2, "c": 5, "extra": None}
    assert len(list(made.parameters())) == 2


@pytest.mark.parametrize("again", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_arguments_survive_copies(again):
    made = again(Plain(7, b=8))
    assert made.init_args == {"a": 7, "b": 8, "c": (1, 2)}
    assert isinstance(made.layer, nn.Linear)


def test_wrong_arguments_raise_the_constructors_own_error():
    with pytest.raises(TypeError, match=r"__init__.*unexpected"):
        ResNet(deep=50)


def test_spec_is_plain_and_survives_weights_only(tmp_path):
    value = {
        "recipe": Recipe(lr=np.float64(0.25)),
        "numbers": Numbers(),
        "colour": Colour.RED,
        "path": tmp_path,
        "t": (1, [2.5, None]),
    }
    plain = spec(value)
    assert plain["numbers"]["init_args"] == {"one": 1.0, "sums": [1]}
    assert plain["colour"] == "red"
    assert plain["t"] == [1, [2.5, None]]
    kinds = Counter(type(x) for x in (plain["recipe"]["init_args"]["lr"], plain["colour"], plain["path"]))
    assert kinds == {float: 1, str: 2}
    torch.save(plain, tmp_path / "x.pt")
    assert torch.load(tmp_path / "x.pt", weights_only=True) == plain == json.loads(json.dumps(plain))


@pytest.mark.parametrize(
    ("value", "where"),
    [
        (Plain(nn.Linear(1, 1)), r"Plain\.a is a Linear"),
        (Plain({"x": [0, torch.ones(1)]}), r"Plain\.a\['x'\]\[1\] is a Tensor"),
        (Plain({1: 2}), r"Plain\.a has the key 1"),
        (Greedy(1), r"positional \*parts"),
    ],
)
def test_what_has_no_plain_form_is_named(value, where):
    with pytest.raises(TypeError, match=where):
        spec(value)


def test_build_gives_equal_objects():
    encoder = ResNet(depth=10, width=8)
    made = build(spec(DecodedEncoder(encoder, SDM(encoder.channels, dims=16))))
    assert isinstance(made, DecodedEncoder)
    assert made.encoder.init_args == encoder.init_args
    assert made.decoder.init_args["dims"] == 16
    recipe = Recipe(lr=1e-3, betas=(0.8, 0.9), horizon_epochs=None, horizon_steps=3)
    assert build(spec(recipe)) == recipe
    assert build([1, {"a": spec(recipe)}]) == [1, {"a": recipe}]


@pytest.mark.parametrize(
    ("plain", "message"),
    [
        ({"class_path": "os.system", "init_args": {}}, "outside the allowed"),
        ({"class_path": "poodle_lightningx.nn.Thing"}, "outside the allowed"),
        ({"class_path": "poodle_lightning.nn.resnet.Nothing"}, "does not exist"),
        ({"class_path": "poodle_lightning.nowhere.Nothing"}, "does not exist"),
        ({"class_path": "poodle_lightning.nn.resnet.nn"}, "not a class"),
        ({"class_path": "poodle_lightning.configured.Mapping"}, "not a class"),
        ({"class_path": "poodle_lightning.types.UserError"}, "not a class"),
        ({"class_path": 3}, "outside the allowed"),
        ({"class_path": "poodle_lightning.nn.optim.Recipe", "init_args": {"rate": 1}}, "rate"),
    ],
)
def test_build_refuses(plain, message):
    with pytest.raises(UserError, match=message) as caught:
        build(plain)
    assert "\n" not in str(caught.value)


def test_signature_for_people_is_the_constructors():
    assert list(inspect.signature(ResNet).parameters)[:2] == ["depth", "output_stride"]

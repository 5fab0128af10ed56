"""The shipped protocols without a segmentation head build, and say in their headers where they come from."""

import re
from pathlib import Path

import pytest
import yaml

from poodle_lightning.cli import build
from poodle_lightning.data.image_classes import ImageClassDataModule
from poodle_lightning.data.labelled import LabelledDataModule
from poodle_lightning.evaluation.classification import KNN, LinearProbe
from poodle_lightning.evaluation.clustering import Clustering
from poodle_lightning.evaluation.retrieval import DenseRetrieval

ROOT = Path(__file__).parents[2] / "configs" / "evaluation"
KINDS = {"retrieval": DenseRetrieval, "clustering": Clustering, "knn": KNN, "linear_probe": LinearProbe}
NAMES = sorted(path.stem for kind in KINDS for path in ROOT.glob(f"{kind}_*.yaml"))
HEADER = ("command", "hardware", "hours", "expected", "obtained")


def test_there_is_one_of_each_kind():
    assert {kind for kind in KINDS for name in NAMES if name.startswith(kind)} == set(KINDS)


@pytest.mark.parametrize("name", NAMES)
def test_builds_with_the_settings_it_names(name, tmp_path):
    for split in ("train", "val"):
        (tmp_path / split / "cat").mkdir(parents=True)
    given = yaml.safe_load((ROOT / f"{name}.yaml").read_text())
    kind = next(kind for start, kind in KINDS.items() if name.startswith(start))
    needs_root = not name.endswith("_synthetic")
    words = [f"--data.root={tmp_path}"] if needs_root else []
    module, data = build([f"evaluation/{name}.yaml"], words)
    assert type(module) is kind
    for key, value in given["model"]["init_args"].get("recipe", {}).items():
        found = getattr(module.recipe, key)
        assert (list(found) if isinstance(found, tuple) else found) == value
    if kind in (KNN, LinearProbe):
        assert isinstance(data, ImageClassDataModule)
    else:
        assert isinstance(data, LabelledDataModule)
        if needs_root:
            assert list(data.test_view.size) == given["data"]["init_args"]["test"]["size"]


@pytest.mark.parametrize("name", NAMES)
def test_has_a_header(name):
    text = (ROOT / f"{name}.yaml").read_text()
    head = [line for line in text.splitlines() if line.startswith("#")]
    for key in HEADER:
        assert any(re.match(rf"# {key}\s+\S", line) for line in head), f"{name}.yaml says no {key!r}"
    assert f"evaluation/{name}.yaml" in "\n".join(head)

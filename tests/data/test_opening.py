"""From the name of a source to the source."""

from __future__ import annotations

from typing import get_args

import numpy as np
import pytest
from PIL import Image

from poodle_lightning.data.decode import probe
from poodle_lightning.data.encode import write_video
from poodle_lightning.data.images import ImagesSource
from poodle_lightning.data.opening import NO_FILMS, Origin, SourceName
from poodle_lightning.data.sources import FolderSource
from poodle_lightning.data.streets import SyntheticSource
from poodle_lightning.data.videonet import Curated, write_manifest
from poodle_lightning.types import UserError

FILES = {
    "folder": "a.mp4",
    "bdd100k": "videos/val/a.mov",
    "walking_tours": "Zurich.mp4",
    "epic_kitchens": "P01/P01_01.mp4",
    "kinetics400": "val/a.mp4",
    "kinetics700": "kinetics700_2020/val/class/a.mp4",
    "audioset": "eval_segments/a.mp4",
    "youtube8m_shots": "a.mp4",
    "videonet": "a.mp4",
    "film": "a.mp4",
    "frames": "a/0.png",
    "images": "a/0.png",
    "synthetic": None,
}


def test_every_source_has_its_layout():
    assert set(FILES) == set(get_args(SourceName))


@pytest.mark.parametrize("name", FILES)
def test_sources_are_opened_by_name(tmp_path, monkeypatch, name):
    monkeypatch.setenv("POODLE_CACHE", str(tmp_path / "cache"))
    root = tmp_path / "data"
    picture = np.zeros((32, 48, 3), np.uint8)
    if FILES[name] is not None:
        path = root / FILES[name]
        path.parent.mkdir(parents=True)
        if path.suffix == ".png":
            Image.fromarray(picture).save(path)
        else:
            write_video(path, [picture] * 5, fps=10)
    if name == "youtube8m_shots":
        (root / "shots.csv").write_text("video,start,stop\na,0,0.3\n")
    if name == "videonet":
        write_manifest(root / "list.jsonl", [Curated("1", "a cat", probe(path), ("cat",))], {})
        root = root / "list.jsonl"
    given = None if name == "synthetic" else str(root / "a.mp4" if name == "film" else root)
    source = Origin(name, given, split="val", city="zurich").open()
    assert len(source.entries) == (64 if name == "synthetic" else 1)
    assert isinstance(source, FolderSource) == (name not in NO_FILMS)
    assert isinstance(source, ImagesSource) == (name == "images")
    assert isinstance(source, SyntheticSource) == (name == "synthetic")


def test_a_missing_root_is_named():
    with pytest.raises(UserError, match=r"source film needs a file: give --data\.root"):
        Origin("film", None)
    with pytest.raises(UserError, match=r"source videonet needs a file: give --data\.root"):
        Origin("videonet", None)
    with pytest.raises(UserError, match="source images needs a folder"):
        Origin("images", None)
    assert Origin("synthetic", None).name == "synthetic"
    assert Origin("folder", "/films").name == "/films"

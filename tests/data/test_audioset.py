"""AudioSet's folders, by split."""

from __future__ import annotations

import numpy as np
import pytest

from poodle_lightning.data.audioset import AudioSetSource
from poodle_lightning.data.encode import write_video
from poodle_lightning.types import UserError


@pytest.fixture
def root(tmp_path, monkeypatch):
    monkeypatch.setenv("POODLE_CACHE", str(tmp_path / "cache"))
    for name in ("balanced_train_segments/a", "x/Unbalanced_Train_Segments/0/b", "eval_segments/c", "loose"):
        path = tmp_path / "audioset" / f"{name}.mp4"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_video(path, [np.zeros((32, 48, 3), np.uint8)] * 3, fps=10)
    return tmp_path / "audioset"


@pytest.mark.parametrize(
    ("split", "names"), [("train", "ab"), ("balanced", "a"), ("eval", "c"), ("val", "c")]
)
def test_folders_are_found_by_split(root, split, names):
    entries = AudioSetSource(root, split).entries
    assert sorted(entry.path.split("/")[-1][0] for entry in entries) == list(names)


def test_a_root_that_is_named_as_a_split_does_not_count(root):
    with pytest.raises(UserError, match="not laid out as AudioSet, no readable video below eval_segments"):
        AudioSetSource(root / "balanced_train_segments", "eval")
    with pytest.raises(UserError, match="split 'test': AudioSet has train, balanced, eval, val"):
        AudioSetSource(root, "test")

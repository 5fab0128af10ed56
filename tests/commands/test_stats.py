"""The verb: three files, numbers of a film that is known, and one line for what is wrong."""

import json
import os
from functools import partial

import cv2
import numpy as np
import pytest

from poodle_lightning import cli
from poodle_lightning.commands.stats import _each
from poodle_lightning.data.encode import write_video


@pytest.fixture
def films(tmp_path, monkeypatch):
    monkeypatch.setenv("POODLE_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "films"
    folder.mkdir()
    for name, levels in (("dusk", [220, 200, 180, 60, 40, 20]), ("noon", [250] * 6)):
        frames = [np.full((48, 64, 3), level, np.uint8) for level in levels for _ in range(5)]
        write_video(folder / f"{name}.mp4", frames, 5.0, gop=5)
    return folder


def test_table_numbers_and_figure_are_written(films, tmp_path, capsys):
    labels = tmp_path / "labels.csv"
    labels.write_text("video,time,class\ndusk,0,dog\ndusk,0,cat\ndusk,1,dog\n")
    out = tmp_path / "deep" / "out"
    assert cli.main(["stats", str(films), "--output", str(out), "--objects", str(labels), "--step", "2"]) == 0
    said = capsys.readouterr().out
    assert str(out) in said
    assert sorted(path.name for path in out.iterdir()) == ["stats.json", "stats.md", "stats.png"]
    dusk, noon = json.loads((out / "stats.json").read_text())["videos"]
    assert dusk["path"] == str(films / "dusk.mp4")
    assert dusk["times"] == [0.0, 2.0, 4.0]
    assert dusk["lightness"][0] > 80 > 75 > dusk["lightness"][1] > 25 > dusk["lightness"][2]
    assert (dusk["summary"]["shots"], noon["summary"]["shots"]) == (2, 1)
    assert dusk["objects"]["frames_with"] == {"dog": 2, "cat": 1}
    assert noon["objects"] is None
    table = (out / "stats.md").read_text()
    assert "| dusk.mp4 |" in table
    assert "| dog | 100.0 | 2 |" in table
    assert table.strip() in said
    assert min(cv2.imread(str(out / "stats.png")).shape[:2]) > 300


def test_processes_keep_the_order_of_the_videos():
    paths = [f"{folder}/film.mp4" for folder in "cab"]
    assert _each(partial(os.path.dirname), paths, workers=2) == ["c", "a", "b"]
    assert _each(partial(os.path.dirname), paths, workers=0) == ["c", "a", "b"]


def test_cuts_are_optional(films, tmp_path):
    words = ["stats", str(films / "dusk.mp4"), "--output", str(tmp_path / "out"), "--no-shots"]
    assert cli.main(words) == 0
    (found,) = json.loads((tmp_path / "out" / "stats.json").read_text())["videos"]
    assert found["shots"] is None


def test_unreadable_videos_are_named_and_the_rest_is_shown(films, tmp_path, capsys):
    (films / "bad.mp4").write_text("hello")
    words = ["stats", str(films), "--output", str(tmp_path / "out"), "--no-shots"]
    assert cli.main(words) == 1
    assert "bad.mp4: not_a_video" in capsys.readouterr().err
    assert len(json.loads((tmp_path / "out" / "stats.json").read_text())["videos"]) == 2
    assert cli.main(["stats", str(films / "bad.mp4"), "--output", str(tmp_path / "none")]) == 2
    assert "none of the 1 videos can be read" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--step", "0"], "--step 0"),
        (["--step", "nan"], "--step nan"),
        (["--workers", "-1"], "--workers"),
        (["--objects", "nowhere.csv"], "nowhere.csv: cannot be read"),
        (["--output", "FILE"], "is a file"),
        (["--objekts", "a.csv"], "did you mean --objects?"),
    ],
)
def test_bad_input_is_one_line(films, tmp_path, capsys, words, said):
    (tmp_path / "FILE").write_text("")
    words = [str(tmp_path / "FILE") if word == "FILE" else word for word in words]
    assert cli.main(["stats", str(films), "--output", str(tmp_path / "out"), *words]) == 2
    error = capsys.readouterr().err.strip()
    assert said in error
    assert "\n" not in error
    assert not (tmp_path / "out").exists()


def test_no_video_is_one_line(tmp_path, capsys):
    assert cli.main(["stats", str(tmp_path / "nowhere")]) == 2
    assert "nowhere: no such file or folder" in capsys.readouterr().err

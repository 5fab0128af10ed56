"""The verb: what is kept, what is written, going on after a stop, shares, and one line for what is wrong."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from torchvision import models

from poodle_lightning import cli
from poodle_lightning.data import curation
from poodle_lightning.data.encode import write_video
from poodle_lightning.data.videonet import VideoNetSource, read_manifest

DOG, CAT = 3, 1


@pytest.fixture(autouse=True)
def one_share(monkeypatch):
    for launcher in ("RANK WORLD_SIZE", "SLURM_PROCID SLURM_STEP_NUM_TASKS"):
        for name in launcher.split():
            monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A ResNet-18 of four classes that always answers dog."""
    state = models.resnet18(num_classes=4).state_dict()
    state["fc.weight"].zero_()
    state["fc.bias"].copy_(torch.eye(4)[DOG])
    path = tmp_path_factory.mktemp("weights") / "dog.pt"
    torch.save(state, path)
    return path


@pytest.fixture
def words(tmp_path, weights):
    """The verb's words, with a table of six videos."""
    for number in range(3):
        frames = [np.full((48, 64, 3), 60 * number + k, np.uint8) for k in range(12)]
        write_video(tmp_path / f"{number}.mp4", frames, fps=10)
    (tmp_path / "bad.mp4").write_text("no video")
    rows = [
        "id,title,path,duration",
        "a,My dogs,0.mp4,",
        "b,A hound and a cat,1.mp4,1.2",
        "c,CAT,2.mp4,1.2",
        "d,dog gone,none.mp4,20",
        "e,a dog for a moment,short.mp4,0.5",
        "f,a broken dog,bad.mp4,",
        "g,nothing,other.mp4,",
    ]
    (tmp_path / "table.csv").write_text("\n".join(rows))
    classes = [{"name": "dog", "synonyms": ["hound"], "index": DOG}, {"name": "cat", "index": CAT}]
    (tmp_path / "classes.json").write_text(json.dumps([*classes, {"name": "ox", "index": 0}]))
    given = {"videos": "table.csv", "classes": "classes.json", "out": "new/list.jsonl"}
    named = [word for name, file in given.items() for word in (f"--{name}", str(tmp_path / file))]
    return ["curate", *named, "--classifier", str(weights), "--frames", "2", "--min-seconds", "1"]


def test_list_report_and_what_is_said(words, tmp_path, capsys):
    assert cli.main(words) == 0
    said = capsys.readouterr()
    assert "2 of 6 retrieved videos kept" in said.out
    assert "no title names 1 of 3 classes: ox" in said.err
    out = tmp_path / "new" / "list.jsonl"
    assert [(one.id, one.classes) for one in read_manifest(out)] == [("a", ("dog",)), ("b", ("dog",))]
    assert len(VideoNetSource(out).entries) == 2
    numbers = json.loads((tmp_path / "new" / "list.jsonl.report.json").read_text())
    assert numbers["videos"] == {
        "listed": 7,
        "retrieved": 6,
        "kept": 2,
        "missing": 1,
        "not_a_video": 1,
        "other_class": 1,
        "too_short": 1,
    }
    assert [(row["class"], row["titles"], row["kept"]) for row in numbers["classes"]] == [
        ("dog", 5, 2),
        ("cat", 2, 0),
        ("ox", 0, 0),
    ]
    assert "| dog | dog | 5 | 5 | 2 |" in (tmp_path / "new" / "list.jsonl.report.md").read_text()


def test_nothing_is_looked_at_twice(words, tmp_path, capsys, monkeypatch):
    assert cli.main(words) == 0
    capsys.readouterr()
    monkeypatch.setattr(curation, "first_frames", lambda *_: pytest.fail("looked at again"))
    assert cli.main([*words, "--per-class", "1"]) == 0
    # a for dog, b for cat
    assert "2 retrieved by their titles, 0 to be looked at" in capsys.readouterr().err
    assert [one.id for one in read_manifest(tmp_path / "new" / "list.jsonl")] == ["a"]


def test_a_stopped_run_goes_on(words, tmp_path, capsys, monkeypatch):
    real, seen = curation.first_frames, []

    def stopped(path, *rest):
        seen.append(path)
        if len(seen) == 2:
            raise KeyboardInterrupt
        return real(path, *rest)

    monkeypatch.setattr(curation, "first_frames", stopped)
    assert cli.main([*words, "--workers", "1"]) == 130
    assert not (tmp_path / "new" / "list.jsonl").exists()
    capsys.readouterr()
    seen[:] = ["", "", ""]
    assert cli.main([*words, "--workers", "1"]) == 0
    again = [path.rpartition("/")[2] for path in seen[3:]]
    assert len(again) == len(set(again))
    # 2.mp4 may have been read, and then written down, before anyone saw that 1.mp4 broke off
    assert {"1.mp4", "bad.mp4"} <= set(again) <= {"1.mp4", "2.mp4", "bad.mp4"}
    assert len(read_manifest(tmp_path / "new" / "list.jsonl")) == 2


@pytest.mark.parametrize("order", [("1/2", "2/2"), ("2/2", "1/2")])
def test_the_last_share_writes_the_list(words, tmp_path, capsys, order):
    out = tmp_path / "new" / "list.jsonl"
    assert cli.main([*words, "--shard", order[0]]) == 0
    assert "videos are left to other shares" in capsys.readouterr().out
    assert not out.exists()
    assert cli.main([*words, "--shard", order[1]]) == 0
    assert len(read_manifest(out)) == 2


def replaced(words, name, value):
    changed = list(words)
    changed[changed.index(f"--{name}") + 1] = str(value)
    return changed


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("videos", "none.csv", "--videos none.csv: cannot be read"),
        ("classes", "none.json", "--classes none.json: cannot be read"),
        ("classifier", "none.pt", "--classifier none.pt: there is no file none.pt"),
        ("out", "{}", "is a folder: give the file of the list"),
        ("out", "{}/table.csv", "is the file of --videos itself"),
        ("out", "{}/classes.json", "is the file of --classes itself"),
        ("out", "{}/0.mp4/list.jsonl", "its folder cannot be made"),
        ("frames", "0", "--frames must be at least 1"),
        ("min-seconds", "-1", "--min-seconds must be at least 0"),
    ],
)
def test_wrong_arguments_are_said_in_one_line(words, tmp_path, capsys, name, value, message):
    assert cli.main(replaced(words, name, value.format(tmp_path))) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert message in said[-1]


def test_no_title_no_video_and_another_label_set(words, tmp_path, capsys):
    (tmp_path / "few.txt").write_text("unicorn\n")
    assert cli.main(replaced(words, "classes", tmp_path / "few.txt")) == 2
    assert "names a class of" in capsys.readouterr().err
    (tmp_path / "few.txt").write_text("dog\ncat\n")
    assert cli.main(replaced(words, "classes", tmp_path / "few.txt")) == 2
    assert "another label set: it has 4 outputs, --classes 2 classes" in capsys.readouterr().err
    (tmp_path / "few.json").write_text('[{"name": "cat", "index": 1}]')
    assert cli.main(replaced(words, "classes", tmp_path / "few.json")) == 2
    assert "no video is kept (2 other_class)" in capsys.readouterr().err
    assert not (tmp_path / "new" / "list.jsonl").exists()

"""The steps of the curation: the table, the titles, the first frames, the verdict, the balance."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from films import film, sequential

from poodle_lightning.data.class_balance import balance, markdown
from poodle_lightning.data.curation import (
    Candidate,
    Listed,
    Retrieved,
    Verdict,
    first_frames,
    is_short,
    judge,
    read_table,
    retrieve,
)
from poodle_lightning.data.encode import write_video
from poodle_lightning.data.info import DecodeError, VideoInfo
from poodle_lightning.data.looks import Look
from poodle_lightning.data.titles import TitleClass
from poodle_lightning.types import Skip, UserError

CLASSES = [TitleClass("cat", ("cat",)), TitleClass("dog", ("dog",)), TitleClass("ox", ("ox",))]


def info(duration=10.0, fps=10.0):
    return VideoInfo("/v.mp4", 0.0, duration, 8, 6, fps, 101, 1.0, 0, "ab")


def test_tables_of_all_forms_are_read_alike(tmp_path):
    expected = [Listed("1", "A, cat", str(tmp_path / "v" / "a.mp4"), 12.5), Listed("2", "", "/b.mp4")]
    texts = {
        "t.csv": '\ufeffid,title,path,duration,likes\n1,"A, cat",v/a.mp4,12.5,9\n2,,/b.mp4,,\n'
        "3,again,v/./a.mp4,1,\n",
        "t.tsv": "id\ttitle\tpath\tduration\n1\tA, cat\tv/a.mp4\t12.5\n2\t\t/b.mp4\t\n",
        "t.jsonl": '{"id": 1, "title": "A, cat", "path": "v/a.mp4", "duration": "12.5"}\n\n'
        '{"id": 2, "title": null, "path": "/b.mp4"}\n',
    }
    for name, text in texts.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
        assert read_table(tmp_path / name) == expected


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("t.xls", "x", r"a table ends in \.csv"),
        ("t.csv", "id,name\n", "missing: title, path"),
        ("t.csv", "id,title,path\n", "holds no video"),
        ("t.csv", "id,title,path\n1,a,\n", "line 2: an id and a path are needed"),
        ("t.csv", "id,title,path,duration\n1,a,b,long\n", "line 2: duration 'long' is no number"),
        ("t.csv", "id,title,path\n1,a,b\n1,c,d\n", "line 3: the id '1' is there twice"),
        ("t.jsonl", "{", "line 1: is no JSON"),
        ("t.jsonl", '{"id": 1}', "line 1: must be"),
        ("t.csv", b"\xff\xfe\x00", "no table of text"),
    ],
)
def test_what_is_no_table_is_said_in_one_line(tmp_path, name, text, message):
    data = text if isinstance(text, bytes) else text.encode()
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError, match=message) as error:
        read_table(tmp_path / name)
    assert "\n" not in str(error.value)


def test_a_missing_table(tmp_path):
    with pytest.raises(UserError, match="cannot be read"):
        read_table(tmp_path / "none.csv")


def test_the_first_videos_of_every_class_are_retrieved():
    titles = ["cat", "dogs and cats", "nothing", "cat", "dog", "oxen? no"]
    listed = [Listed(str(n), title, f"/{n}") for n, title in enumerate(titles)]
    found = retrieve(listed, CLASSES, per_class=2)
    assert [(one.listed.id, one.classes) for one in found.candidates] == [
        ("0", (0,)),
        ("1", (0, 1)),
        ("4", (1,)),
        ("5", (2,)),
    ]
    assert found.matched == (3, 2, 1)
    assert found.taken == (2, 2, 1)


def test_first_frames_are_the_streams_first_ones(tmp_path):
    path = tmp_path / "a.mp4"
    write_video(path, film(7), fps=10)
    video, found = first_frames(
        str(path), 4, 0.0, lambda frame: torch.from_numpy(frame.copy()).permute(2, 0, 1), lambda: False
    )
    expected = np.stack(sequential(path)[1][:4]).transpose(0, 3, 1, 2)
    assert np.array_equal(found.numpy(), expected)
    assert video.frames == 7
    whole = first_frames(str(path), 100, 0.0, lambda frame: torch.zeros(1), lambda: False)[1]
    assert len(whole) == 7
    assert first_frames(str(path), 4, 0.8, lambda frame: 1 / 0, lambda: False)[1] is None
    with pytest.raises(InterruptedError):
        first_frames(str(path), 4, 0.0, lambda frame: torch.zeros(1), lambda: True)
    (tmp_path / "b.mp4").write_text("no")
    with pytest.raises(DecodeError):
        first_frames(str(tmp_path / "b.mp4"), 4, 0.0, lambda frame: torch.zeros(1), lambda: False)


def test_ten_seconds_are_ten_seconds():
    assert not is_short(info(duration=299 / 30, fps=30.0), 10.0)
    assert is_short(info(duration=298 / 30, fps=30.0), 10.0)


def test_a_video_is_kept_when_one_of_its_classes_comes_first_on_any_frame():
    outputs = [7, 3, 5]
    two = Candidate(Listed("1", "cat dog", "/v.mp4", 20.0), (0, 1))

    def outcome(look, candidate=two, least=10.0):
        verdict = judge(candidate, look, outputs, least)
        return None if verdict is None else (verdict.outcome, verdict.classes)

    assert outcome(Look("/v.mp4", (1, 1), {5: 99, 3: 1}, info())) == ("kept", (1,))
    assert outcome(Look("/v.mp4", (1, 1), {7: 1, 3: 1}, info())) == ("kept", (0, 1))
    # shown, but not what its title says
    assert outcome(Look("/v.mp4", (1, 1), {5: 100, 0: 1}, info())) == ("other_class", ())
    assert outcome(None) is None
    assert outcome(Look("/v.mp4", (1, 1), None, skip=Skip("/v.mp4", "corrupt", "…"))) == ("corrupt", ())
    short = Look("/v.mp4", (1, 1), None, info(duration=3.0))
    assert outcome(short) == ("too_short", ())
    assert outcome(short, least=1.0) is None
    # the table says so: no look is needed
    assert outcome(None, Candidate(Listed("1", "cat", "/v.mp4", 9.9), (0,))) == ("too_short", ())


def test_balance_counts_and_its_effective_number_of_classes():
    listed = Listed("1", "", "/v")
    verdicts = [Verdict(Candidate(listed, (0, 1)), "kept", (0, 1))]
    verdicts += [Verdict(Candidate(listed, (0,)), "kept", (0,))] * 2
    verdicts += [Verdict(Candidate(listed, (1,)), "other_class"), Verdict(Candidate(listed, (2,)), "missing")]
    found = balance(CLASSES, Retrieved((), (5, 4, 3), (3, 2, 1)), verdicts, 9, {"frames": 100})
    assert found["videos"] == {"listed": 9, "retrieved": 5, "kept": 3, "missing": 1, "other_class": 1}
    assert [row["kept"] for row in found["classes"]] == [3, 1, 0]
    assert [row["titles"] for row in found["classes"]] == [5, 4, 3]
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert found["spread"]["effective_classes"] == pytest.approx(math.exp(entropy))
    assert found["spread"]["without_video"] == 1
    text = markdown(found)
    assert "| kept | 3 | 60.0 % |" in text
    assert text.index("| cat | cat | 5 | 3 | 3 |") < text.index("| ox | ox | 3 | 1 | 0 |")
    nothing = balance(CLASSES, Retrieved((), (0, 0, 0), (0, 0, 0)), [], 0, {})
    assert nothing["spread"]["effective_classes"] == 0

"""Lists of objects: both forms, whose objects they are, counts by hand, one line where a list is wrong."""

import json

import pytest

from poodle_lightning.analysis.object_lists import count_objects, objects_of, read_objects
from poodle_lightning.types import UserError

# Frames at 0, 1.5, 2 and 4 s; the one at 2 s shows nothing.
ROWS = [(4, "dog"), (0, "person"), (0, "dog"), (1.5, "person"), (1.5, "person"), (2, ""), (4, "ball")]


def write(path, rows=ROWS, video=None):
    """A list in the form that the file's name says."""
    keys = ("time", "class") + (() if video is None else ("video",))
    full = [(*row, video)[: len(keys)] for row in rows]
    if path.suffix == ".csv":
        path.write_text("\n".join(",".join(map(str, row)) for row in [(*keys,), *full]) + "\n")
    else:
        path.write_text("\n".join(json.dumps(dict(zip(keys, row, strict=True))) for row in full) + "\n\n")
    return path


@pytest.mark.parametrize("name", ["a.csv", "a.jsonl", "a.json"])
def test_both_forms_say_the_same(tmp_path, name):
    found = read_objects(write(tmp_path / name))
    assert [(one.time, one.name, one.video) for one in found] == [(float(t), c, "") for t, c in ROWS]


def test_counts_by_hand(tmp_path):
    counts = count_objects(read_objects(write(tmp_path / "a.csv")))
    assert counts.times == (0.0, 1.5, 2.0, 4.0)
    assert counts.objects == (2, 2, 0, 2)
    assert counts.classes == (2, 1, 0, 2)
    # two frames each; the person is there three times, the dog twice
    assert list(counts.frames_with.items()) == [("person", 2), ("dog", 2), ("ball", 1)]
    assert list(counts.total.items()) == [("person", 3), ("dog", 2), ("ball", 1)]


def test_other_columns_and_byte_order_marks_do_no_harm(tmp_path):
    path = tmp_path / "a.csv"
    path.write_bytes("\ufeffscore,class,time,video\n0.5,dog,1,venice\n".encode())
    (one,) = read_objects(path)
    assert (one.time, one.name, one.video) == (1.0, "dog", "venice")
    path = tmp_path / "a.jsonl"
    path.write_text('{"time": 1, "class": null, "box": [0, 1]}')
    assert read_objects(path)[0].name == ""


def test_a_list_goes_to_the_video_it_names(tmp_path):
    videos = ["/films/venice.mp4", "/films/oslo.mp4"]
    both = tmp_path / "both.csv"
    both.write_text("video,time,class\nvenice,0,dog\noslo.mp4,0,cat\n/films/oslo.mp4,1,cat\n")
    found = objects_of(videos, [both])
    assert set(found["/films/venice.mp4"].total) == {"dog"}
    assert found["/films/oslo.mp4"].total == {"cat": 2}
    # by the file's own name, and to the only video
    assert set(objects_of(videos, [write(tmp_path / "oslo.csv")])) == {"/films/oslo.mp4"}
    assert set(objects_of(videos[:1], [write(tmp_path / "any.csv")])) == {"/films/venice.mp4"}
    assert objects_of(videos, []) == {}


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("a.csv", "time,label\n0,dog\n", "missing: class"),
        ("a.csv", "", "missing: time, class"),
        ("a.csv", "time,class\n", "no line with an object"),
        ("a.csv", "time,class\n0,dog\nsoon,dog\n", "line 3: time 'soon'"),
        ("a.csv", "time,class\n-1,dog\n", "line 2: time '-1'"),
        ("a.csv", "time,class\nnan,dog\n", "line 2: time 'nan'"),
        ("a.jsonl", '{"time": 0, "class": "dog"}\n{"time": 1,', "line 2: is no JSON"),
        ("a.jsonl", '{"time": 0}', "line 1: must be"),
        ("a.jsonl", "[]", "line 1: must be"),
        ("a.jsonl", '{"time": null, "class": "dog"}', "line 1: time None"),
        ("a.txt", "0 dog", ".csv, .jsonl, .json"),
        ("a.csv", None, "cannot be read"),
        ("a.csv", b"time,class\n0,\xff\n", "is no table of text"),
    ],
)
def test_a_wrong_list_is_one_line_with_the_file(tmp_path, name, text, words):
    path = tmp_path / name
    if text is not None:
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError) as raised:
        read_objects(path)
    assert words in str(raised.value)
    assert str(path) in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("videos", "video", "words"),
    [
        (["a.mp4", "b.mp4"], None, "not known whose"),
        (["a.mp4"], "c", "not among the 1 given"),
        (["x/a.mp4", "y/a.mp4"], "a", "2 videos are called 'a'"),
    ],
)
def test_objects_of_no_known_video_are_refused(tmp_path, videos, video, words):
    with pytest.raises(UserError, match=words):
        objects_of(videos, [write(tmp_path / "list.csv", video=video)])

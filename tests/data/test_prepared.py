"""The record of prepared videos: sizes, names that never collide, lines that outlive a crash."""

import pytest

from poodle_lightning.data.info import fingerprint
from poodle_lightning.data.prepared import FILE_NAME, Made, Settings, load, names, note


def made(source="a.mov", target="a.mp4", settings=None, made_hash="m"):
    stated = (settings or Settings()).stated
    return Made(source, target, stated, "s", made_hash, 10, 1.5, (100, 50), (250.0, 12.0), 41.5)


@pytest.mark.parametrize(
    ("settings", "size", "expected"),
    [
        ({}, (1280, 720), (1280, 720)),
        ({"height": 512}, (1280, 720), (910, 512)),
        ({"height": 512}, (720, 1280), (288, 512)),
        ({"short_side": 512}, (720, 1280), (512, 910)),
        ({"short_side": 512}, (1280, 720), (910, 512)),
        ({"height": 720}, (640, 360), (640, 360)),  # never enlarged
        ({"short_side": 720}, (641, 361), (640, 360)),  # nor by rounding to even sides
        ({"height": 360}, (641, 361), (640, 360)),
        ({"height": 2}, (4000, 10), (800, 2)),
        ({"height": 2}, (10, 4000), (2, 2)),
    ],
)
def test_sizes(settings, size, expected):
    assert Settings(**settings).size(*size) == expected


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"height": 512, "short_side": 512}, "one of them"),
        ({"height": 511}, "even"),
        ({"short_side": 0}, "even"),
        ({"gop": 0}, "at least 1"),
        ({"every": 0}, "at least 1"),
        ({"crf": 64, "codec": "libsvtav1"}, "from 0 to 63"),
        ({"crf": 52}, "from 0 to 51 for libx264"),
        ({"crf": 52, "codec": "libx265"}, "from 0 to 51"),
        ({"preset": "fastt"}, "ultrafast, superfast"),
    ],
)
def test_wrong_settings(settings, words):
    with pytest.raises(ValueError, match=words):
        Settings(**settings)


def test_names_of_one_folder_never_collide():
    sources = ["x/a.mov", "a.mov", "a.mkv", "a.mp4", "A.mov", "a.mov.mp4", "c d.webm"]
    found = names(sources, {})
    assert len({name.casefold() for name in found.values()}) == len(sources)
    assert found["x/a.mov"] == "x/a.mp4"
    assert found["a.mp4"] == "a.mp4"  # what is called so already keeps its name
    assert found["c d.webm"] == "c d.mp4"


def test_names_once_given_stay():
    first = names(["a.mkv", "b.mov"], {})
    known = {source: made(source, target) for source, target in first.items()}
    later = names(["a.mp4", "a.mkv", "b.mov"], known)
    assert {source: later[source] for source in first} == first
    assert later["a.mp4"] == "a.mp4.mp4"


def test_lines_come_back_and_the_last_one_counts(tmp_path):
    assert load(tmp_path) == {}
    for one in (made(made_hash="old"), made("ü\n\udcff.mkv", "b.mp4"), made(made_hash="new")):
        note(tmp_path, one)
    found = load(tmp_path)
    assert found == {"a.mov": made(made_hash="new"), "ü\n\udcff.mkv": made("ü\n\udcff.mkv", "b.mp4")}


def test_torn_lines_are_passed_over(tmp_path):
    note(tmp_path, made())
    with open(tmp_path / FILE_NAME, "a") as file:
        file.write('\n{"source": "b.mov", "ma')
    note(tmp_path, made("c.mov", "c.mp4"))
    with open(tmp_path / FILE_NAME, "a") as file:
        file.write('\n{"source": "d.mov"}\n[1]\n7\nnull\n')
    assert sorted(load(tmp_path)) == ["a.mov", "c.mov"]


def test_what_stands_agrees_in_everything(tmp_path):
    path = tmp_path / "a.mp4"
    path.write_bytes(b"film")
    one = made(settings=Settings(height=64), made_hash=fingerprint(str(path)))
    assert one.stands(tmp_path, "s", Settings(height=64))
    assert not one.stands(tmp_path, "other source", Settings(height=64))
    for other in (
        {"height": 32},
        {"height": 64, "gop": 6},
        {"height": 64, "crf": 1},
        {"height": 64, "every": 2},
    ):
        assert not one.stands(tmp_path, "s", Settings(**other))
    path.write_bytes(b"FILM")
    assert not one.stands(tmp_path, "s", Settings(height=64))
    path.unlink()
    assert not one.stands(tmp_path, "s", Settings(height=64))

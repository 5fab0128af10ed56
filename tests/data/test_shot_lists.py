"""Shots by a list: which frames they hold, how videos are named, and what is wrong with a list."""

from __future__ import annotations

import numpy as np
import pytest

from poodle_lightning.data.encode import write_video
from poodle_lightning.data.shot_lists import Listed, ShotListSource, _last_before, read_shots
from poodle_lightning.types import UserError


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Two films of 1 s at 10 frames per second; frame k of both is of the grey 20 k."""
    monkeypatch.setenv("POODLE_CACHE", str(tmp_path / "cache"))
    root = tmp_path / "shots"
    for path in (root / "a.mp4", root / "train" / "b.mp4"):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_video(path, [np.full((32, 48, 3), 20 * k, np.uint8) for k in range(10)], fps=10)
    return root


def opened(root, text):
    (root / "shots.csv").write_text(text)
    return ShotListSource(root)


def test_a_shot_ends_before_the_next_one_begins(folder, monkeypatch):
    source = opened(folder, "video,start,stop,score\na,0,0.4,1\na,0.4,1.0,1\ntrain/b.mp4,0.2,0.5,1\n")
    assert [(entry.id, entry.path.split("/")[-1]) for entry in source.entries] == [
        (0, "a.mp4"),
        (0, "a.mp4"),
        (1, "b.mp4"),
    ]
    frames = []
    for entry in source.entries:
        pixels, _ = source.open(entry).read([entry.start, entry.stop])
        frames.append([round(float(one.mean()) / 20) for one in pixels])
    assert frames == [[0, 3], [4, 9], [2, 4]]
    assert source.refused == ()
    monkeypatch.setenv("HOME", str(folder.parent))
    assert ShotListSource("~/shots").entries == source.entries
    assert source.video(source.entries[2]).path.endswith("train/b.mp4")


@pytest.mark.parametrize("name", ["train/b.mp4", "train/b", "b.mp4", "b"])
def test_videos_are_named_by_path_or_name(folder, name):
    (entry,) = opened(folder, f"video,start,stop\n{name},0,1\n").entries
    assert entry.path == str(folder / "train" / "b.mp4")


def test_two_videos_of_one_name_need_their_path(folder):
    for name in ("b.mp4", "train/c.mp4", "val/c.mp4"):
        (folder / name).parent.mkdir(exist_ok=True)
        write_video(folder / name, [np.zeros((32, 48, 3), np.uint8)] * 5, fps=10)
    # b.mp4 is the path of one of them
    assert opened(folder, "video,start,stop\nb.mp4,0,0.4\n").entries[0].path == str(folder / "b.mp4")
    with pytest.raises(UserError, match=r"c\.mp4 may be .*write which"):
        opened(folder, "video,start,stop\nc.mp4,0,0.4\n")


def test_what_is_missing_or_outside_is_counted(folder):
    (folder / "bad.mp4").write_text("no video")
    text = "video,start,stop\na,0,0.5\ngone,0,1\ngone,1,2\na,3,4\na,0.5,2.5\nbad,0,1\na,0.5,1.6\n"
    source = opened(folder, text)
    # the last one is longer by what another way of counting may explain
    assert [(entry.start, round(entry.stop, 6)) for entry in source.entries] == [(0.0, 0.4), (0.5, 0.9)]
    reasons = sorted((skip.path.split("/")[-1], skip.reason) for skip in source.refused)
    assert reasons == [
        ("a.mp4", "outside"),
        ("a.mp4", "outside"),
        ("bad.mp4", "not_a_video"),
        ("gone", "missing"),
    ]
    assert any("line 5: 3 to 4 s is outside of the video of 1.00 s" in skip.detail for skip in source.refused)


def test_a_list_without_a_usable_shot(folder):
    with pytest.raises(UserError, match=r"none of its 1 shots can be read; .* line 2: 3 to 4 s is outside"):
        opened(folder, "video,start,stop\na,3,4\n")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "the first line must name the columns video, start, stop; missing: video, start, stop"),
        ("video,begin,stop\na,0,1\n", "missing: start"),
        ("video,start,stop\n", "holds no shot"),
        ("video,start,stop\na,0,1\na,1,x\n", "line 3: 'a,1,x' is no shot"),
        ("video,start,stop\na,2,1\n", "line 2: 'a,2,1' is no shot"),
        ("video,start,stop\na,-1,1\n", "line 2"),
        ("video,start,stop\n,0,1\n", "line 2: ',0,1' is no shot"),
        ("video,start,stop\na,0\n", "line 2: 'a,0,' is no shot"),
        ("video,start,stop\na,0,inf\n", "line 2"),
    ],
)
def test_malformed_lists_are_said_in_one_line(tmp_path, text, message):
    (tmp_path / "shots.csv").write_text(text)
    with pytest.raises(UserError, match=message) as error:
        read_shots(tmp_path / "shots.csv")
    assert "\n" not in str(error.value)


def test_lists_that_cannot_be_read(tmp_path):
    with pytest.raises(UserError, match="no such list of shots; source youtube8m_shots needs it"):
        ShotListSource(tmp_path)
    (tmp_path / "shots.csv").write_bytes(b"video,start,stop\n\xff,0,1\n")
    with pytest.raises(UserError, match="is no table of text"):
        read_shots(tmp_path / "shots.csv")
    (tmp_path / "shots.csv").write_text("\ufeffvideo,start,stop\na,0,1\n", encoding="utf-8")
    assert read_shots(tmp_path / "shots.csv") == [Listed("a", 0.0, 1.0, 2)]


@pytest.mark.parametrize(
    ("stop", "rate", "last"),
    [
        (0.5, 10, 4),
        (4.2, 30000 / 1001, 125),
        (4.2042, 30000 / 1001, 125),
        (4.206, 30000 / 1001, 126),
        (0.0, 10, 0),
    ],
)
def test_the_last_frame_of_a_shot_is_the_one_before_its_stop(stop, rate, last):
    """125.87 frames are 4.2 s: frame 125 still belongs to the shot; 4.2042 s is frame 126 itself."""
    assert round(_last_before(stop, 1 / rate) * rate, 6) == last

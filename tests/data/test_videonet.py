"""Lists of curated videos: written and read back, moved, damaged."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest

from poodle_lightning.data.decode import probe
from poodle_lightning.data.encode import write_video
from poodle_lightning.data.info import DecodeError
from poodle_lightning.data.videonet import Curated, VideoNetSource, read_manifest, write_manifest
from poodle_lightning.types import UserError


@pytest.fixture
def listed(tmp_path):
    """A list of two videos below its folder and one elsewhere."""
    folder = tmp_path / "set"
    paths = [folder / "v" / "a.mp4", folder / "b.mp4", tmp_path / "other" / "c.mp4"]
    kept = []
    for number, path in enumerate(paths):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_video(path, [np.full((32, 48, 3), 40 * number + k, np.uint8) for k in range(6)], fps=10)
        kept.append(Curated(str(number), f"a cät {number}", probe(path), ("n02123045", "cat")))
    write_manifest(folder / "list.jsonl", kept, {"frames": 100})
    return folder / "list.jsonl", kept


def test_a_list_comes_back_as_it_was(listed):
    file, kept = listed
    assert read_manifest(file) == kept
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert (lines[0]["videos"], lines[0]["frames"]) == (3, 100)
    assert [line["path"] for line in lines[1:]] == ["v/a.mp4", "b.mp4", kept[2].video.path]
    assert [path.name for path in file.parent.iterdir() if path.name.startswith(".")] == []


def test_its_videos_are_entries_that_can_be_read(listed, monkeypatch):
    file, kept = listed
    monkeypatch.setattr(
        "poodle_lightning.data.index.probe", lambda *_, **__: 1 / 0
    )  # nothing is measured again
    source = VideoNetSource(file)
    assert [entry.path for entry in source.entries] == [one.video.path for one in kept]
    entry = source.entries[1]
    assert (entry.width, entry.height) == (48, 32)
    assert entry.duration == pytest.approx(0.5)
    assert source.video(entry) == kept[1].video
    pixels, _ = source.open(entry).read([0.2])
    assert pixels[0].mean() == pytest.approx(42, abs=2)


def test_a_list_moves_with_its_videos(listed, tmp_path, monkeypatch):
    file, _ = listed
    moved = tmp_path / "moved"
    shutil.move(file.parent, moved)
    source = VideoNetSource(moved / "list.jsonl")
    assert source.entries[0].path == str(moved / "v" / "a.mp4")
    monkeypatch.setenv("HOME", str(moved))
    assert VideoNetSource("~/list.jsonl").entries == source.entries
    source.open(source.entries[0]).close()


def test_missing_videos_are_counted_and_replaced_ones_refused(listed):
    file, kept = listed
    (file.parent / "b.mp4").unlink()
    shutil.copy(kept[2].video.path, file.parent / "v" / "a.mp4")
    source = VideoNetSource(file)
    assert [(skip.path, skip.reason) for skip in source.refused] == [(kept[1].video.path, "missing")]
    with pytest.raises(DecodeError, match="no longer the one that was indexed"):
        source.open(source.entries[0])
    for one in kept[::2]:
        (file.parent / one.video.path).unlink()
    with pytest.raises(UserError, match=r"none of its 3 videos is there, e\.g\. .*a\.mp4"):
        VideoNetSource(file)


def edited(file, change):
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join(change(lines)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda lines: [], "is no list of curated videos"),
        (lambda lines: ["id,title\n"], "is no list of curated videos"),
        (lambda lines: lines[:-1], "is damaged, 2 of 3 videos are in it"),
        (lambda lines: [*lines[:3], lines[3][:50]], "line 4: is damaged"),
        (lambda lines: [lines[0], lines[1].replace("width", "w"), *lines[2:]], "line 2: is damaged"),
        (lambda lines: [lines[0], lines[1].replace("48", '"48"'), *lines[2:]], "line 2: is damaged"),
        (lambda lines: [lines[0].replace(": 3", ": 0")], "holds no video"),
    ],
)
def test_damaged_lists_are_said_in_one_line(listed, change, message):
    edited(listed[0], change)
    with pytest.raises(UserError, match=message):
        VideoNetSource(listed[0])


def test_no_list(tmp_path):
    for path in (tmp_path, tmp_path / "none.jsonl"):
        with pytest.raises(UserError, match=r"cannot be read .* poodle-lightning curate"):
            VideoNetSource(path)
    (tmp_path / "a.jsonl").write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match="is no list of curated videos"):
        VideoNetSource(tmp_path / "a.jsonl")

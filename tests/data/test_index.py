"""The index of a folder: what is found, what is remembered, what is said when nothing is."""

import json
import os

import numpy as np
import pytest

from poodle_lightning.data import index as module
from poodle_lightning.data.encode import write_video
from poodle_lightning.data.index import build_index, index_file
from poodle_lightning.data.info import fingerprint
from poodle_lightning.types import UserError


def make(path, count=6, seed=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    write_video(path, (rng.integers(0, 255, (16, 16, 3), dtype=np.uint8) for _ in range(count)), 10)
    return path


@pytest.fixture
def cache(tmp_path, monkeypatch):
    folder = tmp_path / "cache"
    monkeypatch.setenv("POODLE_CACHE", str(folder))
    return folder


@pytest.fixture
def probed(monkeypatch):
    """The files that were measured, in order."""
    calls = []
    probe = module.probe

    def counted(path, **options):
        calls.append(os.path.basename(path))
        return probe(path, **options)

    monkeypatch.setattr(module, "probe", counted)
    return calls


@pytest.fixture
def root(tmp_path):
    folder = tmp_path / "videos"
    make(folder / "b.mp4", 6)
    make(folder / "a b" / "ü 名.MP4", 8)
    make(folder / "deep" / "er" / "new\nline.mkv", 10)
    make(folder / ".hidden" / "x.mp4")
    make(folder / ".also_hidden.mp4")
    (folder / "broken.mp4").write_text("no video")
    (folder / "zero.mp4").write_bytes(b"")
    (folder / "notes.txt").write_text("not tried")
    (folder / "dead.mp4").symlink_to(folder / "nowhere.mp4")
    (folder / "folder.mp4").mkdir()
    return folder


def names(paths):
    return [os.path.basename(p) for p in paths]


def test_every_file_is_a_video_or_refused_with_a_reason(root, cache):
    index = build_index(root)
    assert [(os.path.basename(v.path), v.frames) for v in index.videos] == [
        ("ü 名.MP4", 8),
        ("b.mp4", 6),
        ("new\nline.mkv", 10),
    ]
    assert [v.path for v in index.videos] == sorted(v.path for v in index.videos)
    assert {os.path.basename(s.path): s.reason for s in index.refused} == {
        "broken.mp4": "not_a_video",
        "zero.mp4": "empty",
        "dead.mp4": "missing",
        "folder.mp4": "not_a_file",
    }


def test_a_second_look_measures_nothing_that_lasts(root, cache, probed):
    first = build_index(root)
    probed.clear()
    assert build_index(root) == first
    # the dead link and the folder may have become videos without any sign
    assert sorted(probed) == ["dead.mp4", "folder.mp4"]


def test_changed_new_and_vanished_files(root, cache, probed):
    build_index(root)
    probed.clear()
    make(root / "b.mp4", 9, seed=1)
    make(root / "new.mp4", 5)
    (root / "a b" / "ü 名.MP4").unlink()
    (root / "dead.mp4").unlink()
    (root / "folder.mp4").rmdir()
    index = build_index(root)
    assert sorted(probed) == ["b.mp4", "new.mp4"]
    assert {os.path.basename(v.path): v.frames for v in index.videos} == {
        "b.mp4": 9,
        "new\nline.mkv": 10,
        "new.mp4": 5,
    }
    store = next((cache / "index").iterdir())
    assert sorted(names(json.loads(store.read_text())["entries"])) == sorted(
        ["b.mp4", "new\nline.mkv", "new.mp4", "broken.mp4", "zero.mp4"]
    )


def test_same_size_and_other_time_is_measured_again(root, cache, probed):
    build_index(root)
    probed.clear()
    os.utime(root / "b.mp4", ns=(1, 1))
    build_index(root)
    assert "b.mp4" in probed


@pytest.mark.parametrize("harm", ["torn", "no json", "other format", "other fields", "not a dict"])
def test_a_harmed_cache_is_not_believed(root, cache, probed, harm):
    expected = build_index(root)
    store = next((cache / "index").iterdir())
    content = json.loads(store.read_text())
    if harm == "other format":
        content["format"] = "0"
    if harm == "other fields":
        for entry in content["entries"].values():
            entry.get("video", entry.get("refused")).popitem()
    texts = {"torn": store.read_text()[:-40], "no json": "x", "not a dict": "[1]"}
    store.write_text(texts.get(harm, json.dumps(content)))
    probed.clear()
    assert build_index(root) == expected
    assert len(probed) == 7


def test_without_cache_nothing_is_written_or_believed(root, cache, probed):
    build_index(root, cache=False)
    assert not cache.exists()
    build_index(root)
    probed.clear()
    build_index(root, cache=False)
    assert len(probed) == 7


def test_a_cache_that_cannot_be_written_is_no_error(root, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("POODLE_CACHE", str(tmp_path / "file"))
    assert len(build_index(root).videos) == 3


def test_workers_find_the_same(root, cache):
    assert build_index(root, cache=False, workers=2) == build_index(root, cache=False)


def test_pixel_limit_has_its_own_cache(root, cache):
    make(root / "b.mp4")
    assert len(build_index(root).videos) == 3
    with pytest.raises(UserError, match="3 too_many_pixels"):
        build_index(root, max_pixels=100)
    assert len(build_index(root).videos) == 3


def test_links_are_followed_and_loops_end(root, cache, tmp_path):
    make(tmp_path / "elsewhere" / "far.mp4")
    (root / "link").symlink_to(tmp_path / "elsewhere")
    (root / "deep" / "loop").symlink_to(root)
    found = names(v.path for v in build_index(root).videos)
    assert found.count("far.mp4") == 1
    assert found.count("b.mp4") == 1


def test_own_extensions(root, cache):
    (root / "b.mp4").rename(root / "b.film")
    assert names(v.path for v in build_index(root, extensions=[".film"]).videos) == ["b.film"]


def test_fingerprint_follows_the_content(tmp_path):
    a, b = make(tmp_path / "a.mp4"), make(tmp_path / "b.mp4", seed=2)
    (tmp_path / "copy.mp4").write_bytes(a.read_bytes())
    assert fingerprint(str(a)) == fingerprint(str(tmp_path / "copy.mp4"))
    assert fingerprint(str(a)) != fingerprint(str(b))
    (tmp_path / "longer.mp4").write_bytes(a.read_bytes() + b"\0")
    assert fingerprint(str(a)) != fingerprint(str(tmp_path / "longer.mp4"))


def _nothing(folder):
    return folder / "nowhere"


def _file(folder):
    return make(folder / "only.mp4")


def _empty(folder):
    (folder / "empty").mkdir()
    return folder / "empty"


def _no_video_names(folder):
    (folder / "docs").mkdir()
    (folder / "docs" / "readme.txt").write_text("hello")
    return folder / "docs"


def _only_bad(folder):
    (folder / "bad").mkdir()
    (folder / "bad" / "x.mp4").write_text("<html>404</html>")
    (folder / "bad" / "y.mp4").write_bytes(b"")
    return folder / "bad"


@pytest.mark.parametrize(
    ("prepare", "words"),
    [
        (_nothing, "does not exist"),
        (_file, "is a file, not a folder"),
        (_empty, "no video found"),
        (_no_video_names, "no video found"),
        (_only_bad, "none of the 2 files .*1 not_a_video, 1 empty"),
    ],
)
def test_folders_without_video_are_one_line_errors(tmp_path, cache, prepare, words):
    with pytest.raises(UserError, match=words) as caught:
        build_index(prepare(tmp_path))
    assert "\n" not in str(caught.value)
    assert str(tmp_path) in str(caught.value)


def test_a_single_file_is_measured_and_remembered(root, cache, monkeypatch):
    """As the folder's index has it; without a look at its neighbours."""
    path = build_index(root).videos[0].path
    alone = index_file(path)
    assert alone.videos == build_index(root).videos[:1]
    assert alone.root == path
    monkeypatch.setattr("poodle_lightning.data.index.probe", None)  # whoever measures again fails
    assert index_file(path) == alone
    with pytest.raises(UserError, match="is a folder, not a film"):
        index_file(root)

"""What was seen is kept line by line: torn lines, changed files, other settings and shares."""

from __future__ import annotations

import os

from poodle_lightning.data.info import VideoInfo
from poodle_lightning.data.looks import Look, Looks, stamp_of
from poodle_lightning.data.shares import Share
from poodle_lightning.types import Skip


def look(path, seen=None, content="x"):
    path.write_text(content)
    video = VideoInfo(str(path), 0.0, 1.5, 8, 6, 10.0, 16, 1.5, 0, "ab")
    return Look(str(path), stamp_of(str(path)), seen, video)


def test_what_was_seen_survives_and_a_torn_line_does_not_matter(tmp_path):
    folder = tmp_path / "looks"
    one, two = look(tmp_path / "a.mp4", {3: 2, 5: 1}), look(tmp_path / "b.mp4")
    Looks(folder, "f" * 32, 9).add(one, Share())
    (file,) = folder.iterdir()
    with file.open("a") as stream:
        stream.write('{"path": "' + str(tmp_path / "c.mp4"))
    looks = Looks(folder, "f" * 32, 9)
    assert looks.get(one.path) == one
    looks.add(two, Share())
    again = Looks(folder, "f" * 32, 9)
    assert (again.get(one.path), again.get(two.path)) == (one, two)


def test_a_changed_file_another_classifier_and_other_frames_are_looked_at_again(tmp_path):
    folder, one = tmp_path / "looks", look(tmp_path / "a.mp4", {3: 2})
    Looks(folder, "f" * 32, 9).add(one, Share())
    assert Looks(folder, "e" * 32, 9).get(one.path) is None
    assert Looks(folder, "f" * 32, 8).get(one.path) is None
    looks = Looks(folder, "f" * 32, 9)
    os.utime(one.path, ns=(1, 1))
    assert looks.get(one.path) is None
    os.remove(one.path)
    missing = looks.get(one.path)
    assert missing is not None
    assert missing.skip is not None
    assert missing.skip.reason == "missing"


def test_shares_write_apart_and_read_together(tmp_path):
    folder = tmp_path / "looks"
    one, two = look(tmp_path / "a.mp4", {1: 1}), look(tmp_path / "b.mp4", {2: 1})
    first, second = Looks(folder, "f" * 32, 9), Looks(folder, "f" * 32, 9)
    first.add(one, Share(1, 2))
    second.add(two, Share(2, 2))
    assert len(list(folder.iterdir())) == 2
    assert first.get(two.path) is None
    first.read()
    assert first.get(two.path) == two


def test_what_another_division_saw_of_an_older_file_hides_nothing(tmp_path):
    folder, old = tmp_path / "looks", look(tmp_path / "a.mp4", {1: 1})
    Looks(folder, "f" * 32, 9).add(old, Share())
    new = look(tmp_path / "a.mp4", {2: 1}, content="longer")
    looks = Looks(folder, "f" * 32, 9)
    assert looks.get(new.path) is None
    looks.add(new, Share(1, 2))
    looks.read()
    assert looks.get(new.path) == new
    assert Looks(folder, "f" * 32, 9).get(new.path) == new


def test_a_name_that_no_file_can_have_is_missing(tmp_path):
    for name in ("a\0b.mp4", "\ud83d.mp4"):
        found = Looks(tmp_path, "f" * 32, 9).get(f"{tmp_path}/{name}")
        assert found.skip.reason == "missing"


def test_what_may_pass_is_tried_again_but_counts_at_the_end_of_a_run(tmp_path):
    folder = tmp_path / "looks"
    looks = Looks(folder, "f" * 32, 9)
    for name, reason in (("a.mp4", "corrupt"), ("b.mp4", "timeout")):
        path = str(tmp_path / name)
        look(tmp_path / name)
        looks.add(Look(path, stamp_of(path), None, skip=Skip(path, reason, "…")), Share())
        assert looks.get(path, failed=True) is not None
    again = Looks(folder, "f" * 32, 9)
    assert again.get(str(tmp_path / "a.mp4")).skip.reason == "corrupt"
    assert again.get(str(tmp_path / "b.mp4")) is None
    assert again.get(str(tmp_path / "b.mp4"), failed=True).skip.reason == "timeout"
    seen = look(tmp_path / "b.mp4", {1: 1})
    again.add(seen, Share())
    assert Looks(folder, "f" * 32, 9).get(seen.path, failed=True) == seen

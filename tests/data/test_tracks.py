"""Track files: what comes back, what is refused, and what damage does; tracks of streets with exact flow."""

import errno
import math
import os
import zlib

import numpy as np
import pytest
import torch

from poodle_lightning.data import tracks as data_tracks
from poodle_lightning.data.info import fingerprint
from poodle_lightning.data.sources import Entry
from poodle_lightning.data.streets import StreetSet, SyntheticSource
from poodle_lightning.data.tracks import TrackStore, spans_of, track_name, video_print
from poodle_lightning.ops.geometry import Flow
from poodle_lightning.ops.random import key_of
from poodle_lightning.ops.tracks import alive, anchor_frames, follow, pairs_of, starts
from poodle_lightning.types import UserError

NAME, PRINT, EST = "class/video.mp4", "0" * 32, "DIS medium, OpenCV 4"
TIMES = np.arange(6) / 30


def made(count=40, limit=math.inf, gamma=0.01, seed=0):
    rng = np.random.default_rng(seed)
    forward = rng.uniform(-1.5, 1.5, (5, 2, 1, 1)) + 0.2 * rng.standard_normal((5, 2, 16, 24))
    back = -forward + 0.1 * rng.standard_normal(forward.shape)
    both = (Flow.from_pixels(torch.from_numpy(x.astype(np.float32))) for x in (forward, back))
    return follow(*both, *starts(key_of(seed), count, 6), gamma, limit=limit)


def same(a, b):
    for name in ("first", "offsets", "places", "consistency"):
        np.testing.assert_array_equal(getattr(a, name), getattr(b, name))
    for name in ("frames", "size", "gamma", "limit"):
        assert getattr(a, name) == getattr(b, name)


@pytest.mark.parametrize("limit", [0.7, math.inf])
def test_tracks_come_back_mapped_and_unchanged(tmp_path, limit):
    tracks = made(limit=limit)
    store = TrackStore(tmp_path / "new" / "folder", EST, 0.01)
    written = store.put(NAME, PRINT, tracks, TIMES)
    assert written == store.path(NAME).stat().st_size
    back = store.get(NAME, PRINT)
    same(back.tracks, tracks)
    np.testing.assert_array_equal(back.times, TIMES)
    base = back.tracks.places
    while base.base is not None and not isinstance(base, np.memmap):
        base = base.base
    assert isinstance(base, np.memmap)
    with pytest.raises(ValueError, match="read-only"):
        back.tracks.places[0] = 0


def test_a_file_has_6_bytes_a_place_8_a_track_8_a_frame_and_a_header(tmp_path):
    store = TrackStore(tmp_path, EST)
    sizes = {}
    for count in (40, 4000):
        tracks = made(count)
        body = 6 * len(tracks.places) + 8 * count + 8 * 6
        sizes[count] = store.put(NAME, PRINT, tracks, TIMES) - body
    assert all(0 < size < 400 for size in sizes.values())


def test_what_is_drawn_from_a_file_is_what_is_drawn_from_memory(tmp_path):
    tracks, store = made(), TrackStore(tmp_path, EST)
    store.put(NAME, PRINT, tracks, TIMES)
    back = store.get(NAME, PRINT)
    drawn = []
    for source in (tracks, back.tracks):
        spans = alive(source, 0.2)
        frames = anchor_frames(key_of(1), spans)
        drawn.append((frames, pairs_of(source, spans, frames, key_of(2), cap=6)))
    assert drawn[0][0] == drawn[1][0]
    assert len(drawn[0][1]) > 0
    assert torch.equal(drawn[0][1].second, drawn[1][1].second)


def test_no_tracks_at_all_can_be_kept(tmp_path):
    store = TrackStore(tmp_path, EST)
    store.put(NAME, PRINT, made(0), TIMES)
    assert len(store.get(NAME, PRINT).tracks) == 0
    with pytest.raises(
        UserError, match=r"no track of class/video\.mp4 is active on any frame with delta = 0\.5"
    ):
        spans_of(store.get(NAME, PRINT), NAME)


def test_spans_of_asks_for_a_delta_that_the_tracks_know(tmp_path):
    store = TrackStore(tmp_path, EST)
    store.put(NAME, PRINT, made(limit=0.7), TIMES)
    tracked = store.get(NAME, PRINT)
    np.testing.assert_array_equal(spans_of(tracked, NAME, 0.3).last, alive(tracked.tracks, 0.3).last)
    with pytest.raises(UserError, match=r"delta = 0.8 is above the limit 0.7"):
        spans_of(tracked, NAME, 0.8)
    with pytest.raises(UserError, match=r"no track of .* give more"):
        spans_of(tracked, NAME, -1e4)


def refusal(store, name=NAME, fingerprint=PRINT):
    with pytest.raises(UserError) as caught:
        store.get(name, fingerprint)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_what_does_not_fit_is_refused_in_one_line(tmp_path):
    store = TrackStore(tmp_path, EST)
    assert "no tracks of class/video.mp4" in refusal(store)
    assert "poodle-lightning trace" in refusal(store)
    assert not store.holds(NAME, PRINT)
    store.put(NAME, PRINT, made(), TIMES)
    assert store.holds(NAME, PRINT)
    assert "was changed after it was tracked" in refusal(store, fingerprint="1" * 32)
    assert not store.holds(NAME, "1" * 32)
    assert f"made with {EST}, not RAFT" in refusal(TrackStore(tmp_path, "RAFT"))
    assert "gamma = 0.01, not 0.1" in refusal(TrackStore(tmp_path, EST, 0.1))
    for other in (TrackStore(tmp_path, "RAFT"), TrackStore(tmp_path, EST, 0.1)):
        with pytest.raises(UserError, match="were made with"):  # not to be written over
            other.holds(NAME, PRINT)
    assert TrackStore(tmp_path).holds(NAME, PRINT)
    other = store.path("other.mp4")
    other.parent.mkdir(exist_ok=True)
    other.write_bytes(store.path(NAME).read_bytes())
    said = refusal(store, "other.mp4", "2" * 32)
    assert "holds tracks of another video, class/video.mp4, not other.mp4" in said
    assert store.holds("other.mp4", PRINT)  # the same video under another name


def test_damage_anywhere_is_noticed(tmp_path):
    store = TrackStore(tmp_path, EST)
    store.put(NAME, PRINT, made(), TIMES)
    path = store.path(NAME)
    whole = path.read_bytes()
    for place in (*range(0, 20), *range(20, len(whole), 37), len(whole) - 1):
        torn = bytearray(whole)
        torn[place] ^= 0x10
        path.write_bytes(torn)
        assert "damaged: track it again by poodle-lightning trace" in refusal(store)
        if place < 20:
            assert not store.holds(NAME, PRINT)
    for size in (0, 7, 20, 100, len(whole) - 2):
        path.write_bytes(whole[:size])
        assert "damaged" in refusal(store)
        assert not store.holds(NAME, PRINT)
    path.write_bytes(whole + b"\0\0")
    assert "damaged" in refusal(store)
    path.write_bytes(whole)
    assert store.holds(NAME, PRINT)
    assert len(store.get(NAME, PRINT).tracks) == 40


def test_holds_wants_as_many_points_and_as_large_a_limit(tmp_path):
    store = TrackStore(tmp_path, EST)
    store.put(NAME, PRINT, made(40, limit=0.7), TIMES)
    assert store.holds(NAME, PRINT, 40, 0.7)
    assert not store.holds(NAME, PRINT, 41)
    assert not store.holds(NAME, PRINT, 40, 0.8)
    assert store.holds(NAME, PRINT, 40, seed=0)
    with pytest.raises(UserError, match="start where seed 0 put them, not 5"):
        store.holds(NAME, PRINT, 40, seed=5)
    store.put(NAME, PRINT, made(40), TIMES)
    assert store.holds(NAME, PRINT, 40, math.inf)


def test_a_body_is_checked_once_until_its_file_changes(tmp_path, monkeypatch):
    store = TrackStore(tmp_path, EST)
    store.put(NAME, PRINT, made(), TIMES)
    checked, crc32 = [], zlib.crc32
    monkeypatch.setattr(data_tracks.zlib, "crc32", lambda data: checked.append(len(data)) or crc32(data))
    long = store.path(NAME).stat().st_size - 400  # longer than the header
    for _ in range(3):
        store.get(NAME, PRINT)
    assert sum(size > long for size in checked) == 1
    os.utime(store.path(NAME), ns=(1, 1))
    store.get(NAME, PRINT)
    assert sum(size > long for size in checked) == 2


def test_holding_reads_no_body(tmp_path, monkeypatch):
    store = TrackStore(tmp_path, EST)
    store.put(NAME, PRINT, made(), TIMES)
    monkeypatch.setattr(np, "memmap", lambda *_, **__: pytest.fail("mapped"))
    assert store.holds(NAME, PRINT)


def test_a_name_is_the_path_below_the_root_and_the_stretch(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    entry = Entry(0, str(tmp_path / "data" / "train" / "x.mp4"), 1.5, 11.5104, 64, 48)
    assert track_name(entry, "data") == "train/x.mp4#1500-11510"
    assert track_name(entry, str(tmp_path / "data" / "train")) == "x.mp4#1500-11510"
    assert track_name(entry, "elsewhere") == f"{entry.path}#1500-11510"
    (tmp_path / "data" / "train").mkdir(parents=True)
    (tmp_path / "data" / "train" / "x.mp4").touch()
    assert track_name(entry, "data/train/x.mp4") == "x.mp4#1500-11510"  # a film is its own root
    assert track_name(Entry(0, "street-3", 0.0, 8.0, 64, 48), None) == "street-3#0-8000"


def test_the_fingerprint_follows_the_content(tmp_path):
    for name, streets in (("a", StreetSet(2)), ("b", StreetSet(9)), ("c", StreetSet(2, difficulty="hard"))):
        source = SyntheticSource(streets)
        (tmp_path / name).write_text(video_print(source, source.entries[1]))
    a, b, c = ((tmp_path / name).read_text() for name in "abc")
    assert a == b != c  # how many streets there are does not matter
    source = SyntheticSource(StreetSet(2))
    assert video_print(source, source.entries[0]) != a
    source = None  # of what lies on disk, the disk tells
    folder = tmp_path / "images"
    folder.mkdir()
    (folder / "1.png").write_bytes(b"1")
    entry = Entry(0, str(folder), 0.0, 1.0, 8, 8, 0.1)
    before = video_print(source, entry)
    (folder / "2.png").write_bytes(b"2")
    assert video_print(source, entry) != before
    film = Entry(0, str(folder / "1.png"), 0.0, 1.0, 8, 8, 0.1)
    assert video_print(source, film) == fingerprint(film.path)


def test_a_folder_in_a_files_place_cannot_be_read(tmp_path):
    store = TrackStore(tmp_path, EST)
    store.path(NAME).mkdir(parents=True)
    assert "cannot be read" in refusal(store)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS])
def test_a_disk_that_refuses_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, code):
    store = TrackStore(tmp_path, EST)
    store.put(NAME, PRINT, made(), TIMES)
    before = store.path(NAME).read_bytes()

    def full(_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="tracks cannot be written to"):
        store.put(NAME, PRINT, made(seed=1), TIMES)
    assert store.path(NAME).read_bytes() == before
    assert [p.name for p in tmp_path.rglob("*") if p.is_file()] == [store.path(NAME).name]


def test_a_reader_keeps_the_file_that_it_opened(tmp_path):
    tracks, store = made(), TrackStore(tmp_path, EST)
    store.put(NAME, PRINT, tracks, TIMES)
    old = store.get(NAME, PRINT)
    store.put(NAME, PRINT, made(seed=1), TIMES)
    same(old.tracks, tracks)
    assert not np.array_equal(store.get(NAME, PRINT).tracks.places, tracks.places)


def test_what_cannot_be_written_is_refused(tmp_path):
    with pytest.raises(ValueError, match="name the estimator"):
        TrackStore(tmp_path).put(NAME, PRINT, made(), TIMES)
    with pytest.raises(ValueError, match="cannot take tracks"):
        TrackStore(tmp_path, EST, 0.1).put(NAME, PRINT, made(), TIMES)
    with pytest.raises(ValueError, match="6 frames need as many times"):
        TrackStore(tmp_path, EST).put(NAME, PRINT, made(), TIMES[:-1])

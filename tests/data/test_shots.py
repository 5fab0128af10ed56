"""Shots: cuts, motion, flashes, damage; what is remembered; clips that keep within them."""

from __future__ import annotations

import shutil
import sys
from itertools import pairwise

import cv2
import numpy as np
import pytest
from PIL import Image

from poodle_lightning.data import shots as module
from poodle_lightning.data.decode import VideoReader, probe
from poodle_lightning.data.encode import write_video
from poodle_lightning.data.info import DecodeError
from poodle_lightning.data.sampling import ClipSampler
from poodle_lightning.data.shots import Detector, content_value, find_cuts, find_shots, shots, thumbnail
from poodle_lightning.data.video import VideoDataModule
from poodle_lightning.types import Skip, UserError

FPS = 20


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("POODLE_CACHE", str(tmp_path_factory.mktemp("cache")))


def scene(seed, count, height=48, width=64):
    """A smooth picture that moves a pixel a frame; pictures of different seeds are different places."""
    coarse = np.random.default_rng(seed).integers(0, 256, (3, 4, 3), dtype=np.uint8)
    size = (width + count, height)
    picture = np.asarray(Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC))
    return [picture[:, k : k + width] for k in range(count)]


def flashed(frames, at, count=2):
    lit = [255 - (255 - frame) // 8 for frame in frames[at : at + count]]
    return [*frames[:at], *lit, *frames[at + count :]]


@pytest.fixture(scope="module")
def films(tmp_path_factory):
    root = tmp_path_factory.mktemp("films")
    parts = {
        "cuts": scene(0, 14) + scene(1, 30) + scene(2, 7),
        "motion": scene(3, 60),
        "flash": flashed(scene(4, 50), 20),
    }
    for name, frames in parts.items():
        write_video(root / f"{name}.mp4", frames, FPS, gop=12)
    return root


def frames_of(pictures, fps=FPS):
    return [(k / fps, thumbnail(picture)) for k, picture in enumerate(pictures)]


def test_the_content_value_is_that_of_pyscenedetect():
    from scenedetect import ContentDetector, FrameTimecode, StatsManager

    rng = np.random.default_rng(0)
    pictures = [rng.integers(0, 256, (20, 30, 3), dtype=np.uint8) for _ in range(3)] + scene(0, 3, 20, 30)
    theirs, stats = ContentDetector(), StatsManager()
    theirs.stats_manager = stats
    times = [FrameTimecode(k, 10.0) for k in range(len(pictures))]
    for time, picture in zip(times, pictures, strict=True):
        theirs.process_frame(time, cv2.cvtColor(picture, cv2.COLOR_RGB2BGR))
    expected = [stats.get_metrics(time, ["content_val"])[0] for time in times[1:]]
    small = [thumbnail(picture) for picture in pictures]
    ours = [content_value(a, b) for a, b in pairwise(small)]
    np.testing.assert_allclose(ours, expected, rtol=1e-9)


def test_thumbnails_are_means_of_at_most_256_pixels_width():
    wide = np.zeros((100, 512, 3), np.uint8)
    wide[:, ::2] = 100
    assert thumbnail(wide).shape == (50, 256, 3)
    assert (thumbnail(wide)[..., 2] == 50).all()
    assert thumbnail(wide[:, :200]).shape == (100, 200, 3)


def test_hard_cuts_are_found_to_the_frame(films):
    found = shots(films / "cuts.mp4")
    expected = [(0, 13), (14, 43), (44, 50)]
    np.testing.assert_allclose(found, np.array(expected) / FPS, atol=1e-6)
    theirs = shots(films / "cuts.mp4", detector="scenedetect")
    # it leaves out cuts that follow the one before within 15 frames, here the first
    np.testing.assert_allclose([theirs[0][1], theirs[-1][0]], np.array([43, 44]) / FPS, atol=1e-6)


def test_motion_and_flashes_are_no_cuts(films):
    for name in ("motion", "flash"):
        (one,) = shots(films / f"{name}.mp4")
        assert one == (0.0, pytest.approx(probe(films / f"{name}.mp4").duration))
    assert len(shots(films / "flash.mp4", detector=Detector(flash=0.0))) == 3


@pytest.mark.parametrize(
    ("pictures", "expected"),
    [
        (scene(0, 10) + scene(1, 10), [(9, 10)]),
        # shots shorter than a flash may be
        (scene(0, 10) + scene(1, 3) + scene(2, 10), [(9, 10), (12, 13)]),
        # the picture comes back, but too late
        (scene(0, 10) + scene(1, 8) + scene(0, 10), [(9, 10), (17, 18)]),
        (flashed(scene(0, 20), 5), []),
        (flashed(scene(0, 20), 8) + flashed(scene(1, 20), 3), [(19, 20)]),
        (flashed(scene(0, 20), 18), [(17, 18)]),  # nothing shows that it comes back
        # a jump by little more than the threshold, after which it is little less, does not come back
        ([[[[0]]]] * 5 + [[[[81]]]] * 1 + [[[[80]]]] * 10, [(4, 5)]),
        (scene(0, 1), []),
        ([], []),
    ],
)
def test_cuts_and_flashes(pictures, expected):
    pictures = [np.broadcast_to(np.uint8(picture), (*np.shape(picture)[:2], 3)) for picture in pictures]
    assert find_cuts(frames_of(pictures), Detector()) == [(a / FPS, b / FPS) for a, b in expected]


def test_what_cannot_be_read_is_taken_for_a_cut():
    frames = frames_of(scene(0, 30))
    damaged = [(t, None if 10 <= k < 14 or k < 2 or k > 27 else p) for k, (t, p) in enumerate(frames)]
    assert find_cuts(damaged, Detector()) == [(9 / FPS, 14 / FPS)]


def test_with_a_step_a_shot_ends_with_a_frame_that_was_seen(films):
    found = shots(films / "cuts.mp4", detector=Detector(step=0.2, flash=0.0))  # every fourth frame
    np.testing.assert_allclose(found, [(0, 12 / FPS), (16 / FPS, 40 / FPS), (44 / FPS, 50 / FPS)], atol=1e-6)


@pytest.mark.parametrize("piece", [0.3, 0.65, 0.7, 1.05])
def test_pieces_change_nothing(films, monkeypatch, piece):
    names = ("cuts", "flash", "motion")
    videos = [probe(films / f"{name}.mp4") for name in names]
    whole = find_shots(videos, Detector(), cache=False)
    monkeypatch.setattr(module, "_PIECE", piece)
    assert find_shots(videos, Detector(), cache=False) == whole


def test_what_was_found_is_remembered_by_content(films, tmp_path, monkeypatch):
    first = shots(films / "cuts.mp4")
    shutil.copy(films / "cuts.mp4", tmp_path / "other.mp4")
    with monkeypatch.context() as patched:
        patched.setattr(module, "VideoReader", None)  # whoever looks again fails
        assert shots(tmp_path / "other.mp4") == first
        for again in ({"detector": Detector(threshold=20.0)}, {"cache": False}):
            with pytest.raises(TypeError):
                shots(films / "cuts.mp4", **again)
    for store in (module.cache_folder() / "shots").iterdir():
        store.write_text("torn")
    assert shots(films / "cuts.mp4") == first


def test_a_film_that_went_is_a_skip(films, tmp_path):
    shutil.copy(films / "cuts.mp4", tmp_path / "a.mp4")
    videos = [probe(tmp_path / "a.mp4"), probe(films / "motion.mp4")]
    (tmp_path / "a.mp4").unlink()
    gone, there = find_shots(videos, Detector())
    assert isinstance(gone, Skip)
    assert gone.reason == "missing"
    assert len(there) == 1
    with pytest.raises(DecodeError):
        shots(tmp_path / "a.mp4")


def test_a_video_is_looked_through_as_far_as_it_is_wanted(films, monkeypatch):
    videos, end = [probe(films / "cuts.mp4"), probe(films / "motion.mp4")], 1.5
    whole = find_shots(videos, Detector(), cache=False)
    part = find_shots(videos, Detector(), until=[end, 99.0])
    assert part == [[(0.0, whole[0][0][1]), (whole[0][1][0], end)], whole[1]]
    times, read = [], VideoReader.read

    def watched(self, wanted, box=None):
        times.extend(wanted)
        return read(self, wanted, box)

    with monkeypatch.context() as patched:
        patched.setattr(VideoReader, "read", watched)
        # the part is remembered, and is not taken for the whole
        assert find_shots(videos, Detector(), until=[end, 99.0]) == part
        assert times == []
        find_shots(videos, Detector(), cache=False, until=[end, 0.5])
        assert 1.5 < max(times) < 2.2  # a little further, for flashes
        assert find_shots(videos, Detector()) == whole
        times.clear()
        # nor is a part looked for where the whole is known
        assert find_shots(videos, Detector(), until=[1.4, 99.0])[0][-1] == (whole[0][1][0], 1.4)
        assert times == []


def test_hours_are_not_looked_beyond(films, tmp_path, monkeypatch):
    shutil.copy(films / "motion.mp4", tmp_path / "a.mp4")
    seen, pieces = module._look, []
    monkeypatch.setattr(
        module, "_look", lambda piece, detector: pieces.append(piece) or seen(piece, detector)
    )
    (entry,) = clips(tmp_path, hours=1.5 / 3600).train_entries
    assert (entry.start, entry.stop) == (0.0, pytest.approx(1.5))
    assert [(start, stop) for _, start, stop in pieces] == [(0.0, pytest.approx(1.5))]


def test_a_search_that_is_broken_off_goes_on_where_it_was(films, monkeypatch):
    videos = [probe(films / f"{name}.mp4") for name in ("cuts", "flash", "motion")]
    whole = find_shots(videos, Detector(), cache=False)
    look, looked = module._look, []

    def broken(piece, detector):
        looked.append(piece[0].path)
        if piece[0] == videos[1] and len(looked) < 3:
            raise KeyboardInterrupt
        return look(piece, detector)

    monkeypatch.setattr(module, "_look", broken)
    with pytest.raises(KeyboardInterrupt):
        find_shots(videos, Detector())
    assert looked == [video.path for video in videos[:2]]
    assert find_shots(videos, Detector()) == whole
    assert looked[2:] == [video.path for video in videos[1:]]


def test_without_a_cache_to_write_to_videos_are_looked_through_once(films, tmp_path, monkeypatch):
    shutil.copy(films / "cuts.mp4", tmp_path / "a.mp4")
    look, looked = module._look, []
    monkeypatch.setattr(module, "save_whole", lambda store, content: None)
    monkeypatch.setattr(
        module, "_look", lambda piece, detector: looked.append(piece) or look(piece, detector)
    )
    assert len(clips(tmp_path).train_entries) == 3  # prepare_data, then setup
    assert len(looked) == 1


def test_a_long_search_says_how_far_it_is(films, monkeypatch):
    said = []
    monkeypatch.setattr(module, "rank_zero_info", said.append)
    monkeypatch.setattr(module, "_PIECE", 1.0)
    videos = [probe(films / f"{name}.mp4") for name in ("cuts", "motion")]  # 2.5 and 2.95 s
    find_shots(videos, Detector(), cache=False)
    assert said == ["Looking for the cuts in 5.5 s of video, once for all runs"]
    monkeypatch.setattr(module, "_REPORT_EVERY", 0.0)
    find_shots(videos, Detector(), cache=False)
    told = [line.partition(", about ")[0] for line in said[2:]]
    assert told == [f"Looked for cuts in {done} s of 5.5 s" for done in ("1", "2", "2.5", "3.5", "4.5")]


def test_errors_are_one_line(films, monkeypatch):
    for wrong in ({"threshold": 0.0}, {"flash": -1.0}, {"step": -1.0}):
        with pytest.raises(UserError, match="shots: threshold"):
            Detector(**wrong)
    monkeypatch.setitem(sys.modules, "scenedetect", None)
    with pytest.raises(UserError, match=r"pip install 'poodle-lightning\[shots\]'"):
        shots(films / "cuts.mp4", detector="scenedetect")


# ---- clips
def clips(root, **changes):
    settings = {
        "size": (16, 16),
        "area": (0.5, 1.0),
        "sampler": ClipSampler(4, 0.1),
        "batch_size": 1,
        "num_workers": 0,
        "val_fraction": 0.0,
        "cuts": "avoid",
    }
    data = VideoDataModule("folder", str(root), **(settings | changes))
    data.prepare_data()
    data.setup("fit")
    return data


def test_clips_never_cross_a_cut(films, tmp_path):
    shutil.copy(films / "cuts.mp4", tmp_path / "a.mp4")
    bounds = shots(tmp_path / "a.mp4")
    for changes in ({"start_every": 1 / FPS}, {"repeats": 20}, {"clip_seconds": 0.5, "repeats": 5}):
        data = clips(tmp_path, **changes)
        # a shot of 7 frames holds the clip of 4 frames, 2 apart
        assert len({entry.start for entry in data.train_entries}) >= 3
        for clip in data.train_dataloader():
            first, last = float(clip.times[0, 0]), float(clip.times[0, -1])
            assert last - first == pytest.approx(0.3, abs=0.051)
            assert any(a - 1e-6 <= first and last <= b + 1e-6 for a, b in bounds)
    # every start once: 14 − 6 + 30 − 6 + 7 − 6
    assert len(clips(tmp_path, start_every=1 / FPS).train_entries) == 33
    assert len(clips(tmp_path, start_every=1 / FPS, cuts="keep").train_entries) == 51 - 6


def test_shots_too_short_are_left_out_and_films_of_them_named(films, tmp_path):
    for name in ("cuts", "motion"):
        shutil.copy(films / f"{name}.mp4", tmp_path / f"{name}.mp4")
    data = clips(tmp_path, sampler=ClipSampler(2, 1.0))
    assert [round(entry.start * FPS) for entry in data.train_entries] == [14, 0]
    data = clips(tmp_path, sampler=ClipSampler(2, 2.0))
    assert [entry.path for entry in data.train_entries] == [str(tmp_path / "motion.mp4")]
    assert [(skip.path, skip.reason) for skip in data._too_short] == [
        (str(tmp_path / "cuts.mp4"), "too_short")
    ]
    (tmp_path / "motion.mp4").unlink()
    with pytest.raises(
        UserError, match=r"none of 3 shots lasts the 2 s that a clip needs \(the longest 1.45"
    ):
        clips(tmp_path, sampler=ClipSampler(2, 2.0))
    with pytest.raises(UserError, match=r"cuts avoid is for video files: set --data\.cuts keep"):
        VideoDataModule("synthetic", cuts="avoid")

"""Sources of video files: layouts, what is refused, files that change under the reader."""

from __future__ import annotations

import numpy as np
import pytest

from poodle_lightning.data.encode import write_video
from poodle_lightning.data.info import DecodeError
from poodle_lightning.data.sources import (
    BDD100KSource,
    EpicKitchensSource,
    FilmSource,
    FolderSource,
    Kinetics400Source,
    Kinetics700Source,
    WalkingToursSource,
)
from poodle_lightning.data.video import VideoDataModule
from poodle_lightning.types import UserError


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("POODLE_CACHE", str(tmp_path_factory.mktemp("cache")))


def film(path, seed=0, frames=12, size=(32, 48)):
    path.parent.mkdir(parents=True, exist_ok=True)
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 6, 3), dtype=np.uint8)
    picture = np.kron(coarse, np.ones((size[0] // 4, size[1] // 6, 1), np.uint8))
    write_video(path, [np.roll(picture, number, axis=1) for number in range(frames)], fps=10)
    return path


def names(source):
    return [entry.path.split("/")[-1] for entry in source.entries]


def test_folder_finds_videos_at_any_depth_and_lists_the_refused(tmp_path):
    film(tmp_path / "b.mp4")
    film(tmp_path / "deep" / "er" / "a.mkv", seed=1)
    (tmp_path / "text.mp4").write_text("no video")
    source = FolderSource(tmp_path)
    assert sorted(names(source)) == ["a.mkv", "b.mp4"]
    assert [(skip.path, skip.reason) for skip in source.refused] == [
        (str(tmp_path / "text.mp4"), "not_a_video")
    ]
    entry = source.entries[0]
    assert (entry.id, entry.start, entry.width, entry.height) == (0, 0.0, 48, 32)
    assert entry.stop == pytest.approx(1.1)
    pixels, times = source.open(entry).read([0.3], (4, 6, 20, 16))
    assert pixels.shape == (1, 10, 16, 3)
    assert times[0] == pytest.approx(0.3)


def test_a_file_that_was_replaced_or_removed_is_a_skip_not_a_surprise(tmp_path):
    for number in range(3):
        film(tmp_path / f"{number}.mp4", seed=number)
    source = FolderSource(tmp_path)
    film(tmp_path / "0.mp4", seed=9)
    (tmp_path / "1.mp4").unlink()
    reasons = []
    for entry in source.entries[:2]:
        with pytest.raises(DecodeError) as caught:
            source.open(entry)
        reasons.append(caught.value.reason)
    assert reasons == ["changed", "missing"]
    source.open(source.entries[2]).close()


def test_bdd100k_is_found_by_its_layout(tmp_path):
    film(tmp_path / "bdd100k" / "videos" / "train" / "0001.mov")
    film(tmp_path / "bdd100k" / "videos" / "val" / "0002.mov", seed=1)
    assert names(BDD100KSource(tmp_path / "bdd100k")) == ["0001.mov"]
    assert names(BDD100KSource(tmp_path)) == ["0001.mov"]
    assert names(BDD100KSource(tmp_path, "val")) == ["0002.mov"]
    with pytest.raises(UserError, match=r"not laid out as BDD100K, .*videos/test is missing"):
        BDD100KSource(tmp_path / "bdd100k", "test")


def test_walking_tours_are_found_by_their_names(tmp_path):
    for number, name in enumerate(("Venice_4K.mp4", "kuala-lumpur.mkv", "Wildlife Safari.mp4", "Paris.mp4")):
        film(tmp_path / name, seed=number)
    assert names(WalkingToursSource(tmp_path)) == ["Venice_4K.mp4"]
    assert names(WalkingToursSource(tmp_path, "Kuala Lampur")) == ["kuala-lumpur.mkv"]
    assert names(WalkingToursSource(tmp_path, "safari")) == ["Wildlife Safari.mp4"]
    assert len(names(WalkingToursSource(tmp_path, "all"))) == 3
    with pytest.raises(UserError, match=r"no readable file Zurich\*.mp4"):
        WalkingToursSource(tmp_path, "zurich")


def test_the_tours_of_wt_sem_are_a_set_of_their_own(tmp_path):
    for number, name in enumerate(("Rome 4K.mp4", "Toruń-walk.mp4", "poznan.mkv", "Zürich.mp4")):
        film(tmp_path / name, seed=number)
    assert sorted(names(WalkingToursSource(tmp_path, "val"))) == [
        "Rome 4K.mp4",
        "Toruń-walk.mp4",
        "poznan.mkv",
    ]
    assert names(WalkingToursSource(tmp_path, "all")) == ["Zürich.mp4"]
    with pytest.raises(UserError, match="city 'paris': choose all, val or one of amsterdam"):
        WalkingToursSource(tmp_path, "paris")
    for name in ("Rome 4K.mp4", "Toruń-walk.mp4", "poznan.mkv"):
        (tmp_path / name).unlink()
    with pytest.raises(UserError, match=r"no readable file \{Rome,Torun,Poznan\}\*.mp4"):
        WalkingToursSource(tmp_path, "val")


def test_kitchens_are_found_by_both_layouts(tmp_path):
    (tmp_path / "other").mkdir()
    for number, name in enumerate(
        ("P01/videos/P01_01.MP4", "P02/P02_101.MP4", "other/P03_01.MP4", "P04/x.MP4")
    ):
        film(tmp_path / "EPIC-KITCHENS" / name.replace("MP4", "mp4"), seed=number)
        (tmp_path / "EPIC-KITCHENS" / name.replace("MP4", "mp4")).rename(tmp_path / "EPIC-KITCHENS" / name)
    for root in (tmp_path, tmp_path / "EPIC-KITCHENS"):
        assert names(EpicKitchensSource(root)) == ["P01_01.MP4", "P02_101.MP4"]
    with pytest.raises(UserError, match="not laid out as EPIC-KITCHENS"):
        EpicKitchensSource(tmp_path / "EPIC-KITCHENS" / "other")


@pytest.mark.parametrize("holder", ["", "kinetics400", "k400"])
def test_kinetics_is_found_with_and_without_classes(tmp_path, holder):
    film(tmp_path / holder / "train" / "abseiling" / "a_000001_000011.mp4")
    film(tmp_path / holder / "train" / "zumba" / "b_000001_000011.mp4", seed=1)
    film(tmp_path / holder / "val" / "c_000001_000011.mp4", seed=2)
    assert names(Kinetics400Source(tmp_path)) == ["a_000001_000011.mp4", "b_000001_000011.mp4"]
    assert names(Kinetics400Source(tmp_path, "val")) == ["c_000001_000011.mp4"]
    with pytest.raises(UserError, match=r"not laid out as Kinetics-400, .*test is missing"):
        Kinetics400Source(tmp_path, "test")


def test_the_users_own_folder_has_a_short_name_for_every_source(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    film(tmp_path / "set" / "train" / "a.mp4")
    film(tmp_path / "set" / "videos" / "train" / "a.mov")
    for source in (Kinetics400Source, BDD100KSource, FolderSource):
        assert names(source("~/set"))


@pytest.mark.parametrize("holder", ["", "kinetics700", "kinetics700_2020", "k700"])
def test_kinetics_700_is_laid_out_as_400(tmp_path, holder):
    film(tmp_path / holder / "train" / "abseiling" / "a_000001_000011.mp4")
    assert names(Kinetics700Source(tmp_path)) == ["a_000001_000011.mp4"]
    with pytest.raises(UserError, match=r"not laid out as Kinetics-700, .*val is missing"):
        Kinetics700Source(tmp_path, "val")


def test_a_film_is_one_file(tmp_path):
    film(tmp_path / "a.mp4")
    film(tmp_path / "b.mp4", seed=1)
    source = FilmSource(tmp_path / "a.mp4")
    assert names(source) == ["a.mp4"]
    (entry,) = source.entries
    assert (entry.stop, entry.interval) == (pytest.approx(1.1), pytest.approx(0.1))
    assert source.video(entry).frames == 12
    source.open(entry).close()
    (tmp_path / "text.mp4").write_text("no video")
    for wrong, message in (
        ("", "is a folder, not a film; set --data.root to the file"),
        ("c.mp4", "no such film; set --data.root to the file"),
        ("text.mp4", "no known video container"),
    ):
        with pytest.raises(UserError, match=message) as caught:
            FilmSource(tmp_path / wrong)
        assert "\n" not in str(caught.value)


def test_the_data_module_reads_films(tmp_path):
    for number in range(4):
        film(tmp_path / f"{number}.mp4", seed=number, frames=20, size=(64, 96))
    (tmp_path / "empty.mp4").touch()
    data = VideoDataModule(
        "folder",
        str(tmp_path),
        size=(16, 32),
        area=(0.2, 0.8),
        batch_size=2,
        num_workers=0,
        val_fraction=0.25,
    )
    data.setup("fit")
    clips = [*data.train_dataloader(), *data.val_dataloader()]
    assert len(data.val_entries) == 1
    for clip in clips:
        assert clip.unit().shape == (2, 2, 3, 16, 32)
        gap = clip.times[:, 1] - clip.times[:, 0]
        assert float(gap.min()) >= 0.4 - 1e-6  # gap of 0.5 to 1.0 s, each end on the next frame
        assert float(gap.max()) <= 1.1 + 1e-6

"""Lightness against OpenCV's, the moments that are looked at, and the numbers of the table by hand."""

import cv2
import numpy as np
import pytest

from poodle_lightning.analysis.object_lists import Found, count_objects
from poodle_lightning.analysis.video_stats import (
    VideoStats,
    as_plain,
    lightness,
    markdown,
    names_of,
    video_stats,
)
from poodle_lightning.data.decode import VideoReader
from poodle_lightning.data.encode import write_video
from poodle_lightning.data.info import DecodeError
from poodle_lightning.types import UserError


def grey(levels, size=(32, 48)):
    return [np.full((*size, 3), level, np.uint8) for level in levels]


@pytest.fixture(scope="module")
def film(tmp_path_factory):
    """4 s at 5 per second that grow dark from grey 200 to 10, one level per frame, with a cut at 2 s."""
    path = tmp_path_factory.mktemp("films") / "dusk.mp4"
    write_video(path, grey([200 - 2 * k for k in range(10)] + [60 - 5 * k for k in range(11)]), 5.0, gop=5)
    return path


def test_lightness_is_that_of_opencv():
    frames = np.random.default_rng(0).integers(0, 256, (3, 16, 20, 3), dtype=np.uint8)
    frames[1] //= 20  # near black, where the curve is a line
    wanted = [cv2.cvtColor(f.astype(np.float32) / 255, cv2.COLOR_RGB2LAB)[..., 0].mean() for f in frames]
    np.testing.assert_allclose(lightness(frames), wanted, atol=0.1)  # OpenCV reads a coarse table
    assert lightness(np.array(grey([0, 255]))) == pytest.approx([0.0, 100.0])
    # red, green and blue of sRGB in CIE L*, as tables of colours print them
    primaries = np.eye(3, dtype=np.uint8).reshape(3, 1, 1, 3) * 255
    assert lightness(primaries) == pytest.approx([53.24, 87.73, 32.30], abs=0.01)


def test_frames_are_looked_at_by_time(film):
    found = video_stats(film, step=0.8, find_shots=False)
    assert found.duration == pytest.approx(4.0)
    assert found.times == pytest.approx((0.0, 0.8, 1.6, 2.4, 3.2, 4.0))
    with VideoReader(film) as reader:
        frames, _ = reader.read(found.times)
    assert found.lightness == pytest.approx(lightness(frames).tolist())
    assert found.lightness[0] > found.lightness[2] > found.lightness[3] > found.lightness[5]
    assert found.shots is None
    assert "shots" not in found.summary()


def test_large_frames_are_thinned_without_mixing_pixels(tmp_path):
    # every second column is black: averages of pixels would be another lightness than pixels
    frame = np.zeros((40, 960, 3), np.uint8)
    frame[:, ::4] = 255
    write_video(tmp_path / "wide.mp4", [frame] * 2, 5.0, crf=0)
    with VideoReader(tmp_path / "wide.mp4") as reader:
        read, _ = reader.read([0.0])
    wanted = lightness(read)[0]
    mixed = lightness(cv2.resize(read[0], (320, 13), interpolation=cv2.INTER_AREA)[None])[0]
    found = video_stats(tmp_path / "wide.mp4", find_shots=False).lightness[0]
    assert abs(found - wanted) < 0.5
    assert abs(mixed - wanted) > 2.0


def test_shots_are_found(film):
    found = video_stats(film, step=1.0)
    # from the first frame of a shot to its last, 0.2 s before the next one's first
    assert np.array(found.shots) == pytest.approx(np.array([(0.0, 1.8), (2.0, 4.0)]))
    assert found.summary()["median_shot"] == pytest.approx(1.9)
    assert found.summary()["cuts_per_hour"] == pytest.approx(3600 / 4.0)


def test_numbers_by_hand():
    objects = count_objects(
        [Found(0, "dog", ""), Found(0, "dog", ""), Found(60, "cat", ""), Found(61, "", "")]
    )
    video = VideoStats(
        "a.mp4", 125.0, (0.0, 30.0, 60.0, 90.0, 120.0), (10.0, 30.0, 50.0, 50.0, 40.0),
        ((0.0, 5.0), (5.0, 25.0), (25.0, 125.0)), objects,
    )  # fmt: skip
    numbers = video.summary()
    assert numbers == pytest.approx(
        {
            "seconds": 125.0,
            "lightness": 36.0,
            "lightness_change": (20 + 20 + 0 + 10) / 4,
            "lightness_range": 50.0 - 20.0,  # minutes: 20, 50, 40
            "shots": 3,
            "cuts_per_hour": 57.6,
            "median_shot": 20.0,
            "objects_per_frame": 1.0,
            "classes_per_frame": 2 / 3,
            "classes": 2,
        }
    )


def test_table_has_a_row_per_video_and_its_classes():
    objects = count_objects([Found(0, "d|g", ""), Found(1, "", "")])
    videos = [
        VideoStats("x/a.mp4", 2.0, (0.0,), (50.0,), objects=objects),
        VideoStats("y/a.mp4", 0.0, (0.0,), (60.0,), ((0.0, 0.0),)),
        VideoStats("y/b.mp4", 4.0, (0.0,), (70.0,)),
    ]
    lines = markdown(videos).splitlines()
    widths = {line.replace("\\|", "").count("|") for line in lines[:5]}
    assert len(widths) == 1
    assert lines[2].startswith("| x/a.mp4 | 2.0 | 50.0 |")
    assert "| – |" in lines[2]
    assert lines[4].startswith("| b.mp4 | 4.0 | 70.0 |")
    assert "| d\\|g | 50.0 | 1 |" in lines
    assert names_of(["x/a.mp4", "y/a.mp4", "y/b.mp4"]) == ["x/a.mp4", "y/a.mp4", "b.mp4"]
    plain = as_plain(videos, 1.0)
    assert plain["videos"][0]["objects"]["total"] == {"d|g": 1}
    assert plain["videos"][2]["shots"] is None


def test_what_cannot_be_read_says_why(tmp_path, film):
    with pytest.raises(UserError, match="--step 0"):
        video_stats(film, step=0.0)
    with pytest.raises(DecodeError):
        video_stats(tmp_path / "nothing.mp4")

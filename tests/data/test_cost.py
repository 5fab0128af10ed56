"""What a pair costs: the closed form against a simulated decoder, the measurement against real reads."""

import math

import numpy as np
import pytest
from films import FPS, N, film

from poodle_lightning.data import cost as module
from poodle_lightning.data.cost import (
    Cost,
    cores_for,
    frames_per_pair,
    measure,
    measure_each,
    spread,
    together,
)
from poodle_lightning.data.decode import VideoReader, probe
from poodle_lightning.data.encode import write_video
from poodle_lightning.data.info import DecodeError
from poodle_lightning.data.sampling import TooShort
from poodle_lightning.types import Skip


def decoded(first, second, gop):
    """Frames that a decoder has to decode for two frames, one after the other: a set, key frames in it."""
    needed = set()
    for frame in (first, second):
        needed |= set(range(frame // gop * gop, frame + 1))
    run_on = set(range(first // gop * gop, second + 1))
    return min(len(needed), len(run_on))


@pytest.mark.parametrize(
    ("gop", "fps", "gap"),
    [
        (1, 30, (0.5, 1.0)),
        (12, 30, (0.5, 1.0)),
        (30, 30, (0.5, 1.0)),
        (250, 30, (0.5, 1.0)),
        (20, 29.97, (0.31, 0.87)),
        (12, 10, (0.0, 0.05)),
        (30, 25, (0.42, 0.42)),
    ],
)
def test_frames_per_pair_are_those_of_a_simulated_decoder(gop, fps, gap):
    draw = np.random.default_rng(0)
    starts, gaps = draw.uniform(0, 1000 * gop / fps, 40_000), draw.uniform(*gap, 40_000)
    # the frame at a time is the first that is not before it
    counts = [
        decoded(math.ceil(s * fps), math.ceil((s + d) * fps), gop) for s, d in zip(starts, gaps, strict=True)
    ]
    error = np.std(counts) / math.sqrt(len(counts))
    assert frames_per_pair(gop, fps, gap) == pytest.approx(np.mean(counts), abs=4 * error + 1e-9)


def test_limits_of_the_closed_form():
    assert frames_per_pair(1, 30) == 2  # every frame is a key frame
    # all gaps are longer than the way between key frames: half of it, twice
    assert frames_per_pair(9, 30) == pytest.approx(10)
    # one key frame: half the film on average, and the gap of 0.75 s
    assert frames_per_pair(1e9, 30) == pytest.approx((1e9 + 1) / 2 + 22.5)
    assert frames_per_pair(15, 30, (0, 0)) == 8  # the same frame twice


@pytest.mark.parametrize("wrong", [(0.5, 30), (12, -1), (12, 30, (1.0, 0.5)), (12, 30, (-0.1, 0.5))])
def test_wrong_numbers_are_refused(wrong):
    with pytest.raises(ValueError, match="need gop"):
        frames_per_pair(*wrong)


def test_cores():
    assert cores_for(20, 8) == 2.5
    for wrong in ((0, 8), (20, 0)):
        with pytest.raises(ValueError, match="above 0"):
            cores_for(*wrong)


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    path = tmp_path_factory.mktemp("good") / "good.mp4"
    write_video(path, film(), FPS, gop=12)
    return path


def test_videos_together_average_their_times(good):
    costs = [Cost(probe(good), 100.0, 10.0, rate) for rate in (10.0, 30.0)]
    # a pair takes 1/10 s from one and 1/30 s from the other: 2 pairs in 4/30 s
    assert together(costs) == pytest.approx(15)
    assert costs[0].expected_pairs_per_cpu_s == 10
    with pytest.raises(ValueError, match="no video"):
        together([])


class Clock:
    """A clock of which every reading of pixels takes 1 s."""

    now = 0.0

    def process_time(self):
        return self.now


def test_pairs_are_read_as_in_training_and_divided_by_their_time(good, monkeypatch):
    pairs, clock, read, pieces = [], Clock(), VideoReader.read, VideoReader.pieces

    def counted(self, times, box=None):
        clock.now += len(times)
        return read(self, times, box)

    def pair(self, times, boxes, planes=False):
        clock.now += len(times)
        pairs.append((times, boxes))
        return pieces(self, times, boxes, planes)

    monkeypatch.setattr(VideoReader, "read", counted)
    monkeypatch.setattr(VideoReader, "pieces", pair)
    monkeypatch.setattr(module, "time", clock)
    found = measure(good, gap=(0.2, 0.4), pairs=5)
    assert len(pairs) == 5
    for number, ((first, second), boxes) in enumerate(pairs):
        assert boxes[0] == boxes[1]
        x0, y0, x1, y1 = boxes[0]
        span = (N - 1) / FPS - 0.4
        assert span * number / 5 <= first <= span * (number + 1) / 5
        assert 0.2 <= second - first <= 0.4
        # the paper's share of the frame, and a margin of a pixel or two around
        assert 0.16 < (x1 - x0) * (y1 - y0) / (48 * 64) < 0.65
    assert found.pairs_per_cpu_s == pytest.approx(1 / 2)  # two frames of 1 s each
    assert found.frames_per_cpu_s == pytest.approx(1)
    assert found.frames_per_pair == pytest.approx(frames_per_pair(12, FPS, (0.2, 0.4)))


def test_real_rates_are_positive(good):
    found = measure(good, gap=(0.2, 0.4), pairs=2)
    assert 1 < found.pairs_per_cpu_s < 1e5
    assert 1 < found.frames_per_cpu_s < 1e6


def test_what_cannot_be_measured(good, tmp_path):
    with pytest.raises(TooShort):
        measure(good, gap=(0.5, 3.0))
    with pytest.raises(ValueError, match="at least one"):
        measure(good, pairs=0)
    (tmp_path / "text.mp4").write_text("no film")
    with pytest.raises(DecodeError):
        measure(tmp_path / "text.mp4")
    write_video(tmp_path / "short.mp4", film(3), FPS)
    paths = [str(tmp_path / "text.mp4"), str(good), str(tmp_path / "short.mp4")]
    text, fine, short = measure_each(paths, (0.2, 0.4), 1)
    assert (text.path, text.reason) == (paths[0], "not_a_video")
    assert text.detail
    assert fine.info.path == str(good)
    assert (short.path, short.reason) == (paths[2], "too_short")


def test_a_disk_that_fails_is_a_reason(good, monkeypatch):
    def failing(*_):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(module, "measure", failing)
    assert measure_each(["a"]) == [Skip("a", "unreadable", "Input/output error")]


def test_some_are_spread_over_all():
    assert spread(9, 3) == [0, 4, 8]
    assert spread(2, 3) == [0, 1]
    assert spread(5, 0) == spread(0, 3) == []

"""What follows from a video's measurements."""

import pytest
from films import film

from poodle_lightning.data.decode import probe
from poodle_lightning.data.encode import write_video


@pytest.mark.parametrize(("gop", "frames", "expected"), [(5, 21, 5), (1, 9, 1), (30, 21, 21), (30, 1, 1)])
def test_frames_between_key_frames(tmp_path, gop, frames, expected):
    write_video(tmp_path / "a.mp4", film(frames, 16, 16), 10, gop=gop)
    assert probe(tmp_path / "a.mp4").gop == pytest.approx(expected)

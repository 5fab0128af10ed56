"""Counts of tracking: sums, the line that is shown, when a result is refused, and the list of failures."""

import json
from collections import Counter

import pytest

from poodle_lightning.data.track_counts import Count, listed, note_skip
from poodle_lightning.types import UserError


def test_counts_add_up_and_are_told_in_rates():
    total = Count()
    total += Count(1, 0, 100, 5_000, 10.0, 300_000)
    total += Count(1, 0, 50, 1_000, 8.0, 60_000)
    total += Count(kept=3)
    total += Count(skipped=Counter(corrupt=1))
    assert total == Count(2, 3, 150, 6_000, 18.0, 360_000, Counter(corrupt=1))
    assert total.told(4.0) == (
        "2 videos tracked in 4.0 s, 3 were there; 150 tracks, 1500 points*frames/s, 4.50 s of video/s, "
        "72.0 MB per hour of video"
    )
    assert Count(kept=3).told(0.0) == "0 videos tracked in 0.0 s, 3 were there"


def test_more_than_half_missing_is_an_error():
    Count(1, 1, skipped=Counter(corrupt=2)).check()
    Count().check()
    with pytest.raises(UserError, match=r"3 of 5 videos could not be tracked \(2 corrupt, 1 missing\)"):
        Count(1, 1, skipped=Counter(corrupt=2, missing=1)).check()
    assert listed(Counter()) == ""


def test_failures_are_written_line_by_line(tmp_path):
    for name in ("a.mp4", "b\n.mp4"):
        note_skip(tmp_path / "out", name, "corrupt", "a frame is damaged")
    lines = (tmp_path / "out" / "skipped.jsonl").read_text().splitlines()
    assert [json.loads(line)["video"] for line in lines] == ["a.mp4", "b\n.mp4"]
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be written"):
        note_skip(tmp_path / "file", "a.mp4", "corrupt", "")

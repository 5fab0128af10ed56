"""The ledger: counts, lines, and when a run must stop."""

from __future__ import annotations

import json

import pytest

from poodle_lightning.data.skips import Ledger, TooManySkipped
from poodle_lightning.types import Skip, UserError

BAD = Skip("a.mp4", "corrupt", "bits", 1.5)
SHORT = Skip("b.mp4", "too_short", "0.1 s")


def lines(folder):
    return [json.loads(line) for line in (folder / "skipped.jsonl").read_text().splitlines()]


def test_requested_is_used_plus_skipped(tmp_path):
    ledger = Ledger(1.0)
    ledger.open(tmp_path / "run")
    ledger.train(4, (BAD, SHORT, BAD), epoch=0, step=0)
    ledger.train(4, (), epoch=0, step=1)
    ledger.train(4, (SHORT,), epoch=1, step=2)
    ledger.sum_up()
    assert ledger.requested == 12 + 4
    assert ledger.skipped == {"corrupt": 2, "too_short": 2}
    written = lines(tmp_path / "run")
    assert [line["stage"] for line in written] == ["train"] * 3 + ["epoch"] + ["train", "epoch"]
    assert written[0] == {
        "stage": "train", "epoch": 0, "step": 0, "rank": 0,
        "path": "a.mp4", "reason": "corrupt", "detail": "bits", "time": 1.5,
    }  # fmt: skip
    assert written[3] == {
        "stage": "epoch", "epoch": 0, "rank": 0, "requested": 11, "used": 8,
        "skipped": {"corrupt": 2, "too_short": 1},
    }  # fmt: skip
    assert written[5]["requested"] == 5


@pytest.mark.parametrize(
    ("good", "bad", "stops"), [(98, 2, True), (99, 1, False), (50, 9, False), (198, 2, False)]
)
def test_the_limit_is_judged_after_enough_requests(good, bad, stops):
    ledger = Ledger(0.01)
    if stops:
        with pytest.raises(TooManySkipped, match=f"{bad} of {good + bad} requests could not"):
            ledger.train(good, (BAD,) * bad, 0, 0)
    else:
        ledger.train(good, (BAD,) * bad, 0, 0)


def test_the_extremes_allow_none_and_any():
    with pytest.raises(TooManySkipped, match="corrupt 1"):
        Ledger(0.0).train(1, (BAD,), 0, 0)
    Ledger(0.0).train(1, (), 0, 0)
    Ledger(1.0).train(0, (BAD,) * 500, 0, 0)
    for wrong in (-0.1, 1.1):
        with pytest.raises(UserError, match="max_skip_fraction"):
            Ledger(wrong)


def test_the_error_names_reasons_and_the_file_in_one_line(tmp_path):
    ledger = Ledger(0.5)
    ledger.open(tmp_path)
    with pytest.raises(TooManySkipped) as caught:
        ledger.train(1, (BAD, SHORT), 0, 0)
    text = str(caught.value)
    assert "\n" not in text
    assert "corrupt 1, too_short 1" in text
    assert str(tmp_path / "skipped.jsonl") in text


def test_refused_files_are_listed_once_and_count_nothing(tmp_path):
    for _ in range(2):
        ledger = Ledger(0.0)
        ledger.open(tmp_path)
        ledger.refused((BAD, SHORT))
        assert ledger.requested == 0
    assert [line["path"] for line in lines(tmp_path)] == ["a.mp4", "b.mp4"]
    other = Ledger()
    other.open(tmp_path, rank=1)
    other.refused((Skip("c.mp4", "empty", ""),))
    assert len(lines(tmp_path)) == 2


def test_a_torn_last_line_does_not_stop_the_next_run(tmp_path):
    (tmp_path / "skipped.jsonl").write_text('{"stage": "index", "path": "a.mp4", "rea')
    ledger = Ledger()
    ledger.open(tmp_path)
    ledger.refused((BAD,))
    last = (tmp_path / "skipped.jsonl").read_text().splitlines()[-1]
    assert json.loads(last)["path"] == "a.mp4"


def test_names_of_any_kind_are_kept(tmp_path):
    name = "naïve\n\udcff☃.mp4"
    ledger = Ledger(1.0)
    ledger.open(tmp_path)
    ledger.train(0, (Skip(name, "corrupt", ""),), 0, 0)
    assert lines(tmp_path)[0]["path"] == name


def test_state_leaves_out_a_batch_that_did_not_get_through():
    ledger = Ledger(1.0)
    ledger.train(4, (BAD,), 0, 0)
    ledger.train(4, (SHORT,), 0, 1)
    through, broken = Ledger(1.0), Ledger(1.0)
    through.load_state_dict(ledger.state_dict(processed=2))
    broken.load_state_dict(ledger.state_dict(processed=1))
    assert (through.requested, broken.requested) == (10, 5)
    assert broken.skipped == {"corrupt": 1}
    assert json.loads(json.dumps(ledger.state_dict())) == ledger.state_dict()

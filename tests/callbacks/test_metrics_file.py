import csv

import pytest
import torch

from poodle_lightning.callbacks.metrics_file import MetricsFile


def read(folder):
    with (folder / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_rows_of_a_step_are_joined_and_new_columns_fit_in(tmp_path):
    log = MetricsFile(tmp_path)
    log.log_metrics({"train/loss": torch.tensor(0.5), "epoch": 0}, step=0)
    log.log_metrics({"train/loss": 0.25}, step=1)
    log.log_metrics({"train/loss": 0.125}, step=2)
    log.log_metrics({"health/std": 1.0}, step=2)
    log.log_metrics({"health/std": 2.0}, step=2)
    log.log_metrics({"train/loss": 0.0625}, step=3)
    found = read(tmp_path)
    assert [row["step"] for row in found] == ["0", "1", "2", "3"]
    assert [row["train/loss"] for row in found] == ["0.5", "0.25", "0.125", "0.0625"]
    assert [row["health/std"] for row in found] == ["", "", "2", ""]
    assert [row["epoch"] for row in found] == ["0", "", "", ""]


def test_every_row_is_on_disk_at_once_and_another_start_goes_on(tmp_path):
    first = MetricsFile(tmp_path)
    for step in range(5):
        first.log_metrics({"a": step * 10}, step=step)
        assert len(read(tmp_path)) == step + 1
    second = MetricsFile(tmp_path)
    second.resume_at(3)
    second.log_metrics({"a": 7, "b": 1}, step=3)
    assert [(row["step"], row["a"], row["b"]) for row in read(tmp_path)] == [
        ("0", "0", ""), ("1", "10", ""), ("2", "20", ""), ("3", "7", "1"),
    ]  # fmt: skip


def test_a_half_written_last_row_is_left_out(tmp_path):
    (tmp_path / "metrics.csv").write_text("step,a\n0,1\n1,2\n,")
    log = MetricsFile(tmp_path)
    log.log_metrics({"a": 3}, step=2)
    assert [row["a"] for row in read(tmp_path)] == ["1", "2", "3"]


@pytest.mark.parametrize("value", [1e-12, 123456.789, 3, -0.1])
def test_numbers_keep_their_precision(tmp_path, value):
    MetricsFile(tmp_path).log_metrics({"a": value}, step=0)
    assert float(read(tmp_path)[0]["a"]) == pytest.approx(value, rel=1e-7)


def test_a_file_removed_during_the_run_begins_anew(tmp_path):
    log = MetricsFile(tmp_path)
    log.log_metrics({"a": 1}, step=0)
    (tmp_path / "metrics.csv").unlink()
    log.log_metrics({"a": 2}, step=1)
    assert [row["a"] for row in read(tmp_path)] == ["2"]

import logging
import os
import time
from pathlib import Path

import lightning as L
import pytest
import torch
from tiny_models import make_clip
from torch.utils._python_dispatch import _get_current_dispatch_mode

from poodle_lightning.callbacks.metrics_file import MetricsFile
from poodle_lightning.callbacks.throughput import Throughput, _resident_peak, _unit_of, clips_in
from poodle_lightning.data.actions import ActionBatch
from poodle_lightning.data.depth import DepthBatch


class Slow(torch.utils.data.Dataset):
    """Takes its time; so does the model."""

    def __len__(self):
        return 6

    def __getitem__(self, index):
        time.sleep(0.03)
        return torch.ones(4)


class Model(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = torch.nn.Linear(4, 1)

    def training_step(self, batch, batch_idx):
        time.sleep(0.03)
        return self.net(batch).mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.fixture
def trained(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr("poodle_lightning.callbacks.throughput._peak", lambda device, precision: 1e6)
    throughput = Throughput(print_every=0.0)
    trainer = L.Trainer(
        default_root_dir=tmp_path, accelerator="cpu", max_epochs=2, log_every_n_steps=3,
        logger=MetricsFile(tmp_path), enable_progress_bar=False, enable_checkpointing=False,
        callbacks=[throughput], enable_model_summary=False,
    )  # fmt: skip
    with caplog.at_level(logging.INFO, logger="poodle_lightning"):
        trainer.fit(Model(), torch.utils.data.DataLoader(Slow(), batch_size=2))
    return throughput, tmp_path, caplog


def test_rate_and_wait_are_those_of_the_clock(trained):
    _, folder, _ = trained
    lines = (folder / "metrics.csv").read_text().splitlines()
    columns = lines[0].split(",")
    rows = [dict(zip(columns, line.split(","), strict=True)) for line in lines[1:]]
    assert [row["step"] for row in rows] == ["2", "5"]
    # two items of 30 ms each and a step of 30 ms: two thirds waiting, 2 clips per 90 ms at best
    for row in rows:
        assert 0.4 < float(row["perf/data_wait"]) < 0.85
        assert 4.0 < float(row["perf/pairs_per_s"]) <= 2 / 0.09 * 1.01


def test_arithmetic_is_that_of_the_network(trained):
    """Four weights, a clip: 4 multiply-adds forward, 4 for the weights' gradient, none for the images'."""
    throughput, _, _ = trained
    flops = throughput.latest["perf/tflops"] * 1e12
    assert flops == pytest.approx(2 * (4 + 4) * throughput.latest["perf/pairs_per_s"])
    assert throughput.latest["perf/mfu"] == pytest.approx(flops / 1e6)


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="Linux tells the present size")
def test_memory_is_that_of_the_process(trained):
    throughput, _, _ = trained
    before = _resident_peak()
    assert 0.05 < throughput.latest["perf/host_gb"] <= before / 2**30
    now = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    _ = torch.ones((before - now) // 4 + 2**25)  # 128 MiB above the highest so far
    assert before + 2**26 < _resident_peak() < before + 2**29


def test_a_step_that_fails_leaves_no_count_running(tmp_path):
    class Broken(Model):
        def training_step(self, batch, batch_idx):
            raise RuntimeError("broken")

    trainer = L.Trainer(
        default_root_dir=tmp_path, accelerator="cpu", max_epochs=1, logger=False, enable_checkpointing=False,
        callbacks=[Throughput()], enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    with pytest.raises(RuntimeError, match="broken"):
        trainer.fit(Broken(), torch.utils.data.DataLoader(Slow(), batch_size=2))
    assert _get_current_dispatch_mode() is None


def test_a_line_says_what_is_left(trained):
    throughput, _, caplog = trained
    said = [record.getMessage() for record in caplog.get_records("setup")]
    assert any("step 3/6" in line and "pairs/s" in line for line in said)
    assert throughput.latest["eta_s"] == 0.0
    assert set(throughput.words()) == {"loss", "pairs/s", "data wait", "MFU", "GiB", "ETA"}


class OfClips(Model):
    def training_step(self, batch, batch_idx):
        return self.net(batch.frames[:, 0, 0, 0, :4].float()).mean()


@pytest.mark.parametrize(("frames", "unit"), [(2, "pairs"), (3, "clips")])
def test_clips_of_other_than_two_frames_are_no_pairs(tmp_path, frames, unit):
    throughput = Throughput()
    trainer = L.Trainer(
        default_root_dir=tmp_path, accelerator="cpu", max_epochs=1, logger=False, enable_checkpointing=False,
        callbacks=[throughput], enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(OfClips(), torch.utils.data.DataLoader([make_clip(frames=frames)] * 2, batch_size=None))
    assert f"{unit}/s" in throughput.words()
    assert "perf/pairs_per_s" in throughput.latest  # under one name in all runs


def test_what_is_counted_is_called_by_its_name():
    images, index = torch.zeros(2, 3, 4, 4, dtype=torch.uint8), torch.arange(2)
    depth = DepthBatch(images, torch.ones(2, 4, 4), index, ("a", "b"))
    whole = torch.ones(2, dtype=torch.bool)
    actions = ActionBatch(images[:, None, None], index, whole, 0, index, ("a", "b"))
    assert (_unit_of(depth), clips_in(depth)) == ("images", 2)
    assert (_unit_of(actions), clips_in(actions)) == ("clips", 2)
    assert _unit_of(torch.zeros(2)) == "pairs"


def test_clips_are_counted_in_any_batch():
    assert clips_in(make_clip(batch=3)) == 3
    assert clips_in([torch.ones(5, 2), torch.ones(7)]) == 5
    assert clips_in({"a": torch.ones(4)}) == 4

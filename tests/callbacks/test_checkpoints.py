import os
import signal
import time
from datetime import timedelta

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from poodle_lightning.callbacks.checkpoints import (
    AtomicCheckpointIO,
    TimedCheckpoint,
    damage_of,
    read_checkpoint,
    write_atomically,
)
from poodle_lightning.types import UserError


def content(value=0.0):
    return {"state_dict": {"weight": torch.full((64, 64), value)}, "epoch": 1}


def test_what_is_written_is_read_back(tmp_path):
    AtomicCheckpointIO().save_checkpoint(content(2.0), tmp_path / "new/a.ckpt")
    read = AtomicCheckpointIO().load_checkpoint(tmp_path / "new/a.ckpt")
    assert torch.equal(read["state_dict"]["weight"], torch.full((64, 64), 2.0))
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["a.ckpt"]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), RuntimeError("file write failed")])
def test_a_write_that_fails_is_said_and_leaves_the_old_file(tmp_path, error):
    path = tmp_path / "a.ckpt"
    path.write_bytes(b"old")

    def write(part):
        part.write_bytes(b"half")
        raise error

    with pytest.raises(UserError, match=r"a\.ckpt"):
        write_atomically(path, write)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_that_cannot_be_made_is_an_error_not_a_silence(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        AtomicCheckpointIO().save_checkpoint(content(), tmp_path / "file/a.ckpt")


@pytest.mark.parametrize(
    ("break_it", "said"),
    [
        (lambda data: b"", "empty"),
        (lambda data: data[: len(data) // 2], "truncated"),
        (lambda data: b"hello" * 100, "truncated, or not a checkpoint"),
        (lambda data: data.replace(b"\x00\x00\x00@", b"\x00\x00\x01@", 1), "checksum"),
    ],
)
def test_damage_is_seen(tmp_path, break_it, said):
    path = tmp_path / "a.ckpt"
    torch.save(content(2.0), path)  # 2.0 is 00 00 00 40 in memory
    assert damage_of(path) is None
    path.write_bytes(break_it(path.read_bytes()))
    assert said in damage_of(path)
    with pytest.raises(UserError, match=said):
        read_checkpoint(path)


def test_a_file_that_is_no_checkpoint_is_refused(tmp_path):
    torch.save({"weights": torch.ones(2)}, tmp_path / "a.ckpt")
    with pytest.raises(UserError, match="no state_dict"):
        read_checkpoint(tmp_path / "a.ckpt")
    with pytest.raises(UserError, match="no such checkpoint"):
        read_checkpoint(tmp_path / "b.ckpt")


def test_weights_alone_come_back_from_spawned_processes(tmp_path):
    """``strategy=ddp_spawn`` hands them over in such a file."""
    files, weights = AtomicCheckpointIO(), {"layer.weight": torch.arange(3.0)}
    files.save_checkpoint(dict(weights), tmp_path / ".temp.ckpt")
    assert torch.equal(files.load_checkpoint(tmp_path / ".temp.ckpt")["layer.weight"], torch.arange(3.0))


def test_a_process_killed_at_any_moment_leaves_a_whole_file(tmp_path):
    path = tmp_path / "a.ckpt"
    seen = set()
    for attempt in range(12):
        child = os.fork()
        if child == 0:  # pragma: no cover
            value = 0
            while True:
                AtomicCheckpointIO().save_checkpoint(content(float(value)), path)
                value += 1
        deadline = time.monotonic() + 20
        while not path.is_file() and time.monotonic() < deadline:
            time.sleep(0.002)
        time.sleep(0.005 + 0.0037 * attempt)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        weight = read_checkpoint(path)["state_dict"]["weight"]
        assert torch.equal(weight, torch.full_like(weight, float(weight[0, 0])))
        seen.add(float(weight[0, 0]))
    assert len(seen) > 1


def test_a_timed_checkpoint_asks_the_other_devices_at_every_20th_step_only(tmp_path):
    class Line(L.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = torch.nn.Linear(1, 1)

        def training_step(self, batch, batch_idx):
            return self.net(batch).mean()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    timed = TimedCheckpoint(tmp_path, filename="recent", train_time_interval=timedelta(0))
    assert timed.state_key == ModelCheckpoint(tmp_path, train_time_interval=timedelta(0)).state_key
    trainer = L.Trainer(
        default_root_dir=tmp_path, accelerator="cpu", max_steps=45, logger=False, callbacks=[timed],
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    asked, saved = [], []
    broadcast, save = trainer.strategy.broadcast, trainer.save_checkpoint
    trainer.strategy.broadcast = lambda x, *a: (asked.append(trainer.global_step), broadcast(x, *a))[1]
    trainer.save_checkpoint = lambda *a, **k: (saved.append(trainer.global_step), save(*a, **k))[1]
    trainer.fit(Line(), torch.utils.data.DataLoader(torch.ones(45, 1)))
    assert {20, 40} <= set(saved) <= {20, 40, 45}
    assert not {step for step in asked if step % 20} - {45}

import logging
import os
import time
from pathlib import Path

import pytest
import torch

from poodle_lightning import runs
from poodle_lightning.types import UserError


def save(path, age=0.0):
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"state_dict": {"a": torch.ones(3)}}, path)
    when = time.time() - age
    os.utime(path, (when, when))
    return path


def test_two_runs_in_one_second_get_two_folders(tmp_path):
    first = runs.new_folder(tmp_path)
    first.mkdir(parents=True)
    second = runs.new_folder(tmp_path)
    second.mkdir()
    assert first != second
    assert runs.folders(tmp_path) == sorted([first, second])


def test_processes_of_one_run_share_its_time(tmp_path, monkeypatch):
    monkeypatch.delenv(runs.TIME_VARIABLE, raising=False)
    folder = tmp_path / "2020-01-02_03-04-05"
    with runs.shared_time(folder):
        assert runs.new_folder(tmp_path / "other") == tmp_path / "other/2020-01-02_03-04-05"
    assert runs.TIME_VARIABLE not in os.environ
    monkeypatch.setenv(runs.TIME_VARIABLE, "soon")
    with pytest.raises(UserError, match="soon"):
        runs.new_folder(tmp_path)


def test_last_is_the_newest_run_that_has_a_checkpoint(tmp_path):
    old = save(tmp_path / "name/2020-01-01_00-00-00/checkpoints/last.ckpt")
    new = save(tmp_path / "name/2020-01-02_00-00-00/checkpoints/last.ckpt", age=1000)
    (tmp_path / "name/2020-01-03_00-00-00").mkdir()  # killed before its first checkpoint
    (tmp_path / "name/notes").mkdir()
    assert runs.plan(tmp_path, "name", "fit", "last") == runs.Run(new.parent.parent, new, fresh=False)
    assert runs.plan(tmp_path, "name", "validate", "last").folder == new.parent.parent / "validate"
    explicit = runs.plan(tmp_path, "name", "fit", str(old))
    assert explicit.checkpoint == old
    assert explicit.fresh
    assert explicit.folder.parent == tmp_path / "name"


def test_the_newest_whole_checkpoint_counts(tmp_path, caplog):
    folder = tmp_path / "checkpoints"
    old = save(folder / "epoch=0000.ckpt", age=300)
    new = save(folder / "epoch=0001.ckpt", age=200)
    save(folder / "nonfinite.ckpt", age=10)
    (folder / "last.ckpt").symlink_to("epoch=0001.ckpt")
    (folder / "gone.ckpt").symlink_to("no_such_file")
    assert runs.newest_checkpoint(tmp_path) == new
    new.write_bytes(new.read_bytes()[:-50])
    os.utime(new)
    with caplog.at_level(logging.WARNING):
        assert runs.newest_checkpoint(tmp_path) == old
    assert "epoch=0001.ckpt" in caplog.text
    old.write_bytes(b"")
    with pytest.raises(UserError, match="none of its 2 checkpoints"):
        runs.newest_checkpoint(tmp_path)


def test_a_folder_stands_for_its_newest_checkpoint(tmp_path):
    path = save(tmp_path / "run/checkpoints/last.ckpt")
    assert runs.explicit(str(tmp_path / "run")) == path
    assert runs.explicit(str(path)) == path
    for missing in (tmp_path, tmp_path / "no.ckpt"):
        with pytest.raises(UserError, match=r"no .*checkpoint"):
            runs.explicit(str(missing))


def test_what_a_killed_process_left_is_cleared(tmp_path):
    part = tmp_path / "checkpoints/.last.ckpt.123.part"
    kept = save(tmp_path / "checkpoints/last.ckpt")
    part.write_bytes(b"half")
    runs.clear_parts(tmp_path)
    assert not part.exists()
    assert kept.exists()


def test_messages_go_to_the_log_and_an_empty_run_leaves_nothing(tmp_path):
    for name, stays in (("begun", True), ("failed", False)):
        folder = Path(tmp_path / name)
        folder.mkdir()
        with runs.logged(folder):
            logging.getLogger("poodle_lightning.any").warning("a message")
            if stays:
                (folder / "env.json").write_text("{}")
                assert "a message" in (folder / "train.log").read_text()
        assert folder.is_dir() == stays

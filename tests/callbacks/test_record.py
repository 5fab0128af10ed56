import json
import subprocess

import lightning as L
import torch

from poodle_lightning.callbacks.record import Record, git_state, versions


def fit(folder, record):
    class Model(L.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = torch.nn.Linear(4, 1)

        def training_step(self, batch, batch_idx):
            return self.net(batch).mean()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    trainer = L.Trainer(
        default_root_dir=folder, accelerator="cpu", max_epochs=1, logger=False, enable_progress_bar=False,
        enable_checkpointing=False, enable_model_summary=False, callbacks=[record], accumulate_grad_batches=2,
    )  # fmt: skip
    trainer.fit(Model(), torch.utils.data.DataLoader(torch.ones(12, 4), batch_size=3))
    return json.loads((folder / "env.json").read_text())


def test_the_record_says_what_ran(tmp_path):
    found = fit(tmp_path, Record(["poodle-lightning", "fit", "--name", "two words"], "a: 1\n", None))
    assert found["command"] == "poodle-lightning fit --name 'two words'"
    assert (
        found["config_sha256"] == "37b128c59f1f5097f73f82691cb519f1f568667faab5ced1b4ab979d36837eae"
    )  # of sha256sum
    assert found["data"] == {"batches_per_epoch": 4, "clips": 12, "global_batch": 6}
    assert found["end_step"] == 2
    assert found["devices"] == 1
    assert found["versions"]["torch"] == versions()["torch"]


def test_a_later_start_keeps_the_earlier_ones(tmp_path):
    fit(tmp_path, Record(["first"]))
    fit(tmp_path, Record(["second"]))
    found = fit(tmp_path, Record(["third"], resumed_from="a.ckpt"))
    assert [start["command"] for start in found["earlier"]] == ["first", "second"]
    assert found["resumed_from"] == "a.ckpt"


def test_the_state_of_a_repository(tmp_path):
    assert git_state(tmp_path) is None
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run([*git, "init", "-q"], cwd=tmp_path, check=True)
    (tmp_path / "file").write_text("1")
    subprocess.run([*git, "add", "file"], cwd=tmp_path, check=True)
    subprocess.run([*git, "commit", "-qm", "one"], cwd=tmp_path, check=True)
    head = (tmp_path / ".git/refs/heads").iterdir().__next__().read_text().strip()
    assert git_state(tmp_path) == {"commit": head, "dirty": False}
    (tmp_path / "file").write_text("2")
    assert git_state(tmp_path) == {"commit": head, "dirty": True}

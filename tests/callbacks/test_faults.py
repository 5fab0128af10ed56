import lightning as L
import pytest
import torch
from tiny_models import make_clip

from poodle_lightning.callbacks.faults import Faults, NonFiniteLoss, Stopped, load_replay, save_replay
from poodle_lightning.types import UserError


def test_a_clip_survives_its_replay_file(tmp_path):
    clip = make_clip(batch=3, seed=4)
    save_replay(tmp_path / "replay.pt", clip, step=7)
    raw = torch.load(tmp_path / "replay.pt", weights_only=True)
    assert raw["step"] == 7
    again, facts = load_replay(tmp_path / "replay.pt")
    assert facts["step"] == 7
    for name in ("frames", "times", "index", "key", "flow"):
        assert torch.equal(getattr(clip, name), getattr(again, name))
    assert torch.equal(clip.window.matrix, again.window.matrix)
    assert again.size == clip.size


def test_a_file_that_is_no_replay_is_said(tmp_path):
    torch.save({"a": 1}, tmp_path / "no.pt")
    with pytest.raises(UserError, match=r"no\.pt"):
        load_replay(tmp_path / "no.pt")


class Spoiling(L.LightningModule):
    """Has a running mean that its forward pass spoils together with the loss."""

    def __init__(self):
        super().__init__()
        self.net = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.BatchNorm1d(4))

    def training_step(self, batch, batch_idx):
        x = batch * float("nan") if self.global_step == 2 else batch
        return self.net(x).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(folder, model, **kwargs):
    trainer = L.Trainer(
        default_root_dir=folder, accelerator="cpu", max_steps=5, logger=False, enable_progress_bar=False,
        enable_checkpointing=False, enable_model_summary=False, callbacks=[Faults()], **kwargs,
    )  # fmt: skip
    loader = torch.utils.data.DataLoader(torch.randn(40, 4), batch_size=8)
    trainer.fit(model, loader)


def test_a_state_that_is_spoilt_is_not_left_to_be_resumed(tmp_path):
    model = Spoiling()
    with pytest.raises(NonFiniteLoss, match="step 2"):
        fit(tmp_path, model)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["nonfinite.ckpt"]
    assert all(bool(weight.isfinite().all()) for weight in model.parameters())


def test_accumulated_batches_are_each_looked_at(tmp_path):
    class Late(Spoiling):
        def training_step(self, batch, batch_idx):
            loss = self.net(batch).square().mean()
            return loss * float("inf") if batch_idx == 1 else loss

    with pytest.raises(NonFiniteLoss, match="step 0"):
        fit(tmp_path, Late(), accumulate_grad_batches=4)


def test_a_signal_twice_stops_at_once():
    import signal

    faults = Faults()
    faults._on_signal(signal.SIGTERM, None)
    with pytest.raises(Stopped) as caught:
        faults._on_signal(signal.SIGTERM, None)
    assert caught.value.code == 128 + signal.SIGTERM

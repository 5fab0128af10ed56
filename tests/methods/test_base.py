"""The base's five duties, on a tiny FlowE-free method so that nothing else can go wrong."""

import lightning as L
import pytest
import torch
from tiny_models import make_clip, tiny_encoder, tiny_recipe
from torch.utils.data import DataLoader

from poodle_lightning.augment.geometric import ResizedCrop
from poodle_lightning.methods.base import Method
from poodle_lightning.methods.byol import BYOL
from poodle_lightning.nn.optim import Recipe
from poodle_lightning.types import UserError


class Clips(torch.utils.data.Dataset):
    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int):
        return make_clip(batch=2, seed=index)


def tiny(**recipe) -> BYOL:
    torch.manual_seed(0)
    return BYOL(tiny_encoder(), hidden=16, out=8, crop=ResizedCrop((32, 32)), recipe=tiny_recipe(**recipe))


def fit(method: Method, steps: int, path, **kwargs) -> L.Trainer:
    trainer = L.Trainer(
        accelerator="cpu", max_steps=steps, logger=False, enable_progress_bar=False, default_root_dir=path,
        enable_model_summary=False, enable_checkpointing=False, **kwargs,
    )  # fmt: skip
    trainer.fit(method, DataLoader(Clips(12), batch_size=None))
    return trainer


class Watcher(L.Callback):
    """Keeps online and target parameters around every optimiser step, and the rates used."""

    def __init__(self) -> None:
        self.before, self.rates, self.moves = [], [], []

    def on_before_optimizer_step(self, trainer, module, optimizer):
        self.before.append([p.clone() for p in module.target.parameters()])
        self.rates.append(optimizer.param_groups[0]["lr"])

    def on_train_batch_end(self, trainer, module, *_):
        if len(self.before) > len(self.moves):
            target = [p.clone() for p in module.target.parameters()]
            online = [p.clone() for p in module.online.parameters()]
            self.moves.append((target, online))


def test_target_moves_only_by_the_ema_once_per_optimiser_step(tmp_path):
    watcher = Watcher()
    method = tiny(ema_start=0.9, horizon_steps=10)
    fit(method, 3, tmp_path, accumulate_grad_batches=2, callbacks=[watcher])
    assert len(watcher.moves) == 3
    for step, (before, (target, online)) in enumerate(zip(watcher.before, watcher.moves, strict=True)):
        momentum = 1 - (1 - 0.9) * (torch.cos(torch.tensor(torch.pi * step / 10)).item() + 1) / 2
        for b, t, o in zip(before, target, online, strict=True):
            expected = momentum * b.double() + (1 - momentum) * o.double()
            assert torch.allclose(t.double(), expected, atol=1e-6)


def test_learning_rate_is_the_schedules_at_every_step(tmp_path):
    watcher = Watcher()
    method = tiny(lr=1.0, warmup_steps=2, horizon_steps=6)
    fit(method, 5, tmp_path, callbacks=[watcher])
    cosine = lambda s: 0.5 * (1 + torch.cos(torch.tensor(torch.pi * (s - 2) / 4)).item())  # noqa: E731
    expected = [0.0, 0.5, cosine(2), cosine(3), cosine(4)]
    assert watcher.rates == pytest.approx(expected, abs=1e-6)


def test_epochs_become_steps_once_and_stay_so_in_the_checkpoint(tmp_path):
    method = tiny(warmup_steps=None, horizon_steps=None, warmup_epochs=1.0, horizon_epochs=5.0)
    trainer = fit(method, 2, tmp_path)
    assert (method.schedule.warmup, method.schedule.horizon) == (12, 60)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    other = tiny(warmup_steps=None, horizon_steps=None, warmup_epochs=1.0, horizon_epochs=50.0)
    other.on_load_checkpoint(torch.load(tmp_path / "a.ckpt", weights_only=True))
    assert other.schedule == method.schedule
    with pytest.warns(UserWarning, match="going on along the checkpoint's"):
        fit(other, 1, tmp_path)
    assert other.schedule.horizon == 60


def test_checkpoint_is_plain_and_gives_the_method_back(tmp_path):
    method = tiny(lr=0.01)
    trainer = fit(method, 1, tmp_path)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    for loader in (BYOL, Method):
        again = loader.load_from_checkpoint(tmp_path / "a.ckpt")
        assert type(again) is BYOL
        assert again.recipe == method.recipe
        for (name, one), (_, other) in zip(
            method.state_dict().items(), again.state_dict().items(), strict=True
        ):
            assert torch.equal(one, other), name


def test_wrong_checkpoints_are_named(tmp_path):
    with pytest.raises(UserError, match=r"none\.ckpt is not a file"):
        BYOL.load_from_checkpoint(tmp_path / "none.ckpt")
    torch.save({"state_dict": {}}, tmp_path / "foreign.ckpt")
    with pytest.raises(UserError, match="not a poodle-lightning checkpoint"):
        BYOL.load_from_checkpoint(tmp_path / "foreign.ckpt")


def test_terms_are_logged_under_the_papers_names(tmp_path):
    method = tiny()
    trainer = fit(method, 1, tmp_path)
    assert {"train/loss", "train/loss_pooled"} <= set(trainer.callback_metrics)


def test_global_batch_counts_devices_and_accumulation(tmp_path):
    method = tiny()
    trainer = fit(method, 1, tmp_path, accumulate_grad_batches=3)
    assert method.global_batch == Recipe().reference_batch * trainer.world_size * 3


def test_a_method_without_losses_says_so():
    with pytest.raises(UserError, match=r"no losses\(\)"):
        Method().losses(make_clip())


def test_accumulation_equals_one_big_batch(tmp_path):
    """BatchNorm frozen, no term across samples: two half batches step like one whole batch."""
    results = []
    for accumulate in (1, 2):
        method = tiny(lr=0.1)
        method.recipe = Recipe(optimizer="sgd", lr=0.1, sgd_momentum=0.0, warmup_steps=0, horizon_steps=10)
        method.train = lambda mode=True, m=method: torch.nn.Module.train(m, False)
        method.eval()  # BatchNorm frozen, and stays so
        data = [make_clip(batch=4, seed=5)]
        if accumulate == 2:
            data = [data[0][:2], data[0][2:]]
        trainer = L.Trainer(
            accelerator="cpu",
            max_steps=1,
            accumulate_grad_batches=accumulate,
            logger=False,
            enable_progress_bar=False,
            enable_checkpointing=False,
            enable_model_summary=False,
            default_root_dir=tmp_path,
        )
        trainer.fit(method, DataLoader(data, batch_size=None))
        results.append([p.detach().clone() for p in method.online.parameters()])
    assert max((a - b).abs().max() for a, b in zip(*results, strict=True)) < 1e-6


def test_a_reloaded_method_has_the_flow_net_it_was_trained_with(tmp_path):
    """The flow net is outside the state dict: they come from where they came from, or are asked for."""
    from torchvision.models.optical_flow import raft_small

    from poodle_lightning.flow.raft import RAFT
    from poodle_lightning.methods.flowe import FlowE

    torch.save(raft_small().state_dict(), tmp_path / "raft.pth")
    flow = RAFT(size="small", weights=str(tmp_path / "raft.pth"), iterations=1)
    method = FlowE(tiny_encoder(), flow, hidden=16, out=8, recipe=tiny_recipe())
    trainer = L.Trainer(accelerator="cpu", logger=False, barebones=True)
    trainer.strategy.connect(method)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    again = FlowE.load_from_checkpoint(tmp_path / "a.ckpt")
    for one, other in zip(flow.net.module.parameters(), again.flow.net.module.parameters(), strict=True):
        assert torch.equal(one, other)
    (tmp_path / "raft.pth").unlink()
    with pytest.raises(UserError, match=r"raft\.pth"):
        FlowE.load_from_checkpoint(tmp_path / "a.ckpt")

"""The base's duties, on a tiny FlowE-free method so that nothing else can go wrong."""

import math
import warnings

import lightning as L
import pytest
import torch
from tiny_models import make_clip, tiny_encoder, tiny_recipe
from torch.utils.data import DataLoader

from poodle_lightning import from_pretrained
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


def test_weight_decay_grows_at_every_step(tmp_path):
    used = []

    class Used(L.Callback):
        def on_before_optimizer_step(self, trainer, module, optimizer):
            used.append([group["weight_decay"] for group in optimizer.param_groups])

    fit(tiny(weight_decay=0.04, weight_decay_end=0.4, horizon_steps=6), 4, tmp_path, callbacks=[Used()])
    expected = [0.4 + 0.5 * (0.04 - 0.4) * (1 + math.cos(math.pi * step / 6)) for step in range(4)]
    assert [decayed for decayed, _ in used] == pytest.approx(expected)
    assert [exempt for _, exempt in used] == [0.0] * 4


def test_gradients_are_clipped_one_by_one_and_once_per_step(tmp_path):
    """With plain SGD at rate 1 no parameter moves further than the limit; together they do."""
    method = tiny(optimizer="sgd", lr=1.0, weight_decay=0.0, sgd_momentum=0.0, clip_each=1e-3)
    before = [parameter.detach().clone() for parameter in method.online.parameters()]
    fit(method, 1, tmp_path, accumulate_grad_batches=2)
    moved = [(a - b).detach().norm() for a, b in zip(method.online.parameters(), before, strict=True)]
    assert float(max(moved)) == pytest.approx(1e-3, rel=1e-3)
    assert torch.stack(moved).norm() > 2e-3


class Counting(BYOL):
    """Notes at what step, and with the target how far from the online network, its hook is called."""

    def after_step(self) -> None:
        gap = sum(
            float((a - b).detach().norm())
            for a, b in zip(self.online.parameters(), self.target.parameters(), strict=True)
        )
        self.__dict__.setdefault("calls", []).append((self.global_step, gap))


def test_a_method_hears_of_every_step_once_and_after_the_target_has_moved(tmp_path):
    torch.manual_seed(0)
    method = Counting(
        tiny_encoder(),
        hidden=16,
        out=8,
        crop=ResizedCrop((32, 32)),
        recipe=tiny_recipe(ema_start=0.0, ema_end=0.0),
    )  # with a momentum of 0 the target is where the online network is
    fit(method, 3, tmp_path, accumulate_grad_batches=2)
    assert method.calls == [(0, 0.0), (1, 0.0), (2, 0.0)]


class Teacher(BYOL):
    """Exports its target."""

    def exported(self):
        return self.target.module, "target.module."


def test_a_checkpoint_gives_the_encoder_that_the_method_exports(tmp_path):
    torch.manual_seed(0)
    method = Teacher(tiny_encoder(), hidden=16, out=8, crop=ResizedCrop((32, 32)), recipe=tiny_recipe(lr=0.1))
    fit(method, 2, tmp_path).save_checkpoint(tmp_path / "a.ckpt")
    assert method.backbone() is method.target.module.encoder
    found = from_pretrained(tmp_path / "a.ckpt").state_dict()
    for name, value in method.target.module.encoder.state_dict().items():
        assert torch.equal(found[name], value), name
    assert not torch.equal(found["conv1.weight"], method.online.encoder.conv1.weight)


def test_a_run_of_an_older_version_goes_on(tmp_path):
    """Its schedule lacks two numbers, and its optimiser's groups do not say whether they decay."""
    fit(tiny(), 2, tmp_path).save_checkpoint(tmp_path / "a.ckpt")
    content = torch.load(tmp_path / "a.ckpt", weights_only=True)
    for name in ("warmup_closed", "weight_decay"):
        del content["poodle_lightning"]["schedule"][name]
    for name in ("warmup_closed", "weight_decay_end", "clip_each"):
        del content["poodle_lightning"]["method"]["init_args"]["recipe"]["init_args"][name]
    for group in content["optimizer_states"][0]["param_groups"]:
        del group["decays"]
    torch.save(content, tmp_path / "old.ckpt")
    assert BYOL.load_from_checkpoint(tmp_path / "old.ckpt").recipe == tiny().recipe
    ends = []
    for name in ("a.ckpt", "old.ckpt"):
        method = tiny()
        trainer = L.Trainer(accelerator="cpu", max_steps=4, barebones=True, default_root_dir=tmp_path)
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message="going on along")
            trainer.fit(method, DataLoader(Clips(12), batch_size=None), ckpt_path=tmp_path / name)
        ends.append(method.state_dict())
    assert all(torch.equal(value, ends[1][name]) for name, value in ends[0].items())


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

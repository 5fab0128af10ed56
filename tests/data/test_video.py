"""The data module under Lightning: order, resume, workers, devices, held-out data, skips, settings."""

from __future__ import annotations

import json
import warnings

import lightning as L
import numpy as np
import pytest
import torch
from films import FPS
from lightning.pytorch.callbacks import ModelCheckpoint
from PIL import Image

from poodle_lightning.data.encode import write_video
from poodle_lightning.data.footage import footage_of
from poodle_lightning.data.skips import TooManySkipped
from poodle_lightning.data.sources import FolderSource
from poodle_lightning.data.tracked import TrackedFrames
from poodle_lightning.data.video import VideoDataModule
from poodle_lightning.flow.dis import DIS
from poodle_lightning.methods.trace import Trace
from poodle_lightning.types import UserError

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*(num_workers|many workers|Checkpoint directory|GPU|logger).*"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Seven videos of 12 images each, noise of their own; names sort naturally only."""
    root = tmp_path_factory.mktemp("frames")
    rng = np.random.default_rng(0)
    for video in range(7):
        (root / f"video{video}").mkdir()
        for number in range(12):
            pixels = rng.integers(0, 256, (24, 40, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / f"video{video}" / f"{number}.png")
    return root


def module(folder, **changes):
    settings = {
        "source": "frames",
        "root": str(folder),
        "rate": 10.0,
        "size": (8, 16),
        "gap": (0.2, 0.4),
        "area": (0.3, 0.8),
        "batch_size": 2,
        "num_workers": 0,
        "val_fraction": 0.0,
        "repeats": 2,
        "seed": 3,
    }
    return VideoDataModule(**(settings | changes))


class Recorder(L.LightningModule):
    """Writes down every batch that reaches a step."""

    def __init__(self, fail_at=None):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.fail_at, self.seen, self.validated = fail_at, [], []

    def training_step(self, clip, batch_idx):
        if self.fail_at == self.global_step:
            raise RuntimeError("power cut")
        self.seen.append((self.current_epoch, batch_idx, *digest(clip)))
        return self.weight * 0.0 + (self.weight - 1) ** 2

    def validation_step(self, clip, batch_idx):
        self.validated.append(digest(clip))

    def configure_optimizers(self):
        # a schedule needs the length of an epoch: the loader is asked for before the counters are restored
        self.trainer.fit_loop.setup_data()
        return torch.optim.SGD(self.parameters(), lr=0.1)


def digest(clip):
    return (
        clip.index.tolist(),
        clip.key.tolist(),
        clip.times.tolist(),
        clip.frames.flatten()
        .double()
        .dot(torch.arange(clip.frames.numel(), dtype=torch.float64).cos())
        .item(),
        clip.window.matrix.flatten().tolist(),
    )


def trainer(tmp_path, epochs=3, callbacks=(), **changes):
    settings = {
        "max_epochs": epochs,
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
        "default_root_dir": tmp_path,
        "callbacks": list(callbacks),
        "enable_checkpointing": bool(callbacks),
    }
    return L.Trainer(**(settings | changes))


def epochs_by_hand(folder, epochs=3, **changes):
    """All batches without a trainer: the order as the settings define it."""
    data = module(folder, **changes)
    data.setup("fit")
    loader = data.train_dataloader()
    seen = []
    for epoch in range(epochs):
        loader.sampler.set_epoch(epoch)
        seen += [(epoch, number, *digest(clip)) for number, clip in enumerate(loader)]
    return seen


@pytest.mark.parametrize("workers", [1, 2])
def test_batches_do_not_depend_on_the_number_of_workers(folder, workers):
    assert epochs_by_hand(folder, num_workers=workers) == epochs_by_hand(folder, num_workers=0)


def test_a_run_sees_the_order_of_the_settings(folder, tmp_path):
    model = Recorder()
    trainer(tmp_path).fit(model, datamodule=module(folder))
    assert model.seen == epochs_by_hand(folder)
    assert len(model.seen) == 3 * 7  # 7 videos twice, two per batch


def test_epochs_are_permutations_that_differ(folder):
    seen = epochs_by_hand(folder, epochs=4)
    orders = [[i for e, _, index, *_ in seen if e == epoch for i in index] for epoch in range(4)]
    assert all(sorted(order) == list(range(14)) for order in orders)
    assert len({tuple(order) for order in orders}) == 4
    keys = [k for _, _, _, key, *_ in seen for k in key]
    assert len(set(keys)) == len(keys)


@pytest.mark.parametrize(("workers", "steps"), [(0, range(1, 21)), (1, (3, 7, 12)), (2, (5, 14))])
def test_resume_at_a_step_continues_exactly(folder, tmp_path, workers, steps):
    save = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    whole = Recorder()
    trainer(tmp_path, callbacks=[save]).fit(whole, datamodule=module(folder))
    for step in steps:
        rest = Recorder()
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=".*not resumable.*")
            trainer(tmp_path).fit(
                rest, datamodule=module(folder, num_workers=workers), ckpt_path=tmp_path / f"step={step}.ckpt"
            )
        assert rest.seen == whole.seen[step:], step


@pytest.mark.parametrize("when", ["on_train_epoch_end", "on_validation_end"])
def test_resume_from_checkpoints_of_other_moments(folder, tmp_path, when):
    changes = {"val_fraction": 0.2, "repeats": 3}
    save = ModelCheckpoint(
        tmp_path, filename="{step}", save_top_k=-1, save_on_train_epoch_end=when == "on_train_epoch_end"
    )
    often = {"val_check_interval": 0.5} if when == "on_validation_end" else {}
    whole = Recorder()
    trainer(tmp_path, callbacks=[save], **often).fit(whole, datamodule=module(folder, **changes))
    saved = sorted(int(path.stem.removeprefix("step=")) for path in tmp_path.glob("*.ckpt"))
    assert len(saved) >= 3
    for step in saved:
        rest = Recorder()
        trainer(tmp_path, **often).fit(
            rest, datamodule=module(folder, **changes), ckpt_path=tmp_path / f"step={step}.ckpt"
        )
        assert rest.seen == whole.seen[step:], step


def test_resume_after_an_exception_takes_the_batch_again_and_counts_it_once(folder, tmp_path):
    whole = Recorder()
    trainer(tmp_path / "whole").fit(whole, datamodule=module(folder))
    broken, data = Recorder(fail_at=10), module(folder)
    run = trainer(tmp_path)
    with pytest.raises(RuntimeError, match="power cut"):
        run.fit(broken, datamodule=data)
    # saved as a callback would on the way out: the batch was counted, its step did not happen
    torch.save(run._checkpoint_connector.dump_checkpoint(), tmp_path / "cut.ckpt")
    assert torch.load(tmp_path / "cut.ckpt", weights_only=True)["global_step"] == 10
    rest = Recorder()
    trainer(tmp_path).fit(rest, datamodule=module(folder), ckpt_path=tmp_path / "cut.ckpt")
    assert broken.seen + rest.seen == whole.seen
    lines = [json.loads(line) for line in (tmp_path / "skipped.jsonl").read_text().splitlines()]
    last = {line["epoch"]: line for line in lines if line["stage"] == "epoch"}
    assert [last[epoch]["requested"] for epoch in range(3)] == [14, 14, 14]


def test_a_limit_on_batches_still_gives_every_epoch_its_own_beginning(folder, tmp_path):
    save = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    limited = Recorder()
    trainer(tmp_path, callbacks=[save], limit_train_batches=3).fit(limited, datamodule=module(folder))
    assert limited.seen == [batch for batch in epochs_by_hand(folder) if batch[1] < 3]
    rest = Recorder()
    run = trainer(tmp_path, limit_train_batches=3)
    run.fit(rest, datamodule=module(folder), ckpt_path=tmp_path / "step=4.ckpt")
    assert rest.seen == limited.seen[4:]


def test_overfitting_takes_the_same_batch_again(folder, tmp_path):
    model = Recorder()
    trainer(tmp_path, overfit_batches=1).fit(model, datamodule=module(folder))
    assert len({json.dumps(batch[2:]) for batch in model.seen}) == 1


def test_two_devices_share_what_one_device_sees(folder, tmp_path):
    class Saved(Recorder):
        def on_train_end(self):
            (tmp_path / f"rank{self.global_rank}.json").write_text(json.dumps(self.seen))

    run = trainer(tmp_path, epochs=2, devices=2, strategy="ddp_fork")
    run.fit(Saved(), datamodule=module(folder))
    first, second = (json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(2))
    one = epochs_by_hand(folder, epochs=2, batch_size=4)
    assert len(first) == len(second) == len(one) == 6
    for a, b, both in zip(first, second, one, strict=True):
        for column in (2, 3, 4):  # index, key, times
            assert [x for pair in zip(a[column], b[column], strict=True) for x in pair] == both[column]


def test_a_data_set_smaller_than_a_batch_is_gone_through_several_times(folder):
    seen = epochs_by_hand(folder, epochs=2, batch_size=16, repeats=1)
    assert len(seen) == 2
    for _, _, index, key, *_ in seen:
        assert len(set(key)) == 16  # no clip twice
        counts = np.bincount(np.array(index) % 7, minlength=7)
        assert counts.min() == 2  # every video twice before any comes a third time
        assert counts.max() == 3


def test_held_out_clips_never_change_and_share_no_video(folder):
    data = module(folder, val_fraction=0.3)
    data.setup("fit")
    assert {e.path for e in data.train_entries}.isdisjoint(e.path for e in data.val_entries)
    assert len(data.val_entries) == 2
    loader = data.val_dataloader()
    first = [digest(clip) for clip in loader]
    loader.sampler.set_epoch(5)
    assert [digest(clip) for clip in loader] == first
    again = module(folder, val_fraction=0.3, num_workers=1)
    again.setup("validate")
    assert [digest(clip) for clip in again.val_dataloader()] == first
    chosen = []
    for seed in range(10):
        other = module(folder, val_fraction=0.3, seed=seed)
        other.setup("fit")
        chosen.append(tuple(e.path for e in other.val_entries))
    assert len(set(chosen)) > 3


def test_a_single_video_is_held_out_in_time(folder):
    data = module(folder / "video3", val_fraction=0.1, gap=(0.2, 0.3))
    data.setup("fit")
    (train,), (val,) = data.train_entries, data.val_entries
    assert train.stop == val.start == pytest.approx(1.1 - 0.3)
    assert max(clip.times.max() for clip in data.train_dataloader()) <= val.start + 0.1
    assert min(clip.times.min() for clip in data.val_dataloader()) >= val.start
    with pytest.raises(UserError, match="too short to hold out"):
        module(folder / "video3", val_fraction=0.1, gap=(0.6, 0.6)).setup("fit")


def test_long_videos_count_as_many(folder):
    data = module(folder, clip_seconds=0.4)
    data.setup("fit")
    assert len(data.train_entries) == 7 * 3
    assert all(entry.duration >= 0.3 for entry in data.train_entries)


@pytest.fixture
def damaged(folder, tmp_path):
    """Four sound videos, one broken behind its first image, one that is refused, one too short."""
    root = tmp_path / "damaged"
    for number in range(4):
        (root / f"sound{number}").mkdir(parents=True)
        for path in (folder / f"video{number}").iterdir():
            (root / f"sound{number}" / path.name).symlink_to(path)
    for name, broken in (("late", range(1, 12)), ("refused", range(12)), ("short", ())):
        (root / name).mkdir()
        for number in range(2 if name == "short" else 12):
            data = (folder / "video6" / f"{number}.png").read_bytes()
            (root / name / f"{number}.png").write_bytes(data[:200] if number in broken else data)
    # a header alone is not enough to be refused: the first image of "refused" has none
    (root / "refused" / "0.png").write_bytes(b"not an image")
    return root


def ledger_lines(folder):
    return [json.loads(line) for line in (folder / "skipped.jsonl").read_text().splitlines()]


def test_skips_are_counted_replaced_and_listed(damaged, tmp_path):
    model, run_folder = Recorder(), tmp_path / "run"
    data = module(damaged, max_skip_fraction=1.0, repeats=1, batch_size=2)
    trainer(run_folder, epochs=4).fit(model, datamodule=data)
    lines = ledger_lines(run_folder)
    refused = {(line["path"].split("/")[-2], line["reason"]) for line in lines if line["stage"] == "index"}
    assert ("refused", "corrupt") in refused
    assert any(line["stage"] == "index" and line["reason"] == "too_short" for line in lines)
    failed = [line for line in lines if line["stage"] == "train"]
    assert {line["path"] for line in failed} == {str(damaged / "late")}
    assert {line["reason"] for line in failed} == {"corrupt"}
    sums = [line for line in lines if line["stage"] == "epoch"]
    assert [line["epoch"] for line in sums] == [0, 1, 2, 3]
    for line in sums:
        assert line["used"] == 4  # two full batches of two: never smaller
        assert line["requested"] == line["used"] + sum(line["skipped"].values())
    assert sum(line["skipped"].get("corrupt", 0) for line in sums) == len(failed) > 0
    assert all(len(batch[2]) == 2 for batch in model.seen)


def test_a_second_run_in_the_folder_does_not_list_the_refused_again(damaged, tmp_path):
    for _ in range(2):
        trainer(tmp_path / "run", epochs=1).fit(Recorder(), datamodule=module(damaged, max_skip_fraction=1.0))
    listed = [line for line in ledger_lines(tmp_path / "run") if line["stage"] == "index"]
    assert len(listed) == 2


def test_too_many_skips_stop_the_run_but_not_before_a_fraction_can_be_told(damaged, tmp_path):
    model = Recorder()
    with pytest.raises(TooManySkipped, match=r"of \d+ requests could not be used \(corrupt \d+\)"):
        trainer(tmp_path / "run", epochs=50).fit(model, datamodule=module(damaged, max_skip_fraction=0.05))
    requested = 2 * len(model.seen)
    assert 15 <= requested <= 30  # 1 / 0.05 requests, of which a few failed


def test_skips_among_held_out_clips_do_not_count(damaged, tmp_path):
    for seed in range(20):  # until the damaged video is among those held out
        data = module(damaged, val_fraction=0.2, seed=seed, max_skip_fraction=0.0)
        data.setup("fit")
        if data.val_entries[0].path == str(damaged / "late"):
            break
    # the only held-out video cannot be read at most moments: there is nothing to replace it by
    with pytest.raises(TooManySkipped, match="in a row could not be used"):
        trainer(tmp_path / "run", epochs=2).fit(Recorder(), datamodule=data)
    stages = {line["stage"] for line in ledger_lines(tmp_path / "run")}
    assert "epoch" in stages
    assert "index" in stages


@pytest.mark.parametrize("workers", [0, 1])
def test_when_all_videos_fail_the_run_stops_with_one_line(folder, tmp_path, workers):
    root = tmp_path / "gone"
    for number in range(3):
        (root / f"v{number}").mkdir(parents=True)
        for image in range(12):
            (root / f"v{number}" / f"{image}.png").write_bytes(
                (folder / "video0" / f"{image}.png").read_bytes()
            )
    data = module(root, num_workers=workers)
    data.setup("fit")
    for path in root.rglob("*.png"):
        path.unlink()
    with pytest.raises(TooManySkipped) as caught:
        trainer(tmp_path / "run").fit(Recorder(), datamodule=data)
    assert "\n" not in str(caught.value)
    assert "12 videos in a row could not be used (missing 12;" in str(caught.value)


def test_tracks_of_a_folder_of_films_are_found_by_training(tmp_path, monkeypatch):
    """Traced as ``trace --root`` does; a texture moves 2 px a frame to the left, and so do its points."""
    monkeypatch.setenv("POODLE_CACHE", str(tmp_path / "index"))
    wide = np.kron(np.random.default_rng(0).integers(0, 256, (6, 24, 3)), np.ones((8, 8, 1))).astype(np.uint8)
    films = tmp_path / "films"
    for name in ("a", "b", "c"):
        (films / name).mkdir(parents=True)
        frames = (wide[:, 2 * k : 2 * k + 96] for k in range(20))
        write_video(films / name / "film.mp4", frames, FPS, preset="ultrafast")
    source = FolderSource(films)
    trace = Trace(DIS(), str(tmp_path / "tracks"), points=200)
    for footage in footage_of(source, source.entries, str(films)):
        trace.video(footage)
    tracks = TrackedFrames(str(tmp_path / "tracks"), points=30)
    found = {}
    for pixels in ("rgb", "yuv"):
        settings = {"source": "folder", "root": str(films), "area": None, "whole": True, "pixels": pixels}
        data = module(films, size=(48, 96), sampler=tracks, val_fraction=0.3, repeats=1, **settings)
        data.setup("fit")
        (clip,) = data.train_dataloader()
        (held,) = data.val_dataloader()
        assert not (*clip.skipped, *held.skipped)
        assert (clip.yuv is not None) == (pixels == "yuv")
        apart = (clip.times[:, 1] - clip.times[:, 0]) * FPS
        moved = (clip.points[:, :, 1] - clip.points[:, :, 0]) * torch.tensor([48.0, 24.0])
        middle = moved.nanmedian(dim=1).values
        torch.testing.assert_close(middle[:, 0], -2 * apart.float(), atol=0.5, rtol=0)
        assert middle[:, 1].abs().max() < 0.5
        found[pixels] = clip.points
    torch.testing.assert_close(found["rgb"], found["yuv"], equal_nan=True, rtol=0, atol=0)

"""The labelled data module: order, resume, workers, devices, subset, samples, refusals."""

from __future__ import annotations

from types import SimpleNamespace

import label_trees
import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data.distributed import DistributedSampler

from poodle_lightning.cli import _line, build
from poodle_lightning.data.label_streets import StreetLabels
from poodle_lightning.data.label_views import TestView, TrainView
from poodle_lightning.data.labelled import LabelledDataModule
from poodle_lightning.data.synthetic import labelled_frames
from poodle_lightning.types import UserError

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*(num_workers|many workers|Checkpoint directory|GPU|logger).*"
)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Seven training and five held-out images with four classes."""
    root = tmp_path_factory.mktemp("labelled")
    for split, count in (("train", 7), ("val", 5)):
        label_trees.folder(root, count, splits=(split,))
    return root


def module(root, **changes):
    settings = {"train": TrainView(crop=(8, 8)), "batch_size": 2, "num_workers": 0, "seed": 3}
    return LabelledDataModule("folder", str(root), **(settings | changes))


def refused(act, *parts):
    with pytest.raises(UserError) as caught:
        act()
    line = _line(caught.value)  # as the command line says it, also from a worker
    assert "\n" not in line
    for part in parts:
        assert part in line, line


def same(a, b):
    return all(
        torch.equal(getattr(a, name), getattr(b, name)) for name in ("images", "labels", "index", "key")
    )


# ---- training
def test_batches_of_random_views(root):
    data = module(root)
    batches = list(data.train_dataloader())
    assert len(batches) == len(data.train_dataloader()) == 3  # the seventh image is left out
    assert batches[0].images.shape == (2, 3, 8, 8)
    assert batches[0].labels.shape == (2, 8, 8)
    seen = [number for batch in batches for number in batch.index.tolist()]
    assert len(set(seen)) == 6
    assert batches[0].names[0].endswith(f"{batches[0].index[0]}.png")


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_change_nothing(root, workers):
    for a, b in zip(
        module(root).train_dataloader(), module(root, num_workers=workers).train_dataloader(), strict=True
    ):
        assert same(a, b)
        assert a.names == b.names


def test_seed_and_epoch_decide_the_order_and_the_views(root):
    def epoch(number, **changes):
        loader = module(root, **changes).train_dataloader()
        loader.sampler.set_epoch(number)
        return list(loader)

    first, again, later, other = epoch(0), epoch(0), epoch(1), epoch(0, seed=4)
    assert all(same(a, b) for a, b in zip(first, again, strict=True))
    assert not all(same(a, b) for a, b in zip(first, later, strict=True))
    assert not all(same(a, b) for a, b in zip(first, other, strict=True))


def test_few_images_make_several_passes_with_other_views(root):
    data = module(root, batch_size=16)
    (batch,) = data.train_dataloader()
    counts = np.bincount(batch.index.numpy(), minlength=7)
    assert counts.sum() == 16
    assert counts.min() >= 2  # 21 places, 16 taken: no image more than once before all had a turn
    assert len(set(batch.key.tolist())) == 16


@pytest.mark.parametrize("world", [2, 3])
def test_devices_together_see_the_batch_of_one(root, world):
    def on(rank, size, batch_size):
        data = module(root, batch_size=batch_size)
        data.trainer = SimpleNamespace(world_size=size, global_rank=rank, training=False)
        return list(data.train_dataloader())

    alone = on(0, 1, 6)[0]
    parts = [on(rank, world, 6 // world)[0] for rank in range(world)]
    together = torch.stack([part.key for part in parts], dim=1).flatten()
    assert torch.equal(together, alone.key)


class Recorder(L.LightningModule):
    """Writes down every key that reaches a step."""

    def __init__(self, fail_at=None):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.fail_at, self.seen, self.validated = fail_at, [], []

    def training_step(self, batch, number):
        if self.global_step == self.fail_at:
            raise RuntimeError("stop")
        self.seen.append(batch.key.tolist())
        return self.weight * batch.unit().mean()

    def validation_step(self, batch, number):
        self.validated += batch.index.tolist()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def trainer(folder, steps, callbacks=()):
    return L.Trainer(
        accelerator="cpu", devices=1, max_steps=steps, default_root_dir=folder, logger=False,
        callbacks=list(callbacks), enable_progress_bar=False, enable_model_summary=False,
        num_sanity_val_steps=0, check_val_every_n_epoch=1,
    )  # fmt: skip


@pytest.mark.parametrize("stop", [2, 3, 4])
def test_a_stopped_run_goes_on_at_the_same_batch(root, tmp_path, stop):
    whole = Recorder()
    trainer(tmp_path / "a", 7).fit(whole, datamodule=module(root, num_workers=1))
    assert len(whole.seen) == 7
    assert sorted(whole.validated[:5]) == [0, 1, 2, 3, 4]
    first = Recorder()
    saver = ModelCheckpoint(tmp_path / "b", every_n_train_steps=1, save_top_k=-1, filename="{step}")
    trainer(tmp_path / "b", stop, [saver]).fit(first, datamodule=module(root))
    second = Recorder()
    trainer(tmp_path / "c", 7).fit(
        second, datamodule=module(root), ckpt_path=tmp_path / "b" / f"step={stop}.ckpt", weights_only=True
    )
    assert first.seen + second.seen == whole.seen


def test_another_order_on_resuming_is_said(root, tmp_path):
    saver = ModelCheckpoint(tmp_path, every_n_train_steps=1, save_top_k=-1, filename="{step}")
    trainer(tmp_path, 2, [saver]).fit(Recorder(), datamodule=module(root))
    with pytest.warns(UserWarning, match="seed 3 → 4"):
        trainer(tmp_path, 3).fit(
            Recorder(),
            datamodule=module(root, seed=4),
            ckpt_path=tmp_path / "step=2.ckpt",
            weights_only=True,
        )


# ---- held-out images
@pytest.mark.parametrize("world", [1, 2, 3, 4])
@pytest.mark.parametrize("batch", [1, 2])
def test_every_image_is_measured_once_over_all_devices(root, world, batch):
    for name, total in (("val_dataloader", 5), ("memory_dataloader", 7)):
        shares = []
        for rank in range(world):
            data = module(root, val_batch_size=batch)
            data.trainer = SimpleNamespace(world_size=world, global_rank=rank, training=False)
            loader = getattr(data, name)()
            assert isinstance(
                loader.sampler, DistributedSampler
            )  # or Lightning would put its own, which pads
            batches = list(loader)
            assert len(batches) == len(loader)
            shares += [number for b in batches for number in b.index.tolist()]
        assert sorted(shares) == list(range(total))


def test_more_devices_than_images(root):
    data = module(root)
    data.trainer = SimpleNamespace(world_size=6, global_rank=0, training=False)
    refused(data.val_dataloader, "5 images of the split val for 6 devices")


def test_labels_keep_the_size_of_their_file(root):
    data = module(root, test=TestView(short_side=6))
    batch = next(iter(data.val_dataloader()))
    assert batch.images.shape == (1, 3, 6, 10)
    assert torch.equal(batch.labels[0], torch.from_numpy(label_trees.mask(0, 4).copy()))
    assert same(batch, data.item("val", 0))
    assert data.item("train", 4).names[0].endswith("images/train/4.png")
    assert np.array_equal(module(root).item("val", 2).images[0].permute(1, 2, 0), label_trees.noise(2))


def test_test_batches_of_several_sizes(root, tmp_path):
    label_trees.folder(tmp_path, 3, splits=("train", "val"))
    label_trees.save(tmp_path / "images/val/1.png", label_trees.noise(0, (14, 20)))
    label_trees.save(tmp_path / "masks/val/1.png", label_trees.mask(0, 4, (14, 20)))
    assert len(list(module(tmp_path).val_dataloader())) == 3
    data = module(tmp_path, val_batch_size=2)
    refused(
        lambda: list(data.val_dataloader()),
        "1.png: image of 20×14 px beside 20×12 px of",
        "val_batch_size",
    )


# ---- subset, samples, groups
def test_a_subset_is_drawn_by_the_seed_and_nested(root):
    half, less = module(root, subset=0.6).numbers("train"), module(root, subset=0.3).numbers("train")
    assert (len(half), len(less)) == (4, 2)
    assert set(less) < set(half)
    assert module(root, subset=0.6).numbers("train") == half
    assert any(module(root, subset=0.6, seed=seed).numbers("train") != half for seed in range(4, 9))
    data = module(root, subset=0.3)
    assert data.count("train") == 2
    assert data.count("val") == 5
    assert sorted(i for b in data.memory_dataloader() for i in b.index.tolist()) == less
    assert {i for b in data.train_dataloader() for i in b.index.tolist()} == set(less)


def test_samples(root):
    data = module(root)
    images, labels = data.sample("val", 4, (6, 10), seed=1)
    assert images.shape == (4, 3, 6, 10)
    assert labels.shape == (4, 6, 10)
    assert images.dtype == labels.dtype == torch.uint8
    again = module(root, seed=9).sample("val", 4, (6, 10), seed=1)  # its own seed alone decides
    assert torch.equal(images, again[0])
    assert torch.equal(labels, again[1])
    whole, masks = data.sample("train", 7, label_trees.SIZE)
    found = sorted(int((whole[i].flatten() * 1.0).sum()) for i in range(7))
    wanted = sorted(int(label_trees.noise(i).astype(np.int64).sum()) for i in range(7))
    assert found == wanted  # every image once, its pixels untouched
    assert masks.max() == 3
    refused(lambda: data.sample("val", 6, (6, 10)), "6 images of the split val are wanted, it has 5")


def test_groups_of_a_file_replace_those_of_the_set(tmp_path):
    (tmp_path / "groups.yaml").write_text("flat: [road, sidewalk]\n")
    data = LabelledDataModule("synthetic", groups=str(tmp_path / "groups.yaml"))
    assert data.classes.numbered() == {"flat": [0, 1]}
    assert len(data.classes) == 19
    assert "small" in LabelledDataModule("synthetic").classes.groups


# ---- generated streets
def test_streets_are_those_of_labelled_frames_and_disjoint():
    streets = StreetLabels(train=3, val=2, size=(24, 48), seed=5_000_000)
    data = LabelledDataModule("synthetic", synthetic=streets, batch_size=3, num_workers=0)
    images, labels = labelled_frames(2, (24, 48), seed=6_000_000)
    for number, batch in enumerate(data.val_dataloader()):
        assert torch.equal(batch.images[0], images[number])
        assert torch.equal(batch.labels[0], labels[number])
    train = labelled_frames(3, (24, 48), seed=5_000_000)[0]
    assert torch.equal(data.item("train", 2).images[0], train[2])
    assert not set(data.source.names("train")) & set(data.source.names("val"))
    (batch,) = data.train_dataloader()
    assert batch.images.shape == (3, 3, 24, 48)  # whole images, mirrored or not
    for image, number in zip(batch.images, batch.index.tolist(), strict=True):
        assert torch.equal(image, train[number]) or torch.equal(image, train[number].flip(-1))
    refused(lambda: LabelledDataModule("synthetic", synthetic=StreetLabels(val=0)), "val 0 must be from 1")
    refused(lambda: LabelledDataModule("synthetic", synthetic=StreetLabels(size=(4, 4))), "size (4, 4)")


def test_from_a_configuration(tmp_path):
    path = tmp_path / "streets.yaml"
    path.write_text(
        "model: {class_path: lightning.pytorch.demos.boring_classes.BoringModel}\n"
        "data:\n"
        "  class_path: poodle_lightning.data.labelled.LabelledDataModule\n"
        "  init_args:\n"
        "    source: synthetic\n"
        "    train: {crop: [32, 64], short_side: [64, 128], cat_max_ratio: 0.75}\n"
        "    test: {short_side: 24}\n"
        "    synthetic: {train: 2, val: 1, size: [48, 96]}\n"
    )
    data = build([path], ["--data.train.flip=0.25", "--data.num_workers=0"])[1]
    assert data.train_view == TrainView((32, 64), short_side=(64, 128), cat_max_ratio=0.75, flip=0.25)
    assert next(iter(data.val_dataloader())).images.shape == (1, 3, 24, 48)


# ---- bad data
@pytest.mark.parametrize(
    ("workers", "loader"), [(0, "train_dataloader"), (0, "val_dataloader"), (1, "val_dataloader")]
)
def test_a_bad_mask_stops_the_run_in_one_line(tmp_path, workers, loader):
    label_trees.folder(tmp_path, 2, splits=("train", "val"))
    for split in ("train", "val"):
        label_trees.save(tmp_path / "masks" / split / "1.png", np.full(label_trees.SIZE, 77))
    data = module(tmp_path, num_workers=workers)
    refused(
        lambda: list(getattr(data, loader)()),
        "1.png: id 77 in 240 pixels is no label; expected labels 0 to 3",
    )


def test_an_all_ignored_image_cannot_be_measured_on(tmp_path):
    label_trees.folder(tmp_path, 2, splits=("train", "val"))
    for split in ("train", "val"):
        label_trees.save(tmp_path / "masks" / split / "0.png", np.full(label_trees.SIZE, 255))
    data = module(tmp_path)
    refused(lambda: list(data.val_dataloader()), "val/0.png: every pixel is ignored")
    assert len(list(data.train_dataloader())) == 1


def test_files_that_do_not_match_stop_before_the_first_step(tmp_path):
    label_trees.folder(tmp_path, 3, splits=("train", "val"))
    (tmp_path / "masks/val/1.png").unlink()
    data = module(tmp_path)
    refused(lambda: data.setup("fit"), "val/1.png: no mask for this image")
    refused(lambda: data.setup("validate"), "val/1.png: no mask for this image")
    refused(lambda: module(tmp_path / "no").setup(), "no: no such folder")


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"source": "bdd100k"}, "source bdd100k needs a folder: give --data.root"),
        ({"source": "synthetic", "batch_size": 0}, "batch_size 0"),
        ({"source": "synthetic", "val_batch_size": 0}, "val_batch_size 0"),
        ({"source": "synthetic", "subset": 0.0}, "subset 0.0"),
        ({"source": "synthetic", "num_workers": -1}, "num_workers -1"),
    ],
)
def test_settings_that_make_no_sense(settings, said):
    refused(lambda: LabelledDataModule(**settings), said)

"""Vitals against NumPy; planted collapses raise the alarm, healthy features do not; nothing is changed."""

import math
import warnings

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from tiny_models import make_clip, tiny_crops, tiny_head, tiny_recipe, tiny_vit
from torch.utils.data import DataLoader

from poodle_lightning import MAE, DoRA, cli
from poodle_lightning.augment.geometric import ResizedCrop
from poodle_lightning.callbacks.health import Health, evenly, vitals
from poodle_lightning.methods.base import Method
from poodle_lightning.methods.mae import DecoderSizes
from poodle_lightning.nn.ema import EMA
from poodle_lightning.nn.online import Online
from poodle_lightning.nn.optim import Recipe
from poodle_lightning.nn.resnet import ResNet
from poodle_lightning.nn.vit import ViT
from poodle_lightning.ops.geometry import Affine
from poodle_lightning.types import Clip, UserError

SIZE = (16, 32)


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", [(200, 32), (24, 64)])
def test_vitals_equal_numpy_in_float64(shape):
    rows = randn(*shape) @ torch.diag(torch.linspace(0.01, 2, shape[1])) + 0.3
    unit = rows.double().numpy()
    unit = unit / np.linalg.norm(unit, axis=1, keepdims=True)
    singular = np.linalg.svd(unit, compute_uv=False)
    share = singular / singular.sum()
    cosines = unit @ unit.T
    found = vitals(rows)
    assert found.rankme == pytest.approx(np.exp(-(share * np.log(share)).sum()), rel=1e-9)
    assert found.std == pytest.approx(unit.std(axis=0, ddof=1).mean() * math.sqrt(shape[1]), rel=1e-12)
    assert found.cosine == pytest.approx(cosines[~np.eye(shape[0], dtype=bool)].mean(), rel=1e-9)
    assert found.full_rank == min(shape)


def test_known_spectra():
    assert vitals(torch.eye(8)).rankme == pytest.approx(8.0)
    assert vitals(torch.ones(20, 8)).rankme == pytest.approx(1.0, abs=1e-6)
    assert vitals(torch.ones(20, 8)).cosine == pytest.approx(1.0)
    assert vitals(randn(4000, 64)).std == pytest.approx(1.0, abs=0.01)


PLANTED = {
    "constant": torch.ones(256, 128),
    "constant and noise": torch.ones(256, 128) + 1e-3 * randn(256, 128),
    "one line": randn(256, 1) @ randn(1, 128, seed=1),
    "two points": torch.where(randn(256, 1) > 0, 1.0, -1.0) * randn(1, 128, seed=1),
    "four directions": randn(256, 4) @ randn(4, 128, seed=1),
    "zero": torch.zeros(256, 128),
    "not finite": torch.full((256, 128), math.nan),
}


class Told(Method):
    """Embeds what it is told."""

    def __init__(self, rows):
        super().__init__()
        self.online = Online(ResNet(depth=10, width=8))
        self.rows = rows

    def embed(self, images):
        return {"told": self.rows}


def clip(seed=0):
    frames = torch.randint(
        0, 256, (4, 2, 3, *SIZE), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8
    )
    index = torch.arange(4)
    return Clip(frames, Affine.identity(4), SIZE, torch.zeros(4, 2, dtype=torch.float64), index, index)


def looks(health, rows, steps):
    return [health.look(Told(rows), clip(), step) for step in steps]


@pytest.mark.parametrize("kind", PLANTED)
def test_planted_collapse_is_told_once_after_100_steps(kind):
    health = Health()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        numbers = looks(health, PLANTED[kind], range(25, 501, 25))
    assert [n["health/collapsed"] for n in numbers] == [0.0] * 4 + [1.0] * 16
    assert len(said) == 1
    assert "told" in str(said[0].message)
    assert "step 125" in str(said[0].message)


@pytest.mark.parametrize("rows", [randn(256, 128), randn(256, 128) + 1.0, randn(64, 512).relu()])
def test_healthy_features_raise_nothing(rows):
    health = Health()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        numbers = looks(health, rows, range(25, 501, 25))
    assert {n["health/collapsed"] for n in numbers} == {0.0}


def test_one_good_look_starts_the_count_again():
    health = Health()
    looks(health, PLANTED["constant"], range(25, 101, 25))
    looks(health, randn(256, 128), [125])
    assert looks(health, PLANTED["constant"], [150])[0]["health/collapsed"] == 0.0
    assert health.sick_since == {"told": 150}


def test_count_survives_a_restart():
    first, second = Health(), Health()
    looks(first, PLANTED["constant"], [25, 50])
    second.load_state_dict(first.state_dict())
    with pytest.warns(UserWarning, match="collapsed"):
        assert looks(second, PLANTED["constant"], [125])[0]["health/collapsed"] == 1.0


def test_rows_are_taken_evenly():
    rows = torch.arange(10)[:, None]
    assert evenly(rows, 4).flatten().tolist() == [0, 2, 5, 7]
    assert evenly(rows, 10) is rows


class Dropping(Online):
    def __init__(self):
        super().__init__(ResNet(depth=10, width=8))
        self.drop = torch.nn.Dropout(0.5)


class Tiny(Method):
    """A loss that depends on BatchNorm statistics, on dropout and on the target."""

    def __init__(self):
        super().__init__(Recipe(warmup_steps=1, horizon_steps=50))
        self.online = Dropping()
        self.target = EMA(self.online)

    def losses(self, clip):
        frames = clip.unit().flatten(0, 1)
        wanted = self.target.module.encoder(frames).vector.detach()
        return {"dense": (self.online.drop(self.online.encoder(frames).vector) - wanted).square().mean()}


def run(folder, *callbacks, accumulate=1):
    L.seed_everything(7)
    method = Tiny()
    trainer = L.Trainer(
        max_steps=6,
        accumulate_grad_batches=accumulate,
        callbacks=list(callbacks),
        logger=CSVLogger(folder, name="", version=""),
        accelerator="cpu",
        log_every_n_steps=1,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(method, DataLoader([clip(seed) for seed in range(12)], batch_size=None))
    return method, trainer


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_training_is_bit_equal_with_and_without(tmp_path):
    watched, trainer = run(tmp_path / "a", Health(every_n_steps=1, patience=2))
    alone, _ = run(tmp_path / "b")
    for name, value in watched.state_dict().items():
        assert torch.equal(value, alone.state_dict()[name]), name
    assert watched.online.encoder.training
    assert "health/encoder/rankme" in trainer.callback_metrics


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_one_row_per_look_beside_the_loss_of_that_batch(tmp_path):
    run(tmp_path, Health(every_n_steps=3), accumulate=2)
    header, *rows = [line.split(",") for line in (tmp_path / "metrics.csv").read_text().splitlines()]
    table = [dict(zip(header, row, strict=True)) for row in rows]
    assert [int(row["step"]) for row in table if row.get("health/encoder/std")] == [2, 5]
    assert {int(row["step"]) for row in table if row.get("train/loss")} >= {2, 5}


@pytest.mark.parametrize("most", [2, 5])
def test_memory_is_bounded_by_images_and_rows(most):
    class Counting(Told):
        seen = 0

        def embed(self, images):
            self.seen += len(images)
            return {"a": images.flatten(1), "one row": images[:1].flatten(1)}

    method = Counting(None)
    rows = Health(max_images=6, max_rows=most)._rows(method, clip())
    assert method.seen == 6
    assert rows["a"].shape == (most, 3 * SIZE[0] * SIZE[1])
    assert list(rows) == ["a"]


def transformer(name):
    """Crops of whole patches, cut out of clips of another size."""
    torch.manual_seed(0)
    if name == "MAE":
        encoder, crop = tiny_vit(positions="sincos"), ResizedCrop((32, 32))
        return MAE(encoder, crop, decoder=DecoderSizes(16, 1, 2), recipe=tiny_recipe())
    return DoRA(tiny_vit(), tiny_head(), tiny_crops(views=1), objects=2, recipe=tiny_recipe())


@pytest.mark.parametrize("name", ["MAE", "DoRA"])
@pytest.mark.parametrize("verb", ["fit", "validate"])
def test_clips_need_not_have_whole_patches(name, verb):
    """As DoRA's do: 300 pixels, with crops of 224 and patches of 16."""
    method, clips = transformer(name), [make_clip(size=(52, 60), seed=seed) for seed in range(2)]
    assert clips[0].unit().shape[-2:] == (52, 60)
    loader = DataLoader(clips, batch_size=None, collate_fn=lambda clip: clip)
    trainer = L.Trainer(
        max_steps=2,
        callbacks=[Health(every_n_steps=1)],
        logger=False,
        accelerator="cpu",
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    getattr(trainer, verb)(method, loader)
    assert 0 < float(trainer.callback_metrics["health/encoder/std"]) < 10


def test_the_verb_validate_takes_them_too(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data = ["--data=VideoDataModule", "--data.source=synthetic", "--data.size=[52, 52]"]
    few = ["--data.batch_size=2", "--data.num_workers=0", "--trainer.limit_val_batches=1"]
    words = ["--model=method/dora_tiny.yaml", "--trainer.accelerator=cpu", *data, *few]
    assert cli.main(["validate", *words]) == 0
    [file] = tmp_path.glob("runs/dora_tiny/*/metrics.csv")
    header, row = (line.split(",") for line in file.read_text().splitlines())
    assert float(row[header.index("health/encoder/std")]) > 0


def test_what_a_transformer_is_shown_is_the_clip_without_its_last_rows_and_columns():
    seen = []

    class Shown(Told):
        def embed(self, images):
            seen.append(images)
            return {"told": images.flatten(1)}

    method, clip = Shown(None), make_clip(size=(52, 60))
    Health().look(method, clip, 1)
    method.online = Online(tiny_vit())
    Health().look(method, clip, 1)
    assert torch.equal(seen[0], clip.unit().flatten(0, 1))
    assert torch.equal(seen[1], clip.unit().flatten(0, 1)[..., :48, :56])
    method.online = Online(ViT(patch=64, dim=24, depth=1, heads=3, image_size=(64, 64)))
    with pytest.raises(UserError, match="patches of 64x64 pixels cannot take 52x60"):
        Health().look(method, clip, 1)


def test_nonsense_is_refused():
    with pytest.raises(ValueError, match="every_n_steps"):
        Health(every_n_steps=0)

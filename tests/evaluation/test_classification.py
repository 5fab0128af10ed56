"""k-NN against a float64 loop and scikit-learn; the linear probe on classes that a line separates."""

import shutil

import lightning as L
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from sklearn.neighbors import KNeighborsClassifier
from tiny_models import tiny_encoder

from poodle_lightning import cli, save_pretrained
from poodle_lightning.data.image_classes import ImageBatch, ImageClassDataModule, ImageViews
from poodle_lightning.data.label_streets import StreetLabels
from poodle_lightning.data.labelled import LabelledDataModule
from poodle_lightning.evaluation.classification import KNN, KNNRecipe, LinearProbe, ProbeRecipe
from poodle_lightning.evaluation.clustering import Clustering
from poodle_lightning.evaluation.retrieval import DenseRetrieval
from poodle_lightning.evaluation.vectors import knn_votes, read_vectors
from poodle_lightning.nn.encoder import Encoder
from poodle_lightning.nn.vit import ViT
from poodle_lightning.ops.knn import nearest
from poodle_lightning.types import Features, UserError

COLOURS = {"ant": (200, 60, 60), "bee": (60, 200, 60), "cat": (60, 60, 200)}


class Colour(Encoder):
    """The mean colour as the vector."""

    def __init__(self):
        super().__init__({"colour": 3}, {"colour": 8}, mean=(0.4, 0.4, 0.4), std=(0.2, 0.2, 0.2))
        self.scale = torch.nn.Parameter(torch.ones(()))

    def features(self, normalised):
        cells = F.avg_pool2d(normalised, 8) * self.scale
        return Features({"colour": cells}, {"colour": 8}, cells.mean(dim=(2, 3)))


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder, draws = tmp_path_factory.mktemp("classes"), np.random.default_rng(0)
    for split, count in (("train", 8), ("val", 5)):
        for name, colour in COLOURS.items():
            (folder / split / name).mkdir(parents=True)
            for number in range(count):
                shifted = np.array(colour) + draws.normal(0, 55, 3)
                pixels = shifted + draws.normal(0, 20, (24, 28, 3))
                image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
                image.save(folder / split / name / f"{number}.png")
    return str(folder)


def data(root, **kwargs):
    return ImageClassDataModule(root, views=ImageViews(size=16, resize=16), num_workers=0, **kwargs)


def trainer(**kwargs):
    return L.Trainer(
        accelerator="cpu", devices=1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, use_distributed_sampler=False, **kwargs,
    )  # fmt: skip


def all_of(loader, encoder):
    batches = list(loader)
    with torch.no_grad():
        vectors = torch.cat([encoder(b.images.float() / 255).vector for b in batches]).double()
    return F.normalize(vectors, dim=1), torch.cat([b.labels for b in batches])


@pytest.mark.parametrize("batch", [1, 4])
def test_knn_equals_a_loop_and_scikit_learn(root, batch):
    recipe = KNNRecipe(k=(1, 5, 20), headline=5)
    module, labelled = KNN(Colour(), recipe=recipe), data(root, val_batch_size=batch)
    trainer().validate(module, datamodule=labelled, verbose=False)
    scores = module.scores()
    rows, truth = all_of(labelled.memory_dataloader(), module.encoder)
    asked, wanted = all_of(labelled.val_dataloader(), module.encoder)
    for k in recipe.k:
        right = 0
        for vector, label in zip(asked, wanted.tolist(), strict=True):
            cosines = rows @ vector
            order = cosines.argsort(descending=True)[:k]
            votes = [0.0, 0.0, 0.0]
            for place in order.tolist():
                votes[truth[place]] += float((cosines[place] / 0.07).exp())
            right += max(range(3), key=votes.__getitem__) == label
        assert scores.scores[f"top1_k{k}"] == pytest.approx(right / len(asked))
        reference = KNeighborsClassifier(
            k, metric="cosine", algorithm="brute", weights=lambda away: np.exp((1 - away) / 0.07)
        ).fit(rows.numpy(), truth.numpy())
        assert scores.scores[f"top1_k{k}"] == pytest.approx(reference.score(asked.numpy(), wanted.numpy()))
        cosines, places = nearest(asked.float(), rows.float(), k)
        votes = knn_votes(cosines, truth[places], 3)
        shares = votes.double() / votes.double().sum(dim=1, keepdim=True)
        assert np.abs(shares.numpy() - reference.predict_proba(asked.numpy())).max() < 1e-5
    assert scores.scores["top1"] == scores.scores["top1_k5"]
    assert 0.5 < scores.scores["top1"] < 1.0
    assert scores.scores["top5"] == 1.0
    assert scores.counts == {"images": 15, "training_images": 24}
    assert np.mean(list(scores.per_class["top1"].values())) == pytest.approx(scores.scores["top1"])


def test_more_neighbours_than_images_is_one_line(root):
    with pytest.raises(UserError, match="200 neighbours wanted of 24 training images"):
        trainer().validate(KNN(Colour()), datamodule=data(root), verbose=False)


@pytest.mark.parametrize("kind", [KNN, LinearProbe])
def test_a_class_without_a_held_out_image_is_one_line(root, tmp_path, kind):
    shutil.copytree(root, tmp_path / "classes")
    for path in (tmp_path / "classes" / "val" / "bee").iterdir():
        path.unlink()
    with pytest.raises(UserError, match=r"the class bee has no image in val: add some"):
        trainer().validate(kind(Colour()), datamodule=data(str(tmp_path / "classes")), verbose=False)


def test_labels_per_pixel_are_refused():
    streets = LabelledDataModule("synthetic", synthetic=StreetLabels(2, 2, (32, 64)), num_workers=0)
    module = KNN(Colour(), recipe=KNNRecipe(k=(1,), headline=1))
    with pytest.raises(UserError, match="ImageClassDataModule"):
        trainer().validate(module, datamodule=streets, verbose=False)


def test_classes_of_whole_images_are_refused_where_pixels_need_them(root):
    for module in (DenseRetrieval(Colour()), Clustering(Colour())):
        with pytest.raises(UserError, match="class per pixel"):
            trainer().validate(module, datamodule=data(root), verbose=False)


def test_vectors_that_are_not_finite_are_refused(root):
    module = KNN(Colour(), recipe=KNNRecipe(k=(1,), headline=1))
    torch.nn.init.constant_(module.encoder.scale, torch.nan)
    with pytest.raises(UserError, match="not finite"):
        trainer().validate(module, datamodule=data(root), verbose=False)


@pytest.mark.parametrize("wrong", [{"headline": 7}, {"k": (0, 20)}, {"temperature": 0.0}])
def test_recipes_out_of_range_are_refused(wrong):
    with pytest.raises(UserError, match="above 0"):
        KNNRecipe(**wrong)


def test_probe_learns_and_reports_last_and_best(root):
    module = LinearProbe(Colour(), recipe=ProbeRecipe(lr=20.0))
    before = module.encoder.scale.clone()
    fitted = trainer(max_epochs=8, limit_val_batches=0)
    labelled = data(root, batch_size=12)
    fitted.fit(module, datamodule=labelled)
    watched = dict(module.best)
    fitted.limit_val_batches = 1.0
    fitted.validate(module, datamodule=labelled, verbose=False)
    scores = module.scores()
    assert scores.scores["top1"] > 0.7
    assert scores.scores["top1_best"] >= scores.scores["top1"]
    assert scores.scores["top1_best"] == watched["top1"]
    assert scores.headline == "top1"
    assert torch.equal(module.encoder.scale, before)


def test_a_probes_checkpoint_gives_it_back(root, tmp_path):
    module = LinearProbe(tiny_encoder(), recipe=ProbeRecipe(lr=5.0))
    fitted = trainer(max_epochs=1, limit_val_batches=0)
    fitted.fit(module, datamodule=data(root, batch_size=12))
    fitted.save_checkpoint(tmp_path / "probe.ckpt")
    again = LinearProbe.load_from_checkpoint(tmp_path / "probe.ckpt").eval()
    images = torch.randint(
        0, 256, (2, 3, 32, 32), generator=torch.Generator().manual_seed(0), dtype=torch.uint8
    )
    assert torch.equal(again(images), module.eval()(images))
    assert again.the_classes().names == ("ant", "bee", "cat")
    trainer().validate(again, datamodule=data(root), ckpt_path=str(tmp_path / "probe.ckpt"), verbose=False)
    assert again.scores().scores["top1_best"] >= module.best["top1"]


def test_probe_follows_half_a_cosine_of_the_scaled_rate(root):
    module, seen = LinearProbe(Colour(), recipe=ProbeRecipe(lr=0.32)), []

    class Watch(L.Callback):
        def on_train_batch_start(self, trainer, *_):
            seen.append(trainer.optimizers[0].param_groups[0]["lr"])

    trainer(max_epochs=4, limit_val_batches=0, callbacks=[Watch()]).fit(
        module, datamodule=data(root, batch_size=8)
    )
    wanted = [0.32 * 8 / 256 * 0.5 * (1 + np.cos(np.pi * epoch / 4)) for epoch in range(4) for _ in range(3)]
    assert seen == pytest.approx(wanted)


def test_probe_steps_like_plain_sgd(root):
    """One epoch of one batch: the layer moves by minus the rate times the gradient of the cross-entropy."""
    module = LinearProbe(Colour(), recipe=ProbeRecipe(lr=1.0))
    labelled = data(root, batch_size=24)
    fitted = trainer(max_epochs=1, limit_val_batches=0)
    fitted.fit(module, datamodule=labelled)
    loader = labelled.train_dataloader()
    loader.sampler.set_epoch(0)
    batch = next(iter(loader))
    fresh = LinearProbe(Colour(), recipe=ProbeRecipe(lr=1.0), classes=3)
    rows = fresh.encoder(batch.images.float() / 255).vector.detach().double()
    shares = (rows @ fresh.head.weight.double().T).softmax(dim=1) - F.one_hot(batch.labels, 3)
    moved = fresh.head.weight.double() - 24 / 256 * shares.T @ rows / 24
    assert (module.head.weight.double() - moved).abs().max() < 1e-6
    assert (module.head.weight - fresh.head.weight).abs().max() > 1e-3


def test_probe_needs_epochs_and_a_result(root):
    module = LinearProbe(Colour(), classes=3)
    with pytest.raises(UserError, match="fit and validate it first"):
        module.scores()
    with pytest.raises(UserError, match="max_epochs"):
        trainer(max_epochs=-1, max_steps=1, limit_val_batches=0).fit(module, datamodule=data(root))


def test_probe_leaves_a_given_encoder_alone():
    encoder = Colour()
    LinearProbe(encoder, classes=3).train()
    assert encoder.scale.requires_grad
    assert encoder.training


def test_vectors_of_blocks_are_the_class_tokens_behind_the_norm():
    encoder = ViT(patch=8, dim=24, depth=3, heads=2, image_size=(16, 16)).eval()
    images = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found = read_vectors(encoder, images, 2)
        assert found.shape == (2, 48)
        assert torch.allclose(found[:, 24:], encoder(images).vector, atol=1e-6)
        # block by block, by hand
        x = encoder.patch_embed((images - encoder.mean) / encoder.std).flatten(1, 2)
        x = torch.cat([encoder.cls_token.expand(2, -1, -1), x], dim=1) + encoder.pos_embed
        x = encoder.blocks[1](encoder.blocks[0](x))
        assert torch.allclose(found[:, :24], encoder.norm(x)[:, 0], atol=1e-5)
    assert all(not block._forward_hooks for block in encoder.blocks)


@pytest.mark.parametrize("blocks", [2, 4])
def test_blocks_that_are_not_there_are_refused(blocks):
    encoder = tiny_encoder() if blocks == 2 else ViT(patch=8, dim=24, depth=3, heads=2, image_size=(16, 16))
    with pytest.raises(UserError, match="set blocks to 1"):
        read_vectors(encoder, torch.rand(1, 3, 16, 16), blocks)


def test_a_probe_that_cannot_be_read_is_refused_before_it_is_trained(root, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    vit = ViT(patch=8, dim=12, depth=2, heads=2, image_size=(16, 16))
    started = []

    class Watch(L.Callback):
        def on_fit_start(self, trainer, module):
            started.append(module)

    with pytest.raises(UserError, match="blocks 3: only a ViT"):
        trainer(max_epochs=1, callbacks=[Watch()]).fit(
            LinearProbe(vit, recipe=ProbeRecipe(blocks=3)), datamodule=data(root)
        )
    assert not started
    save_pretrained(vit, "encoder")
    words = ["evaluate", "--config", "evaluation/linear_probe_imagenet_vits.yaml", "--encoder", "encoder"]
    words += [f"--data.root={root}", "--data.num_workers=0", "--data.views={size: 16, resize: 16}"]
    words += ["--trainer.accelerator=cpu", "--trainer.devices=1", "--data.batch_size=8"]
    assert cli.main(words) == 2
    assert "error: blocks 4: only a ViT" in capsys.readouterr().err
    assert not list(tmp_path.rglob("*.ckpt"))


def test_a_batch_moves_and_keeps_its_names():
    batch = ImageBatch(
        torch.zeros(1, 3, 2, 2, dtype=torch.uint8), torch.tensor([1]), torch.tensor([0]), ("a.png",)
    )
    assert batch.to("cpu").names == ("a.png",)
    assert len(batch) == 1

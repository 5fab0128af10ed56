"""Dense nearest-neighbour segmentation against a float64 loop from the protocol, and scikit-learn."""

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from sklearn.neighbors import KNeighborsClassifier
from tiny_models import tiny_encoder

from poodle_lightning.data.label_streets import StreetLabels
from poodle_lightning.data.label_views import TestView
from poodle_lightning.data.labelled import LabelledDataModule
from poodle_lightning.evaluation.memory import Memory, patch_counts
from poodle_lightning.evaluation.retrieval import DenseRetrieval, RetrievalRecipe, dense_retrieval
from poodle_lightning.nn.encoder import Encoder
from poodle_lightning.nn.observed import observed
from poodle_lightning.nn.vit import ViT
from poodle_lightning.types import ClassSet, Features, UserError

CLASSES = ClassSet(("a", "b", "c", "d"), {"some": ("a", "d")})


class Cells(Encoder):
    """Colours of 4×4 cells: a map that a test can compute by itself."""

    def __init__(self):
        super().__init__({"cells": 3}, {"cells": 4}, mean=(0.3, 0.5, 0.4), std=(1.0, 1.0, 1.0))
        self.scale = torch.nn.Parameter(torch.ones(()))

    def features(self, normalised):
        cells = F.avg_pool2d(normalised, 4) * self.scale
        return Features({"cells": cells}, {"cells": 4}, cells.mean(dim=(2, 3)))


def data(count, seed, size=(16, 24)):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 4, (count, size[0] // 4, size[1] // 4), generator=generator)
    labels = F.interpolate(labels[:, None].float(), size=size, mode="nearest")[:, 0].to(torch.uint8)
    noise = torch.randint(0, 90, (count, 3, *size), generator=generator)
    colour = torch.tensor([[200, 20, 20], [20, 200, 20], [20, 20, 200], [150, 150, 20]])[labels.long()]
    images = (colour.permute(0, 3, 1, 2) * 0.7 + noise).clamp(0, 255).to(torch.uint8)
    mixed = torch.rand(labels.shape, generator=generator)
    labels = torch.where(mixed < 0.1, torch.randint(0, 4, labels.shape, generator=generator), labels)
    labels[mixed > 0.9] = 255
    labels[0, :4, :8] = 255  # two cells without any label
    return images, labels.to(torch.uint8)


@pytest.fixture(scope="module")
def sets():
    return data(6, 0), data(3, 1)


def naive(encoder, train, test, k, temperature):
    """Predictions of the protocol, all pairs sorted, in float64."""
    vectors, shares = [], []
    for image, labels in zip(*train, strict=True):
        cells = encoder(image[None].float() / 255).last[0].double()
        for y in range(cells.shape[1]):
            for x in range(cells.shape[2]):
                inside = [
                    v for v in labels[4 * y : 4 * y + 4, 4 * x : 4 * x + 4].flatten().tolist() if v != 255
                ]
                if inside:
                    vectors.append(cells[:, y, x] / cells[:, y, x].norm())
                    shares.append([inside.count(c) / len(inside) for c in range(4)])
    vectors, shares = torch.stack(vectors), torch.tensor(shares, dtype=torch.float64)
    guesses = []
    for image in test[0]:
        cells = encoder(image[None].float() / 255).last[0].double()
        mixed = torch.zeros(4, *cells.shape[1:], dtype=torch.float64)
        for y in range(cells.shape[1]):
            for x in range(cells.shape[2]):
                cosines = vectors @ (cells[:, y, x] / cells[:, y, x].norm())
                order = cosines.argsort(descending=True, stable=True)[:k]
                weights = (cosines[order] / temperature).exp()
                mixed[:, y, x] = (weights / weights.sum()) @ shares[order]
        up = F.interpolate(mixed[None], size=image.shape[1:], mode="bilinear", align_corners=False)
        guesses.append(up[0].argmax(dim=0))
    return torch.stack(guesses), len(vectors)


@pytest.mark.parametrize(("k", "temperature"), [(1, 0.02), (7, 0.1)])
def test_equals_a_loop_in_float64(sets, k, temperature):
    encoder = Cells().eval()
    train, test = sets
    with torch.no_grad():
        guess, vectors = naive(encoder, train, test, k, temperature)
    found = dense_retrieval(encoder, train, test, CLASSES, RetrievalRecipe(k=k, temperature=temperature))
    keep = test[1] != 255
    wanted = torch.bincount(test[1][keep].long() * 4 + guess[keep], minlength=16).reshape(4, 4)
    assert found.vectors == vectors
    # float32 may turn a pixel on which two classes are as good as equal
    assert (found.confusion.matrix - wanted).abs().sum() <= 2
    assert found.confusion.pixel_accuracy() > 0.6
    assert set(found.summary()) >= {"miou", "miou_some"}
    assert found.per_class()["a"] == pytest.approx(float(found.confusion.iou()[0]))


def test_weights_and_neighbours_are_those_of_scikit_learn(sets):
    encoder = Cells().eval()
    (images, _), (queries, _) = sets
    labels = torch.arange(6).remainder(4).reshape(6, 1, 1).expand(6, 16, 24).to(torch.uint8)
    with torch.no_grad():
        rows, asked = (
            F.normalize(encoder(part.float() / 255).last.permute(0, 2, 3, 1).reshape(-1, 3).double(), dim=1)
            for part in (images, queries)
        )
        truth = labels[:, ::4, ::4].flatten().numpy()
        reference = KNeighborsClassifier(
            9,
            metric="cosine",
            algorithm="brute",
            weights=lambda distance: torch.from_numpy(-distance / 0.1).exp().numpy(),
        ).fit(rows.numpy(), truth)
        wanted = torch.from_numpy(reference.predict_proba(asked.numpy()))
        memory = Memory(4, RetrievalRecipe(k=9, temperature=0.1), 6)
        memory.add(encoder(images.float() / 255).last, labels, torch.arange(6))
        found = memory.finish().shares(encoder(queries.float() / 255).last)
    assert (found.permute(0, 2, 3, 1).reshape(-1, 4).double() - wanted).abs().max() < 1e-5


def test_nothing_depends_on_budget_or_batches(sets):
    encoder = tiny_encoder(output_stride=8).train()
    train, test = (tuple(torch.cat([part] * 2) for part in one) for one in sets)
    big = [F.interpolate(i.float(), scale_factor=2).to(torch.uint8) for i, _ in (train, test)]
    labels = [part.repeat_interleave(2, 1).repeat_interleave(2, 2) for _, part in (train, test)]
    pairs = list(zip(big, labels, strict=True))
    results = [
        dense_retrieval(encoder, *pairs, CLASSES, RetrievalRecipe(k=5, budget=budget))
        for budget in (1 << 28, 4096)
    ]
    assert torch.equal(results[0].confusion.matrix, results[1].confusion.matrix)
    assert encoder.training


def test_a_pixel_belongs_to_the_cell_of_its_centre():
    generator = torch.Generator().manual_seed(3)
    labels = torch.randint(0, 5, (2, 7, 10), generator=generator)
    counts = patch_counts(labels, (3, 4), 4)  # 4 is no class here
    wanted = torch.zeros(2, 3, 4, 4, dtype=torch.int64)
    for b in range(2):
        for y in range(7):
            for x in range(10):
                if labels[b, y, x] < 4:
                    wanted[b, int((y + 0.5) / 7 * 3), int((x + 0.5) / 10 * 4), labels[b, y, x]] += 1
    assert torch.equal(counts, wanted)


def memory_of(recipe, labels, seed=0):
    maps = torch.arange(labels[0].numel() * len(labels), dtype=torch.float32).reshape(
        len(labels), 1, *labels.shape[1:]
    )
    maps = torch.cat([maps.cos(), maps.sin()], dim=1)
    memory = Memory(4, recipe, len(labels), seed)
    memory.add(maps, memory.taken(labels), torch.arange(len(labels)))
    return memory.finish(), maps


def test_ignored_pixels_are_left_out_or_the_first_class():
    labels = torch.full((2, 4, 4), 255)
    labels[:, :2] = 3
    memory, _ = memory_of(RetrievalRecipe(k=1), labels)
    assert len(memory.vectors) == 16
    assert torch.equal(memory.labels, F.one_hot(torch.full((16,), 3), 4).float())
    memory, _ = memory_of(RetrievalRecipe(k=1, ignored="first_class"), labels)
    assert len(memory.vectors) == 32
    assert memory.labels.sum(dim=0).tolist() == [16, 0, 0, 16]


def test_a_bounded_memory_takes_as_many_of_every_image_and_prefers_rare_classes():
    labels = torch.zeros(4, 8, 8, dtype=torch.int64)
    labels[:, 0, :4] = 2  # 4 of 64 cells
    shares = {}
    for sampling in ("rarity", "uniform"):
        taken = []
        for seed in range(10):
            memory, maps = memory_of(RetrievalRecipe(k=1, vectors=35, sampling=sampling), labels, seed)
            assert len(memory.vectors) == 32  # 8 of each of 4 images
            per_image = maps.permute(0, 2, 3, 1).reshape(4, 64, 2)
            homes = [int((per_image @ row).amax(dim=1).argmax()) for row in memory.vectors[::8]]
            assert homes == [0, 1, 2, 3]
            taken.append(float(memory.labels[:, 2].mean()))
        shares[sampling] = sum(taken) / len(taken)
    # a draw of a rare cell is below those of 60 others with probability 1 - 1/16 or more
    assert shares["rarity"] > 0.4
    assert shares["uniform"] == pytest.approx(4 / 64, abs=0.04)


def test_a_bounded_memory_is_a_function_of_the_seed():
    labels = torch.randint(0, 4, (3, 8, 8), generator=torch.Generator().manual_seed(0))
    recipe = RetrievalRecipe(k=1, vectors=12)
    one, again, other = (memory_of(recipe, labels, seed)[0].vectors for seed in (1, 1, 2))
    assert torch.equal(one, again)
    assert not torch.equal(one, other)


def test_images_that_a_vit_cannot_take_are_filled_up_and_the_filling_is_cut_off():
    encoder = ViT(patch=8, dim=24, depth=2, heads=2, image_size=(16, 16)).eval()
    images = torch.randint(
        0, 256, (4, 3, 20, 28), generator=torch.Generator().manual_seed(0), dtype=torch.uint8
    )
    labels = torch.zeros(4, 10, 14, dtype=torch.uint8)
    labels[:, :, 7:] = 1
    found = dense_retrieval(encoder, (images, labels), (images, labels), CLASSES, RetrievalRecipe(k=1))
    assert found.vectors == 4 * 3 * 4
    assert found.confusion.pixel_accuracy() > 0.95
    assert int(found.confusion.matrix.sum()) == labels.numel()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"layer": "layer9"}, "no layer 'layer9'.*cells"),
        ({"recipe": RetrievalRecipe(k=10_000)}, "10000 neighbours"),
        ({"recipe": RetrievalRecipe(vectors=3)}, "fewer than the 6 training images"),
    ],
)
def test_what_does_not_fit_is_one_line(sets, change, said):
    with pytest.raises(UserError, match=said) as raised:
        dense_retrieval(Cells(), *sets, CLASSES, **change)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("part", [0, 1])
def test_a_label_that_is_no_class_is_refused(sets, part):
    sets = [list(one) for one in sets]
    sets[part][1] = sets[part][1].clone()
    sets[part][1][1, 9, 9] = 4
    with pytest.raises(ValueError, match=r"value.* 4.* 4"):
        dense_retrieval(Cells(), *sets, CLASSES)


def test_features_that_are_not_finite_are_refused(sets):
    encoder = Cells()
    torch.nn.init.constant_(encoder.scale, torch.nan)
    with pytest.raises(UserError, match="not finite"):
        dense_retrieval(encoder, *sets, CLASSES)


@pytest.mark.parametrize("wrong", [{"k": 0}, {"temperature": 0.0}, {"vectors": 0}, {"budget": 0}])
def test_settings_out_of_range_are_refused(wrong):
    with pytest.raises(UserError, match="above 0"):
        RetrievalRecipe(**wrong)


def trainer():
    return L.Trainer(
        accelerator="cpu", devices=1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, use_distributed_sampler=False,
    )  # fmt: skip


def test_module_finds_what_the_function_finds():
    streets = StreetLabels(train=4, val=2, size=(32, 64))
    labelled = LabelledDataModule("synthetic", synthetic=streets, num_workers=0, test=TestView())
    encoder = tiny_encoder(output_stride=8).eval()
    module = DenseRetrieval(encoder, recipe=RetrievalRecipe(k=5))
    with pytest.raises(UserError, match="validate it first"):
        module.scores()
    trainer().validate(module, datamodule=labelled, verbose=False)
    scores = module.scores()

    def whole(split, count):
        items = [labelled.item(split, number) for number in range(count)]
        return torch.cat([i.images for i in items]), torch.cat([i.labels for i in items])

    with observed(encoder):
        wanted = dense_retrieval(
            encoder, whole("train", 4), whole("val", 2), labelled.classes, RetrievalRecipe(k=5)
        )
    assert torch.equal(module.confusion.matrix, wanted.confusion.matrix)
    assert scores.headline == "miou"
    assert scores.scores == pytest.approx(wanted.summary(), nan_ok=True)
    assert scores.counts["images"] == 2
    assert scores.counts["memory_vectors"] == wanted.vectors
    assert all(name in labelled.classes.names and 0 <= number < 2 for name, number in scores.worst)
    batch = labelled.item("val", 1)
    assert module.predict_labels(batch).shape == batch.labels.shape

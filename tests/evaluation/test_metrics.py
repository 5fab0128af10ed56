"""The confusion matrix and its views against the paper's tables, scikit-learn and torchmetrics."""

import json
import math

import pytest
import torch
from sklearn.metrics import (
    balanced_accuracy_score,
    confusion_matrix,
    jaccard_score,
    recall_score,
    top_k_accuracy_score,
)
from torchmetrics.classification import MulticlassJaccardIndex

from poodle_lightning.data.label_sets import BDD100K, COMMON, LARGE, RARE, SMALL
from poodle_lightning.data.synthetic import classes as synthetic
from poodle_lightning.draw.segmentation import STREET_COLOURS
from poodle_lightning.evaluation import metrics
from poodle_lightning.evaluation.metrics import Accuracy, Confusion, group_means
from poodle_lightning.types import ClassSet, UserError

# PooDLe, appendix H, Table 9 in the order of its columns, and Table 3 (all, small, large, rare, common).
COLUMNS = (
    "road", "sky", "building", "vegetation", "car", "bus", "fence", "truck", "wall", "sidewalk", "terrain",
    "train", "pole", "bicycle", "person", "motorcycle", "traffic sign", "rider", "traffic light",
)  # fmt: skip
TABLE_10_SIZE = "LLLLLLLLLLLLSSSSSSS"
TABLE_10_PIXELS = "21.3 17.3 13.2 13.2 8.1 0.6 1.0 1.0 0.5 2.0 1.0 0.0 0.9 0.1 0.3 0.0 0.3 0.0 0.2"
TABLE_10_FREQUENCY = "CCCCCRCCRCCRCRCRCRC"
TABLE_9 = {
    "DINO": "88.6 93.0 72.3 77.3 73.7 0.8 11.7 5.3 5.1 38.5 37.5 0 8.1 0 19.6 0 13.4 0 17.7",
    "DenseCL": "82.0 88.2 68.3 72.6 63.0 0 1.5 0.5 0 17.7 7.2 0 0.3 0 0.1 0 1.1 0 9.4",
    "DoRA": "89.9 93.6 75.4 79.9 76.6 5.1 17.9 11.0 10.8 44.6 42.7 0 13.3 0.7 25.2 0 20.5 0 23.9",
    "FlowE": "90.6 92.9 75.8 79.6 80.8 32.9 23.5 22.7 15.3 45.7 32.4 0 12.9 11.8 28.7 4.1 15.9 0 12.1",
    "PooDLe": "91.3 93.5 77.0 80.4 81.7 34.0 29.4 24.3 17.2 49.6 38.1 0 24.3 18.0 35.2 2.9 26.6 0 21.2",
    "Supervised": "79.8 88.8 70.0 77.2 72.6 24.9 21.8 14.4 7.2 18.4 31.8 0 22.8 36.8 40.2 19.5 31.8 8.2 31.2",
    "PooDLe*": "92.6 94.0 80.3 82.2 84.8 54.7 34.9 33.4 17.8 56.3 42.2 0 25.7 27.1 41.5 7.7 39.0 0.1 35.2",
}
TABLE_3 = {
    "DINO": (29.6, 8.4, 42.0, 1.0, 42.8),
    "DenseCL": (24.2, 1.6, 37.4, 0.0, 35.4),
    "DoRA": (33.2, 11.9, 45.6, 2.8, 47.3),
    "FlowE": (35.7, 12.2, 49.3, 10.7, 47.2),
    "PooDLe": (39.2, 18.3, 51.4, 12.0, 51.8),
    "Supervised": (36.7, 27.2, 42.2, 16.1, 46.2),
    "PooDLe*": (44.7, 25.2, 56.1, 17.9, 57.1),
}


def misses(row: str) -> list[float]:
    values = dict(zip(COLUMNS, map(float, TABLE_9[row].split()), strict=True))
    means = group_means(values, {"all": BDD100K.names, **BDD100K.groups})
    return [abs(mean - printed) for mean, printed in zip(means.values(), TABLE_3[row], strict=True)]


@pytest.mark.parametrize("row", [row for row in TABLE_9 if row != "DenseCL"])
def test_groups_reproduce_table_3(row):
    # both tables are rounded to 0.1, so a mean may differ by one unit of the last digit
    assert max(misses(row)) < 0.1


def test_densecl_row_is_the_papers_own_mismatch():
    assert max(misses("DenseCL")) > 0.1


def test_groups_are_table_10():
    size = dict(zip(COLUMNS, TABLE_10_SIZE, strict=True))
    frequency = dict(zip(COLUMNS, TABLE_10_FREQUENCY, strict=True))
    assert {n for n in COLUMNS if size[n] == "S"} == set(SMALL)
    assert {n for n in COLUMNS if size[n] == "L"} == set(LARGE)
    assert {n for n in COLUMNS if frequency[n] == "R"} == set(RARE)
    assert {n for n in COLUMNS if frequency[n] == "C"} == set(COMMON)
    assert BDD100K.names[13] == "car"
    assert BDD100K.indices("small") == [BDD100K.names.index(name) for name in SMALL]


def test_synthetic_streets_have_the_same_classes_and_colours():
    assert BDD100K.names == synthetic.CLASSES
    assert list(synthetic.SMALL) == sorted(BDD100K.indices("small"))
    assert tuple(STREET_COLOURS[name] for name in BDD100K.names) == synthetic.PALETTE


def test_class_set_refuses_a_strange_name():
    with pytest.raises(ValueError, match="tram"):
        ClassSet(("road", "car"), {"big": ("road", "tram")})


@pytest.fixture(scope="module")
def maps():
    generator = torch.Generator().manual_seed(3)
    labels = torch.randint(0, 7, (9, 20, 31), generator=generator, dtype=torch.uint8)
    prediction = torch.where(torch.rand(labels.shape, generator=generator) < 0.6, labels.long(), 2)
    labels[torch.rand(labels.shape, generator=generator) < 0.1] = 255
    return prediction, labels


def counted(prediction, labels, classes, step=2):
    confusion = Confusion(classes)
    for i in range(0, len(labels), step):
        confusion.update(prediction[i : i + step], labels[i : i + step])
    return confusion


def test_equals_scikit_learn(maps):
    prediction, labels = maps
    confusion = counted(prediction, labels, 7)
    keep = labels != 255
    truth, guess = labels[keep].numpy(), prediction[keep].numpy()
    assert confusion.matrix.dtype == torch.int64
    assert confusion.matrix.tolist() == confusion_matrix(truth, guess, labels=range(7)).tolist()
    assert confusion.miou() == pytest.approx(jaccard_score(truth, guess, average="macro"), abs=1e-12)
    assert confusion.fwiou() == pytest.approx(jaccard_score(truth, guess, average="weighted"), abs=1e-12)
    assert confusion.mean_class_accuracy() == pytest.approx(balanced_accuracy_score(truth, guess), abs=1e-12)
    assert confusion.pixel_accuracy() == pytest.approx((truth == guess).mean(), abs=1e-12)
    assert (confusion.images, confusion.ignored) == (9, int((~keep).sum()))


def test_equals_torchmetrics_with_an_absent_class(maps):
    prediction, labels = maps
    reference = MulticlassJaccardIndex(num_classes=8, ignore_index=255)
    reference.update(prediction, labels.long())
    # class 7 is in neither; torchmetrics drops it like mmsegmentation
    assert counted(prediction, labels, 8).miou() == pytest.approx(float(reference.compute()), abs=1e-6)


def test_views_differ_on_a_class_that_is_only_predicted():
    labels = torch.tensor([[[0, 0, 1, 1, 255]]])
    prediction = torch.tensor([[[0, 2, 1, 1, 3]]])
    confusion = counted(prediction, labels, 4)
    # IoU: 1/2, 1, 0 (predicted, not there), absent from both
    assert confusion.iou()[:3].tolist() == [0.5, 1.0, 0.0]
    assert math.isnan(confusion.iou()[3])
    assert confusion.miou() == 0.5
    assert confusion.miou_present() == 0.75
    assert confusion.class_accuracy()[:2].tolist() == [0.5, 1.0]


def test_group_accuracy_is_pixel_weighted():
    labels = torch.tensor([[[0] * 8 + [1] * 2]])
    prediction = torch.tensor([[[0] * 8 + [0] * 2]])
    confusion = counted(prediction, labels, 2)
    assert confusion.group_accuracy([0, 1]) == 0.8
    assert confusion.group_accuracy([1]) == 0.0
    numbers = confusion.summary({"both": [0, 1]})
    assert numbers["accuracy_both"] == 0.8
    assert numbers["miou_both"] == pytest.approx(0.4)


@pytest.mark.parametrize(("prediction", "label"), [(0, 4), (4, 0), (-1, 0)])
def test_values_that_are_no_class_are_refused(prediction, label):
    with pytest.raises(ValueError, match="4 classes"):
        Confusion(4).update(torch.full((1, 2, 2), prediction), torch.full((1, 2, 2), label))


def test_shapes_must_agree():
    with pytest.raises(ValueError, match="shape"):
        Confusion(2).update(torch.zeros(1, 2, 2), torch.zeros(1, 4))


def test_empty_is_nan_not_an_error():
    confusion = Confusion(3)
    confusion.update(torch.zeros(1, 2, 2, dtype=torch.long), torch.full((1, 2, 2), 255))
    assert all(math.isnan(value) for value in confusion.summary({"g": [0]}).values())


def naive_views(prediction, labels, classes):
    """IoU per class, one pixel after the other, in float64."""
    both, truth, guess = [0] * classes, [0] * classes, [0] * classes
    for p, t in zip(prediction.flatten().tolist(), labels.flatten().tolist(), strict=True):
        if t != 255:
            both[t] += p == t
            truth[t] += 1
            guess[p] += 1
    unions = [t + g - b for t, g, b in zip(truth, guess, both, strict=True)]
    return [b / u if u else math.nan for b, u in zip(both, unions, strict=True)], truth, guess, both


def test_miou_equals_a_loop_to_1e_9(maps):
    prediction, labels = maps
    confusion = counted(prediction, labels, 9)
    iou, truth, guess, both = naive_views(prediction, labels, 9)
    known = [value for value in iou if not math.isnan(value)]
    assert confusion.miou() == pytest.approx(sum(known) / len(known), abs=1e-9)
    assert confusion.truth.tolist() == truth
    assert confusion.predicted.tolist() == guess
    precision = [b / g if g else math.nan for b, g in zip(both, guess, strict=True)]
    assert confusion.precision().tolist() == pytest.approx(precision, nan_ok=True)
    assert confusion.classes_absent == [7, 8]
    assert confusion.counts() == {
        "images": 9,
        "labelled_pixels": sum(truth),
        "ignored_pixels": labels.numel() - sum(truth),
        "classes_absent": 2,
    }


def test_group_accuracy_follows_from_recalls_and_pixel_shares(maps):
    # PooDLe's appendix F weighs classes by their pixels: small 1.8 % and large 79.2 % there
    prediction, labels = maps
    confusion = counted(prediction, labels, 7)
    parts = {"few": [0, 3], "many": [1, 2, 4, 5, 6]}
    shares = {name: float(confusion.truth[members].sum()) for name, members in parts.items()}
    total = sum(shares.values())
    mixed = sum(shares[name] / total * confusion.group_accuracy(members) for name, members in parts.items())
    assert mixed == pytest.approx(confusion.pixel_accuracy(), abs=1e-12)
    recall, truth = confusion.class_accuracy(), confusion.truth
    wanted = sum(float(recall[i]) * int(truth[i]) for i in parts["few"]) / int(truth[parts["few"]].sum())
    assert confusion.group_accuracy(parts["few"]) == pytest.approx(wanted, abs=1e-12)


def test_group_of_absent_classes_is_nan():
    numbers = counted(torch.tensor([[[0, 1]]]), torch.tensor([[[0, 1]]]), 5).summary(
        {"gone": [3, 4], "all": [0, 4]}
    )
    assert math.isnan(numbers["miou_gone"])
    assert math.isnan(numbers["accuracy_gone"])
    assert numbers["miou_all"] == 1.0
    assert math.isnan(group_means({"a": math.nan}, {"g": ["a"]})["g"])


def test_merge_and_state_keep_every_count(maps):
    prediction, labels = maps
    whole = counted(prediction, labels, 7)
    parts = counted(prediction[:2], labels[:2], 7).merge(counted(prediction[2:], labels[2:], 7))
    copied = Confusion.from_state(json.loads(json.dumps(whole.state_dict())))
    for other in (parts, copied):
        assert torch.equal(other.matrix, whole.matrix)
        assert (other.images, other.ignored) == (whole.images, whole.ignored)
    with pytest.raises(ValueError, match="7 classes"):
        Confusion(6).merge(whole)


def test_alone_all_reduce_changes_nothing(maps):
    confusion = counted(*maps, 7)
    before = confusion.matrix.clone()
    assert torch.equal(confusion.all_reduce().matrix, before)


def test_the_path_without_waiting_counts_the_same_and_refuses_later(maps, monkeypatch):
    prediction, labels = maps
    wanted = counted(prediction, labels, 7)
    confusion = Confusion(7)
    monkeypatch.setattr(metrics, "on_host", lambda values: False)
    confusion.update(prediction[:4], labels[:4])
    confusion.update(prediction[4:], labels[4:])
    assert torch.equal(confusion.matrix, wanted.matrix)
    assert (confusion.images, confusion.ignored) == (wanted.images, wanted.ignored)
    confusion.update(torch.tensor([[[0, 7, -1]]]), torch.tensor([[[9, 0, 255]]]))
    with pytest.raises(ValueError, match=r"2 pixels .* 7 classes"):
        confusion.miou()


def test_accuracy_equals_scikit_learn():
    generator = torch.Generator().manual_seed(4)
    scores, labels = torch.randn(60, 9, generator=generator), torch.randint(0, 8, (60,), generator=generator)
    accuracy = Accuracy(9)
    for rows in (slice(0, 13), slice(13, 60)):
        accuracy.update(scores[rows], labels[rows])
    truth, guess = labels.numpy(), scores.double().numpy()
    assert accuracy.top1() == pytest.approx(top_k_accuracy_score(truth, guess, k=1, labels=range(9)))
    assert accuracy.top5() == pytest.approx(top_k_accuracy_score(truth, guess, k=5, labels=range(9)))
    recalls = recall_score(truth, guess.argmax(1), average=None, labels=range(8))
    assert accuracy.per_class()[:8].tolist() == pytest.approx(recalls.tolist())
    assert math.isnan(accuracy.per_class()[8])
    assert accuracy.images == 60


def test_of_equal_scores_the_lower_class_is_first():
    accuracy = Accuracy(8)
    accuracy.update(torch.zeros(3, 8), torch.tensor([0, 4, 5]))
    assert (accuracy.top1(), accuracy.top5()) == (pytest.approx(1 / 3), pytest.approx(2 / 3))


# PooDLe, appendix F: accuracy of all, small, large, rare and common classes.
APPENDIX_F = {
    "DINO": (86.8, 12.3, 88.3, 2.3, 87.8),
    "DenseCL": (84.9, 2.0, 86.6, 0.0, 86.0),
    "DoRA": (88.1, 19.3, 89.5, 7.2, 89.1),
    "FlowE": (88.5, 18.2, 89.9, 32.0, 89.2),
    "PooDLe": (89.2, 33.6, 90.3, 34.2, 89.9),
    "Supervised": (84.7, 36.9, 85.3, 23.8, 85.1),
    "PooDLe*": (90.7, 35.6, 91.2, 46.9, 91.2),
}


@pytest.mark.parametrize("row", APPENDIX_F)
@pytest.mark.parametrize(("few", "many"), [("small", "large"), ("rare", "common")])
def test_group_accuracy_is_that_of_appendix_f(row, few, many):
    """Weighed by the pixels of Table 10, group accuracies give that over all; unweighed ones do not."""
    shares = dict(zip(COLUMNS, map(float, TABLE_10_PIXELS.split()), strict=True))
    overall, *parts = APPENDIX_F[row]
    wanted = dict(zip(("small", "large", "rare", "common"), parts, strict=True))
    confusion = Confusion(20)
    rows = torch.zeros(20, 20, dtype=torch.int64)
    for group in (few, many):
        for name in BDD100K.groups[group]:
            pixels = round(shares[name] * 10_000)
            right = round(pixels * wanted[group] / 100)
            label = BDD100K.names.index(name)
            rows[label, label], rows[label, 19] = right, pixels - right
    confusion = Confusion.from_state(confusion.state_dict() | {"matrix": rows.tolist()})
    for group in (few, many):
        assert 100 * confusion.group_accuracy(BDD100K.indices(group)) == pytest.approx(
            wanted[group], abs=0.05
        )
    # the shares are those of the training images, the accuracies of the held-out ones
    assert 100 * confusion.pixel_accuracy() == pytest.approx(overall, abs=0.8)
    assert abs((wanted[few] + wanted[many]) / 2 - overall) > 10


def test_scores_that_are_no_numbers_are_refused_not_right():
    with pytest.raises(UserError, match="NaN"):
        Accuracy(3).update(torch.full((2, 3), math.nan), torch.tensor([1, 2]))

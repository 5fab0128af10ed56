"""The confusion matrix and its views against the paper's tables, scikit-learn and torchmetrics."""

import math

import pytest
import torch
from sklearn.metrics import balanced_accuracy_score, confusion_matrix, jaccard_score
from torchmetrics.classification import MulticlassJaccardIndex

from poodle_lightning.data.label_sets import BDD100K, COMMON, LARGE, RARE, SMALL
from poodle_lightning.data.synthetic import classes as synthetic
from poodle_lightning.draw.segmentation import STREET_COLOURS
from poodle_lightning.evaluation.metrics import Confusion, group_means
from poodle_lightning.types import ClassSet

# PooDLe, appendix H, Table 9 in the order of its columns, and Table 3 (all, small, large, rare, common).
COLUMNS = (
    "road", "sky", "building", "vegetation", "car", "bus", "fence", "truck", "wall", "sidewalk", "terrain",
    "train", "pole", "bicycle", "person", "motorcycle", "traffic sign", "rider", "traffic light",
)  # fmt: skip
TABLE_10_SIZE = "LLLLLLLLLLLLSSSSSSS"
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

"""Official layouts of classified images: what is in them is what is read, and nothing else is executed."""

import json
import os
import pickle
from pathlib import Path

import image_trees
import numpy as np
import pytest
import torch
from scipy.io import loadmat, savemat
from torchvision.datasets import StanfordCars

from poodle_lightning.data.image_classes import ImageClassDataModule, ImageViews
from poodle_lightning.data.image_sets import open_images, read_plain_pickle
from poodle_lightning.types import UserError


def opened(tmp_path, source, tree=None):
    tree = tree or image_trees.TREES[source]
    return open_images(source, tree(tmp_path))


@pytest.mark.parametrize("below", ["", "cifar-10-batches-py"])
def test_cifar10_has_the_rows_of_all_files(tmp_path, below):
    found = open_images("cifar10", image_trees.cifar10(tmp_path) / below)
    train, val = found.split("train"), found.split("val")
    assert found.classes == tuple(f"c{n}" for n in range(10))
    assert (len(train), len(val)) == (50, 10)
    assert train.labels.tolist() == [(n + file) % 10 for file in range(5) for n in range(10)]
    for file, row in ((0, 0), (3, 7)):
        planes = image_trees.cifar_rows(10, file)[row].reshape(3, 32, 32)
        assert np.array_equal(train.read(10 * file + row), planes.transpose(1, 2, 0))
    assert np.array_equal(val.read(9)[..., 1], image_trees.cifar_rows(10, 5)[9, 1024:2048].reshape(32, 32))


def test_cifar100_has_fine_classes(tmp_path):
    found = opened(tmp_path, "cifar100")
    assert found.classes[42] == "f42"
    assert found.split("train").labels.tolist() == [7 * n % 100 for n in range(100)]
    assert found.split("val").labels[3] == 22


def test_a_pickle_of_todays_python_is_read_too(tmp_path):
    rows = image_trees.cifar_rows(2, 0)
    (tmp_path / "file").write_bytes(pickle.dumps({"data": rows, "labels": [1, 2]}, protocol=4))
    found = read_plain_pickle(tmp_path / "file")
    assert np.array_equal(found["data"], rows)


class Evil:
    def __init__(self, flag):
        self.flag = flag

    def __reduce__(self):
        return os.system, (f"touch {self.flag}",)


def test_a_pickle_that_would_run_something_is_refused_and_does_not_run(tmp_path):
    image_trees.cifar10(tmp_path)
    path, flag = tmp_path / "cifar-10-batches-py" / "test_batch", tmp_path / "flag"
    path.write_bytes(pickle.dumps({"data": Evil(flag)}))
    with pytest.raises(UserError, match=r"test_batch: is no file of CIFAR.*(posix|nt)\.system"):
        open_images("cifar10", tmp_path).split("val")
    assert not flag.exists()
    pickle.loads(path.read_bytes())  # the flag would be there
    assert flag.exists()


@pytest.mark.parametrize("content", [b"", b"no pickle", pickle.dumps([1, 2]), pickle.dumps({"a": 1})[:-4]])
def test_a_damaged_pickle_is_one_line(tmp_path, content):
    image_trees.cifar10(tmp_path)
    path = tmp_path / "cifar-10-batches-py" / "data_batch_2"
    path.write_bytes(content)
    with pytest.raises(UserError, match="data_batch_2: is no file of CIFAR") as caught:
        open_images("cifar10", tmp_path).split("train")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [({b"data": [1]}, "rows of 3,072 bytes"), ({b"labels": [1, 2]}, "for every image"),
     ({b"labels": [*range(9), 10]}, "from 0 to 9"), ({b"labels": [[]] * 10}, "for every image")],
)  # fmt: skip
def test_a_cifar_file_with_other_content_is_one_line(tmp_path, wrong, said):
    image_trees.cifar10(tmp_path)
    content = {b"data": image_trees.cifar_rows(10, 0), b"labels": list(range(10))} | wrong
    image_trees.write_python2(tmp_path / "cifar-10-batches-py" / "test_batch", content)
    with pytest.raises(UserError, match=said):
        open_images("cifar10", tmp_path).split("val")


def test_flowers_train_on_trnid_and_valid(tmp_path):
    found = opened(tmp_path, "flowers102")
    train, val = found.split("train"), found.split("val")
    assert [Path(name).name for name in train.names] == [f"image_0000{n}.jpg" for n in (5, 1, 3, 2)]
    assert train.labels.tolist() == [1, 0, 2, 1]
    assert val.labels.tolist() == [2, 0, 1]
    assert abs(int(val.read(0).mean()) - 180) <= 2


def test_cars_have_the_class_of_the_field_of_that_name(tmp_path):
    found = opened(tmp_path, "cars")
    train, val = found.split("train"), found.split("val")
    assert found.classes == ("Acura", "BMW", "Saab")
    assert train.labels.tolist() == [0, 1, 2, 0, 1]
    assert val.labels.tolist() == [2, 0, 1]
    assert abs(int(val.read(2).mean()) - 175) <= 2


def test_cars_with_a_devkit_are_torchvisions(tmp_path):
    found = opened(tmp_path / "stanford_cars", "cars", image_trees.cars_devkit)
    for split, theirs in (("train", "train"), ("val", "test")):
        ours, wanted = found.split(split), StanfordCars(str(tmp_path), theirs)._samples
        assert [Path(name) for name in ours.names] == [Path(name) for name, _ in wanted]
        assert ours.labels.tolist() == [label for _, label in wanted]
    assert len(open_images("cars", tmp_path).split("train")) == 5  # the folder above


def test_both_layouts_of_cars_may_be_a_folder_below(tmp_path):
    image_trees.cars(tmp_path / "cars")
    assert len(open_images("cars", tmp_path).split("train")) == 5


def test_inaturalist_goes_by_the_annotations(tmp_path):
    found = opened(tmp_path, "inat18")
    assert found.classes == ("Felis catus", "Apis (1)", "Apis (2)")
    train, val = found.split("train"), found.split("val")
    assert train.labels.tolist() == [1, 2, 0, 1, 2, 0]
    assert val.labels.tolist() == [1, 2, 0]
    assert abs(int(val.read(1).mean()) - 7 * 31) <= 2
    for strange in ("{}", "3", '[3, {"id": [], "name": "x"}]'):
        (tmp_path / "categories.json").write_text(strange)
        assert open_images("inat18", tmp_path).classes == ("3", "5", "9")
    (tmp_path / "categories.json").unlink()
    assert open_images("inat18", tmp_path).classes == ("3", "5", "9")


@pytest.mark.parametrize("source", sorted(image_trees.TREES))
def test_every_source_gives_batches(tmp_path, source):
    root = image_trees.TREES[source](tmp_path)
    data = ImageClassDataModule(
        str(root), source=source, views=ImageViews(size=8, resize=8), num_workers=0, batch_size=4
    )
    data.setup()
    batch = next(iter(data.train_dataloader()))
    assert batch.images.shape == (4, 3, 8, 8)
    for split, loader in (("train", data.memory_dataloader()), ("val", data.val_dataloader())):
        labels = torch.cat([batch.labels for batch in loader])
        assert labels.tolist() == data.images(split).labels.tolist()
        assert set(labels.tolist()) == set(range(len(data.classes)))


def without(file, *keys):
    """A MATLAB file that has only these variables."""
    return lambda root: savemat(root / file, {key: np.zeros((1, 3)) for key in keys})


def saved(file, **content):
    return lambda root: savemat(root / file, content)


def python2_file(file, content):
    return lambda root: image_trees.write_python2(root / "cifar-10-batches-py" / file, content)


def car_class(value):
    """The class of one car is another thing."""

    def harm(root):
        content = loadmat(root / "cars_annos.mat")
        content["annotations"][0, 0]["class"] = value
        savemat(root / "cars_annos.mat", {key: content[key] for key in ("annotations", "class_names")})

    return harm


def in_json(part, key, value):
    def harm(root):
        content = json.loads((root / "val2018.json").read_text())
        content[part][0][key] = value
        (root / "val2018.json").write_text(json.dumps(content))

    return harm


def read_all(source, root):
    found = open_images(source, root)
    return found.split("train"), found.split("val")


def gone(file):
    return lambda root: (root / file).unlink()


def holds(file, content):
    return lambda root: (root / file).write_bytes(content)


def drop_category(root):
    content = json.loads((root / "val2018.json").read_text())
    content["annotations"][0]["category_id"] = 77
    (root / "val2018.json").write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("source", "harm", "said"),
    [
        ("cifar10", gone("cifar-10-batches-py/batches.meta"), "has no batches.meta"),
        ("cifar10", gone("cifar-10-batches-py/data_batch_4"), "data_batch_4: the file is missing"),
        ("cifar10", python2_file("batches.meta", {b"label_names": [[]] * 10}), "does not name the 10"),
        ("cifar100", lambda root: image_trees.write_python2(root / "meta", {b"a": 1}), "does not name the"),
        ("flowers102", gone("setid.mat"), "setid.mat: the file is missing"),
        ("flowers102", holds("setid.mat", b"x" * 200), "setid.mat: cannot be read as a MATLAB file"),
        ("flowers102", without("setid.mat", "trnid"), "has no variable valid"),
        ("flowers102", saved("imagelabels.mat", labels=[[1, 2, 3]]), "has no label for"),
        *(
            ("flowers102", saved("imagelabels.mat", labels=labels), "imagelabels.mat: has no list of whole")
            for labels in (np.zeros((1, 0)), np.array([["rose"]]), [[1, np.nan]], [[0, 1]], [[1.5]])
        ),
        (
            "flowers102",
            saved("setid.mat", trnid=[[1]], valid=[["b"]], tstid=[[2]]),
            "setid.mat: has no list of whole",
        ),
        ("cars", without("cars_annos.mat", "annotations", "class_names"), "no field relative_im_path"),
        ("cars", gone("cars_annos.mat"), "has no cars_annos.mat and no devkit"),
        ("cars", car_class("Saab"), "cars_annos.mat: has no list of whole"),
        ("cars", car_class(np.zeros((1, 2))), "cars_annos.mat: has no list of whole"),
        ("cars", car_class(4), "outside 1 to 3"),
        ("inat18", gone("val2018.json"), "val2018.json: the file is missing"),
        ("inat18", holds("val2018.json", b"{"), "cannot be read as JSON"),
        ("inat18", holds("val2018.json", b"{}"), "do not all have id and file_name"),
        ("inat18", in_json("images", "id", [1]), "do not all have id and file_name"),
        ("inat18", in_json("images", "file_name", 3), "do not all have id and file_name"),
        ("inat18", in_json("annotations", "image_id", {}), "do not all have image_id and category_id"),
        ("inat18", in_json("annotations", "category_id", None), "do not all have image_id and category_id"),
        ("inat18", drop_category, "has no category of train2018.json"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(tmp_path, source, harm, said):
    root = image_trees.TREES[source](tmp_path)
    harm(root)
    with pytest.raises(UserError, match=said) as caught:
        read_all(source, root)
    assert "\n" not in str(caught.value)


def test_a_class_without_a_held_out_image_is_one_line(tmp_path):
    root = image_trees.flowers102(tmp_path)
    sets = {"trnid": [[5, 1, 3]], "valid": [[2]], "tstid": [[9, 4, 7]]}
    savemat(root / "setid.mat", {key: np.array(value, np.uint16) for key, value in sets.items()})
    with pytest.raises(UserError, match=r"the class flower 2 has no image in val: add some"):
        ImageClassDataModule(str(root), source="flowers102").setup()


def test_an_unknown_source_is_one_line(tmp_path):
    with pytest.raises(UserError, match="choose one of folder, cifar10"):
        open_images("mnist", tmp_path)

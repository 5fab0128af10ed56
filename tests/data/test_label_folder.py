"""A folder of one's own: layouts, the YAML file of classes, held-out images."""

from __future__ import annotations

import label_trees
import numpy as np
import pytest

from poodle_lightning.data.label_folder import FolderLabels, read_classes, read_groups
from poodle_lightning.types import UserError


def refused(act, *parts):
    with pytest.raises(UserError) as caught:
        act()
    line = str(caught.value)
    assert "\n" not in line
    for part in parts:
        assert part in line, line


def test_a_share_is_held_out_and_no_image_is_in_both(tmp_path):
    root = label_trees.folder(tmp_path, count=10)
    source = FolderLabels(root, val_fraction=0.3)
    train, val = source.names("train"), source.names("val")
    assert (len(train), len(val)) == (7, 3)
    assert len({*train, *val}) == 10
    assert FolderLabels(root, val_fraction=0.3).names("val") == val
    others = [FolderLabels(root, val_fraction=0.3, seed=seed).names("val") for seed in range(1, 6)]
    assert any(other != val for other in others)
    number = int(val[0].rsplit("/", 1)[1].split(".")[0])
    image, labels = source.read("val", 0)
    assert np.array_equal(labels, label_trees.mask(number, 4))
    assert np.array_equal(image, label_trees.noise(number))


def test_folders_for_both_splits(tmp_path):
    source = FolderLabels(label_trees.folder(tmp_path / "a", count=3, splits=("train", "val")))
    assert (len(source.names("train")), len(source.names("val"))) == (3, 3)
    assert "images/val/0.png" in source.names("val")[0]
    root = label_trees.folder(tmp_path / "b", count=0)
    for split, count in (("train", 3), ("val", 1)):
        for number in range(count):
            label_trees.save(root / split / "images" / "deep" / f"{number}.JPG", label_trees.noise(0))
            label_trees.save(root / split / "masks" / "deep" / f"{number}.png", label_trees.mask(0, 4))
    source = FolderLabels(root)
    assert (len(source.names("train")), len(source.names("val"))) == (3, 1)


@pytest.mark.parametrize("name", ["training", "validation", "test"])
def test_splits_of_other_names_are_not_mixed(tmp_path, name):
    root = label_trees.folder(tmp_path, count=3)
    (root / "images" / name).mkdir()
    refused(lambda: FolderLabels(root).names("train"), f"images/{name}", "train and val")


def test_a_folder_of_colours_and_of_palette_masks(tmp_path):
    yaml = "names: [a, b]\ncolours: {a: [255, 0, 0], b: [0, 0, 255]}\n"
    root = label_trees.folder(tmp_path / "colours", 2, 2, splits=("val",), yaml=yaml)
    for number in range(2):
        labels = label_trees.mask(number, 2)
        rgb = np.array([[255, 0, 0], [0, 0, 255]], np.uint8)[labels]
        label_trees.save(root / f"masks/val/{number}.png", rgb)
        assert np.array_equal(FolderLabels(root).read("val", number)[1], labels)
    root = label_trees.folder(
        tmp_path / "palette", 1, 2, splits=("val",), yaml="names: [a, b]\nmasks: palette\n"
    )
    label_trees.save(root / "masks/val/0.png", label_trees.mask(1, 2), "P")
    assert np.array_equal(FolderLabels(root).read("val", 0)[1], label_trees.mask(1, 2))


def test_one_split_is_missing_or_nothing_is_there(tmp_path):
    source = FolderLabels(label_trees.folder(tmp_path, splits=("train",)))
    refused(lambda: source.names("val"), "no images/val or val/images", "classes.yaml, images/, masks/")
    empty = label_trees.folder(tmp_path / "empty", count=0)
    refused(lambda: FolderLabels(empty).names("val"), "no images/val or val/images or images in it")
    (empty / "images").mkdir()
    refused(lambda: FolderLabels(empty).names("val"), "masks: no such folder; the masks of")
    (empty / "masks").mkdir()
    refused(lambda: FolderLabels(empty).names("val"), "images: the split is empty")
    refused(lambda: FolderLabels(tmp_path / "nowhere"), "nowhere: no such folder", "--data.root")
    single = FolderLabels(label_trees.folder(tmp_path / "single", count=1))
    refused(lambda: single.names("val"), "0.png: the only image")
    refused(lambda: FolderLabels(tmp_path, val_fraction=0.0), "val_fraction 0.0")


def test_masks_that_do_not_match(tmp_path):
    root = label_trees.folder(tmp_path)
    (root / "masks" / "3.png").unlink()
    (root / "images" / "5.png").unlink()
    first, second = FolderLabels(root).problems("val")
    assert "images/3.png: no mask for this image" in first
    assert "masks/5.png: no image for this mask" in second
    label_trees.save(root / "images" / "4.jpg", label_trees.noise(0))
    refused(lambda: FolderLabels(root).names("val"), "have the same name")
    (root / "images" / "4.jpg").unlink()
    label_trees.save(root / "masks" / "3.jpg", label_trees.mask(3, 4))
    refused(lambda: FolderLabels(root).names("val"), "3.jpg: JPEG and WebP change labels")


def write(tmp_path, text):
    path = tmp_path / "classes.yaml"
    path.write_text(text)
    return path


def test_names_ignore_and_groups(tmp_path):
    classes, codes = read_classes(write(tmp_path, "names: [a, b, c]\ngroups: {small: [c], large: [a, b]}\n"))
    assert classes.names == ("a", "b", "c")
    assert classes.numbered() == {"small": [2], "large": [0, 1]}
    assert (codes.kind, codes.labels) == ("ids", {255: 255, 0: 0, 1: 1, 2: 2})
    codes = read_classes(write(tmp_path, "names: [a, b]\nignore: [200, 7]\nmasks: palette\n"))[1]
    assert (codes.kind, codes.labels) == ("palette", {7: 255, 200: 255, 0: 0, 1: 1})


def test_ids(tmp_path):
    text = "names: [road, car]\nids: {7: road, 8: road, 300: car, 0: ignore}\n"
    codes = read_classes(write(tmp_path, text))[1]
    assert (codes.kind, codes.labels) == ("ids", {7: 0, 8: 0, 300: 1, 0: 255, 255: 255})


def test_colours(tmp_path):
    text = "names: [a, b]\ncolours: {a: [1, 2, 3], b: [[0, 0, 1], [0, 1, 0]]}\nignore: [0, 0, 0]\n"
    codes = read_classes(write(tmp_path, text))[1]
    assert codes.kind == "colours"
    assert codes.labels == {0x010203: 0, 0x000001: 1, 0x000100: 1, 0: 255}
    text = "names: [a]\ncolours: {a: [1, 2, 3], ignore: [[0, 0, 0], [255, 255, 255]]}\n"
    assert read_classes(write(tmp_path, text))[1].labels == {0x010203: 0, 0: 255, 0xFFFFFF: 255}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("names: [a, b", "cannot be read"),
        ("- a\n", "must hold keys and values"),
        ("names: a\n", "names must be a list"),
        ("names: []\n", "names must be a list"),
        ("names: [a, 1]\n", "names must be a list"),
        ("names: [a, b, a]\n", "'a' is there twice"),
        ("classes: [a]\n", "unknown key 'classes'; there are names, ignore"),
        ("names: [a, b]\ngroups: {x: [c]}\n", "group x: no class 'c'"),
        ("names: [a, b]\ngroups: {x: []}\n", "group x: give one class or more"),
        ("names: [a, b]\ngroups: [a]\n", "groups must be lists"),
        ("names: [road, b]\nids: {0: roar}\n", "ids: no class 'roar', did you mean road?"),
        ("names: [a, b]\nids: [1, 2]\n", "ids must go from"),
        ("names: [a, b]\nids: {-1: a}\n", "ids must go from"),
        ("names: [a, b]\nignore: 1\n", "ignore: 1 is the label of 'b'"),
        ("names: [a, b]\nignore: x\n", "must be numbers from 0 to 65535"),
        ("names: [a]\nids: {0: a}\ncolours: {a: [1, 2, 3]}\n", "ids or colours, not both"),
        ("names: [a]\nmasks: colours\n", "masks: 'colours' must be ids or palette"),
        ("names: [a]\nmasks: ids\ncolours: {a: [1, 2, 3]}\n", "masks: 'ids' must be colours"),
        ("names: [a]\ncolours: {a: [1, 2]}\n", "must be three numbers"),
        ("names: [a]\ncolours: {a: [1, 2, 256]}\n", "must be three numbers"),
        ("names: [a, b]\ncolours: {a: [1, 2, 3], b: [1, 2, 3]}\n", "stands for two classes"),
        ("names: [a, b]\ncolours: 3\n", "colours must go from"),
        ("names: [a]\ncolours: {a: []}\n", "must be three numbers"),
    ],
)
def test_what_the_yaml_file_may_not_say(tmp_path, text, said):
    refused(lambda: read_classes(write(tmp_path, text)), "classes.yaml: ", said)


def test_too_many_classes_and_no_file(tmp_path):
    names = ", ".join(f"c{number}" for number in range(255))
    refused(lambda: read_classes(write(tmp_path, f"names: [{names}]\n")), "255 classes, at most 254")
    refused(lambda: read_classes(tmp_path / "no.yaml"), "no.yaml: no such file; it names the classes")


def test_groups_of_a_file(tmp_path):
    path = write(tmp_path, "rare: [b]\n")
    assert read_groups(path, ("a", "b")) == {"rare": ("b",)}
    refused(lambda: read_groups(path, ("a", "c")), "group rare: no class 'b'")

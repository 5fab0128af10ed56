"""What is found in a split: counts, sizes, shares, and everything that is wrong with it."""

from __future__ import annotations

import label_trees
import numpy as np
import pytest

from poodle_lightning.data.labelled import LabelledDataModule


def module(root, source="folder"):
    return LabelledDataModule(source, str(root), num_workers=0)


def texts(findings):
    lines = [str(finding) for finding in findings]
    assert not any("\n" in line for line in lines)
    return lines


def test_counts_sizes_and_shares(tmp_path):
    root = label_trees.folder(tmp_path, 3, classes=4, splits=("train", "val"))
    label_trees.save(root / "images/val/2.png", label_trees.noise(0, (10, 10)))
    label_trees.save(root / "masks/val/2.png", np.where(np.arange(100) < 30, 255, 1).reshape(10, 10))
    survey = module(root).survey("val")
    assert survey.findings == []
    assert (survey.images, survey.published, survey.read) == (3, None, True)
    assert survey.sizes == {(12, 20): 2, (10, 10): 1}
    masks = np.concatenate([label_trees.mask(n, 4).ravel() for n in (0, 1)])
    wanted = np.add(np.bincount(masks, minlength=4), [0, 70, 0, 0])
    assert survey.pixels == [*wanted, 30]
    assert survey.ignored == 30 / (2 * 240 + 100)
    in_first, in_second = (np.isin(range(4), label_trees.mask(n, 4)) for n in (0, 1))
    assert survey.holding == [*(in_first + 0 + in_second + [0, 1, 0, 0]), 1]


def test_everything_wrong_is_found_at_once(tmp_path):
    root = label_trees.folder(tmp_path, 8, classes=6, splits=("train", "val"))
    masks, images = root / "masks/val", root / "images/val"
    for number in range(8):
        label_trees.save(masks / f"{number}.png", np.zeros(label_trees.SIZE))
    (masks / "0.png").unlink()
    label_trees.save(masks / "1.png", np.full(label_trees.SIZE, 6))
    label_trees.save(masks / "2.png", np.full(label_trees.SIZE, 255))
    label_trees.save(masks / "3.png", np.zeros((12, 21)))
    label_trees.save(masks / "4.png", np.zeros((*label_trees.SIZE, 3)))
    label_trees.save(masks / "5.png", np.zeros(label_trees.SIZE), "P")
    (images / "6.png").write_bytes((images / "6.png").read_bytes()[:300])
    found = module(root).check("val")
    wanted = [
        "images/val/0.png: no mask for this image",
        "masks/val/1.png: id 6 in 240 pixels is no label; expected labels 0 to 5",
        "images/val/2.png: every pixel is ignored",
        "masks/val/3.png: the mask is 21×12 px, its image 3.png is 20×12 px",
        "masks/val/4.png: an RGB mask",
        "masks/val/5.png: a palette mask",
        "images/val/6.png: the image cannot be read",
        "no pixel of c1, c2, c3, c4, c5 in 7 images",
    ]
    lines = texts(found)
    assert len(lines) == len(wanted)
    for line, part in zip(lines, wanted, strict=True):
        assert line.startswith("val: ")
        assert part in line
    assert [finding.fatal for finding in found] == [True] * 7 + [False]
    assert module(root).check("train") == []


def test_headers_alone_find_missing_files_and_sizes(tmp_path):
    root = label_trees.folder(tmp_path, 3, splits=("train", "val"))
    (root / "masks/val/0.png").unlink()
    label_trees.save(root / "masks/val/1.png", np.full((12, 21), 77))
    label_trees.save(root / "masks/val/2.png", np.full(label_trees.SIZE, 77))
    lines = texts(module(root).check("val", every_mask=False))
    assert len(lines) == 2
    assert "0.png: no mask" in lines[0]
    assert "1.png: the image is 20×12 px, its mask 21×12 px" in lines[1]
    assert module(root).survey("val", every_mask=False).absent == []


def test_published_counts(tmp_path):
    label_trees.bdd100k(tmp_path, train=3, val=2)
    (finding, *_) = module(tmp_path, "bdd100k").check("val")
    assert str(finding) == "val: 2 images with a mask, the published split has 1,000"
    assert not finding.fatal


@pytest.mark.parametrize(
    ("source", "build"),
    [
        ("bdd100k", label_trees.bdd100k),
        ("cityscapes", label_trees.cityscapes),
        ("ade20k", label_trees.ade20k),
        ("voc", label_trees.voc),
        ("coco", label_trees.coco),
    ],
)
def test_the_published_layouts_have_nothing_wrong_but_their_size(tmp_path, source, build):
    build(tmp_path)
    for split in ("train", "val"):
        for every in (True, False):
            assert not [str(f) for f in module(tmp_path, source).check(split, every) if f.fatal]


def test_a_layout_that_is_not_there_is_one_finding(tmp_path):
    (finding,) = module(tmp_path, "cityscapes").check("train")
    assert finding.fatal
    assert "not laid out as cityscapes: no leftImg8bit/train in it or in cityscapes/" in str(finding)

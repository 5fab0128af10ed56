"""The command that says what a labelled data set holds and lacks."""

import depth_trees
import label_trees
import numpy as np
import pytest

from poodle_lightning import cli


def check(*words):
    return cli.main(["check-data", "--workers", "0", *map(str, words)])


def test_a_good_folder(tmp_path, capsys):
    root = label_trees.folder(tmp_path, 4, splits=("train", "val"))
    assert check("--source", "folder", "--root", root) == 0
    said = capsys.readouterr().out
    assert "train: 4 images with masks\n  20×12 px: 4\n" in said
    assert "val: 4 images with masks" in said
    labels = np.stack([label_trees.mask(number, 4) for number in range(4)])
    share, among = 100 * (labels == 2).mean(), 100 * (labels == 2).any(axis=(1, 2)).mean()
    assert f"  2 c2 {share:>42.3f} {among:>12.1f}\n" in said
    assert "ignored: 0.000 % of all pixels" in said
    assert said.endswith("nothing wrong\n")


def test_what_is_wrong_is_listed_and_the_worst_is_the_error(tmp_path, capsys):
    root = label_trees.bdd100k(tmp_path)
    label_trees.save(root / "labels/sem_seg/masks/val/val1.png", np.full(label_trees.SIZE, 40))
    assert check("--source", "bdd100k", "--root", root) == 2
    out, error = capsys.readouterr()
    assert "val: 2 images with masks (published: 1,000)" in out
    assert "wrong: 2 images with a mask, the published split has 1,000" in out
    assert "wrong: no pixel of" in out
    (line,) = error.splitlines()
    assert line.startswith("error: val: ")
    assert "val1.png: id 40 in 240 pixels is no label" in line
    assert line.endswith("(and 4 more, above)")


def test_only_headers_and_only_one_split(tmp_path, capsys):
    root = label_trees.folder(tmp_path, 2, splits=("train", "val"))
    label_trees.save(root / "masks/val/1.png", np.full(label_trees.SIZE, 40))
    assert check("--source", "folder", "--root", root, "--fast") == 0
    assert "masks were not read (--fast)" in capsys.readouterr().out
    assert check("--source", "folder", "--root", root, "--split", "train") == 0
    assert "val:" not in capsys.readouterr().out
    assert check("--source", "folder", "--root", root, "--split", "val") == 2


def test_a_wrong_folder(tmp_path, capsys):
    (tmp_path / "videos").mkdir()
    assert check("--source", "ade20k", "--root", tmp_path) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "no images/training in it or in ADEChallengeData2016/" in line
    assert "there is videos/" in line


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "give --config FILE, or --source NAME with --root DIR"),
        (["--source", "voc"], "source voc needs a folder"),
        (["--source", "imagenet", "--root", "x"], "invalid choice"),
        (["--source", "voc", "--root", "x", "--data.seed", "3"], "--data.seed belongs to --config"),
        (["--config", "experiment/quickstart.yaml", "--root", "x"], "`inspect` looks at videos"),
    ],
)
def test_words_that_make_no_sense(words, said, capsys):
    assert check(*words) == 2
    assert said in capsys.readouterr().err


def test_labels_of_another_kind_are_not_taken_for_videos(tmp_path, capsys):
    root = depth_trees.nyu(tmp_path)
    assert check("--config", "evaluation/pico_nyu_depth.yaml", "--root", root) == 2
    said = capsys.readouterr().err
    assert "has no images with a class per pixel" in said
    assert "other labels are checked by the run that uses them" in said

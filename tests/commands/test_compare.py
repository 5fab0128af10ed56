"""Methods trained alike and put side by side: what is trained, what is not trained again, what is written."""

import json
import math
import os
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from poodle_lightning import cli
from poodle_lightning.callbacks import probes
from poodle_lightning.commands import _pretraining, _readings, _trials
from poodle_lightning.commands._pretraining import Start, side_by_side
from poodle_lightning.commands._trials import Scale, digest, entrants, folder_content, labelled_data
from poodle_lightning.data.label_streets import StreetLabels
from poodle_lightning.data.labelled import LabelledDataModule
from poodle_lightning.data.synthetic import write_videos
from poodle_lightning.evaluation.linear_readout import ReadoutRecipe, linear_readout
from poodle_lightning.hub import dilate, from_pretrained
from poodle_lightning.report.comparison import split_facts
from poodle_lightning.types import ClassSet, UserError

METHODS = ("poodle", "byol")
SMALL = ["--data.batch_size=2", "--data.size=[32,64]", "--model.hidden=16"]


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("videos")
    write_videos(folder, 3, seconds=1.0, fps=6.0, size=(48, 96), supersample=1)
    return folder


@pytest.fixture
def trained(monkeypatch):
    """Trains in this process; the names of the runs that were started, and their words."""
    started = []

    def launch(start, threads):
        started.append(start)
        return SimpleNamespace(poll=lambda: 0, returncode=cli.main(["fit", *start.words]))

    monkeypatch.setattr(_pretraining, "launch", launch)
    brief = ReadoutRecipe(steps=3, images=2, pixels=64)
    monkeypatch.setattr(_readings, "READOUT", brief)
    monkeypatch.setattr(probes, "_READOUT", brief)
    monkeypatch.setitem(_trials.SCALES, "tiny", Scale("data/demo.yaml", (32, 64), 50))
    return started


def compare(videos, *words, methods=METHODS):
    given = ["--methods", ",".join(methods), "--data.root", str(videos), "--labelled-images", "6", *SMALL]
    return cli.main(["compare", *given, *words])


@pytest.mark.filterwarnings("ignore")
def test_each_is_trained_once_and_the_table_is_that_of_its_checkpoints(
    videos, trained, tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    assert compare(videos, "--steps", "2", "--seeds", "2") == 0
    said = capsys.readouterr().out
    assert [re.sub("_[0-9a-f]{8}$", "", start.name) for start in trained] == [
        *("poodle_seed0", "byol_seed0", "poodle_seed1", "byol_seed1"),
    ]  # fmt: skip
    out = Path("compare")
    for word in ("generated streets", "± ", "untrained, as poodle", "untrained, as byol", "position alone"):
        assert word in said
    assert "not equal: decoder: poodle SDM, byol –" in said
    assert "its stride" not in said.split("not equal", 1)[1]
    assert "equal, recipe: optimizer adamw, lr 0.002" in said
    found = json.loads((out / "comparison.json").read_text())
    rows = {row["name"]: row for row in found["rows"]}
    assert list(rows) == [*METHODS, "untrained, as poodle", "untrained, as byol", "position alone"]
    # read out here once more, from the checkpoint of a run
    streets = StreetLabels(train=6, val=3, size=(32, 64))
    labels = LabelledDataModule("synthetic", synthetic=streets)
    sample = [labels.sample(split, count, (32, 64), seed=1) for split, count in (("train", 6), ("val", 3))]
    for seed, start in ((0, trained[1]), (1, trained[3])):
        run = next((out / "runs" / start.name).iterdir())
        # BYOL has no decoder: it is read out dilated
        encoder = dilate(from_pretrained(run / "checkpoints" / "last.ckpt"), 8)
        assert torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 2
        read = linear_readout(encoder, *sample, labels.classes, _readings.READOUT).confusion
        assert rows["byol"]["scores"]["linear_miou"][seed] == pytest.approx(read.miou(), rel=1e-9)
    one, two = rows["poodle"]["scores"]["knn_miou"]
    assert found["summary"]["poodle"]["knn_miou"]["mean"] == pytest.approx((one + two) / 2)
    assert found["summary"]["poodle"]["knn_miou"]["std"] == pytest.approx(abs(one - two) / math.sqrt(2))
    assert rows["poodle"]["parameters"] > rows["byol"]["parameters"]
    assert {steps for each in found["curves"].values() for steps in map(str, _steps(each))} == {"[1.0, 2.0]"}
    for name in ("comparison.png", "curves.png"):
        assert (out / name).read_bytes().startswith(b"\x89PNG")
    assert "| poodle " in (out / "comparison.md").read_text()

    # a second time nothing is trained or read out: it prints
    before = {path: path.stat().st_mtime_ns for path in (out / "runs").rglob("*") if path.is_file()}
    monkeypatch.setattr(_readings, "linear_readout", None)
    assert compare(videos, "--steps", "2", "--seeds", "2") == 0
    assert len(trained) == 4
    assert before == {path: path.stat().st_mtime_ns for path in (out / "runs").rglob("*") if path.is_file()}
    again = capsys.readouterr().out
    assert again[again.index("mIoU in %") :] == said[said.index("mIoU in %") :]


def _steps(measures):
    return [seed[0] for seed in measures["linear_miou"].values()]


@pytest.mark.filterwarnings("ignore")
def test_what_broke_off_goes_on_and_what_was_changed_starts_anew(videos, trained, tmp_path, capsys):
    words = ["--out", str(tmp_path), "--seeds", "1", "--steps", "3"]
    assert compare(videos, *words, methods=["byol"]) == 0
    [start] = trained
    run = next((tmp_path / "runs" / start.name).iterdir())
    # as a run that was killed after its second step leaves it
    for path in (run / "checkpoints").iterdir():
        if "step=0000002" not in path.name:
            path.unlink()
    (tmp_path / "readouts.json").unlink()
    assert compare(videos, *words, methods=["byol", "flowe"]) == 0
    assert [re.sub("_seed0_.*", "", start.name) for start in trained] == ["byol", "byol", "flowe"]
    assert trained[1].name == start.name
    assert list(trained[1].words)[-2:] == ["--ckpt_path", "last"]
    assert "--ckpt_path" not in trained[2].words
    assert [path.name for path in run.parent.iterdir()] == [run.name]
    assert torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 3
    # the other settings are another run; what there is stays
    assert compare(videos, *words, "--data.gap=[0.3,0.6]", methods=["byol"]) == 0
    assert trained[3].name not in [start.name for start in trained[:3]]
    assert len(list((tmp_path / "runs").iterdir())) == 3


def test_a_failed_run_is_named_and_the_others_go_on(monkeypatch):
    codes = {"a": 0, "b": 1, "c": 0}
    running = []

    def launch(start, threads):
        assert threads == 2
        running.append(start.name)
        return SimpleNamespace(poll=lambda: codes[start.name], returncode=codes[start.name])

    monkeypatch.setattr(_pretraining, "launch", launch)
    told = []
    starts = [Start(name, []) for name in codes]
    failed = side_by_side(starts, 2, 2, lambda start, well: told.append((start.name, well)))
    assert [start.name for start in failed] == ["b"]
    assert running == ["a", "b", "c"]
    assert told == [("a", True), ("b", False), ("c", True)]


def test_at_most_so_many_run_at_once_and_an_interruption_stops_them(monkeypatch):
    ended = []

    class Process:
        returncode = None

        def poll(self):
            return self.returncode

        def terminate(self):
            self.returncode = 143

        def wait(self):
            ended.append(self.returncode)

    started = []
    monkeypatch.setattr(_pretraining, "launch", lambda start, threads: started.append(start) or Process())

    def interrupted(seconds):
        raise KeyboardInterrupt

    monkeypatch.setattr(_pretraining.time, "sleep", interrupted)
    with pytest.raises(KeyboardInterrupt):
        side_by_side([Start(name, []) for name in "abc"], 1, 2)
    assert len(started) == 2
    assert ended == [143, 143]


def test_methods_by_name_by_alias_and_with_patches():
    poodle, pooled, patched = entrants("poodle, pooled,byol+byol_frames", "tiny")
    assert (poodle.model.name, poodle.patches) == ("poodle_tiny.yaml", ())
    assert (pooled.model.name, pooled.patches[0].name) == ("poodle_tiny.yaml", "pooled_alone.yaml")
    assert (patched.name, patched.patches[0].name) == ("byol+byol_frames", "byol_frames.yaml")
    assert [one.model.name for one in entrants("poodle,flowe,byol,sdm", "small")] == [
        *("poodle_small.yaml", "flowe_small.yaml", "byol_small.yaml", "poodle_small.yaml"),
    ]  # fmt: skip


@pytest.mark.parametrize("size", ["tiny", "small"])
def test_what_is_compared_has_one_recipe_and_one_encoder_but_for_its_dilation(size, tmp_path):
    made = {}
    for one in entrants("poodle,flowe,byol,pooled,sdm", size):
        base = tmp_path / f"{one.name}.yaml"
        base.write_text(f"model: {one.model}\n")
        made[one.name], _ = cli.build([base, *one.patches], ["--data.root=videos"])
    recipes = {name: vars(method.recipe) for name, method in made.items()}
    assert all(recipe == recipes["poodle"] for recipe in recipes.values())
    encoders = {name: method.online.encoder.init_args for name, method in made.items()}
    _, different = split_facts(encoders)
    assert set(different) == {"output_stride"}
    assert made["pooled"].online.decoder is None
    assert made["sdm"].pooled_weight == 0


@pytest.mark.parametrize(
    ("words", "say"),
    [
        (["--methods", "pooodle"], "did you mean poodle"),
        (["--methods", "poodle+pooled_alon"], "pooled_alone"),
        (["--methods", "byol,byol"], "once"),
        (["--methods", ","], "at least one"),
        (["--stepps", "3"], "did you mean --steps"),
        (["--trainer.max_steps", "3"], "use --steps"),
        (["--seeds", "0"], "1 or more"),
        (["--labelled", "nowhere"], "no such folder"),
        (["--labelled", "data/folder.yaml"], "not labelled data"),
        (["--labelled", "data/labelled_cityscapes.yaml"], "give --labelled-root"),
        (["--data.root", "nowhere"], "nowhere"),
        (["--data.gapp", "3"], "did you mean gap"),
    ],
)
def test_what_does_not_fit_is_one_line_and_starts_nothing(words, say, videos, trained, tmp_path, capsys):
    root = [] if "--data.root" in words else ["--data.root", str(videos)]
    assert cli.main(["compare", *words, *root, "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert say in said[-1]
    assert not any("Traceback" in line for line in said)
    assert not trained


def test_without_videos_it_says_what_to_give(capsys):
    assert cli.main(["compare"]) == 2
    assert "--data.root" in capsys.readouterr().err


def test_labelled_data_of_a_file_of_a_folder_and_generated(tmp_path):
    assert labelled_data(str(tmp_path), None, 4, 2, (8, 16))["init_args"]["root"] == str(tmp_path)
    made = labelled_data(None, None, 4, 2, (8, 16))["init_args"]["synthetic"]
    assert made == {"train": 4, "val": 2, "size": [8, 16]}
    path = tmp_path / "mine.yaml"
    path.write_text("class_path: poodle_lightning.LabelledDataModule\ninit_args: {source: voc, root: null}\n")
    assert labelled_data(str(path), "there", 4, 2, (8, 16))["init_args"] == {"source": "voc", "root": "there"}
    with pytest.raises(UserError, match="no such"):
        labelled_data("data/labelled_nothing.yaml", None, 4, 2, (8, 16))


def test_other_labels_are_read_out_anew(tmp_path):
    """A mask or a class name may change without any file's size."""
    (tmp_path / "masks").mkdir()
    mask = tmp_path / "masks" / "a.png"
    mask.write_bytes(b"0123")
    videos, labels = folder_content(str(tmp_path)), folder_content(str(tmp_path), times=True)
    os.utime(mask, ns=(1, 1))
    assert folder_content(str(tmp_path)) == videos
    assert folder_content(str(tmp_path), times=True) != labels
    one, other = ClassSet(("road", "sky")), ClassSet(("sky", "road"))
    assert digest([one]) != digest([other])

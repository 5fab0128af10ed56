"""Bad files, folders, settings and checkpoints, as users meet them: a counted skip or one line.

All of it goes through the command line with a real method in a tiny size.
"""

import importlib.util
import json
import os
import shutil
from pathlib import Path

import av
import lightning.pytorch  # noqa: F401  # its log handlers keep the stderr of the moment of import
import numpy as np
import pytest
import torch
from films import FPS, H, W, film, sequential

from poodle_lightning import cli
from poodle_lightning.data.encode import write_video

FRAMES = 45  # 1.5 s
GAP = 0.5
ENCODER = "{class_path: poodle_lightning.nn.resnet.ResNet, init_args: {depth: 10, width: %d}}"
TINY = [
    *("--model.hidden=16", "--model.out=8", "--name=tiny", "--checkpoint.every_minutes=null"),
    *("--trainer.accelerator=cpu", "--trainer.max_steps=2", "--trainer.log_every_n_steps=1"),
    *("--data.size=[32, 32]", f"--data.gap=[{GAP}, {GAP}]", "--data.batch_size=2"),
    *("--data.num_workers=0", "--data.val_fraction=0"),
]
BYOL = ["--model=method/byol_tiny.yaml", "--model.crop.size=[32, 32]"]
FLOWE = ["--model=method/flowe_tiny.yaml", "--model.flow=poodle_lightning.flow.given.ZeroFlow"]


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    folder = tmp_path_factory.mktemp("good")
    for number in range(3):
        write_video(folder / f"good{number}.mp4", film(FRAMES, seed=number), FPS, gop=9)
    return folder


@pytest.fixture
def videos(good, tmp_path, monkeypatch):
    """Three good films in ``videos``, in the working folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("POODLE_CACHE", str(tmp_path / "cache"))
    shutil.copytree(good, tmp_path / "videos")
    return tmp_path / "videos"


def fit(*words, verb="fit", method=BYOL, width=8):
    return cli.main([verb, *method, f"--model.encoder={ENCODER % width}", *TINY, *words])


def runs():
    return sorted(Path("runs").glob("*/*"))


def step_of(run, name="last"):
    return torch.load(run / f"checkpoints/{name}.ckpt", weights_only=True)["global_step"]


def ledger(run):
    """Lines of ``skipped.jsonl``: refused files, failed requests, sums of the epochs."""
    lines = [json.loads(line) for line in (run / "skipped.jsonl").read_text().splitlines()]
    stages = {"index": [], "train": [], "epoch": []}
    for line in lines:
        stages[line["stage"]].append(line)
    return list(stages.values())


def error_line(capsys):
    """The one line that says what is wrong, the last that the command prints."""
    said = capsys.readouterr().err
    assert "Traceback" not in said
    lines = said.splitlines()
    assert [line for line in lines if line.startswith("error: ")] == lines[-1:]
    return lines[-1]


# ---- files that cannot be used at all: found while the folder is measured
def _audio(path):
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=16_000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 16_000), np.float32), format="fltp", layout="mono")
        frame.rate = 16_000
        container.mux(stream.encode(frame) + stream.encode())


def _truncated(path):
    write_video(path, film(FRAMES), FPS)
    os.truncate(path, path.stat().st_size * 7 // 10)


REFUSED = {
    "text": ("not_a_video", lambda path: path.write_text("hello\n" * 100)),
    "truncated": ("truncated", _truncated),
    "zero-length": ("empty", lambda path: path.touch()),
    "audio only": ("no_video_stream", _audio),
    "one frame": ("too_short", lambda path: write_video(path, film(1), FPS)),
    "shorter than the gap": ("too_short", lambda path: write_video(path, film(int(GAP * FPS)), FPS)),
}


def _check_refused(run, path, reason):
    (refused,), failed, epochs = ledger(run)
    assert (Path(refused["path"]), refused["reason"]) == (path, reason)
    assert refused["detail"]
    assert "\n" not in refused["detail"]
    assert failed == []
    # three films are left, and a batch takes two: one step an epoch
    assert [(line["requested"], line["used"], line["skipped"]) for line in epochs] == [(2, 2, {})] * 2


@pytest.mark.parametrize("name", REFUSED)
def test_an_unusable_file_is_listed_and_the_others_train(videos, name):
    reason, make = REFUSED[name]
    make(videos / "bad.mp4")
    assert fit("--data.root=videos", "--data.max_skip_fraction=0") == 0
    (run,) = runs()
    _check_refused(run, videos / "bad.mp4", reason)
    assert step_of(run) == 2


def test_an_unreadable_file_is_listed_and_the_others_train(videos, monkeypatch):
    path = videos / "bad.mp4"
    shutil.copy(videos / "good0.mp4", path)
    path.chmod(0)
    access = os.access
    if access(path, os.R_OK):  # root reads everything
        monkeypatch.setattr(os, "access", lambda name, *rest: Path(name) != path and access(name, *rest))
    assert fit("--data.root=videos") == 0
    (run,) = runs()
    _check_refused(run, path, "unreadable")


def test_every_run_lists_what_is_refused_also_when_the_folder_is_measured_already(videos):
    (videos / "bad.mp4").write_text("hello\n" * 100)
    assert fit("--data.root=videos") == 0
    assert fit("--data.root=videos") == 0
    for run in runs():
        _check_refused(run, videos / "bad.mp4", "not_a_video")


# ---- files that show their fault only when they are used
def _corrupt_middle(path, seed=7):
    """Between the first and the last group of pictures nothing is left: every pair touches it."""
    write_video(path, film(FRAMES, seed=seed), FPS, gop=9)
    with av.open(str(path)) as container:
        keys = [entry.pos for entry in container.streams.video[0].index_entries if entry.is_keyframe]
    content = bytearray(path.read_bytes())
    content[keys[1] : keys[-1]] = bytes(keys[-1] - keys[1])
    path.write_bytes(content)


FAILING = {
    "corrupt middle": ("corrupt", _corrupt_middle, []),
    "smaller than the crop": (
        "too_small",
        lambda path: write_video(path, film(FRAMES, 24, 24), FPS),
        ["--data.scale=[1, 1]", "--data.reference=null"],
    ),
}


def _check_counted(run, path, reason):
    refused, failed, (epoch,) = ledger(run)
    assert refused == []
    assert failed
    assert all((Path(line["path"]), line["reason"]) == (path, reason) and line["detail"] for line in failed)
    assert epoch["skipped"] == {reason: len(failed)}
    assert epoch["requested"] == epoch["used"] + len(failed)
    return epoch["used"]


@pytest.mark.parametrize("name", FAILING)
def test_a_failing_file_is_counted_and_replaced(videos, name):
    reason, make, words = FAILING[name]
    make(videos / "bad.mp4")
    assert fit("--data.root=videos", *words) == 0
    (run,) = runs()
    assert _check_counted(run, videos / "bad.mp4", reason) == 2 * 2  # both batches are full


@pytest.mark.parametrize("name", FAILING)
def test_where_no_skip_is_allowed_the_run_stops_with_a_line_and_a_checkpoint(videos, good, name, capsys):
    reason, make, words = FAILING[name]
    make(videos / "bad.mp4")
    assert fit("--data.root=videos", "--data.max_skip_fraction=0", *words) == 2
    line = error_line(capsys)
    assert f"({reason} 1)" in line
    assert "max_skip_fraction 0" in line
    (run,) = runs()
    assert f"{run}/skipped.jsonl" in line
    _check_counted(run, videos / "bad.mp4", reason)
    assert step_of(run, "interrupted") < 2
    assert fit(f"--data.root={good}", f"--ckpt_path={run}") == 0
    assert step_of(runs()[1]) == 2


@pytest.mark.parametrize("name", FAILING)
def test_where_every_file_fails_the_run_stops_at_once_with_a_checkpoint(videos, name, capsys):
    reason, make, words = FAILING[name]
    for path in videos.iterdir():
        make(path)
    assert fit("--data.root=videos", *words) == 2
    line = error_line(capsys)
    assert f"{reason} " in line
    assert str(videos) in line
    (run,) = runs()
    assert step_of(run, "interrupted") == 0


def test_a_frame_smaller_than_the_crop_is_enlarged_where_the_window_is_a_share_of_it(videos):
    write_video(videos / "small.mp4", film(FRAMES, 24, 24), FPS)
    assert fit("--data.root=videos", "--data.max_skip_fraction=0") == 0
    _check_all_used(runs()[0])


# ---- files that are merely unusual
UNEVEN = np.cumsum([0.0, *np.tile([0.02, 0.05, 0.011, 0.1], FRAMES // 4)]).tolist()
UNUSUAL = {
    "odd size": ({"codec": "libvpx-vp9"}, ".webm", (H - 1, W - 1)),
    "rotated": ({"rotation": 90}, ".mp4", (H, W)),
    "10-bit": ({"pix_fmt": "yuv420p10le"}, ".mp4", (H, W)),
    "variable rate": ({"times": UNEVEN}, ".mp4", (H, W)),
}


def _is_unusual(name, path):
    """The file is what it should be, by the decoder alone."""
    with av.open(str(path)) as container:
        frame = next(container.decode(video=0))
    intervals = np.diff(sequential(path)[0])
    return {
        "odd size": (frame.height, frame.width) == (H - 1, W - 1) and frame.format.name == "yuv420p",
        "rotated": frame.rotation == 90,
        "10-bit": frame.format.components[0].bits == 10,
        "variable rate": intervals.max() > 5 * intervals.min(),
    }[name]


def _check_all_used(run):
    refused, failed, (epoch,) = ledger(run)
    assert refused == failed == []
    assert (epoch["requested"], epoch["used"], epoch["skipped"]) == (4, 4, {})  # four films, each once


@pytest.mark.parametrize("name", UNUSUAL)
def test_an_unusual_film_is_used_like_any_other(videos, name):
    options, suffix, size = UNUSUAL[name]
    path = videos / f"unusual{suffix}"
    write_video(path, film(FRAMES, *size), FPS, **options)
    assert _is_unusual(name, path)
    assert fit("--data.root=videos", "--data.max_skip_fraction=0") == 0
    _check_all_used(runs()[0])


# ---- folders
def _write_only(count):
    return lambda path: write_video(path / "bad.mp4", film(count), FPS)


ROOTS = {
    "missing": (Path.rmdir, ["{root}", "does not exist", "--data.root"]),
    "a file": (lambda path: [path.rmdir(), path.touch()], ["{root}", "not a folder", "--data.root"]),
    "empty": (lambda path: None, ["{root}", "no video found", ".mp4", "--data.root"]),
    "no video in it": (lambda path: (path / "notes.txt").touch(), ["{root}", "no video found", ".mp4"]),
    "text": (lambda path: (path / "bad.mp4").write_text("hello"), ["{root}/bad.mp4", "1 not_a_video"]),
    "one frame": (_write_only(1), ["{root}", "lasts", "smaller gap"]),
    "shorter than the gap": (_write_only(int(GAP * FPS)), ["{root}", "lasts", "smaller gap"]),
    "too short to hold some out": (_write_only(20), ["{root}/bad.mp4", "val_fraction"]),
}


@pytest.mark.parametrize("name", ROOTS)
def test_a_bad_folder_is_one_line_that_names_it_and_leaves_no_run(tmp_path, monkeypatch, capsys, name):
    make, said = ROOTS[name]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("POODLE_CACHE", str(tmp_path / "cache"))
    root = tmp_path / "there"
    root.mkdir()
    make(root)
    assert fit(f"--data.root={root}", f"--data.val_fraction={0.05 if 'hold' in name else 0}") == 2
    line = error_line(capsys)
    assert [words for words in said if words.format(root=root) not in line] == []
    assert runs() == []


def test_no_folder_at_all_is_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert fit() == 2
    assert "--data.root" in error_line(capsys)
    assert list(tmp_path.iterdir()) == []


# ---- settings
@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("modle: {class_path: BYOL}", "modle.class_path: did you mean model.class_path?"),
        ("model: {hiden: 3}", "model.hiden: BYOL has no such option: did you mean hidden?"),
        ("model: {encoder: {init_args: {widht: 3}}}", "model.encoder.widht: ResNet has no such option"),
        ("data: {batch_sise: 3}", "VideoDataModule has no such option: did you mean batch_size?"),
        ("trainer: {max_step: 3}", "trainer.max_step: did you mean trainer.max_steps?"),
        ("data: {scale: [0.01, 0.02], area: null}", "raise scale or reduce size"),
    ],
)
def test_a_wrong_key_of_a_file_is_one_line_that_names_it(videos, capsys, text, said):
    Path("mine.yaml").write_text(f"{text}\n")
    experiment = ["--config=experiment/demo_byol.yaml", "--config=mine.yaml"]
    assert cli.main(["fit", *experiment, "--data.source=folder", "--data.root=videos", *TINY]) == 2
    assert said in error_line(capsys)
    assert runs() == []


NAMES = ["BYOLL", "poodle_lightning.BYOLL", "poodle_lightning.methods.byol.BYOLL", "method/byoll_tiny.yaml"]


@pytest.mark.parametrize("word", [*(f"--model={name}" for name in NAMES), "--config=mine.yaml"])
def test_a_wrong_name_of_a_method_is_one_line_with_the_right_one(videos, capsys, word):
    Path("mine.yaml").write_text("model: {class_path: poodle_lightning.BYOLL}\n")
    assert cli.main(["fit", word, "--data.root=videos"]) == 2
    line = error_line(capsys)
    assert "BYOLL" in line or "byoll_tiny.yaml" in line
    assert "did you mean BYOL?" in line or "did you mean method/byol_tiny.yaml?" in line
    assert runs() == []


LOGGERS = {"tensorboard": "lightning.fabric.loggers.tensorboard", "wandb": "lightning.pytorch.loggers.wandb"}


def _pretend_absent(monkeypatch, package):
    """Where the package is installed, lets Lightning find that it is not."""
    if importlib.util.find_spec(package) is None:
        return
    flags = vars(importlib.import_module(LOGGERS[package]))
    for flag in [flags[name] for name in flags if name.startswith(("_TENSORBOARD", "_WANDB"))]:
        monkeypatch.setattr(flag, "available", False, raising=False)
        monkeypatch.setattr(flag, "message", f"Requirement '{flag.requirement}' not met.", raising=False)


@pytest.mark.parametrize(
    ("package", "extra", "words"),
    [
        ("tensorboard", "log", ["TensorBoardLogger", "--trainer.logger.save_dir=logs"]),
        ("wandb", "wandb", ["lightning.pytorch.loggers.WandbLogger"]),
        ("wandb", "wandb", ["[{class_path: lightning.pytorch.loggers.WandbLogger}]"]),
    ],
)
def test_a_missing_extra_is_one_line_that_says_how_to_install_it(
    videos, monkeypatch, capsys, package, extra, words
):
    _pretend_absent(monkeypatch, package)
    assert fit("--data.root=videos", f"--trainer.logger={words[0]}", *words[1:]) == 2
    line = error_line(capsys)
    assert package in line
    assert f"pip install 'poodle-lightning[{extra}]'" in line
    assert runs() == []


# ---- a checkpoint of another architecture
OTHERS = {
    "wider encoder": ({"width": 16}, [], "online.encoder.conv1.weight"),
    "other heads": ({}, ["--model.out=16"], "online.projector.3.weight"),
    "other method": ({"method": FLOWE}, [], "online.projector."),
}


@pytest.fixture(scope="module")
def trained(good, tmp_path_factory):
    root = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("POODLE_CACHE", str(root / "cache"))
        assert fit(f"--data.root={good}", f"--trainer.default_root_dir={root / 'runs'}") == 0
    return next((root / "runs/tiny").iterdir())


@pytest.mark.parametrize("verb", ["fit", "validate"])
@pytest.mark.parametrize("name", OTHERS)
def test_a_checkpoint_of_another_architecture_is_one_line_and_leaves_no_run(
    videos, trained, capsys, name, verb
):
    settings, words, where = OTHERS[name]
    assert fit("--data.root=videos", f"--ckpt_path={trained}", *words, verb=verb, **settings) == 2
    line = error_line(capsys)
    said = ["--ckpt_path", "another architecture", where, "config.yaml"]  # the one beside it is right
    assert [words for words in said if words not in line] == []
    assert runs() == []


def test_a_run_is_not_touched_by_going_on_with_another_architecture(videos, capsys):
    assert fit("--data.root=videos") == 0
    (run,) = runs()
    before = {path: path.read_bytes() for path in (run / "config.yaml", run / "env.json")}
    assert fit("--data.root=videos", "--ckpt_path=last", "--model.out=16") == 2
    assert "another architecture" in error_line(capsys)
    assert {path: path.read_bytes() for path in before} == before
    assert fit("--data.root=videos", "--ckpt_path=last", "--trainer.max_steps=4") == 0

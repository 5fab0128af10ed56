"""``report``: finds the run, draws from its checkpoint, and still shows the curves when the data is gone."""

import argparse
import inspect
import shutil
from pathlib import Path

import pytest
import torch

from poodle_lightning import cli
from poodle_lightning.commands import report
from poodle_lightning.hub import save_pretrained
from poodle_lightning.methods.base import Method
from poodle_lightning.nn.online import Online
from poodle_lightning.nn.resnet import ResNet
from poodle_lightning.ops.geometry import Affine
from poodle_lightning.types import Clip, UserError


class Plain(Method):
    def __init__(self):
        super().__init__()
        self.online = Online(ResNet(depth=10, width=8))


class Data:
    """A data module with one held-out batch."""

    def __init__(self, held_out=True):
        self.held_out = held_out

    def prepare_data(self):
        pass

    def setup(self, stage):
        assert stage == "fit"

    def loader(self):
        frames = torch.zeros(2, 2, 3, 32, 64, dtype=torch.uint8)
        index = torch.arange(2)
        return [Clip(frames, Affine.identity(2), (32, 64), torch.zeros(2, 2), index, index)]

    train_dataloader = loader

    def val_dataloader(self):
        return self.loader() if self.held_out else []


def parsed(*words):
    parser = argparse.ArgumentParser()
    report.add_arguments(parser)
    return parser.parse_args(words)


@pytest.fixture
def root(tmp_path):
    """Runs a (two starts) and b (one, the newest)."""
    for place in ("a/2026-01-01_00-00-00", "a/2026-01-02_00-00-00", "b/2026-01-03_00-00-00"):
        folder = tmp_path / place
        (folder / "checkpoints").mkdir(parents=True)
        (folder / "config.yaml").write_text("model: Plain\n")
        (folder / "metrics.csv").write_text("step,train/loss\n0,1.0\n1,0.5\n")
        torch.save(
            {"state_dict": Plain().state_dict(), "global_step": 41}, folder / "checkpoints" / "last.ckpt"
        )
    (tmp_path / "stray").mkdir()
    return tmp_path


def test_finds_a_run_by_folder_name_and_age(root):
    assert report.find_run(root, str(root / "a" / "2026-01-01_00-00-00")).name == "2026-01-01_00-00-00"
    assert report.find_run(root, "a").name == "2026-01-02_00-00-00"
    assert report.find_run(root, None).parent.name == "b"


def test_an_unknown_run_is_answered_with_the_known_ones(root):
    with pytest.raises(UserError, match=r"stray.*a, b"):
        report.find_run(root, "stray")
    with pytest.raises(UserError, match="no run"):
        report.find_run(root / "stray", None)


def test_draws_from_the_checkpoint(root, capsys):
    asked = []
    method = Plain()

    def build(configs, overrides):
        asked.append((configs, overrides))
        return method, Data()

    assert report.run(parsed("--run", "a", "--root", str(root)), build) == 0
    folder = root / "a" / "2026-01-02_00-00-00"
    assert asked == [([str(folder / "config.yaml")], [])]
    assert capsys.readouterr().out.strip() == str(folder / "report" / "index.html")
    page = (folder / "report" / "index.html").read_text()
    for words in (">Loss<", "Held-out pairs", ">Features<", "Plain", "41"):
        assert words in page
    saved = torch.load(folder / "checkpoints" / "last.ckpt")["state_dict"]
    assert all(torch.equal(value, saved[name]) for name, value in method.state_dict().items())


def test_without_held_out_videos_it_shows_training_frames(root):
    report.run(parsed("--last", "--root", str(root)), lambda *_: (Plain(), Data(held_out=False)))
    assert "Training pairs" in (root / "b" / "2026-01-03_00-00-00" / "report" / "index.html").read_text()


def test_the_encoder_that_a_run_began_from_may_be_gone(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    save_pretrained(ResNet(10, width=8), "first")
    data = ["--data.source=synthetic", "--data.synthetic={videos: 4, seconds: 1.0, size: [48, 96]}"]
    words = ["--model=method/pico_tiny.yaml", "--model.encoder=first", "--model.queue=8", "--model.places=4"]
    sampler = "--data.sampler=poodle_lightning.data.sampling.ClipSampler"
    sampler += " --data.sampler.frames=1 --data.sampler.step=1.0"
    more = ["--data.size=[32, 64]", *sampler.split(), "--data.num_workers=0", "--trainer.max_steps=1"]
    assert cli.main(["fit", *words, *data, *more, "--data.batch_size=2", "--trainer.accelerator=cpu"]) == 0
    shutil.rmtree("first")
    assert cli.main(["report", "--last", "--labelled=0"]) == 0
    said = capsys.readouterr()
    assert "error" not in said.err
    assert "first" not in said.err.partition("run folder")[2]
    assert ">Features<" in Path(said.out.strip().splitlines()[-1]).read_text()


def test_curves_are_shown_even_if_the_data_is_gone(root, tmp_path, capsys):
    def build(configs, overrides):
        raise UserError("/gone: no such folder")

    out = tmp_path / "page.html"
    assert report.run(parsed("--last", "--root", str(root), "--out", str(out)), build) == 0
    assert "/gone: no such folder" in capsys.readouterr().err
    assert ">Loss<" in out.read_text()
    assert ">Features<" not in out.read_text()


def test_a_run_that_never_saved_shows_its_curves(root, capsys):
    folder = root / "b" / "2026-01-03_00-00-00"
    (folder / "checkpoints" / "last.ckpt").unlink()
    assert report.run(parsed("--run", str(folder)), lambda *_: pytest.fail("built")) == 0
    assert "no checkpoint" in capsys.readouterr().err


def test_which_run_must_be_said():
    with pytest.raises(SystemExit):
        parsed()


def test_command_interface():
    assert report.NAME == "report"
    assert report.HELP
    assert list(inspect.signature(report.run).parameters) == ["args", "build"]

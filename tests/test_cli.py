"""The user's own command lines, from end to end, on a stand-in model."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path

import lightning.pytorch  # noqa: F401  # its log handlers keep the stderr of the moment of import
import pytest
import torch
import yaml
from toy_run import make_configs, rows, run, runs_of, weights

from poodle_lightning import cli, recipes


@pytest.fixture
def folder(tmp_path, monkeypatch):
    make_configs(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


# ---- the run folder
def test_a_run_writes_everything_into_one_folder_and_nothing_beside_it(folder):
    before = set(folder.iterdir())
    assert run("fit", "--data.root", "videos/", "--data.num_workers", "0", "--model.trunk.width", "6") == 0
    assert set(folder.iterdir()) - before == {folder / "runs"}
    (found,) = runs_of()
    config = yaml.safe_load((found / "config.yaml").read_text())
    assert config["name"] == "toy"
    assert config["data"]["init_args"]["root"] == "videos/"
    assert config["model"]["init_args"]["trunk"]["init_args"]["width"] == 6
    assert config["model"]["init_args"]["rule"]["rate"] == 0.01
    names = {path.name for path in (found / "checkpoints").iterdir()}
    assert names == {"last.ckpt", "epoch=0000-step=0000006.ckpt", "epoch=0001-step=0000012.ckpt"}
    assert [int(row["step"]) for row in rows(found)] == list(range(12))
    assert all(float(row["train/loss"]) > 0 and float(row["perf/pairs_per_s"]) > 0 for row in rows(found))
    env = json.loads((found / "env.json").read_text())
    assert env["data"] == {"batches_per_epoch": 6, "clips": 24, "global_batch": 4}
    assert env["versions"]["torch"] == torch.__version__.split("+")[0]
    assert "--data.root videos/" in env["command"]
    assert "run folder" in (found / "train.log").read_text()
    assert weights(found / "checkpoints/last.ckpt")["trunk.layer.weight"].shape == (6, 4)


def test_running_twice_gives_two_folders_and_validate_afterwards_works(folder):
    assert run("fit") == 0
    assert run("fit") == 0
    assert len(runs_of()) == 2
    assert run("validate") == 0
    newest = runs_of()[1]
    assert run("validate", "--ckpt_path", "last") == 0
    with (newest / "validate/metrics.csv").open() as file:
        measured = float(next(csv.DictReader(file))["val/loss"])
    assert measured == pytest.approx(float(rows(newest)[-1]["val/loss"]), rel=1e-5)


def test_the_saved_config_repeats_the_run_under_the_same_name(folder):
    assert run("fit", "--name", "mine") == 0
    (first,) = runs_of("mine")
    assert cli.main(["fit", "--config", str(first / "config.yaml"), "--allow", "stand_in"]) == 0
    again = runs_of("mine")[1]
    both = [weights(found / "checkpoints/last.ckpt") for found in (first, again)]
    assert all(torch.equal(both[0][key], both[1][key]) for key in both[0])


def test_last_goes_on_in_the_folder_and_an_explicit_path_starts_a_new_one(folder):
    assert run("fit", "--trainer.max_epochs", "1") == 0
    assert run("fit", "--ckpt_path", "last") == 0
    (found,) = runs_of()
    assert [int(row["step"]) for row in rows(found)] == list(range(12))
    env = json.loads((found / "env.json").read_text())
    assert env["start_step"] == 6
    assert len(env["earlier"]) == 1
    assert run("fit", "--ckpt_path", str(found), "--trainer.max_epochs", "3") == 0
    assert [int(row["step"]) for row in rows(runs_of()[1])] == list(range(12, 18))


def test_last_without_an_earlier_run_starts_one_but_cannot_be_validated(folder, capsys):
    assert run("validate", "--ckpt_path", "last") == 2
    assert run("fit", "--ckpt_path", "last") == 0
    assert "starting a new one" in capsys.readouterr().err


def test_a_torn_newest_checkpoint_is_passed_over(folder, capsys):
    assert run("fit") == 0
    (found,) = runs_of()
    newest = found / "checkpoints/epoch=0001-step=0000012.ckpt"
    newest.write_bytes(newest.read_bytes()[:-100])
    assert run("fit", "--ckpt_path", "last", "--trainer.max_epochs", "3") == 0
    said = capsys.readouterr().err
    assert "truncated" in said
    assert "going on from" in said
    assert "epoch=0000-step=0000006.ckpt" in said
    assert [int(row["step"]) for row in rows(found)] == list(range(18))
    for path in (found / "checkpoints").glob("*.ckpt"):
        path.write_bytes(b"")
    assert run("fit", "--ckpt_path", "last") == 2


# ---- configurations
def test_files_are_layered_in_order_and_come_before_overrides(folder):
    words = ["--data.batch_size=3", "--config", "cfg/experiment/toy.yaml", "-c", "cfg/patch/wide.yaml"]
    model, data = cli.build(
        ["cfg/experiment/toy.yaml", "cfg/patch/wide.yaml"], ["--allow", "stand_in", *words[:1]]
    )
    assert model.trunk.layer.weight.shape == (7, 4)
    assert data.batch_size == 3
    request = cli.read_words(words)
    assert request.name == "toy+wide"
    assert request.words[-1] == "--data.batch_size=3"


def test_a_shipped_file_is_found_from_any_folder_and_a_local_one_comes_first(folder, tmp_path, monkeypatch):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.setattr(recipes, "roots", lambda: [tmp_path / "cfg"])
    monkeypatch.chdir(elsewhere)
    assert recipes.find("experiment/toy.yaml") == tmp_path / "cfg/experiment/toy.yaml"
    assert recipes.find("configs/experiment/toy") == tmp_path / "cfg/experiment/toy.yaml"
    model, _ = cli.build(["experiment/toy"], ["--allow", "stand_in"])
    assert model.trunk.layer.weight.shape == (5, 4)
    local = elsewhere / "experiment/toy.yaml"
    local.parent.mkdir()
    local.write_text("model: {class_path: stand_in.Toy}\ndata: {class_path: stand_in.ToyData}\n")
    assert recipes.find("experiment/toy.yaml") == local
    model, _ = cli.build(["experiment/toy"], ["--allow", "stand_in"])
    assert model.trunk.layer.weight.shape == (3, 4)


@pytest.mark.parametrize(
    ("words", "seed"),
    [
        ([], 0),
        (["--seed_everything", "5"], 5),
        (["--seed_everything", "5", "--data.seed", "7"], 7),
        (["--seed_everything", "5", "--data.seed", "0"], 0),
    ],
)
def test_the_data_take_the_seed_of_everything_unless_they_have_their_own(folder, words, seed):
    _, data = cli.build(["cfg/experiment/toy.yaml"], ["--allow", "stand_in", *words])
    assert data.seed == seed


def test_building_writes_nothing(folder):
    before = sorted(folder.rglob("*"))
    cli.build(["cfg/experiment/toy.yaml"], ["--allow", "stand_in"])
    assert sorted(folder.rglob("*")) == before


# ---- errors
@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["fit", "--model", "Toyy"], "model: no class Toyy: did you mean Toy?"),
        (["fit", "--model.trunc", "3"], "model.trunc: Toy has no such option: did you mean trunk?"),
        (["fit", "--model.trunk", "DeepTrunc"], "model.trunk: no class DeepTrunc: did you mean DeepTrunk?"),
        (["fit", "--model.trunk.width", "abc"], "model.trunk.width: expected int, not abc"),
        (["fit", "--model.trunk.widht", "3"], "DeepTrunk has no such option: did you mean width?"),
        (["fit", "--model.rule.rat", "3"], "model.rule.rat: Rule has no such option: did you mean rate?"),
        (["fit", "--data.roots", "x"], "data.roots: ToyData has no such option: did you mean root?"),
        (["fit", "--trainer.max_epoch", "3"], "trainer.max_epoch: did you mean trainer.max_epochs?"),
        (["fit", "--trainer.max_epochs", "x"], "trainer.max_epochs: expected int or null, not x"),
        (["fit", "--dta.root", "x"], "no such key: dta.root: did you mean data.root?"),
        (["fit", "--bogus", "1"], "no such key: bogus"),
        (["fit", "--config", "cfg/experiment/toi.yaml"], "did you mean cfg/experiment/toy.yaml?"),
        (["fit", "--config"], "--config needs a value"),
        (["fit", "--ckpt_path", "no.ckpt"], "no.ckpt: no such checkpoint"),
        (["fit", "--allow", "no_such_package"], "--allow no_such_package"),
        (["fit", "--trainer.accelerator", "gpuu"], "gpuu"),
        (["fit", "--trainer.callbacks.layr", "x"], "callbacks.layr: no callback of the configuration"),
        (["fti"], "no command 'fti': did you mean fit?"),
    ],
)
def test_errors_are_one_line_that_says_what_to_do(folder, capsys, words, said):
    verb, rest = words[0], words[1:]
    assert cli.main([verb, "--config", "cfg/experiment/toy.yaml", "--allow", "stand_in", *rest]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert said in lines[0]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("model: {init_args: {trunc: 3}}", "model.trunc: Toy has no such option: did you mean trunk?"),
        ("modell: {a: 1}", "no such key: modell.a: did you mean model.a?"),
        ("trainer: {max_epocs: 3}", "trainer.max_epocs: did you mean trainer.max_epochs?"),
        ("model: ../nope.yaml", "model: no file ../nope.yaml"),
        ("model: {class_path: Toy", "not valid YAML"),
        ("data: !!python/object/apply:os.mkdir ['made']", "not valid YAML"),
    ],
)
def test_errors_in_files_are_one_line(folder, capsys, text, said):
    (folder / "bad.yaml").write_text(text)
    assert run("fit", "--config", "bad.yaml") == 2
    err = capsys.readouterr().err
    assert said in err
    assert "Traceback" not in err
    assert not (folder / "made").exists()


def test_a_missing_video_folder_is_one_line_and_leaves_no_run(folder, capsys):
    words = ["--data.root", "nowhere", "--data.num_workers", "0", "--trainer.accelerator", "cpu"]
    assert cli.main(["fit", "--model", "stand_in.Toy", "--allow", "stand_in", *words]) == 2
    err = capsys.readouterr().err
    assert "nowhere" in err
    assert "Traceback" not in err
    assert list(Path("runs/Toy").iterdir()) == []


def test_debug_shows_the_traceback(folder, capsys):
    assert run("fit", "--ckpt_path", "no.ckpt", "--debug") == 2
    assert "Traceback" in capsys.readouterr().err


# ---- security
def test_a_foreign_class_is_refused_before_its_module_runs(folder, capsys):
    (folder / "foreign.py").write_text("open('touched', 'w').close()\nclass Model: pass\n")
    sys.path.insert(0, str(folder))
    try:
        for key in ("model", "data", "model.trunk", "trainer.callbacks"):
            assert run("fit", f"--{key}=foreign.Model") == 2
            assert (
                "foreign.Model may not be imported; if you trust it, add --allow foreign"
                in capsys.readouterr().err
            )
        assert not (folder / "touched").exists()
        assert "foreign" not in sys.modules
        assert run("fit", "--model=foreign.Model", "--allow", "foreign") == 2
        assert (folder / "touched").exists()
    finally:
        sys.path.remove(str(folder))


@pytest.mark.parametrize(
    "path", ["os.system", "subprocess.Popen", "torch.load", "lightning.pytorch.callbacks.os.system"]
)
def test_functions_that_run_code_are_refused(folder, capsys, path):
    assert run("fit", f"--model={path}") == 2
    assert "error: model" in capsys.readouterr().err


def test_a_package_is_allowed_for_its_own_command_only(folder):
    assert run("fit", "--trainer.fast_dev_run", "true") == 0
    assert cli.main(["fit", "--config", "cfg/experiment/toy.yaml"]) == 2


class Payload:
    def __reduce__(self):
        return (open, ("touched", "w"))


def test_a_checkpoint_with_code_in_it_is_refused(folder, capsys):
    torch.save({"state_dict": {}, "payload": Payload()}, "bad.ckpt")
    assert run("fit", "--ckpt_path", "bad.ckpt") == 2
    assert "refused" in capsys.readouterr().err
    assert not Path("touched").exists()


def test_a_checkpoint_of_another_architecture_is_one_line(folder, capsys):
    assert run("fit") == 0
    assert run("fit", "--ckpt_path", str(runs_of()[0]), "--model.trunk.width", "8") == 2
    err = capsys.readouterr().err
    assert "another architecture" in err
    assert "trunk.layer.weight" in err
    assert "Traceback" not in err


# ---- speed
@pytest.mark.parametrize("words", [["--help"], ["list"], ["--version"]])
def test_lists_do_not_wait_for_torch(words):
    code = (
        "import sys; from poodle_lightning.cli import main; "
        f"assert main({words!r}) == 0; assert not {{'torch', 'lightning', 'jsonargparse'}} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, timeout=240)


def test_one_clip_for_a_batch_norm_is_one_line(monkeypatch, capsys):
    monkeypatch.setattr(cli, "_dispatch", lambda words, stack: torch.nn.BatchNorm1d(3)(torch.zeros(1, 3)))
    assert cli.main(["fit"]) == 2
    said = capsys.readouterr().err
    assert "error: BatchNorm needs more than one clip on each device: raise --data.batch_size" in said
    assert "Traceback" not in said


def test_the_end_of_another_process_is_one_line(monkeypatch, capsys):
    """Gloo's words, and NCCL's."""
    for text in (
        "[pair.cc:561] Connection closed by peer [127.0.0.1]:1",
        "remote process exited",
    ):

        def gone(words, stack, text=text):
            raise RuntimeError(text)

        monkeypatch.setattr(cli, "_dispatch", gone)
        assert cli.main(["fit"]) == 2
        said = capsys.readouterr().err
        assert "another process of this run has ended: see its message" in said
        assert "Traceback" not in said


def test_a_reader_that_ends_early_is_no_error():
    """``poodle-lightning list | head -1``."""
    command = [sys.executable, "-m", "poodle_lightning", "list", "configs"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        process.stdout.close()
        said = process.stderr.read()
    assert (process.returncode, said) == (141, "")


def test_no_gpu_is_one_line_that_names_the_key(folder, capfd, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert run("fit", "--trainer.accelerator", "gpu") == 2
    assert "trainer.accelerator is gpu" in capfd.readouterr().err


def test_a_trainer_of_one_device_replaces_one_of_many():
    """``--trainer`` is layered over the experiment's: 4 nodes left in it would be waited for."""
    one, many = ("any", "cpu", "gpu1_bf16", "gpu1_fp32"), ("nodes4x8", "nodes4x8_fp32", "gpu8", "gpu4_fp32")
    folder = Path(__file__).parents[1] / "configs/trainer"
    for first in many:
        for second in one:
            merged = {}
            for name in (first, second):
                merged |= yaml.safe_load((folder / f"{name}.yaml").read_text())
            found = [merged[key] for key in ("devices", "num_nodes", "strategy", "sync_batchnorm")]
            assert found == [1, 1, "auto", False]

import pytest

from poodle_lightning.cli import main

WORDS = ["check-geometry", "--trials", "1", "--frame", "360x640", "--data.root=videos"]


@pytest.mark.parametrize("name", ["quickstart", "demo_flowe", "demo_byol"])
def test_shipped_configs_pass(name, capsys):
    assert main([*WORDS, "--config", f"experiment/{name}.yaml"]) == 0
    said = capsys.readouterr().out
    assert "passed: the limit is 0.01 px" in said


def test_the_authors_order_fails(capsys):
    words = ["--config", "experiment/demo_poodle.yaml", "--model.warp_order=code"]
    assert main([*WORDS, *words]) == 1
    assert "FAILED" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "--config"),
        (["--config", "experiment/quickstart.yaml", "--frame", "big"], "720x1280"),
        (["--config", "experiment/quickstart.yaml", "--data.area=null", "--data.scale=[0.75, 1.25]",
          "--data.reference=null", "--frame", "64x64"], "--frame 64x64"),
    ],
)  # fmt: skip
def test_what_is_missing_is_said_in_one_line(words, said, capsys):
    assert main([*WORDS, *words]) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert said in error[-1]
    assert "Traceback" not in "\n".join(error)

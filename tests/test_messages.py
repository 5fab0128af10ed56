"""What the parser's errors become: one line that names the key, what is wrong, what was perhaps meant."""

from __future__ import annotations

import lightning.pytorch  # noqa: F401  # its log handlers keep the stderr of the moment of import
import pytest

from poodle_lightning import cli

CLIPS = ["fit", "--model=method/byol_tiny.yaml", "--data=data/folder_clips.yaml", "--data.root=videos"]


@pytest.mark.parametrize(
    ("words", "line"),
    [
        # what a sampler refuses is not taken for "another kind of sampler"
        (["--data.sampler.frames=0"], "data.sampler: a clip needs frames >= 1 and step > 0 s, not 0 and 0.5"),
        (["--data.sampler.step=0"], "data.sampler: a clip needs frames >= 1 and step > 0 s, not 4 and 0.0"),
        # of the sampler that the configuration names
        (
            ["--data.sampler.frame=3"],
            "data.sampler.frame: ClipSampler has no such option: did you mean frames?",
        ),
        (
            ["--data.sampler.second=3"],
            "data.sampler.second: ClipSampler has no such option",
        ),
        (
            ["--data.sampler=WindowSampler"],
            "no seconds given: add --config FILE (`poodle-lightning list` shows those that come with the "
            "package) or --data.sampler.seconds VALUE",
        ),
        (["--data.sampler.frames=x"], "data.sampler.frames: expected int, not x"),
        # the value itself, not the parser's wrapping
        (["--data.hours=abc"], "data.hours: expected float or null, not abc"),
        (
            ["--model.recipe.clip_each=null"],
            "model.recipe.clip_each: null cannot be given here: set it in a file and add --config FILE",
        ),
    ],
)
def test_a_wrong_value_is_one_line(tmp_path, monkeypatch, capsys, words, line):
    monkeypatch.chdir(tmp_path)
    assert cli.main([*CLIPS, *words]) == 2
    said = capsys.readouterr().err
    assert "Traceback" not in said
    assert said.splitlines()[-1] == f"error: {line}"
    assert list(tmp_path.iterdir()) == []

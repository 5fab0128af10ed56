from poodle_lightning import cli
from poodle_lightning.commands import doctor


def test_this_machine_is_well(capsys):
    assert cli.main(["doctor", "--pairs", "2"]) == 0
    said = capsys.readouterr().out
    assert said.count("  ok    ") == 5
    assert "all is well" in said


def test_a_check_that_fails_is_named_and_the_others_go_on(capsys, monkeypatch):
    def broken():
        raise RuntimeError("no solver")

    monkeypatch.setattr(doctor, "_flow", broken)
    assert cli.main(["doctor", "--pairs", "1"]) == 1
    said = capsys.readouterr().out
    assert "FAILS optical flow (DIS): RuntimeError: no solver" in said
    assert said.count("  ok    ") == 4

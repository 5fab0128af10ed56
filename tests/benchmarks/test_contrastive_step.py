import pytest

from benchmarks import contrastive_step

SMALL = ["--rounds", "1", "--batch", "2", "--points", "6", "--queue", "32", "--clips", "3", "--crop", "32"]


def test_both_forms_give_the_same_loss_and_gradients(tmp_path):
    found = contrastive_step.main([*SMALL, "--out", str(tmp_path)])
    for name in ("PiCo", "VITO"):
        assert found[name]["difference"] < 1e-5
        assert found[name]["times_faster"]["min"] > 0
    assert (tmp_path / "contrastive_step.json").is_file()


@pytest.mark.parametrize("name", ["pico", "moclr"])
def test_the_difference_sees_another_temperature(name):
    """The check that the forms agree can fail."""
    clip = contrastive_step.make_clip(2, 3 if name == "moclr" else 2, 40, 6)
    method = contrastive_step.vito(32) if name == "moclr" else contrastive_step.pico(32, 32)

    def other():
        method.temperature *= 0.5
        loss = getattr(contrastive_step.contrastive, name)(method, clip)
        method.temperature *= 2.0
        return loss

    forms = {"package": lambda: next(iter(method.losses(clip).values())), "other": other}
    assert contrastive_step.difference(method, forms) > 1e-2


@pytest.mark.parametrize("apart", [1e-2, float("nan")])
def test_forms_that_differ_are_not_timed(apart, tmp_path, monkeypatch):
    monkeypatch.setattr(contrastive_step, "difference", lambda method, forms: apart)
    with pytest.raises(SystemExit, match="PiCo: loss and gradients of the two forms differ by"):
        contrastive_step.main([*SMALL, "--out", str(tmp_path)])
    assert not list(tmp_path.iterdir())

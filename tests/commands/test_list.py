import inspect

from poodle_lightning import cli, recipes
from poodle_lightning.commands.list import subclasses


def test_what_is_listed_is_what_there_is(capsys):
    from poodle_lightning.methods.base import Method
    from poodle_lightning.methods.byol import BYOL
    from poodle_lightning.methods.distillation import SelfDistillation
    from poodle_lightning.methods.flowe import FlowE
    from poodle_lightning.methods.poodle import PooDLe
    from poodle_lightning.nn.resnet import ResNet

    assert cli.main(["list", "methods"]) == 0
    listed = {line.split()[0] for line in capsys.readouterr().out.splitlines()[1:]}
    assert listed >= {cls.__name__ for cls in (PooDLe, FlowE, BYOL)}
    assert listed >= {"DINO", "IBOT", "AttMask", "DoRA", "MAE"}
    assert listed.isdisjoint({Method.__name__, SelfDistillation.__name__})  # bases, with no loss
    assert cli.main(["list", "encoders"]) == 0
    rows = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines()[1:])
    assert rows["ResNet"] == inspect.getdoc(ResNet).splitlines()[0].rstrip(".").replace("``", "")


def test_configurations_are_listed_with_their_first_line(tmp_path, monkeypatch, capsys):
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment/a.yaml").write_text("# What it is\n# more\nmodel: 1\n")
    (tmp_path / "experiment/b.yaml").write_text("model: 1\n# not a header\n")
    monkeypatch.setattr(recipes, "roots", lambda: [tmp_path])
    assert cli.main(["list", "configs"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "configs", "  experiment/a.yaml  What it is", "  experiment/b.yaml",
    ]  # fmt: skip


def test_classes_are_found_through_their_bases_without_importing(tmp_path):
    lines = ['"""File."""', "raise SystemExit", "class A(base.Root):", '    """First.', "", '    More."""']
    lines += ["class _B(A): pass", "class C(_B): pass", "class D: pass"]
    (tmp_path / "one.py").write_text("\n".join(lines))
    found = subclasses(tmp_path, "Root")
    assert [(one.name, one.summary, one.about) for one in found] == [
        ("A", "First", "File"),
        ("C", "", "File"),
    ]


def test_a_base_without_the_function_is_left_out(tmp_path):
    """One may write it itself, or descend from one that does; the root's own does not count."""
    bodies = {"Root": "step", "Base(Root)": "other", "A(Base)": "step", "B(A)": "other", "C(Base)": "other"}
    text = "".join(f"class {name}:\n    def {body}(self): ...\n" for name, body in bodies.items())
    (tmp_path / "one.py").write_text(text)
    assert [one.name for one in subclasses(tmp_path, "Root", writes="step")] == ["A", "B"]
    assert [one.name for one in subclasses(tmp_path, "Root")] == ["A", "B", "Base", "C"]

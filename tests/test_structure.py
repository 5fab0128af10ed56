"""The limits that keep files and functions short, and every method complete."""

import ast
from pathlib import Path

import pytest

import poodle_lightning
from poodle_lightning.methods.base import Method

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "poodle_lightning"
FILES = sorted(PACKAGE.rglob("*.py"))


def limit(path: Path) -> int:
    if path == PACKAGE / "methods" / "base.py":
        return 150
    return 250 if path.parent == PACKAGE / "methods" else 400


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_files_and_functions_are_short(path):
    text = path.read_text()
    assert len(text.splitlines()) <= limit(path)
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            doc = ast.get_docstring(node, clean=False) or ""
            # a docstring states shapes and sources; the limit is for code
            length = node.end_lineno - node.lineno + 1 - len(doc.splitlines())
            assert length <= 60, f"{node.name} has {length} lines"


def test_no_file_is_named_after_nothing():
    assert not [p for p in FILES if p.stem in ("utils", "helpers", "common", "misc")]


METHODS = sorted(
    name
    for name in poodle_lightning.__all__
    if isinstance(getattr(poodle_lightning, name), type)
    and issubclass(getattr(poodle_lightning, name), Method)
    and name != "Method"
)


@pytest.mark.parametrize("name", METHODS)
def test_every_method_has_a_config_a_test_and_a_docs_row(name):
    file = Path(*getattr(poodle_lightning, name).__module__.split(".")).with_suffix(".py").name
    configs = [
        p
        for p in (ROOT / "configs" / "method").glob("*.yaml")
        if f"poodle_lightning.{name}\n" in p.read_text()
    ]
    assert configs, f"no configs/method/*.yaml has class_path poodle_lightning.{name}"
    assert (ROOT / "tests" / "methods" / f"test_{file}").is_file()
    assert f"`poodle_lightning.{name}`" in (ROOT / "docs" / "methods.md").read_text()


def test_tests_mirror_the_package():
    rooms = {p.parent.relative_to(PACKAGE) for p in FILES if p.parent != PACKAGE}
    for room in rooms:
        if room.parts[0] not in ("data",) or len(room.parts) == 1:
            assert (ROOT / "tests" / room).is_dir(), f"tests/{room} is missing"


def test_all_names_are_importable_and_importing_is_light():
    import subprocess
    import sys

    heavy = ("torch", "lightning", "kornia", "cv2")
    code = f"import sys, poodle_lightning; print([m for m in {heavy} if m in sys.modules])"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert loaded.strip() == "[]"
    for name in poodle_lightning.__all__:
        assert getattr(poodle_lightning, name) is not None

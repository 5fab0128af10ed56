import pytest

from poodle_lightning.data.tables import rows_of
from poodle_lightning.types import UserError


def test_all_forms_give_the_same_rows_with_their_lines(tmp_path):
    texts = {
        "a.csv": '\ufeffa,b,more\n1,"x, y",\n2,z,\n',
        "a.tsv": "a\tb\n1\tx, y\n2\tz\n",
        "a.jsonl": '{"a": "1", "b": "x, y"}\n{"a": "2", "b": "z"}\n',
    }
    for name, text in texts.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
        rows = list(rows_of(tmp_path / name, ("a", "b")))
        assert [(row["a"], row["b"]) for _, row in rows] == [("1", "x, y"), ("2", "z")]
        assert [line for line, _ in rows] == ([1, 2] if name == "a.jsonl" else [2, 3])


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("a.csv", "b\n1\n", "the first line must name the columns a, b; missing: a"),
        ("a.jsonl", "{\n", "line 1: is no JSON"),
        ("a.jsonl", '{"a": 1}\n', 'line 1: must be {"a": …, "b": …}'),
        ("a.csv", b"\xff", "is no table of text"),
        ("a.tsv", 'a\tb\n1\t"open\n2\tx\n3\t"y" z\n', "line 2: is no row of a table"),
        ("a.csv", 'a,b\n1,"open\n2,x\n', "line 2: is no row of a table"),
        ("a.csv", "a,b\n1,x,\n1,x,y\n", "line 3: has more fields than columns"),
        ("a.csv", None, "cannot be read"),
    ],
)
def test_what_is_no_table_is_one_line_with_option_and_file(tmp_path, name, text, words):
    path = tmp_path / name
    if text is not None:
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError) as told:
        list(rows_of(path, ("a", "b"), "--table"))
    assert str(told.value).startswith(f"--table {path}")
    assert words in str(told.value)
    assert "\n" not in str(told.value)

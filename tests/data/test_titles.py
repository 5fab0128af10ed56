"""Titles: whole words, plurals and accents; and the forms of a list of classes."""

from __future__ import annotations

import json

import pytest

from poodle_lightning.data.titles import TitleClass, Titles, read_classes, singulars, words
from poodle_lightning.types import UserError


@pytest.mark.parametrize(
    ("name", "title", "found"),
    [
        ("cat", "My CATS and I", True),
        ("cat", "my cat's day", True),
        ("cat", "my cat\N{RIGHT SINGLE QUOTATION MARK}s day", True),
        ("cat", "a catalogue of concatenation", False),
        ("cat", "bobcat", False),
        ("sports car", "Fast sports-cars!", True),
        ("sports car", "car sports", False),
        ("sports car", "sports in my car", False),
        ("timber wolf", "timber wolves at night", True),
        ("knife", "ten knives", True),
        ("glove", "old gloves", True),
        ("safe", "how to save money", False),
        ("butterfly", "butterflies", True),
        ("bus", "two buses", True),
        ("dish", "dirty dishes", True),
        ("mouse", "field mice", True),
        ("fireman", "brave firemen", True),
        ("glass", "a gla", False),
        ("sunglasses", "a sunglass", True),
        ("Pekinese", "Pékinese in the café", True),
        ("café", "CAFE", True),
        ("box_turtle", "a box turtle", True),
        ("ox", "", False),
    ],
)
def test_a_name_is_found_as_whole_words(name, title, found):
    assert bool(Titles([TitleClass("k", (name.replace("_", " "),))]).find(title)) == found


def test_every_class_and_every_synonym_is_found_once():
    classes = [TitleClass("a", ("tabby", "tabby cat")), TitleClass("b", ("cat",)), TitleClass("c", ("dog",))]
    assert Titles(classes).find("Tabby cat meets cats") == (0, 1)
    assert words("L'été — a_b, O'Neil's") == ("l", "ete", "a", "b", "o", "neil")
    assert singulars("wolves") == {"wolves", "wolve", "wolf", "wolfe"}
    assert singulars("grass") == {"grass"}


def test_imagenet_has_its_thousand_classes_in_order():
    classes = read_classes("imagenet")
    assert len(classes) == 1000
    assert classes[0] == TitleClass("n01440764", ("tench", "Tinca tinca"), "n01440764")
    assert [one.wnid for one in classes[1:]] == sorted(one.wnid for one in classes[1:])
    # two classes of one name are both asked for
    assert len([n for n in Titles(classes).find("a crane") if classes[n].names[0] == "crane"]) == 2


def test_forms_of_a_list(tmp_path):
    tabby = TitleClass("n02123045", ("tabby", "tabby cat"), "n02123045")
    text = tmp_path / "a.txt"
    for blank in " \t":  # WordNet's own lists have tabs
        text.write_text(f"# comment\nn02123045{blank}tabby, tabby cat\n\nred panda, lesser_panda\n")
        assert read_classes(str(text)) == [tabby, TitleClass("red panda", ("red panda", "lesser panda"))]
    file = tmp_path / "a.json"
    for content, expected in [
        ([{"wnid": "n02123045", "name": "tabby", "synonyms": ["tabby cat"]}], tabby),
        ([{"wnid": "n02123045", "name": "tabby, tabby cat"}], tabby),
        ({"n02123045": "tabby, tabby cat"}, tabby),
        ({"n02123045": ["tabby", "tabby cat"]}, tabby),
        ({"281": ["n02123045", "tabby"]}, TitleClass("n02123045", ("tabby",), "n02123045", 281)),
        ([{"name": "tabby", "index": 3}], TitleClass("tabby", ("tabby",), None, 3)),
        ({"tabby": ["cat"]}, TitleClass("tabby", ("tabby", "cat"))),
        (["tabby, cat"], TitleClass("tabby", ("tabby", "cat"))),
    ]:
        file.write_text(json.dumps(content))
        assert read_classes(str(file)) == [expected]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.csv", "x", r"give a \.json or a \.txt file of classes, or imagenet"),
        ("a.txt", "", "holds no class"),
        ("a.txt", "cat\ncat\n", "'cat' is there twice"),
        ("a.txt", "n02123045 --\n", "n02123045' has no name"),
        ("a.json", "[1", "line 1: is no JSON"),
        ("a.json", '[{"wnid": "x"}]', "must be a list of"),
        ("a.json", '[{"name": "cat", "index": -1}]', "must be a list of"),
        ("a.json", "3", "must be a list of"),
        ("a.json", '"cat"', "must be a list of"),
        ("a.json", "[null]", "must be a list of"),
        ("a.json", '[["n02123045", "tabby"]]', "must be a list of"),
        ("a.json", '[{"name": null}]', "must be a list of"),
    ],
)
def test_what_is_no_list_is_said_in_one_line(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=message) as error:
        read_classes(str(tmp_path / name))
    assert "\n" not in str(error.value)


def test_missing_and_binary_files(tmp_path):
    with pytest.raises(UserError, match="cannot be read"):
        read_classes(str(tmp_path / "none.txt"))
    (tmp_path / "a.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="no UTF-8"):
        read_classes(str(tmp_path / "a.txt"))

"""Classes by the words that name them, and the titles in which those words stand.

A list of classes is ``imagenet`` (the 1,000 of ImageNet with WordNet's synonyms), or a file:

========  ===================================================================================================
JSON      a list of ``{"wnid": "n02123045", "name": "tabby", "synonyms": ["tabby cat"], "index": 281}``, of
          which only ``name`` is needed; or an object ``{"n02123045": "tabby, tabby cat"}``; or one by
          outputs, as Keras spreads it, ``{"281": ["n02123045", "tabby"]}``
text      one class a line, its names separated by commas, a WordNet id before them if there is one:
          ``n02123045 tabby, tabby cat``
========  ===================================================================================================

A title has a class when it has one of its names: all words of the name, whole, one after the other. Case,
accents, punctuation and plural do not matter.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from poodle_lightning.types import UserError

IMAGENET = "imagenet"
_WNID = re.compile(r"n\d{8}")
_IRREGULAR = {
    "children": "child", "feet": "foot", "geese": "goose", "lice": "louse", "mice": "mouse", "oxen": "ox",
    "teeth": "tooth",
}  # fmt: skip


@dataclass(frozen=True)
class TitleClass:
    """A class that videos are looked for.

    Args:
        key: its WordNet id, or else its name; no two classes share one.
        names: how it is called, the usual name first.
        wnid: its WordNet id, if it is known.
        index: its place among a classifier's outputs, if it is known.
    """

    key: str
    names: tuple[str, ...]
    wnid: str | None = None
    index: int | None = None


def words(text: str) -> tuple[str, ...]:
    """Lower-case words without accents; ``'s`` at their end is dropped, hyphens part them."""
    plain = unicodedata.normalize("NFKD", text.replace("\N{RIGHT SINGLE QUOTATION MARK}", "'"))
    letters = "".join(c for c in plain if not unicodedata.combining(c)).casefold()
    return tuple(re.findall(r"[^\W_]+", re.sub(r"'s\b", "", letters)))


@cache
def singulars(word: str) -> frozenset[str]:
    """The word, and all of which it may be the plural by English spelling: of ``wolves`` wolf and wolve."""
    found = {word}
    if word in _IRREGULAR:
        found.add(_IRREGULAR[word])
    elif word.endswith("men") and len(word) > 4:
        found.add(word[:-2] + "an")
    elif len(word) > 3 and word.endswith("s") and not word.endswith("ss"):
        found.add(word[:-1])
        if word.endswith("ies") and len(word) > 4:
            found.add(word[:-3] + "y")
        elif word.endswith("ves"):
            found |= {word[:-3] + "f", word[:-3] + "fe"}
        elif word.endswith(("ses", "xes", "zes", "ches", "shes", "oes")):
            found.add(word[:-2])
    return frozenset(found | ({"man"} if word == "men" else set()))


class Titles:
    """Finds the classes that a title names.

    Args:
        classes: to be found.
    """

    def __init__(self, classes: Sequence[TitleClass]) -> None:
        # by the first word: a name is compared only where it may begin
        self._names: dict[str, dict[tuple[frozenset[str], ...], set[int]]] = defaultdict(dict)
        for number, one in enumerate(classes):
            for name in one.names:
                forms = tuple(map(singulars, words(name)))
                for first in forms[0] if forms else ():
                    self._names[first].setdefault(forms, set()).add(number)

    def find(self, title: str) -> tuple[int, ...]:
        """Places of the classes in their list, increasing."""
        said = [singulars(word) for word in words(title)]
        found: set[int] = set()
        for place, forms in enumerate(said):
            for first in forms:
                for name, numbers in self._names.get(first, {}).items():
                    here = said[place : place + len(name)]
                    if len(here) == len(name) and all(map(_meet, here, name)):
                        found |= numbers
        return tuple(sorted(found))


def _meet(one: frozenset[str], other: frozenset[str]) -> bool:
    return not one.isdisjoint(other)


def read_classes(given: str) -> list[TitleClass]:
    """The classes of a file, or ImageNet's; see the module for the forms.

    Raises:
        UserError: there is no such file, it is of neither form, holds no class, or one of them twice.
    """
    if given == IMAGENET:
        return imagenet_classes()
    file = Path(given)
    if file.suffix.lower() not in (".json", ".txt"):
        raise UserError(f"--classes {given}: give a .json or a .txt file of classes, or {IMAGENET}")
    try:
        text = file.read_text(encoding="utf-8-sig")
    except OSError as error:
        reason = error.strerror or error
        raise UserError(
            f"--classes {given}: cannot be read ({reason}); give a file of classes, or {IMAGENET}"
        ) from error
    except UnicodeDecodeError as error:
        raise UserError(f"--classes {given}: is no UTF-8 text ({error.reason})") from error
    found = _of_json(file, text) if file.suffix.lower() == ".json" else _of_lines(text)
    if not found:
        raise UserError(f"--classes {given}: holds no class; write one a line, its names separated by commas")
    seen: set[str] = set()
    for one in found:
        if not one.names or not any(map(words, one.names)):
            raise UserError(f"--classes {given}: the class {one.key!r} has no name that a title could hold")
        if one.key in seen:
            raise UserError(
                f"--classes {given}: the class {one.key!r} is there twice; give each its own wnid"
            )
        seen.add(one.key)
    return found


def imagenet_classes() -> list[TitleClass]:
    """The 1,000 classes of ImageNet in the usual order, with WordNet's synonyms as timm lists them.

    They have no ``index``: in a larger release of ImageNet other outputs are theirs.
    """
    from timm.data import ImageNetInfo

    info = ImageNetInfo("imagenet-1k")
    return [
        _class(_split(info.index_to_description(number)), wnid)
        for number, wnid in enumerate(info.label_names())
    ]


def _class(names: Iterable[Any], wnid: Any = None, index: int | None = None) -> TitleClass:
    kept = tuple(dict.fromkeys(text for name in names if (text := str(name).replace("_", " ").strip())))
    key = str(wnid) if wnid else (kept[0] if kept else "")
    return TitleClass(key, kept, str(wnid) if wnid else None, index)


def _split(names: str) -> list[str]:
    return names.split(",")


def _of_lines(text: str) -> list[TitleClass]:
    found = []
    for line in text.splitlines():
        if line.strip() and not line.startswith("#"):
            first, *rest = line.split(maxsplit=1)
            wnid = first if _WNID.fullmatch(first) else None
            found.append(_class(_split("".join(rest) if wnid else line), wnid))
    return found


def _of_json(file: Path, text: str) -> list[TitleClass]:
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"--classes {file}, line {error.lineno}: is no JSON ({error.msg})") from error
    try:
        if isinstance(content, dict):
            return [_of_pair(key, value) for key, value in content.items()]
        if isinstance(content, list):
            return [_of_object(one) for one in content]
        raise TypeError(content)
    except (TypeError, KeyError, ValueError, AttributeError) as error:
        raise UserError(
            f'--classes {file}: must be a list of {{"name": …, "wnid": …, "synonyms": […]}} or an object '
            '{"wnid": "name, synonym"}'
        ) from error


def _of_pair(key: str, value: Any) -> TitleClass:
    names = _split(value) if isinstance(value, str) else list(value)
    if key.isdecimal():  # by output: the WordNet id, then the name
        wnid = names.pop(0) if names and _WNID.fullmatch(str(names[0])) else None
        return _class(names, wnid, int(key))
    return _class(names, key) if _WNID.fullmatch(key) else _class([key, *names])


def _of_object(one: Any) -> TitleClass:
    if isinstance(one, str):
        return _class(_split(one))
    synonyms, index = one.get("synonyms") or [], one.get("index")
    if isinstance(synonyms, str):
        synonyms = _split(synonyms)
    if index is not None and (isinstance(index, bool) or not isinstance(index, int) or index < 0):
        raise ValueError(index)
    return _class([*_split(one["name"]), *synonyms], one.get("wnid"), index)

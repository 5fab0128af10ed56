"""Any folder of images and masks, with its classes in a small YAML file.

Layouts below ``root``: ``images/{train,val}/…`` + ``masks/{train,val}/…``, or ``{train,val}/images/…`` +
``{train,val}/masks/…``, or ``images/…`` + ``masks/…`` of which a share is held out. An image and its mask
have the same path below these folders but for the suffix. ``classes.yaml``::

    names: [road, pavement, car]        # labels 0, 1, 2
    ignore: 255                         # value (or list of values) that does not count; default 255
    ids: {7: road, 8: pavement, 26: car, 0: ignore}      # if the masks hold other numbers than 0, 1, 2
    masks: palette                      # masks are palette images whose indices are the ids
    colours: {road: [128, 64, 128], car: [[0, 0, 142], [0, 0, 70]]}    # masks are RGB; instead of ids
    groups: {small: [car]}              # optional, for scores of groups
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from poodle_lightning.data.label_files import IMAGES, MASKS, Codes, colour_value
from poodle_lightning.data.label_sources import (
    DOCS,
    SPLITS,
    Files,
    FileSource,
    Listing,
    Split,
    by_key,
    matched,
    not_there,
)
from poodle_lightning.ops.random import key_of, permutation
from poodle_lightning.types import IGNORE, ClassSet, UserError

CLASSES_FILE = "classes.yaml"
_KEYS = ("names", "ignore", "ids", "masks", "colours", "groups")
_MOST = IGNORE - 1  # labels are bytes and 255 is ignored


class FolderLabels(FileSource):
    """Images and masks of one's own.

    Args:
        root: the folder.
        classes: the YAML file; None is ``<root>/classes.yaml``.
        val_fraction: share that is held out where there are no folders for it, at least one image.
        seed: chooses which.

    Raises:
        UserError: the YAML file is missing or wrong.
    """

    def __init__(
        self, root: str | Path, classes: str | Path | None = None, val_fraction: float = 0.2, seed: int = 0
    ) -> None:
        root = Path(root)
        if not root.is_dir():
            raise UserError(f"{root}: no such folder; give the folder of images and masks as --data.root")
        found, codes = read_classes(Path(classes) if classes else root / CLASSES_FILE)
        super().__init__("folder", root, found, codes)
        if not 0 < val_fraction < 1:
            raise UserError(f"val_fraction {val_fraction}: give a share of the images between 0 and 1")
        self.val_fraction, self.seed = val_fraction, seed

    def find(self, split: Split) -> Listing:
        """See ``FileSource.find``.

        Raises:
            UserError: the folders are not there, or there is a single image to divide.
        """
        pairs = [(self.root / "images" / split, self.root / "masks" / split)]
        pairs.append((self.root / split / "images", self.root / split / "masks"))
        for images, masks in pairs:
            if images.is_dir():
                return _found(images, masks)
        other = SPLITS[split == "train"]
        whole = self.root / "images"
        divided = (whole / other).is_dir() or (self.root / other / "images").is_dir()
        if divided or not whole.is_dir():
            wanted = [f"images/{split}", f"{split}/images", *([] if divided else ["images"])]
            raise not_there(self.root, "a folder of images and masks", wanted)
        for name in ("training", "validation", "valid", "test"):
            if (whole / name).is_dir():
                raise UserError(
                    f"{whole / name}: splits are folders called train and val: rename it ({DOCS})"
                )
        return self._share(_found(whole, self.root / "masks"), split)

    def _share(self, whole: Listing, split: Split) -> Listing:
        total = len(whole.items)
        if total == 0:
            return whole
        if total == 1:
            raise UserError(f"{whole.items[0].image}: the only image cannot be both trained and measured on")
        count = min(max(1, round(self.val_fraction * total)), total - 1)
        chosen = set(permutation(key_of(self.seed, "held out").reshape(1), total)[0, :count].tolist())
        items: list[Files] = [
            files for number, files in enumerate(whole.items) if (number in chosen) == (split == "val")
        ]
        return Listing(items, whole.problems)


def _found(images: Path, masks: Path) -> Listing:
    if not masks.is_dir():
        raise UserError(f"{masks}: no such folder; the masks of {images} belong there ({DOCS})")
    lossy = by_key(masks, "", (".jpg", ".jpeg", ".webp"))
    if lossy:
        raise UserError(f"{next(iter(lossy.values()))}: JPEG and WebP change labels; save masks as PNG")
    return matched(by_key(images, "", IMAGES), by_key(masks, "", MASKS), images, masks)


# ---- the YAML file
@dataclass(frozen=True)
class _Text:
    """A YAML mapping that knows where it stands, for messages."""

    path: Path
    values: Mapping[str, Any]

    def wrong(self, what: str) -> UserError:
        return UserError(f"{self.path}: {what} ({DOCS})")

    def label(self, name: Any, names: Sequence[str], key: str) -> int:
        """The label of a class's name; ``ignore`` is 255."""
        if name == "ignore" and "ignore" not in names:
            return IGNORE
        if name not in names:
            near = difflib.get_close_matches(str(name), names, 1)
            raise self.wrong(f"{key}: no class {name!r}" + (f", did you mean {near[0]}?" if near else ""))
        return names.index(name)


def read_classes(path: Path) -> tuple[ClassSet, Codes]:
    """Classes of a YAML file, and what the values in the masks mean.

    Raises:
        UserError: the file is missing or says something that has no meaning.
    """
    text = _load(path)
    if strange := [key for key in text.values if key not in _KEYS]:
        raise text.wrong(f"unknown key {strange[0]!r}; there are {', '.join(_KEYS)}")
    names = text.values.get("names")
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        raise text.wrong("names must be a list of the classes' names, e.g. names: [road, car]")
    if double := [name for name in names if names.count(name) > 1]:
        raise text.wrong(f"names: {double[0]!r} is there twice")
    if len(names) > _MOST:
        raise text.wrong(f"names: {len(names)} classes, at most {_MOST} fit into a mask")
    given = text.values.get("groups") or {}
    classes = ClassSet(tuple(names), _groups(text, given, names))
    kinds = [key for key in ("ids", "colours") if text.values.get(key) is not None]
    if len(kinds) == 2:
        raise text.wrong("give ids or colours, not both: masks hold numbers or colours")
    masks = text.values.get("masks", "colours" if kinds == ["colours"] else "ids")
    allowed = ("colours",) if kinds == ["colours"] else ("ids", "palette")
    if masks not in allowed:
        raise text.wrong(f"masks: {masks!r} must be {' or '.join(allowed)} (colours need the key colours)")
    return classes, _colours(text, names) if masks == "colours" else _ids(text, names, masks)


def read_groups(path: Path, names: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Groups of classes from a YAML file, ``{group: [class, …]}``.

    Raises:
        UserError: the file is missing, or names a class that does not exist.
    """
    text = _load(path)
    return _groups(text, text.values, names)


def _load(path: Path) -> _Text:
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(
            f"{path}: no such file; it names the classes, e.g. names: [road, car] ({DOCS})"
        ) from error
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{path}: cannot be read: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise UserError(f"{path}: must hold keys and values, e.g. names: [road, car] ({DOCS})")
    return _Text(path, values)


def _groups(text: _Text, given: Any, names: Sequence[str]) -> dict[str, tuple[str, ...]]:
    if not isinstance(given, dict) or not all(isinstance(members, list) for members in given.values()):
        raise text.wrong("groups must be lists of classes, e.g. groups: {small: [car]}")
    groups: dict[str, tuple[str, ...]] = {}
    for group, members in given.items():
        labels = [text.label(name, names, f"group {group}") for name in members]
        if IGNORE in labels or not labels or len(set(labels)) < len(labels):
            raise text.wrong(f"group {group}: give one class or more, each once")
        groups[str(group)] = tuple(names[label] for label in labels)
    return groups


def _ids(text: _Text, names: Sequence[str], kind: Any) -> Codes:
    ignored = text.values.get("ignore", IGNORE)
    ignored = ignored if isinstance(ignored, list) else [ignored]
    if not all(_is_id(value) for value in ignored):
        raise text.wrong(f"ignore: {ignored} must be numbers from 0 to 65535")
    ids = text.values.get("ids")
    if ids is None:
        if clash := [value for value in ignored if value < len(names)]:
            raise text.wrong(f"ignore: {clash[0]} is the label of {names[clash[0]]!r}; use ids to renumber")
        return Codes.plain(len(names), ignored, kind)
    if not isinstance(ids, dict) or not ids or not all(_is_id(value) for value in ids):
        raise text.wrong("ids must go from the masks' numbers to classes, e.g. ids: {7: road, 0: ignore}")
    labels = {value: text.label(name, names, "ids") for value, name in ids.items()}
    known = ", ".join(map(str, sorted(labels)))
    return Codes(kind, dict.fromkeys(ignored, IGNORE) | labels, f"the ids {known} of {text.path.name}")


def _colours(text: _Text, names: Sequence[str]) -> Codes:
    given = text.values["colours"]
    if not isinstance(given, dict) or not given:
        raise text.wrong("colours must go from classes to RGB, e.g. colours: {road: [128, 64, 128]}")
    pairs = [(text.label(name, names, "colours"), colours) for name, colours in given.items()]
    if "ignore" in text.values:
        pairs.append((IGNORE, text.values["ignore"]))
    labels: dict[int, int] = {}
    for label, colours in pairs:
        several = isinstance(colours, list) and any(isinstance(part, list) for part in colours)
        for colour in colours if several else [colours]:
            if not isinstance(colour, list) or len(colour) != 3 or not all(_is_byte(part) for part in colour):
                raise text.wrong(f"colours: {colour} must be three numbers from 0 to 255")
            value = colour_value(colour)
            if labels.setdefault(value, label) != label:
                raise text.wrong(f"colours: {colour} stands for two classes")
    return Codes("colours", labels, f"the {len(labels)} colours of {text.path.name}")


def _is_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= 65_535


def _is_byte(value: Any) -> bool:
    return _is_id(value) and value <= 255

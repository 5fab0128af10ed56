"""The parser's messages, said in one line: which key, what is wrong, what was perhaps meant."""

from __future__ import annotations

import difflib
import inspect
import re
import sys
from collections.abc import Iterable

_KEY = re.compile(r'^(\s*)(?:- )?(?:Problem with .*)?Parser key "([^"]+)":')
_CLASS = re.compile(r"Problem with given class_path '([^']+)'")
_TYPES = re.compile(r"<class '([\w.]+)'>")
_REFUSED = re.compile(r"Importing '([^']+)' is not allowed")
_UNKNOWN_OPTION = re.compile(r"Option '([^']+)' is not accepted")
_UNKNOWN_KEY = re.compile(r"does not accept option '([^']+)'")
_UNKNOWN_FLAG = re.compile(r"unrecognized arguments: (\S+)")
_UNKNOWN_NAME = re.compile(r"Expected a dot import path string: (\S+)")
_REQUIRED = re.compile(r"the following arguments are required: (.+)")
_NO_FRAGMENT = re.compile(r"Expected a path but (\S+\.ya?ml) ")
_NO_CLASS = re.compile(
    r"Problem with given class_path '([^']+)':\s+(?:module '[^']*' has no attribute|No module named)"
)
_ABSENT = re.compile(r"Requirement '([\w-]+)[^']*' not met")
_EXTRAS = {"tensorboard": "log", "wandb": "wandb"}
_WANTED = re.compile(r"(Expected [^\n]+?)\. Got value: ([^\n]*)")
_YAML = re.compile(r"Problems parsing config: ([^\n]+)")
_NESTED = re.compile(r"NestedArg\(key='([^']+)'")
_REFUSAL = re.compile(r"Problem with given class_path '([^']+)':\s+Option '[^']+' is not accepted")
_GIVEN = re.compile(r"^( *)Given value: ([^\n]*)", re.MULTILINE)
_LINE = re.compile(r"line (\d+), column (\d+)")


def one_line(message: str, flags: Iterable[str]) -> str:
    """What a parser error means.

    Args:
        message: jsonargparse's text, many lines, with the branches of every union type in it.
        flags: the options there are at the top (``trainer.max_epochs``, ``model``, ...).

    Returns:
        One line that names the key, what is wrong and, where something is near, what was perhaps meant.
    """
    for rule in (
        _refused,
        _unknown_name,
        _no_class,
        _no_fragment,
        _unknown_option,
        _unknown_key,
        _required,
        _yaml,
    ):
        said = rule(message, list(flags))
        if said is not None:
            return said
    return _wrong_value(message)


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """``": did you mean X?"`` for the nearest known word, else nothing."""
    lower = {name.lower(): name for name in known}
    near = difflib.get_close_matches(word.lower(), lower, n=1, cutoff=0.6)
    return f": did you mean {lower[near[0]]}?" if near else ""


def missing_package(message: str) -> str | None:
    """How to install the package that Lightning misses, if the message says so."""
    names = _ABSENT.findall(message)
    if not names:
        return None
    extra = _EXTRAS.get(names[-1])
    return (
        f"{names[-1]} is not installed: pip install '{f'poodle-lightning[{extra}]' if extra else names[-1]}'"
    )


def _refused(message: str, flags: list[str]) -> str | None:
    found = _REFUSED.search(message)
    if found is None:
        return None
    path = found[1]
    if path in ("lightning.LightningModule", "lightning.LightningDataModule"):
        key = _key(message, found.start()).split(".")[0]
        return f"{key}: no class given: add --{key} NAME, or class_path in the configuration"
    if path == "lightning.Callback":
        option = _NESTED.search(message)
        wrong = f".{option[1]}" if option else ""
        return f"{_key(message, found.start())}{wrong}: no callback of the configuration has such an option"
    package = path.split(".")[0]
    return (
        f"{_key(message, found.start())}: {path} may not be imported; if you trust it, add --allow {package}"
    )


def _unknown_name(message: str, flags: list[str]) -> str | None:
    found = _UNKNOWN_NAME.search(message)
    if found is None:
        return None
    if _key(message, found.start()) == "model.encoder" and found[1].startswith(("torchvision:", "timm:")):
        return f"model.encoder: {found[1]} is for an evaluation: give --config evaluation/NAME.yaml"
    known = sorted(_subclasses(_wanted_types(message[: found.start()])))
    if not known:  # a protocol: any class with its methods will do, but only by its full path
        known = [path for path in _ours() if path.rsplit(".", 1)[-1].lower() == found[1].lower()]
    listed = f" (there are {', '.join(known)})" if 0 < len(known) <= 12 else ""
    return f"{_key(message, found.start())}: no class {found[1]}{did_you_mean(found[1], known) or listed}"


def _no_class(message: str, flags: list[str]) -> str | None:
    found = _NO_CLASS.search(message)
    if found is None:
        return None
    near = did_you_mean(found[1].rsplit(".", 1)[-1], _subclasses(_wanted_types(message[: found.start()])))
    return f"{_key(message, found.start())}: no class {found[1]}{near}"


def _no_fragment(message: str, flags: list[str]) -> str | None:
    found = _NO_FRAGMENT.search(message)
    if found is None:
        return None
    where = _key(message, found.start())
    part = where.split(".")[0]
    return (
        f"{where}: no file {found[1]} (looked for beside the file that names it): correct the path, or leave "
        f"the line out and give --{part} {part}/NAME.yaml, which finds the package's"
    )


def _unknown_option(message: str, flags: list[str]) -> str | None:
    found = _UNKNOWN_OPTION.search(message)
    if found is None:
        return None
    refused = _REFUSAL.findall(message)
    if len(refused) > 1 and _WANTED.search(message):
        return None  # of several classes that were tried, one has the option: its value is wrong
    classes = _CLASS.findall(message[: found.start()])
    owner = _nearest(found[1], refused) or (classes[-1] if classes else "")
    known = _parameters(owner)
    option = next((part for part in found[1].split(".") if part not in known), found[1])
    where = f"{_key(message, found.start())}.{option}"
    if len(set(refused)) > 1 and not did_you_mean(option, known):
        names = ", ".join(dict.fromkeys(path.rsplit(".", 1)[-1] for path in refused))
        return f"{where}: none of {names} has such an option"
    return f"{where}: {owner.rsplit('.', 1)[-1]} has no such option{did_you_mean(option, known)}"


def _unknown_key(message: str, flags: list[str]) -> str | None:
    found = _UNKNOWN_KEY.search(message) or _UNKNOWN_FLAG.search(message)
    if found is None:
        return None
    word = found[1].lstrip("-").split("=")[0]
    first, dot, rest = word.partition(".")
    near = did_you_mean(word, flags)
    if first not in flags:  # a wrong group: what follows it may be right
        near = did_you_mean(word, [f"{flag}{dot}{rest}" for flag in flags if "." not in flag])
    return f"no such key: {word}{near}"


def _required(message: str, flags: list[str]) -> str | None:
    found = _REQUIRED.search(message)
    if found is None:
        return None
    keys = sorted({key.strip().split(".")[-1] for key in found[1].split(",")})
    where = _key(message, found.start())
    first = keys[0] if where == "config" else f"{where}.{keys[0]}"
    return (
        f"no {' and no '.join(keys)} given: add --config FILE (`poodle-lightning list` shows those that come "
        f"with the package) or --{first} {'NAME' if where == 'config' else 'VALUE'}"
    )


def _yaml(message: str, flags: list[str]) -> str | None:
    found = _YAML.search(message)
    if found is None:
        return None
    line = _LINE.findall(message)
    where = f" (line {line[-1][0]}, column {line[-1][1]})" if line else ""
    return f"not valid YAML{where}: {found[1]}"


def _wrong_value(message: str) -> str:
    found = _WANTED.search(message)
    if found is not None:
        return f"{_key(message, found.start())}: {_type_words(found[1])}, not {found[2]}"
    wanted = [text for text in re.findall(r"- (Expected [^\n:]+)", message) if "path" not in text]
    values = _GIVEN.findall(message)
    if wanted and values:
        types = list(dict.fromkeys(_type_words(text).removeprefix("expected ") for text in wanted))
        where, last = _key(message, len(message)), values[-1][1]
        if "null" in types and last.startswith("NestedArg(") and last.endswith("val=None)"):
            # on its way down to the option the parser makes a word of it
            return f"{where}: null cannot be given here: set it in a file and add --config FILE"
        # what was given to the option itself, not to an object around it
        value = max(values, key=lambda found: len(found[0]))[1]
        return f"{where}: expected {' or '.join(types)}, not {value}"
    return " ".join(message.split())


def _nearest(option: str, classes: list[str]) -> str | None:
    """Of classes that have no such option, the one with the most similar."""

    def likeness(path: str) -> float:
        known = _parameters(path)
        return max((difflib.SequenceMatcher(None, option, name).ratio() for name in known), default=0.0)

    return max(classes, key=likeness) if classes else None


def _type_words(text: str) -> str:
    text = _TYPES.sub(lambda found: found[1].rsplit(".", 1)[-1], text)
    return (
        text.replace("NoneType", "null").replace("Expected a ", "expected ").replace("Expected", "expected")
    )


def _key(message: str, before: int) -> str:
    """The dotted key around a place in the message, from the indentation of the keys above it."""
    keys: list[tuple[int, str]] = []
    for line in message[:before].splitlines():
        found = _KEY.match(line)
        if found is not None:
            indent = len(found[1])
            keys = [(other, name) for other, name in keys if other < indent]
            keys.append((indent, found[2]))
    return ".".join(name for _, name in keys) or "config"


def _wanted_types(message: str) -> list[str]:
    found = re.findall(r"Subtypes: \[([^\n]*)\]", message)
    return [name for name in _TYPES.findall(found[-1]) if name != "NoneType"] if found else []


def _resolve(path: str) -> type | None:
    """A class of a module that is already imported; nothing is imported for a message."""
    module, _, name = path.rpartition(".")
    found = getattr(sys.modules.get(module), name, None)
    return found if isinstance(found, type) else None


def _subclasses(paths: Iterable[str]) -> set[str]:
    names: set[str] = set()
    waiting = [found for found in map(_resolve, paths) if found is not None]
    while waiting:
        current = waiting.pop()
        waiting.extend(current.__subclasses__())
        foreign = current.__module__.split(".")[0] in ("lightning", "torch", "torchmetrics", "torchvision")
        protocol = getattr(current, "_is_protocol", False)
        if not (foreign or protocol or inspect.isabstract(current) or current.__name__.startswith("_")):
            names.add(current.__name__)
    return names


def _ours() -> list[str]:
    modules = {name: module for name, module in sys.modules.items() if name.startswith("poodle_lightning.")}
    return [
        f"{name}.{item.__name__}"
        for name, module in sorted(modules.items())
        for item in vars(module).values()
        if isinstance(item, type) and item.__module__ == name
    ]


def _parameters(path: str) -> list[str]:
    found = _resolve(path)
    return list(inspect.signature(found).parameters) if found is not None else []

"""Objects that remember how they were made, as plain data that any checkpoint can carry.

A checkpoint must load with ``torch.load(weights_only=True)``, so it cannot hold objects. It holds their
*spec* instead: ``{"class_path": ..., "init_args": {...}}``, the form that the YAML configs have as well.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import os
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Self

from poodle_lightning.types import UserError

_KEYS = {"class_path", "init_args"}


class Configured:
    """Mixin that keeps the constructor's arguments in ``init_args``, defaults filled in.

    Put it last among the bases: ``class ResNet(Encoder)``, ``class SDM(nn.Module, Configured)``. The
    arguments are taken before ``__init__`` runs, so subclasses need no call of their own; they survive
    ``copy.deepcopy`` and pickling. A constructor with ``**kwargs`` has them merged in; positional ``*args``
    cannot be rebuilt by name and make :func:`spec` raise.
    """

    init_args: dict[str, Any]
    __signature__: ClassVar[inspect.Signature]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        # Without this, inspect and editors would show the (*args, **kwargs) of __new__.
        signature = inspect.signature(cls.__init__)
        cls.__signature__ = signature.replace(parameters=list(signature.parameters.values())[1:])

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        """Takes down the arguments; ``__init__`` follows as always."""
        made = super().__new__(cls)
        # nn.Module refuses attributes before its __init__ has run.
        object.__setattr__(made, "init_args", _bound(cls.__signature__, args, kwargs))
        return made


def _bound(signature: inspect.Signature, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    try:
        bound = signature.bind_partial(*args, **kwargs)
    except TypeError:
        return {}  # __init__ is about to raise the same error under its own name
    bound.apply_defaults()
    named: dict[str, Any] = {}
    for name, value in bound.arguments.items():
        kind = signature.parameters[name].kind
        if kind is inspect.Parameter.VAR_KEYWORD:
            named.update(value)
        elif kind is not inspect.Parameter.VAR_POSITIONAL:
            named[name] = value
        elif value:
            named[f"*{name}"] = value
    return named


def spec(value: object) -> Any:
    """Plain data from which :func:`build` makes an equal object.

    Args:
        value: a :class:`Configured` object, a dataclass object, or plain data that may hold such objects.

    Returns:
        Only ``str``, ``int``, ``float``, ``bool``, ``None``, ``list`` and ``dict`` with ``str`` keys. Objects
        become ``{"class_path", "init_args"}``, tuples become lists, paths become strings.

    Raises:
        TypeError: something has no plain form; the message names the argument.
    """
    return _plain(value, type(value).__name__)


def _plain(value: object, where: str) -> Any:
    if value is None or isinstance(value, bool):
        return value
    # Subclasses (NumPy's float64, string enums) would ask for their class when the checkpoint is loaded.
    for kind in (int, float, str):
        if isinstance(value, kind):
            return str.__str__(value) if isinstance(value, str) else kind(value)
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, list | tuple):
        return [_plain(item, f"{where}[{i}]") for i, item in enumerate(value)]
    if isinstance(value, Mapping):
        return {_key(key, where): _plain(item, f"{where}[{key!r}]") for key, item in value.items()}
    if isinstance(value, Configured):
        return _object(type(value), value.init_args, where)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        arguments = {
            field.name: getattr(value, field.name) for field in dataclasses.fields(value) if field.init
        }
        return _object(type(value), arguments, where)
    raise TypeError(f"{where} is a {type(value).__qualname__}, which has no plain form")


def _key(key: object, where: str) -> str:
    if not isinstance(key, str):
        raise TypeError(f"{where} has the key {key!r}; plain data has only str keys")
    return str.__str__(key)


def _object(kind: type, arguments: Mapping[str, Any], where: str) -> dict[str, Any]:
    for name in arguments:
        if name.startswith("*"):
            raise TypeError(
                f"{where} was made with positional {name}, which has no plain form: pass it by name"
            )
    return {
        "class_path": f"{kind.__module__}.{kind.__qualname__}",
        "init_args": {name: _plain(value, f"{where}.{name}") for name, value in arguments.items()},
    }


def build(plain: Any, allow: Sequence[str] = ("poodle_lightning",)) -> Any:
    """The object that a spec describes; the inverse of :func:`spec`.

    Args:
        plain: a spec, or plain data that may hold specs.
        allow: packages whose classes may be named. Importing a module runs it, so a spec that came with a
            downloaded file must not choose it freely.

    Raises:
        UserError: the class is outside the allowed packages, does not exist, is neither
            :class:`Configured` nor a dataclass, or does not take the arguments.
    """
    if isinstance(plain, list):
        return [build(item, allow) for item in plain]
    if not isinstance(plain, Mapping):
        return plain
    if "class_path" not in plain or not set(plain) <= _KEYS:
        return {key: build(item, allow) for key, item in plain.items()}
    kind = _find(plain["class_path"], allow)
    arguments = {name: build(item, allow) for name, item in (plain.get("init_args") or {}).items()}
    try:
        inspect.signature(kind).bind(**arguments)
    except TypeError as error:
        raise UserError(
            f"{plain['class_path']} cannot be made from its init_args ({error}): "
            "it was probably written by another version of the package"
        ) from error
    return kind(**arguments)


def untrained(plain: Any) -> Any:
    """A spec whose parts start untrained: their weights follow from the file and are not fetched first."""
    if isinstance(plain, list):
        return [untrained(item) for item in plain]
    if not isinstance(plain, Mapping):
        return plain
    return {
        key: None if key == "weights" and isinstance(value, str) else untrained(value)
        for key, value in plain.items()
    }


def _find(path: Any, allow: Sequence[str]) -> type[Any]:
    if not isinstance(path, str) or not any(path.startswith(f"{package}.") for package in allow):
        raise UserError(
            f"class_path {path!r} is outside the allowed packages ({', '.join(allow)}): allow its package"
        )
    module, _, name = path.rpartition(".")
    try:
        found: type[Any] = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise UserError(
            f"class_path {path!r} does not exist ({error}): correct it or update the package"
        ) from error
    made_here = isinstance(found, type) and any(f"{found.__module__}.".startswith(f"{p}.") for p in allow)
    if not made_here or not (issubclass(found, Configured) or dataclasses.is_dataclass(found)):
        raise UserError(f"class_path {path!r} is not a class that can be configured: name one of {module}")
    return found

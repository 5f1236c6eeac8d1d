"""What is written (ConfigDict) becomes what is built (frozen dataclasses), strictly and in one place.

A config file's ``get_config(arg)`` returns an ``ml_collections.ConfigDict`` made by ``experiment``; the entries turn it
back into dataclasses with ``build``. The dataclasses hold the defaults, so no default is written twice.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import types
import typing
from collections.abc import Mapping
from typing import Any

import ml_collections
from ml_collections import config_dict

from sslx.errors import UserError, nearest
from sslx.settings import RunConfig

TO_BE_GIVEN = "to be given: "


def experiment(**parts: Any) -> ml_collections.ConfigDict:
    """A full config: ``RunConfig``'s defaults plus named parts, such as ``data=TextConfig(...)`` and ``model=...``."""
    config = to_config_dict(RunConfig())
    for name, part in parts.items():
        config[name] = to_config_dict(part)
    return config


def to_be_given(what: str) -> str:
    """A value of ``config.init`` that stands for what the command line has to name."""
    return f"{TO_BE_GIVEN}{what}"


def to_config_dict(instance: Any) -> ml_collections.ConfigDict:
    """Writes a dataclass out; a field that may be None stays settable on the command line by its declared type."""
    config = ml_collections.ConfigDict()
    hints = typing.get_type_hints(type(instance))
    for field in dataclasses.fields(instance):
        value = getattr(instance, field.name)
        if dataclasses.is_dataclass(value):
            value = to_config_dict(value)
        elif value is None:
            value = config_dict.placeholder(_without_none(hints[field.name]))
        config[field.name] = value
    return config


def build(cls: type, written: Mapping[str, Any], where: str = "config") -> Any:
    """Builds the frozen dataclass ``cls`` from what was written.

    Raises:
      UserError: an unknown key (with the nearest valid ones) or a value of the wrong type.
    """
    if not isinstance(written, Mapping):
        raise UserError(f"{where} is {written!r}; expected a group of values")
    hints = typing.get_type_hints(cls)
    fields = {field.name: hints[field.name] for field in dataclasses.fields(cls)}
    values = {}
    for name, value in written.items():
        if name not in fields:
            raise UserError(f"unknown key {where}.{name}; {nearest(name, fields)}")
        kind = fields[name]
        if dataclasses.is_dataclass(kind):
            values[name] = build(kind, value, f"{where}.{name}")
        else:
            values[name] = checked(kind, value, f"{where}.{name}")
    return cls(**values)


def load_class(name: str, table: Mapping[str, str], what: str, base: type = object) -> type:
    """The class behind a table's name, or behind a dotted path ``package.module:Class`` outside the tree.

    Raises:
      UserError: neither exists (names the nearest), or it is no ``base``.
    """
    path = table.get(name, name)
    if ":" not in path:
        raise UserError(f"unknown {what} {name!r}; {nearest(name, table)}, or a dotted path 'module:Class'")
    module_name, class_name = path.split(":", 1)
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise UserError(f"{what} {name!r}: no module named {error.name!r}") from None
    if not hasattr(module, class_name):
        classes = [key for key, value in vars(module).items() if isinstance(value, type)]
        raise UserError(f"{what} {name!r}: {module_name} has no {class_name!r}; {nearest(class_name, classes)}")
    found = getattr(module, class_name)
    if not (isinstance(found, type) and issubclass(found, base)):
        raise UserError(f"{what} {name!r} is no {base.__module__}.{base.__name__}")
    if inspect.isabstract(found):
        missing = ", ".join(sorted(found.__abstractmethods__))
        raise UserError(f"{what} {name!r} lacks methods of {base.__module__}.{base.__name__}: {missing}")
    return found


def parse_argument(argument: str | None, first: str, **defaults: str) -> dict[str, str]:
    """Parses a config file's argument: ``base,data=tfds:wikipedia`` gives ``{"size": "base", "data": ...}``.

    Args:
      argument: What stands behind the config file's colon; None or "" is all defaults.
      first: The name of the value that may stand without ``name=``.
      **defaults: Every valid name with its default.
    """
    values = dict(defaults)
    for part in filter(None, (argument or "").split(",")):
        name, given, value = part.partition("=")
        if not given:
            name, value = first, part
        if name not in values:
            raise UserError(f"unknown config argument {name!r} in {argument!r}; {nearest(name, values)}")
        values[name] = value
    return values


def differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> dict[str, tuple[Any, Any]]:
    """Dotted keys whose values differ, as ``{key: (old, new)}``; a key missing on one side counts as None there."""
    found = {}
    for key in sorted({*old, *new}):
        name, a, b = f"{prefix}{key}", old.get(key), new.get(key)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            found |= differences(a, b, f"{name}.")
        elif _plain(a) != _plain(b):
            found[name] = (a, b)
    return found


def _plain(value: Any) -> Any:
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def _without_none(kind: Any) -> type:
    kinds = [k for k in typing.get_args(kind) if k is not types.NoneType]
    return kinds[0] if kinds else kind


def checked(kind: Any, value: Any, where: str) -> Any:
    """Returns a value that was given for something of a type; a whole number is a float, too.

    Raises:
      UserError: it is of another type.
    """
    optional = types.NoneType in typing.get_args(kind)
    if value is None and optional:
        return None
    base = _without_none(kind) if optional else kind
    origin = typing.get_origin(base) or base
    if origin is tuple:
        if isinstance(value, str) or not isinstance(value, (list, tuple)):
            raise UserError(f"{where} is {value!r}; expected a tuple")
        return tuple(value)
    if origin is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if origin in (int, float, str, bool) and (
        not isinstance(value, origin) or (isinstance(value, bool) and origin is not bool)
    ):
        raise UserError(f"{where} is {value!r}; expected {origin.__name__}")
    return value

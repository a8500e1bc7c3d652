"""From nested tables to dataclasses: keys and types checked, errors in one line with the dotted key."""

from __future__ import annotations

import dataclasses
import difflib
import math
import sys
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar

from aapo_fast.types import UserError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

T = TypeVar("T")


class ConfigError(UserError):
    """A key, a value or a combination that cannot be; the text says which and what would be right."""


def read_toml(path: Path) -> dict[str, Any]:
    """The tables of a TOML file. Raises ConfigError if it cannot be read or is none."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"config file {path} cannot be read: {error.strerror or error}") from error
    except ValueError as error:  # not TOML, not even UTF-8, or an integer of thousands of digits
        raise ConfigError(f"config file {path} is not valid TOML: {error}") from error


def override(tree: dict[str, Any], key: str, text: str) -> None:
    """Set one dotted key to a text from the command line, which ``build`` reads as the key's type wants."""
    *parents, last = key.split(".")
    node: Any = tree
    for depth, part in enumerate(parents):
        if isinstance(node, list):
            node = _item(node, part, key)
            continue
        if not isinstance(node, dict):
            parents, last = parents[:depth], part
            break
        # [[rewards]] left out of the file stands for one default entry; --rewards.0.x speaks of that one
        empty: Any = [{}] if parents[depth + 1 : depth + 2] == ["0"] or (part == "rewards") else {}
        node = node.setdefault(part, empty)
    if not isinstance(node, dict):
        raise ConfigError(f"--{key}: {'.'.join(parents)} has no key {last!r}")
    node[last] = _Text(text)


def _item(items: list[Any], part: str, key: str) -> Any:
    if part not in map(str, range(len(items))):
        raise ConfigError(f"--{key}: {part!r} is not one of the {len(items)} entries; count from 0")
    return items[int(part)]


class _Text(str):
    """A value as it was typed on the command line."""


def _read(text: _Text, kind: Any) -> Any:
    """For a string the text itself (TOML's quotes may be used, for escapes); else a TOML value, or the text if none."""
    wants_text = kind is str or typing.get_origin(kind) is Literal
    return str(text) if wants_text and text[:1] not in ("'", '"') else _toml_value(text)


def _toml_value(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except ValueError:  # an integer of thousands of digits is one, too
        return str(text)


def build(cls: type[T], tree: Any, where: str = "") -> T:
    """An instance of the dataclass ``cls`` from a table; ``where`` is the dotted key of the table.

    Raises:
        ConfigError: an unknown key or a value of another type.
    """
    if isinstance(tree, _Text):
        tree = _toml_value(tree)
    if not isinstance(tree, Mapping):
        raise ConfigError(f"{where}={tree!r} must be a table")
    hints = typing.get_type_hints(cls)
    for key in tree:
        if key not in hints:
            near = difflib.get_close_matches(key, hints, n=1)
            hint = f"did you mean {_join(where, near[0])}?" if near else f"known here: {', '.join(hints)}"
            raise ConfigError(f"unknown key {_join(where, key)}; {hint}")
    return cls(**{key: _convert(hints[key], value, _join(where, key)) for key, value in tree.items()})


def _join(where: str, key: str) -> str:
    return f"{where}.{key}" if where else key


def _convert(kind: Any, value: Any, key: str) -> Any:
    if isinstance(value, _Text):
        value = _read(value, kind)
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if dataclasses.is_dataclass(kind):
        return build(typing.cast(type, kind), value, key)
    if origin is list:
        if not isinstance(value, list):
            raise ConfigError(f"{key}={value!r} must be {type_name(kind)}")
        return [_convert(args[0], item, f"{key}.{i}") for i, item in enumerate(value)]
    if origin is Literal:
        if value not in args:
            raise ConfigError(f"{key}={value!r} must be one of {', '.join(args)}")
        return value
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        try:
            return float(value)
        except OverflowError as error:
            raise ConfigError(f"{key} is an integer beyond the range of a float; 1.8e308 is the largest") from error
    plain = dict if origin is dict else kind
    if not isinstance(value, plain) or (isinstance(value, bool) and plain is not bool):
        raise ConfigError(f"{key}={value!r} must be {type_name(kind)}, not {type(value).__name__}")
    if origin is dict:
        return {k: _read(v, None) if isinstance(v, _Text) else v for k, v in value.items()}
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{key}={value!r} must be finite")
    return value


def type_name(kind: Any) -> str:
    """A type as a user would say it."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin is Literal:
        return " | ".join(args)
    if origin is list:
        return f"list of {type_name(args[0])}"
    if origin is dict:
        return "table"
    if isinstance(kind, types.GenericAlias):
        return str(kind)
    return str(kind.__name__)

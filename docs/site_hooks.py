"""What the site makes of the code: the page of all settings, from the dataclasses that define them."""

from __future__ import annotations

import dataclasses
import json
from typing import Any, get_args, get_origin, get_type_hints

from aapo_fast.config import layers

PLACE = "<!-- settings -->"


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Called by MkDocs for every page."""
    return markdown.replace(PLACE, settings()) if PLACE in markdown else markdown


def settings() -> str:
    """A table for each layer of the configuration."""
    hints = get_type_hints(layers.Config)
    return "\n\n".join(_table(field.name, hints[field.name]) for field in dataclasses.fields(layers.Config))


def _table(name: str, layer: Any) -> str:
    if get_origin(layer) is list:
        name, layer = f"[{name}]", get_args(layer)[0]
    about = (layer.__doc__ or "").strip()
    about = about.removeprefix(f"[{name}] ").removeprefix(f"[[{name.strip('[]')}]] ")
    hints = get_type_hints(layer)
    rows = [
        f"| `{field.name}` | {_kind(hints[field.name])} | `{_default(field)}` | {_cell(field.metadata['help'])} |"
        for field in dataclasses.fields(layer)
    ]
    head = "| setting | type | default | |\n| --- | --- | --- | --- |"
    return f"## `[{name}]`\n\n{about[:1].upper()}{about[1:]}\n\n{head}\n" + "\n".join(rows)


def _kind(hint: Any) -> str:
    choices = get_args(hint)
    if choices and all(isinstance(choice, str) for choice in choices):
        return ", ".join(f"`{choice}`" for choice in choices)
    return f"`{getattr(hint, '__name__', hint) if not choices else hint}`"


def _default(field: dataclasses.Field[Any]) -> str:
    value = field.default if field.default is not dataclasses.MISSING else field.default_factory()  # type: ignore[misc]
    return json.dumps(value)


def _cell(text: str) -> str:
    return text.replace("|", "\\|")

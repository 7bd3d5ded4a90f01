"""Writing settings as TOML. `none` stands for None, which TOML lacks; reading is the standard library's."""

import json
from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import BaseModel


def toml_value(value: Any) -> str:
    """A single value as TOML text: `0.1`, `"linear"`, `true`, `"none"`."""
    if value is None:
        return '"none"'
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        # JSON escapes what TOML must escape, except DEL.
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    return repr(value)


def dump_toml(config: BaseModel) -> str:
    """All settings as TOML, defaults included, so that reading the text back gives an equal config."""
    return "\n".join(_table("", config.model_dump())).lstrip("\n") + "\n"


def _table(path: str, values: Mapping[str, Any]) -> Iterator[str]:
    tables = {key: value for key, value in values.items() if isinstance(value, dict)}
    settings = {key: value for key, value in values.items() if key not in tables}
    # An absent group of settings (model.scratch without a scratch model) reads "none" like any other value.
    if path and settings:
        yield f"\n[{path}]"
    for key, value in settings.items():
        yield f"{key} = {toml_value(value)}"
    for key, value in tables.items():
        yield from _table(f"{path}.{key}" if path else key, value)


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested tables as dotted keys. An empty table stays as an empty dict under its own key."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict) and value:
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def unflatten(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Dotted keys as nested tables, the inverse of `flatten`."""
    nested: dict[str, Any] = {}
    for key, value in flat.items():
        *path, last = key.split(".")
        table = nested
        for name in path:
            table = table.setdefault(name, {})
        table[last] = value
    return nested

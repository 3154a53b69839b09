"""Options as dataclasses with help texts, built from nested keys such as those of a YAML file."""

from __future__ import annotations

import dataclasses
from dataclasses import field
from typing import Any

from liveweight._check import near_misses


class RecipeError(ValueError):
    """A recipe that cannot be read or run; the message names the key."""


def option(default: Any, help_text: str) -> Any:
    """Return a dataclass field with a default and the help that the command line shows."""
    if isinstance(default, (list, dict)):
        return field(default_factory=default.copy, metadata={"help": help_text})
    return field(default=default, metadata={"help": help_text})


def section_type(entry: dataclasses.Field) -> Any:
    """Return the dataclass of a nested section, or None for a plain value."""
    return entry.default_factory if dataclasses.is_dataclass(entry.default_factory) else None


def check_keys(values: Any, cls: type, prefix: str = "") -> None:
    """Raise RecipeError for a key the recipe does not have; the message names the closest one."""
    if not isinstance(values, dict):
        where = prefix.rstrip(".") or "the recipe"
        raise RecipeError(f"{where}: expected keys and values, got {values!r}")
    fields = {f.name: f for f in dataclasses.fields(cls)}
    for key, value in values.items():
        if key not in fields:
            close = near_misses(str(key), fields)
            raise RecipeError(f"unknown recipe key {prefix + str(key)!r}: {close}")
        if dataclasses.is_dataclass(nested := section_type(fields[key])):
            check_keys(value, nested, f"{prefix}{key}.")


def build(values: dict[str, Any], cls: type) -> Any:
    """Build a dataclass of options from nested keys; RecipeError for keys that it does not have."""
    check_keys(values, cls)
    sections = {}
    for entry in dataclasses.fields(cls):
        if entry.name not in values:
            continue
        nested = section_type(entry)
        value = values[entry.name]
        sections[entry.name] = nested(**value) if nested else value
    return cls(**sections)

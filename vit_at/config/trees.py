"""Nested dicts as one dict with dotted names, and back."""

from typing import Any

from ml_collections import ConfigDict


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Dotted fields in which two JSON configurations differ, as 'field old -> new'."""
    old, new = flatten(old), flatten(new)
    return [
        f"{field} {old.get(field)!r} -> {new.get(field)!r}"
        for field in sorted(old.keys() | new.keys())
        if old.get(field) != new.get(field)
    ]


def flatten(tree: dict[str, Any] | ConfigDict, prefix: str = "") -> dict[str, Any]:
    """{dotted field: value} of nested dicts, with the groups left out."""
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, (dict, ConfigDict)):
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat


def nested(flat: dict[str, Any]) -> dict[str, Any]:
    """The inverse of ``flatten``."""
    tree: dict[str, Any] = {}
    for field, value in flat.items():
        *groups, name = field.split(".")
        group = tree
        for part in groups:
            group = group.setdefault(part, {})
        group[name] = value
    return tree

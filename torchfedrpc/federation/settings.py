"""Settings of a trainer with attribute access, for any type of configuration."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torchfedrpc.errors import suggest


class Settings(dict[str, Any]):
    """Mapping with attribute access to its keys. Nested mappings, also in lists, are converted as well."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        super().__init__({key: _attributes(value) for key, value in values.items()})

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"no setting named {name!r}{suggest(name, map(str, self))}") from None


def as_settings(config: Any) -> Any:
    """Return a mapping as `Settings`, and any other object unchanged."""
    return _attributes(config)


def _attributes(value: Any) -> Any:
    if isinstance(value, Settings):
        return value
    if isinstance(value, Mapping):
        return Settings(value)
    if isinstance(value, list | tuple) and type(value) in (list, tuple):
        return type(value)(map(_attributes, value))
    return value

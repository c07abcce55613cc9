"""A trainer's settings, readable as attributes whatever they were given as."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torchfedrpc.errors import suggest


class Settings(dict[str, Any]):
    """A mapping whose keys are attributes too; mappings inside it, and inside its lists, are made alike."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        super().__init__({key: _attributes(value) for key, value in values.items()})

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"no setting named {name!r}{suggest(name, map(str, self))}") from None


def as_settings(config: Any) -> Any:
    """Give a mapping attributes; anything else has them already and is returned as it is."""
    return _attributes(config)


def _attributes(value: Any) -> Any:
    if isinstance(value, Settings):
        return value
    if isinstance(value, Mapping):
        return Settings(value)
    if isinstance(value, list | tuple) and type(value) in (list, tuple):
        return type(value)(map(_attributes, value))
    return value

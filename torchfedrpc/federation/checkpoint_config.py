"""The configuration in a checkpoint: as plain values by dotted key, and compared with a run's."""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
from collections.abc import Iterator, Mapping
from types import SimpleNamespace
from typing import Any

from torchfedrpc.errors import ConfigError
from torchfedrpc.federation.checkpoint_folder import Checkpoint
from torchfedrpc.wire.fingerprint import fingerprint

FACTS = "proxy."
"""Prefix of what is compared in any case."""

_MISSING = object()
_MAY_DIFFER = ("num_rounds", "trainer.num_rounds")  # it may grow


def plain(config: Any) -> dict[str, Any]:
    """Settings by dotted key, with plain values; of anything else its type and a hash of it."""
    return dict(_flattened("", _items(config) or getattr(config, "__dict__", {})))


def check_equal(found: Checkpoint, config: Mapping[str, Any], *, with_facts: bool) -> None:
    """Refuse a checkpoint of another configuration.

    Args:
        found: the checkpoint.
        config: this run's, by dotted key.
        with_facts: whether it has what is known of the proxy too; else ``proxy.*`` is not compared.

    Raises:
        ConfigError: they differ; the keys are named.
    """
    keys = [key for key in {**found.config, **config} if with_facts or not key.startswith(FACTS)]
    differing = [
        f"{key} was {_shown(found.config, key)} and is {_shown(config, key)}"
        for key in keys
        if key not in _MAY_DIFFER and found.config.get(key, _MISSING) != config.get(key, _MISSING)
    ]
    if differing:
        raise ConfigError(
            f"the checkpoint of round {found.round_num} is of another configuration: {'; '.join(differing)}. Set "
            f"these as they were, choose another folder, or begin anew with resume=never"
        )


def _shown(config: Mapping[str, Any], key: str) -> str:
    return repr(config[key]) if key in config else "not set"


def _flattened(prefix: str, values: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if inner := _items(value):
            yield from _flattened(f"{prefix}{key}.", inner)
        else:
            yield f"{prefix}{key}", _plain(value)


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    name = f"{type(value).__module__}.{type(value).__qualname__}"
    try:
        return f"{name} {hashlib.sha256(fingerprint(value)).hexdigest()[:16]}"
    except Exception:  # whatever its pickling raises: one of that type is as good as another
        return name


def _items(value: Any) -> Mapping[str, Any] | None:
    """What a setting has inside, where it is a mapping or an object of plain attributes."""
    if isinstance(value, Mapping):
        return value
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {item.name: getattr(value, item.name) for item in dataclasses.fields(value)}
    return vars(value) if isinstance(value, SimpleNamespace | argparse.Namespace) else None

"""Settings by dotted key, and names in the order of the numbers in them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any


def flattened(values: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield dotted key and value of all settings of nested mappings; an empty mapping is a value."""
    if isinstance(values, Mapping) and values:
        for key, value in values.items():
            yield from flattened(value, f"{prefix}.{key}" if prefix else str(key))
    elif prefix:
        yield prefix, values


def by_numbers(name: str) -> list[tuple[int, str]]:
    """Return a key for sorting by which worker2 comes before worker10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]
